"""Train the small MoE models that the project ships, on texts that `tiny_moe_corpus.py` prepared.

    python examples/train_tiny_moe.py --data data --kind qwen3 --out tiny-qwen3-moe

Kinds: `qwen3` (Qwen3-MoE, 32 experts, top-4), `mixtral` (8 experts, top-2), and `upcycled`: the Qwen3-MoE again, but
every expert starts as a copy of one trained dense MLP plus a little noise, so that experts are redundant, as in large
upcycled models. All have a load-balancing loss. Prints held-out bits per byte beside trivial baselines.

Minutes on a GPU. On a CPU, `--minutes 80 --batch 16` fits the learning-rate schedule into the time there is.
"""

import argparse
import json
import lzma
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LENGTH = 256
NOISE = 0.05  # of upcycled experts, relative to the spread of the dense weights
DOMAINS = ("code", "prose")
SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
BALANCE = 0.01  # weight of the load-balancing loss


def qwen3_moe(vocabulary: int) -> PreTrainedModel:
    """32 experts of width 64, top-4: 5.6 M parameters."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            intermediate_size=256,
            norm_topk_prob=True,
            router_aux_loss_coef=BALANCE,
            **SHAPE,
        )
    )


def mixtral(vocabulary: int) -> PreTrainedModel:
    """8 experts of width 256, top-2: as many parameters."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocabulary,
            num_local_experts=8,
            num_experts_per_tok=2,
            intermediate_size=256,
            router_aux_loss_coef=BALANCE,
            **SHAPE,
        )
    )


def dense(vocabulary: int) -> PreTrainedModel:
    """The Qwen3 that `upcycle` copies: one MLP of an expert's width a layer."""
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, intermediate_size=64, **SHAPE))


@torch.no_grad()
def upcycle(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Make every expert of `target` a noisy copy of the layer's MLP in `source`; the rest is copied."""
    weights = source.state_dict()
    target.load_state_dict({name: w for name, w in weights.items() if ".mlp." not in name}, strict=False)
    for layer, (old, new) in enumerate(zip(source.model.layers, target.model.layers, strict=True)):
        generator = torch.Generator().manual_seed(layer)
        gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        experts = new.mlp.experts
        for stacked, single in ((experts.gate_up_proj, gate_up), (experts.down_proj, old.mlp.down_proj.weight)):
            noise = torch.randn(stacked.shape, generator=generator).to(stacked)
            stacked.copy_(single + NOISE * single.std() * noise)


class Trainer:
    """AdamW on float32 copies of the weights; the model itself computes in its own dtype.

    So a bf16 model is trained, evaluated and shipped in the very numbers it has.
    """

    def __init__(self, model: PreTrainedModel, rate: float) -> None:
        self.model, self.rate = model, rate
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": 0.05},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))

    def step(self, tokens: torch.Tensor, progress: float) -> torch.Tensor:
        """One update on tokens [B, L + 1]; returns the loss, a scalar on the device."""
        warm = min(1.0, progress / 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        arguments = {"output_router_logits": True} if hasattr(self.model, "num_experts") else {}
        output = self.model(input_ids=tokens[:, :-1], use_cache=False, **arguments)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        balance = output.aux_loss if arguments else 0.0
        (loss + BALANCE * balance).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


def train(model: PreTrainedModel, data: np.ndarray, steps: int, minutes: float, batch: int, rate: float) -> None:
    """Random windows of all documents: `steps` updates, or as many as `minutes` allow."""
    device = model.device
    tokens = torch.from_numpy(data.astype(np.int64)).to(device)
    trainer = Trainer(model.train(), rate)
    generator = torch.Generator().manual_seed(1)
    window = torch.arange(LENGTH + 1, device=device)
    start = time.perf_counter()
    step, progress = 0, 0.0
    while progress < 1:
        rows = torch.randint(len(tokens) - LENGTH - 1, (batch, 1), generator=generator).to(device)
        step += 1
        passed = time.perf_counter() - start
        progress = max(step / steps, passed / 60 / minutes)
        loss = trainer.step(tokens[rows + window], min(1.0, progress))
        if step == 20 or step % 500 == 0 or progress >= 1:
            name, done = type(model).__name__, step * batch * LENGTH / 1e6
            print(f"{name} step {step} loss {loss.item():.3f} {passed:.0f} s {done:.1f} M tokens", flush=True)
    model.eval()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokens: np.ndarray, size: int) -> float:
    """Of held-out text: tokens in windows of LENGTH, `size` bytes of text behind them."""
    count = (len(tokens) - 1) // LENGTH
    rows = torch.from_numpy(tokens[: count * LENGTH + 1].astype(np.int64)).to(model.device)
    total = 0.0
    for part in torch.arange(count).split(64):
        start = int(part[0]) * LENGTH
        inputs = rows[start : start + len(part) * LENGTH].view(len(part), LENGTH)
        targets = rows[start + 1 : start + 1 + len(part) * LENGTH]
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    return total / math.log(2) / (size * count * LENGTH / len(tokens))


def baselines(train_tokens: np.ndarray, tokens: np.ndarray, text: bytes, vocabulary: int) -> dict[str, float]:
    """Bits per byte of a unigram model over the same tokens, and of general-purpose compressors."""
    counts = np.bincount(train_tokens, minlength=vocabulary) + 1
    unigram = -np.log2(counts / counts.sum())[tokens].sum()
    return {
        "unigram": unigram / len(text),
        "gzip": 8 * len(zlib.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def make(arguments: argparse.Namespace, vocabulary: int, data: np.ndarray) -> PreTrainedModel:
    """The trained model of the kind that was asked for."""
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    steps, minutes, batch, rate = arguments.steps, arguments.minutes, arguments.batch, arguments.rate
    torch.manual_seed(0)
    if arguments.kind != "upcycled":
        model = (qwen3_moe if arguments.kind == "qwen3" else mixtral)(vocabulary).to(device, dtype)
        train(model, data, steps, minutes, batch, rate)
        return model
    source = dense(vocabulary).to(device, dtype)
    train(source, data, steps * 2 // 3, minutes * 2 / 3, batch, rate)
    model = qwen3_moe(vocabulary).to(device, dtype)
    upcycle(source, model)
    train(model, data, steps // 3, minutes / 3, batch, rate / 3)
    return model


def main() -> None:
    """Train one model, save it, and say how well it predicts held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kind", choices=["qwen3", "mixtral", "upcycled"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=80.0, help="upper limit of the training time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.data / "tokenizer")
    data = np.concatenate([np.load(arguments.data / f"train_{domain}.npy") for domain in DOMAINS])
    model = make(arguments, len(tokenizer), data)
    report = {"kind": arguments.kind, "steps": arguments.steps, "batch": arguments.batch}
    for domain in DOMAINS:
        text = (arguments.data / f"held_out_{domain}.txt").read_bytes()
        tokens = np.load(arguments.data / f"held_out_{domain}.npy")
        bits = {"model": bits_per_byte(model, tokens, len(text)), **baselines(data, tokens, text, len(tokenizer))}
        report[domain] = {name: round(value, 3) for name, value in bits.items()}
    print(json.dumps(report), flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
