"""Shapes of published Mixture-of-Experts models, to be timed with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """One published model's shape.

    Attributes:
        model_type: of transformers.
        experts: E.
        top_k: K.
        hidden: H.
        inner: I, of one routed expert.
        options: of the transformers configuration, except the number of layers.
        activation: of the experts, as `sere::expert_mlp` names it.
        expert_layout: the other options of that operator: interleaved, transposed; bias.
    """

    model_type: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    options: Mapping[str, Any]
    activation: str = "silu_glu"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False

    @property
    def expert_elements(self) -> int:
        """Weights of one expert: what one more active expert costs."""
        return 3 * self.hidden * self.inner

    def config(self, num_layers: int) -> Any:
        """The transformers configuration with this many layers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, num_hidden_layers=num_layers, **self.options)


GEOMETRIES: Mapping[str, Geometry] = {
    "qwen3-30b-a3b": Geometry(
        "qwen3_moe", 128, 8, 2048, 768,
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32, "num_key_value_heads": 4,
            "head_dim": 128, "vocab_size": 151936, "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    ),
    "qwen1.5-moe-a2.7b": Geometry(
        "qwen2_moe", 60, 4, 2048, 1408,
        {
            "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
            "norm_topk_prob": False, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
        },
    ),
    "mixtral-8x7b": Geometry(
        "mixtral", 8, 2, 4096, 14336,
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        },
    ),
    "deepseek-v2-lite": Geometry(
        "deepseek_v2", 64, 6, 2048, 1408,
        {
            "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400,
        },
    ),
    "gpt-oss-20b": Geometry(
        "gpt_oss", 32, 4, 2880, 2880,
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        },
        activation="gpt_oss", interleaved=True, transposed=True, bias=True,
    ),
}  # fmt: skip
