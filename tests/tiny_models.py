"""Small models of the real transformers classes, random weights, seconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LAYERS = 2
VOCABULARY = 96
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **_SIZES))


def qwen2_moe() -> Qwen2MoeForCausalLM:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
            num_experts=12,
            num_experts_per_tok=4,
            **_SIZES,
        )
    )


def qwen3_moe() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            moe_intermediate_size=16, head_dim=8, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, **_SIZES
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe}
# Tracing the eager loops takes ten seconds: where a test is not about them, in the lane `slow`.
EAGER_SLOW = ("grouped_mm", "batched_mm", pytest.param("eager", marks=pytest.mark.slow))
# In the default suite two models have a turn; every other pair is in the lane `slow`, one with eager loops (the lane
# `zoo` has those of every architecture).
_DEFAULT = (("mixtral", "grouped_mm"), ("qwen2_moe", "batched_mm"))
PAIRS = [
    pytest.param(name, experts, marks=() if (name, experts) in _DEFAULT else pytest.mark.slow)
    for name in MODELS
    for experts in IMPLEMENTATIONS
    if experts != "eager" or name == "qwen2_moe"
]
# K of each model; S = K is the identity.
TOP_K = {"mixtral": 2, "qwen2_moe": 4, "qwen3_moe": 4}


def build(name: str, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A model with weights large enough for routing to differ from token to token."""
    torch.manual_seed(0)
    model = _spread(MODELS[name]().eval())
    model.set_experts_implementation(experts)
    return model.to(device=device, dtype=dtype)


def grouped_deepseek(version: int) -> nn.Module:
    """DeepSeek-V2 or V3 with 16 experts in 4 groups, of which 2 are open to a token; K = 4."""
    torch.manual_seed(0)
    options = _SIZES | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "n_shared_experts": 1, "kv_lora_rank": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    if version == 2:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(topk_method="group_limited_greedy", **options))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**options))
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.3)
    return _spread(model.eval())


def gpt_oss() -> nn.Module:
    """gpt-oss: a bias on the router and on experts, softmax over the chosen; K = 4."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_local_experts=16, num_experts_per_tok=4, head_dim=8, sliding_window=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **_SIZES,
    )  # fmt: skip
    return _spread(GptOssForCausalLM(config).eval())


def _spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def tokens(batch: int = 4, length: int = 6, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def gate_names(layers: int = LAYERS, router: str = "gate") -> list[str]:
    """Router weights of all three models, in order; gpt-oss calls its routers "router"."""
    return [f"model.layers.{i}.mlp.{router}.weight" for i in range(layers)]


def random_profile(model: nn.Module, seed: int = 0, router: str = "gate"):
    """A `SimilarityProfile` with a random symmetric matrix for every gate; `router` as in `gate_names`."""
    from sere_compile import SimilarityProfile

    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name in gate_names(router=router):
        experts = model.get_parameter(name).shape[0]
        half = torch.rand(experts, experts, generator=generator)
        matrices[name] = ((half + half.T) / 2).fill_diagonal_(1.0)
    return SimilarityProfile(matrices, {"method": "random"})


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter from a to j."""
    words = {word: i for i, word in enumerate(["<end>", "<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
