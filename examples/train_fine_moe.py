"""Train a small MoE model with many fine experts, on texts that `fine_moe_corpus.py` prepared.

    python examples/train_fine_moe.py --data data --kind shared --out fine-shared --minutes 4

64 experts of width 64, top-8, in 8 layers; the MoE layers hold 25 M of 28 M parameters. Kinds:

- `shared`: Qwen2-MoE, softmax routing, a shared expert of width 128 beside them, a load-balancing loss.
- `biased`: MiniMax-M2, sigmoid routing; a bias for the selection alone balances the load, without a loss.

Minutes on a GPU. Prints held-out bits per byte by domain.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from train_tiny_moe import BALANCE, LENGTH, Trainer, bits_per_byte
from transformers import (
    AutoTokenizer,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

DOMAINS = ("books", "documentation", "sources")
EXPERTS, TOP_K, WIDTH = 64, 8, 64
STEP = 1e-3  # of the selection bias, in each update
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts_per_tok": TOP_K,
}


def shared(vocabulary: int) -> PreTrainedModel:
    """Softmax routing, weights normalised, and a shared expert."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=vocabulary,
            num_experts=EXPERTS,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=2 * WIDTH,
            norm_topk_prob=True,
            router_aux_loss_coef=BALANCE,
            **SHAPE,
        )
    )


def biased(vocabulary: int) -> PreTrainedModel:
    """Sigmoid routing with a bias for the selection, no shared expert."""
    return MiniMaxM2ForCausalLM(
        MiniMaxM2Config(
            vocab_size=vocabulary,
            num_local_experts=EXPERTS,
            intermediate_size=WIDTH,
            head_dim=32,
            router_aux_loss_coef=0.0,
            **SHAPE,
        )
    )


class BiasBalance:
    """After each update an expert's bias goes up where it had less than its share of tokens, and down where more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._loads: dict[torch.nn.Module, torch.Tensor] = {}
        self._blocks = [m for m in model.modules() if hasattr(m, "e_score_correction_bias") and hasattr(m, "gate")]
        for block in self._blocks:
            # In float32: a step of a thousandth is lost in 16 bits.
            block.e_score_correction_bias = block.e_score_correction_bias.float()
            block.gate.register_forward_hook(lambda _, __, out, block=block: self._count(block, out[-1]))

    def _count(self, block: torch.nn.Module, ids: torch.Tensor) -> None:
        self._loads[block] = torch.bincount(ids.flatten(), minlength=EXPERTS)

    def step(self) -> None:
        """Move the biases of all layers by the loads of the last forward."""
        for block, load in self._loads.items():
            block.e_score_correction_bias += STEP * torch.sign(load.float().mean() - load)


def train(model: PreTrainedModel, data: np.ndarray, minutes: float, batch: int, rate: float) -> dict[str, float]:
    """Random windows of all documents for as long as there are minutes. Says how many tokens that were."""
    import time

    tokens = torch.from_numpy(data.astype(np.int32)).to(model.device)
    trainer, balance = Trainer(model.train(), rate), BiasBalance(model)
    generator = torch.Generator().manual_seed(1)
    window = torch.arange(LENGTH + 1, device=model.device)
    start, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        rows = torch.randint(len(tokens) - LENGTH - 1, (batch, 1), generator=generator).to(model.device)
        loss = trainer.step(tokens[rows + window].long(), progress)
        balance.step()
        step += 1
        if step % 10 == 0:
            value = loss.item()  # waits for the device, so that the clock below is its own
            progress = (time.perf_counter() - start) / 60 / minutes
            if step == 10 or step % 200 == 0 or progress >= 1:
                done = step * batch * LENGTH / 1e6
                print(f"step {step} loss {value:.3f} {60 * minutes * progress:.0f} s {done:.1f} M tokens", flush=True)
    model.eval()
    return {"steps": step, "tokens": step * batch * LENGTH, "unique_tokens": len(data)}


def main() -> None:
    """Train one model, save it, and say how well it predicts held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kind", choices=["shared", "biased"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=400_000, help="tokens of each domain to predict in the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
    data = np.concatenate([np.load(arguments.data / f"train_{domain}.npy") for domain in DOMAINS])
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = {"shared": shared, "biased": biased}[arguments.kind](len(tokenizer)).to(arguments.device, dtype)
    size = sum(parameter.numel() for parameter in model.parameters())
    report = {"kind": arguments.kind, "parameters": size, "batch": arguments.batch}
    report |= train(model, data, arguments.minutes, arguments.batch, arguments.rate)
    corpus = json.loads((arguments.data / "corpus.json").read_text())
    for domain in DOMAINS:
        held_out = np.load(arguments.data / f"held_out_{domain}.npy")
        limit = min(len(held_out), arguments.held_out)
        size = corpus[f"held_out_{domain}"]["bytes"] * limit // len(held_out)
        report[domain] = round(bits_per_byte(model, held_out[:limit], size), 3)
    print(json.dumps(report), flush=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
