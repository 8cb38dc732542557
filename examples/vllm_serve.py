"""SERE in vLLM: prompts served with it or without, and how many experts each layer reads.

pip install "sere-compile[vllm]"
python examples/vllm_serve.py                                  # a small trained model that comes with the package
python examples/vllm_serve.py --model Qwen/Qwen3-30B-A3B --select-top-k 1 --batch 64

The same as a server:
vllm serve Qwen/Qwen1.5-MoE-A2.7B --additional-config '{"sere": {"select_top_k": 2}}'
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

import sere_compile

SHIPPED = Path(sere_compile.__file__).parent / "models" / "qwen3"


@click.command(help=__doc__)
@click.option("--model", default=str(SHIPPED), help="A name or folder; the shipped model without one.")
@click.option("--select-top-k", default=2, show_default=True)
@click.option("--profile", default=None, help="A similarity profile; the experts are probed without one.")
@click.option("--batch", default=16, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--baseline", is_flag=True, help="Without SERE, for comparison.")
@click.option("--eager", is_flag=True, help="Without compiling the model: starts sooner, runs slower.")
def main(
    model: str, select_top_k: int, profile: str | None, batch: int, tokens: int, baseline: bool, eager: bool
) -> None:
    """One engine a process: it does not give its memory back."""
    # Statistics are read from the worker's own process otherwise; both work.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    options = {"select_top_k": select_top_k, "collect_stats": True, **({"profile": profile} if profile else {})}
    additional = {} if baseline else {"sere": options}
    llm = LLM(model=model, max_num_seqs=batch, enforce_eager=eager, additional_config=additional)
    prompts = [f"Question {i}: why is the sky blue? Answer:" for i in range(batch)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    seconds = time.perf_counter() - start
    print(outputs[0].outputs[0].text)
    print(f"{sum(len(o.outputs[0].token_ids) for o in outputs) / seconds:.0f} tokens/s, prompts included")
    if baseline:
        return
    counted = sere_compile.stats(llm)
    for name, gate in counted.items():
        print(f"{name}: active experts {gate.mean_active_before:.1f} -> {gate.mean_active_after:.1f}")
    if not any(gate.slots_changed for gate in counted.values()):
        raise SystemExit("nothing was re-routed: is the batch too small?")


if __name__ == "__main__":
    main()
