"""One entry for each MoE architecture of transformers: how to build it small, and what is expected of its gates.

A new architecture builds by the shared sizes of `shrink.py` more often than not. `tests/zoo/test_registry.py` fails
for one that is not listed and says what to do.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .discover import has_experts_interface, moe_architectures
from .shrink import EXPERTS, tiny_config

VOCABULARY = 96
# Suffixes of the classes to prefer, the text model where a model has several modalities.
_SUFFIXES = ("ForCausalLM", "TextModel", "Model")


@dataclass(frozen=True)
class Entry:
    """How an architecture is built small, and what is known of it.

    Attributes:
        overrides: configuration values on top of `shrink.SIZES`; None leaves the class's own value.
        model: name of the class, where the first of `_SUFFIXES` is not the one with the experts.
        inputs: names of further inputs that take the token ids (a decoder's).
        identity: K is 1, so that every gate is an identity.
        selecting: end of the class name of the modules that select, where experts do not take `top_k_index`.
        columns: columns of the router, which may be more than the experts selected from.
        experts: size of the similarity matrices.
        unselected: how many calls of experts a forward makes without a selection (hash routing).
        probed: whether its experts can be run for a matrix; else its gates are re-routed with a profile alone.
        skipped: why no gate of the architecture is re-routed, or empty: a word of the reason in the report.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    inputs: tuple[str, ...] = ()
    identity: bool = False
    selecting: str = ""
    columns: int = EXPERTS
    experts: int = EXPERTS
    unselected: int = 0
    probed: bool = True
    skipped: str = ""


_LATENT = {"num_key_value_heads": 4}
_ONE_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}


def _rope_sections(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


# Built by the shared sizes alone.
_PLAIN = (
    "afmoe aria bailing_hybrid cohere2_moe diffusion_gemma dots1 ergo ernie4_5_moe exaone_moe flex_olmo glm4_moe "
    "gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 kolibri1 laguna lara_mini "
    "mellum mimo_v2_flash minicpm5_moe minimax minimax_m2 minimax_m3_vl mixtral muse_spark olmoe openai_privacy_filter "
    "phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open "
    "unlimited_ocr"
)

ENTRIES: dict[str, Entry] = {name: Entry() for name in _PLAIN.split()} | {
    "axk1": Entry(_LATENT),
    "axk2": Entry(_LATENT),
    "beam": Entry(_ONE_DENSE),
    "dbrx": Entry(
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 12, "moe_top_k": 3},
        },
    ),
    "deepseek_ocr2": Entry(_ONE_DENSE | {"n_group": None, "topk_group": None}),
    "deepseek_v2": Entry(_LATENT),
    "deepseek_v3": Entry(_LATENT),
    "deepseek_v32": Entry(_LATENT),
    # The first layer routes by token id, through a table.
    "deepseek_v4": Entry({"mlp_layer_types": ["hash_moe", "moe", "moe"]}, unselected=1),
    "doge": Entry(
        {"is_moe": True, "num_experts": 16},
        selecting="CDMoE",
        columns=8,
        experts=8,
        skipped="product keys",
    ),
    "dots3_note": Entry(_LATENT | {"head_dim": 16, "index_n_heads": 2, "index_head_dim": 16}),
    "ernie4_5_vl_moe": Entry({"moe_intermediate_size": [16, 16]} | _rope_sections(1, 1, 2)),
    "flint": Entry({"mlp_only_layers": [0]}),
    "gemma4": Entry({"enable_moe_block": True, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}),
    "glm4_moe_lite": Entry(_LATENT),
    "glm4v_moe": Entry(_rope_sections(1, 1, 0)),
    "glm5_next": Entry(
        _LATENT
        | _ONE_DENSE
        | {"head_dim": None, "qk_rope_head_dim": 0, "linear_num_heads": 2, "linear_head_dim": 8}
        | {"index_n_heads": 2, "index_head_dim": 8, "hc_sinkhorn_iters": 2},
    ),
    "glm_moe_dsa": Entry(_LATENT),
    "granitemoehybrid": Entry({"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}),
    "hy_v4_vl": Entry(_rope_sections(2, 1, 1)),
    # The shared expert has a column of the router.
    "inkling": Entry(columns=13),
    "inkling2": Entry({"unpadded_vocab_size": 96}),
    "inkling2_loop": Entry({"unpadded_vocab_size": 96}),
    "jamba": Entry(
        {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 3, "attn_layer_offset": 1}
    ),
    "jetmoe": Entry({"kv_channels": 8}, selecting="TopKGating", probed=False),
    "kimi_linear": Entry({"linear_num_heads": 2, "linear_head_dim": 8}),
    # Its cache keeps keys and values in blocks of 16 numbers.
    "kolibri1_1": Entry(
        {"layer_types": ["sliding_attention", "indexed_attention", "sliding_attention"], "mlp_only_layers": [0]}
        | {"head_dim": 16, "index_num_heads": 1}
    ),
    "lfm2_moe": Entry({"layer_types": ["conv", "full_attention", "conv"]}),
    # The published models take one expert a token.
    "llama4": Entry({"num_experts_per_tok": 1}, selecting="Router", identity=True),
    "longcat_flash": Entry(
        _LATENT | {"zero_expert_num": 5, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16},
        # Slots of its experts that compute nothing get other ids behind the router (transformers 5.25).
        selecting="TopkRouter",
        columns=17,
    ),
    "mistral4": Entry(_LATENT),
    "mistral_large4": Entry(_LATENT),
    "nemotron_h": Entry(
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "mamba_num_heads": 4}
        | {"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
    ),
    "nllb_moe": Entry(
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "expert_capacity": 8}
        | {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
        inputs=("decoder_input_ids",),
        selecting="Top2Router",
        skipped="capacity",
    ),
    "step3p7": Entry(_ONE_DENSE | {"sliding_window": 16}),
    "switch_transformers": Entry(
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_sparse_encoder_layers": 2}
        | {"num_decoder_layers": 2, "num_sparse_decoder_layers": 2},
        selecting="Top1Router",
        skipped="capacity",
    ),
    "zaya": Entry({"num_experts_per_tok": 1}, columns=13, identity=True),
}

# Modeling files that `discover` takes for an MoE and that hold none.
NO_MOE = {
    "granite_docling": "its density router picks between two image paths for a whole sample",
    "vitpose_backbone": "its experts are picked by the data set's number, an input",
}


def model_class(name: str) -> type[PreTrainedModel]:
    """The class that is built for an architecture."""
    module = importlib.import_module(moe_architectures()[name])
    if ENTRIES[name].model:
        return getattr(module, ENTRIES[name].model)
    own = [
        value
        for key, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, PreTrainedModel) and value.__module__ == module.__name__ and "PreTrained" not in key
    ]
    for suffix in _SUFFIXES:
        found = [value for value in own if value.__name__.endswith(suffix)]
        if found:
            return found[0]
    raise LookupError(f"{name}: none of {[value.__name__ for value in own]} ends with one of {_SUFFIXES}")


def build(name: str, experts: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model with random weights that make routing differ from token to token, in eval mode."""
    made = model_class(name)
    torch.manual_seed(0)
    model = made(tiny_config(made.config_class, **ENTRIES[name].overrides)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    if has_experts_interface(name):
        model.set_experts_implementation(experts)
    return model.to(dtype)


def inputs(name: str, batch: int = 2, length: int = 4, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a call: token ids [batch, length], no cache."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False} | dict.fromkeys(ENTRIES[name].inputs, ids)


def implementations(name: str) -> tuple[str, ...]:
    """The experts implementations of an architecture; one that has a dispatch of its own has only that: "own"."""
    return ("grouped_mm", "batched_mm", "eager") if has_experts_interface(name) else ("own",)
