"""SERE in a Qwen-MoE: gates, continuations, active experts, rewritten code, and a check against an eager oracle.

python examples/qwen_moe.py                             # small random weights, a minute on a CPU
python examples/qwen_moe.py --model Qwen/Qwen3-30B-A3B
python examples/qwen_moe.py --model Qwen/Qwen1.5-MoE-A2.7B
"""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from walkthrough import main


def small_qwen3_moe() -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of the real class with 2 layers of 32 experts, top-4, over bytes."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            initializer_range=0.2,
        )
    )


if __name__ == "__main__":
    main(small_qwen3_moe, __doc__)
