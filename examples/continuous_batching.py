"""Continuous batching of transformers with re-routing in forwards that only decode, on the package's trained model.

python examples/continuous_batching.py          # some seconds on a CPU
"""

from transformers import ContinuousBatchingConfig, GenerationConfig

import sere_compile
from sere_compile.integrations.transformers import load_causal_lm

PROMPTS = ["def __init__(self,", "She had been", "for name in", "Mr. Elliot was", "import os\nimport", "The captain"]


def continuations(model, tokenizer):
    """Twelve greedy tokens for every prompt, in order."""
    inputs = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    pages = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_requests_per_batch=len(PROMPTS))
    outputs = model.generate_batch(inputs, greedy, pages).values()
    ordered = sorted(outputs, key=lambda output: int(output.request_id.rpartition("_")[2]))
    return [tokenizer.decode(output.generated_tokens) for output in ordered]


def main():
    """Print what the model says, unchanged and re-routed."""
    model, tokenizer = load_causal_lm("qwen3", dtype="float32")
    unchanged = continuations(model, tokenizer)
    sere_compile.register_experts(select_top_k=1, max_tokens=len(PROMPTS))
    model.set_experts_implementation("sere")
    for prompt, before, after in zip(PROMPTS, unchanged, continuations(model, tokenizer), strict=True):
        print(f"{prompt!r}\n    unchanged  {before!r}\n    re-routed  {after!r}")


if __name__ == "__main__":
    main()
