"""What the tests of the benchmark share: tiny models, made-up rows."""

import pytest
import torch

from sere_compile.benchmark.geometries import GEOMETRIES, Geometry
from sere_compile.benchmark.result import Results
from sere_compile.benchmark.subject import random_model
from sere_compile.benchmark.timing import Timing

TINY = Geometry(
    "qwen3_moe", 16, 4, 32, 16,
    {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 16,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
)  # fmt: skip


# Its top-k is unsorted, and it has shared experts.
UNSORTED = Geometry(
    "deepseek_v2", 16, 4, 96, 16,
    {
        **{k: v for k, v in GEOMETRIES["deepseek-v2-lite"].options.items() if k != "hidden_size"},
        "hidden_size": 96, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
)  # fmt: skip


def tiny(geometry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GEOMETRIES, "tiny", geometry)
        torch.manual_seed(0)
        return random_model("tiny", 2, torch.float32, "cpu")


def results_of(rows):
    return Results("tiny", "no machine", 1e12, "random", rows)


def results_row(**changes):
    from sere_compile.benchmark.result import Row

    fields = {
        "what": "MoE layer", "batch": 8, "variant": "sere S=2", "ours": True, "timing": Timing(2.0, 1.0, 3.0),
        "error": 0.001, "tolerance": 0.01,
    }  # fmt: skip
    return Row(**fields | changes)
