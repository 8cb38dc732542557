"""`transformers serve`, re-routing in forwards that only decode; arguments are those of `transformers`.

pip install "transformers[serving]"
python examples/transformers_serve.py serve Qwen/Qwen1.5-MoE-A2.7B --continuous-batching
"""

from transformers.cli.transformers import main
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import sere_compile

# As many requests as run at once: forwards of more tokens hold prompts, and are left alone.
REQUESTS = 16

if __name__ == "__main__":
    sere_compile.register_experts(select_top_k=2, max_tokens=REQUESTS)
    # The command has no option for the experts: ours take the place of those that models use by default.
    type(ALL_EXPERTS_FUNCTIONS).register("grouped_mm", ALL_EXPERTS_FUNCTIONS["sere"])
    main()
