"""SERE in a Mixtral: gates, continuations, active experts, rewritten code, and a check against an eager oracle.

python examples/mixtral.py                              # the small trained model of the package, a minute on a CPU
python examples/mixtral.py --model mistralai/Mixtral-8x7B-v0.1
"""

from walkthrough import main

if __name__ == "__main__":
    main("mixtral", __doc__)
