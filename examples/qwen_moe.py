"""SERE in a Qwen-MoE: gates, continuations, active experts, rewritten code, and a check against an eager oracle.

python examples/qwen_moe.py                             # the small trained model of the package, a minute on a CPU
python examples/qwen_moe.py --model Qwen/Qwen3-30B-A3B
python examples/qwen_moe.py --model Qwen/Qwen1.5-MoE-A2.7B
"""

from walkthrough import main

if __name__ == "__main__":
    main("qwen3", __doc__)
