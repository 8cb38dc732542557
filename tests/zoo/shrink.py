"""A tiny configuration of any architecture: sizes by the names that configurations share."""

from __future__ import annotations

import dataclasses
from typing import Any

EXPERTS, TOP_K = 12, 3
LAYERS = 3

# Names for one quantity, as transformers' configurations spell them. Only those that a configuration has are set.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the number of experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_routed_experts": EXPERTS,
    # how many a token takes
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_top_k": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "num_selected_experts": TOP_K,
    # groups of experts
    "n_group": 2,
    "topk_group": 1,
    "num_expert_groups": 2,
    # dense layers in front
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    # layers beside the model proper
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}


def tiny_config(config_class: type, **overrides: Any) -> Any:
    """A small configuration of a class; overrides win, and `None` among them leaves the class's own value."""
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in SIZES.items() if name in names} | overrides
    return config_class(**{name: size for name, size in sizes.items() if size is not None})
