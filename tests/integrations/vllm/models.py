"""Small models on disk: random weights with routing that differs from token to token, and the shipped trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from sere_compile import SimilarityProfile, calibrate
from sere_compile.integrations.transformers import SHIPPED

VOCABULARY = 128
# vLLM's CPU kernels want heads of 32 and widths that 32 divides.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    # No token ends a generation.
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DEEPSEEK = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    # The one size of head that latent attention takes.
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def config(name: str) -> PretrainedConfig:
    """The configuration of one of `NAMES`, of those with random weights."""
    if name == "mixtral":
        return MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **_SIZES)
    if name == "qwen2_moe":
        return Qwen2MoeConfig(
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=16,
            num_experts_per_tok=4,
            **_SIZES,
        )
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            moe_intermediate_size=32, head_dim=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, **_SIZES
        )
    if name == "deepseek_v2":
        return DeepseekV2Config(topk_method="group_limited_greedy", n_group=4, topk_group=2, **_DEEPSEEK, **_SIZES)
    if name == "deepseek_v3":
        return DeepseekV3Config(
            topk_method="noaux_tc", scoring_func="sigmoid", n_group=4, topk_group=2, **_DEEPSEEK, **_SIZES
        )
    return GptOssConfig(num_local_experts=16, num_experts_per_tok=4, head_dim=32, sliding_window=32, **_SIZES)


# Name, and the kind of its router. Those with "trained" are the models that the package brings.
KINDS = {
    "mixtral": "softmax, top-2 of 8",
    "qwen2_moe": "softmax, top-4 of 16",
    "qwen3_moe": "softmax, top-4 of 16, normalised",
    "deepseek_v2": "softmax, 2 of 4 groups, top-4 of 16",
    "deepseek_v3": "sigmoid with bias, 2 of 4 groups, top-4 of 16",
    "gpt_oss": "top-4 of 16, then softmax",
    "mixtral, trained": "softmax, top-2 of 8",
    "qwen3, trained": "softmax, top-4 of 32, normalised",
}
NAMES = tuple(KINDS)
# Of equal length in the shipped tokenizer: batches in step.
TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want
of a wife. However little known the feelings or views of such a man may be on his first entering a
neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered
the rightful property of some one or other of their daughters. def __init__(self, name, parent=None):
self.name = name for key, value in sorted(items.items()): return key
"""
TEXT_TOKENS = 12


def prepare(name: str, folder: Path) -> tuple[Path, str, list[list[int]]]:
    """A model, a similarity profile for it and a batch of prompts of equal length."""
    if not name.endswith("trained"):
        model, profile = save(name, folder / "model"), folder / "profile.safetensors"
        # Not in the model's folder: vLLM takes every safetensors file there for weights.
        random_profile(model).save(profile)
        return model, str(profile), prompts(8)
    model = SHIPPED / name.partition(",")[0]
    return model, calibrated(model, folder), texts(model)[1]


def random_profile(model: Path) -> SimilarityProfile:
    """For each gate of a saved model a random symmetric matrix."""
    generator, matrices = torch.Generator().manual_seed(1), {}
    for name, weight in AutoModelForCausalLM.from_pretrained(model).named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            half = torch.rand(len(weight), len(weight), generator=generator)
            matrices[name] = ((half + half.T) / 2).fill_diagonal_(1.0)
    assert len(matrices) == 2
    return SimilarityProfile(matrices, {"method": "random"})


def calibrated(model: Path, folder: Path) -> str:
    """A profile of a shipped model, made from text in transformers, as its user would; the file."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt")["input_ids"]
    profile = folder / "profile.safetensors"
    calibrate(network, [{"input_ids": ids}], progress=False).save(profile)
    return str(profile)


def texts(model: Path, batch: int = 8) -> tuple[list[str], list[list[int]]]:
    """Pieces of text, and their tokens, as many in each."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, list[int]] = {}
    words = TEXT.split()
    for start in range(len(words)):
        text = ""
        for word in words[start:]:
            text = f"{text} {word}".strip()
            ids = tokenizer(text)["input_ids"]
            if len(ids) == TEXT_TOKENS:
                found[text] = ids
            if len(ids) >= TEXT_TOKENS:
                break
    # From all over the text, no two beside each other.
    chosen = list(found)[:: len(found) // batch][:batch]
    assert len(chosen) == batch
    return chosen, [found[text] for text in chosen]


def save(name: str, folder: Path) -> Path:
    """A model with seeded random weights in `folder`; the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name)).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in key:
                parameter.normal_(0, 0.05)
        for key, buffer in model.named_buffers():
            if "e_score_correction_bias" in key:
                buffer.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def prompts(batch: int, length: int = 6, seed: int = 0) -> list[list[int]]:
    """Random token ids, rows of equal length, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).tolist()
