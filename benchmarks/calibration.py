"""What calibration costs: a layer of a large model beside the plain computation, and memory against the size of data.

    python -m benchmarks.calibration layer      seconds and memory, one layer in the shape of Qwen3-30B-A3B
    python -m benchmarks.calibration memory     memory of a process for 1x and 8x the data, shipped model

The plain computation keeps the outputs of all experts on all tokens and takes every pair of experts by itself. Both
work on the same outputs and have to agree, or nothing is printed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sere_compile

MODEL = Path(sere_compile.__file__).parent / "models" / "qwen3"
SEQUENCES, LENGTH = 400, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layer", "memory", "one"])
    parser.add_argument("--times", type=int, default=1, help="one: multiples of the data")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--small", action="store_true", help="layer: a shape for a CPU")
    parsed = parser.parse_args()
    if parsed.what == "layer":
        layer(parsed.small, parsed.sequences)
    elif parsed.what == "one":
        one(parsed.times, parsed.sequences)
    else:
        memory(parsed.sequences)


def layer(small: bool, sequences: int) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = (64, 32, 8, 4) if small else (2048, 768, 128, 8)
    config = Qwen3MoeConfig(
        **dict(zip(("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"), sizes, strict=True))
    )
    config._experts_implementation = "grouped_mm"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).eval()
        for parameter in block.parameters():
            parameter.data.normal_(0, 0.02)
        batches = [torch.randn(8, LENGTH, sizes[0], dtype=torch.bfloat16) for _ in range(sequences // 8)]
    if device == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"weights and hidden states: {_allocated(device):.2f} GB")
    rows = []
    for method in ("frobenius", "cosine", "cka"):
        if method == "frobenius":
            measure(lambda: sere_compile.calibrate(block, batches[:1], progress=False), device)  # compiles kernels
        # CKA compares all pairs of tokens of a minibatch: a quarter of the data shows what it costs.
        part = batches if method != "cka" else batches[: max(1, len(batches) // 4)]
        got, seconds, peak = measure(
            lambda method=method, part=part: sere_compile.calibrate(block, part, method=method, progress=False),
            device,
        )
        rows.append((f"calibrate, {method}", len(part) * 8 * LENGTH, seconds, peak))
        if method == "frobenius":
            similarity = got["gate.weight"]
    expected, seconds, peak = measure(lambda: plain(block, batches), device)
    rows.append(("plain, frobenius", len(batches) * 8 * LENGTH, seconds, peak))
    worst = (similarity.to(expected) - expected).abs().max().item()
    assert worst < 1e-3, f"calibrate and the plain computation differ by {worst}"
    print(f"largest difference of frobenius from the plain computation: {worst:.1e}")
    print("| | tokens | seconds | peak GB beyond weights and hidden states |\n| --- | --- | --- | --- |")
    for name, tokens, seconds, peak in rows:
        print(f"| {name} | {tokens} | {seconds:.1f} | {peak:.2f} |")


def plain(block: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    """1 - d / max d from the outputs of all experts on all tokens, pair by pair."""
    from torch.nn import functional as F

    hidden = torch.cat(batches).flatten(0, 1)
    experts = block.experts
    outputs = torch.empty(
        len(experts.down_proj), len(hidden), hidden.shape[1], dtype=hidden.dtype, device=hidden.device
    )
    with torch.no_grad():
        for e, (up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, value = F.linear(hidden, up).chunk(2, -1)
            outputs[e] = F.linear(F.silu(gate) * value, down)
        distance = torch.zeros(len(outputs), len(outputs), dtype=torch.float64, device=hidden.device)
        for p in range(len(outputs)):
            for q in range(p):
                distance[p, q] = distance[q, p] = (outputs[p].float() - outputs[q].float()).norm()
    return 1 - distance / distance.max()


def measure(function: Any, device: str) -> tuple[Any, float, float]:
    """Result, seconds and peak gigabytes beyond what was allocated before."""
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, started = _allocated(device), time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e9 - before if device == "cuda" else float("nan")
    return result, seconds, peak


def _allocated(device: str) -> float:
    return torch.cuda.memory_allocated() / 1e9 if device == "cuda" else float("nan")


def memory(sequences: int) -> None:
    """A process for each size, whose own peak counts."""
    print("| tokens | seconds | peak of the process, MB | of which before calibrating |\n| --- | --- | --- | --- |")
    for times in (1, 8):
        one = ["-m", "benchmarks.calibration", "one", "--times", str(times), "--sequences", str(sequences)]
        done = subprocess.run([sys.executable, *one], check=True, capture_output=True, text=True)
        print(done.stdout.strip(), flush=True)


def one(times: int, sequences: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Any:
        for _ in range(sequences * times // 8):
            yield {"input_ids": torch.randint(0, model.config.vocab_size, (8, LENGTH), generator=generator)}

    sere_compile.calibrate(model, [next(batches())], progress=False)  # what importing and tracing take
    before, started = _resident(), time.perf_counter()
    profile = sere_compile.calibrate(model, batches(), progress=False)
    seconds = time.perf_counter() - started
    print(f"| {profile.metadata['tokens']} | {seconds:.0f} | {_resident():.0f} | {before:.0f} |")


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
