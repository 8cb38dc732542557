"""The hub's kernels for FP8 experts, in plain PyTorch under the names that they have there, and a model with them.

What they are documented to compute: weights in blocks of 128 x 128 with a scale each, and 128 activations of a row
rounded to FP8 with their largest over 448.
"""

from collections.abc import Callable

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

from ..tiny_models import VOCABULARY


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """128 numbers of a row with one factor, as e4m3."""
    blocks = rows.float().unflatten(1, (-1, 128))
    factor = blocks.abs().amax(-1, keepdim=True) / 448
    return ((blocks / factor.clamp(min=1e-12)).to(torch.float8_e4m3fn).float() * factor).flatten(1)


def wide(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight as its FP8 numbers and scales define it."""
    blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.float() * blocks[: weight.shape[0], : weight.shape[1]]


def define(namespace: str, of_rows: Callable[[torch.Tensor], torch.Tensor]) -> finegrained_fp8.FineGrainedFP8:
    """The operators in a namespace, as transformers has them from the hub; `of_rows` is what activations become."""

    @torch.library.custom_op(f"{namespace}::w8a8_block_dynamic_fp8_matmul_batched", mutates_args=())
    def batched(
        A: torch.Tensor, B: torch.Tensor, Bs: torch.Tensor, expert_ids: torch.Tensor, block_size: list[int],
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        out = torch.full((len(A), B.shape[1]), torch.nan)  # rows of no expert stay unwritten
        for expert in range(len(B)):
            mine = (expert_ids == expert).nonzero().flatten()
            out[mine] = of_rows(A[mine]) @ wide(B[expert], Bs[expert]).T
        return out.to(output_dtype or A.dtype)

    @torch.library.custom_op(f"{namespace}::w8a8_block_dynamic_fp8_matmul_grouped", mutates_args=())
    def grouped(
        A: torch.Tensor, B: torch.Tensor, Bs: torch.Tensor, offsets: torch.Tensor, tokens_per_expert: torch.Tensor,
        block_size: list[int], output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        ids = torch.searchsorted(offsets, torch.arange(len(A), dtype=offsets.dtype), right=True)
        return batched(A, B, Bs, ids, block_size, output_dtype)

    for operator in (batched, grouped):
        operator.register_fake(lambda A, B, *_, output_dtype=None: A.new_empty((A.shape[0], B.shape[1])))

    def matmul_batched(A, B, Bs, expert_ids, block_size, output_dtype=None):
        return batched(A, B, Bs, expert_ids, block_size, output_dtype)

    def matmul_grouped(A, B, Bs, offsets, tokens_per_expert, block_size, output_dtype=None):
        return grouped(A, B, Bs, offsets, tokens_per_expert, block_size, output_dtype)

    return finegrained_fp8.FineGrainedFP8(None, matmul_batched, matmul_grouped)


KERNELS = define("_finegrained_fp8_0a1b2c3", rounded)
UNROUNDED = define("_finegrained_fp8_4d5e6f7", torch.Tensor.float)


def build_fp8(experts: str) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of two layers in bfloat16 whose experts are transformers' FP8 ones; `experts`: the implementation."""
    config = Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_experts=8,
        num_experts_per_tok=3, vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).bfloat16().eval()
    of_blocks = use_experts_implementation(
        experts_class=finegrained_fp8.FP8Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_bias=False, has_gate=True,
    )  # fmt: skip
    for layer in model.model.layers:
        layer.mlp.experts = of_blocks(model.config, block_size=(128, 128))
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = (getattr(layer.mlp.experts, name + end) for end in ("", "_scale_inv"))
            weight.data = (torch.randn(weight.shape) * 10).to(torch.float8_e4m3fn)
            scale.data = torch.rand(scale.shape) * 0.01 + 0.005
    model.set_experts_implementation(experts)
    return model
