"""SERE in vLLM: the same prompts served with and without it, and how many experts each layer reads.

pip install "sere-compile[vllm]"
python examples/vllm_serve.py --model Qwen/Qwen1.5-MoE-A2.7B
python examples/vllm_serve.py --model Qwen/Qwen3-30B-A3B --select-top-k 1 --batch 64

The same as a server:
vllm serve Qwen/Qwen1.5-MoE-A2.7B --additional-config '{"sere": {"select_top_k": 2}}'
"""

from __future__ import annotations

import os
import time

import click


@click.command(help=__doc__)
@click.option("--model", default="Qwen/Qwen1.5-MoE-A2.7B", show_default=True)
@click.option("--select-top-k", default=2, show_default=True)
@click.option("--profile", default=None, help="A similarity profile; the experts are probed without one.")
@click.option("--batch", default=16, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--baseline", is_flag=True, help="Without SERE, for comparison.")
def main(model: str, select_top_k: int, profile: str | None, batch: int, tokens: int, baseline: bool) -> None:
    """One engine a process: it does not give its memory back."""
    # Statistics are read from the worker's own process otherwise; both work.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from sere_compile.integrations.vllm import stats

    options = {"select_top_k": select_top_k, "collect_stats": True, **({"profile": profile} if profile else {})}
    llm = LLM(model=model, max_num_seqs=batch, additional_config={} if baseline else {"sere": options})
    prompts = [f"Question {i}: why is the sky blue? Answer:" for i in range(batch)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    seconds = time.perf_counter() - start
    print(outputs[0].outputs[0].text)
    print(f"{sum(len(o.outputs[0].token_ids) for o in outputs) / seconds:.0f} tokens/s, prompts included")
    if not baseline:
        for name, gate in stats(llm).items():
            print(f"{name}: active experts {gate.mean_active_before:.1f} -> {gate.mean_active_after:.1f}")


if __name__ == "__main__":
    main()
