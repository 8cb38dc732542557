"""SERE in a Mixtral: gates, continuations, active experts, rewritten code, and a check against an eager oracle.

python examples/mixtral.py                              # small random weights, a minute on a CPU
python examples/mixtral.py --model mistralai/Mixtral-8x7B-v0.1
"""

from transformers import MixtralConfig, MixtralForCausalLM
from walkthrough import main


def small_mixtral() -> MixtralForCausalLM:
    """A Mixtral of the real class with 2 layers of 8 experts, top-2, over bytes."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.2,
        )
    )


if __name__ == "__main__":
    main(small_mixtral, __doc__)
