"""Time experts on a CPU: `sere::expert_mlp` against the bytes that it reads, and whole decode steps with each dispatch.

    python -m benchmarks.cpu_experts [--dtype bfloat16] [--batch 16] [--rounds 7] [--alone]

A Qwen3-MoE model of 3 layers with random weights: E = 64, K = 8, hidden 1024, width 384. Each dispatch, stock ones of
transformers and ours, with S = K, 2 and 1, in turn in one process. --alone: the operator only, by active experts.
"""

import argparse
from collections.abc import Sequence

import torch

from sere_compile.backend import sere_backend
from sere_compile.benchmark import decode_step
from sere_compile.benchmark.subject import make_subject
from sere_compile.benchmark.timing import copy_bandwidth, machine_name, time_in_turn
from sere_compile.benchmark.variant import INNER, Variant
from sere_compile.ops import expert_mlp

EXPERTS, TOP_K, HIDDEN, INNER_SIZE, LAYERS = 64, 8, 1024, 384, 3
STOCK = ("grouped_mm", "batched_mm")


def make_model(dtype: torch.dtype):
    """The model, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=2048,
        moe_intermediate_size=INNER_SIZE, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, vocab_size=4096, decoder_sparse_step=1,
        mlp_only_layers=[],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm").eval()


def variants(selects: Sequence[int], top_k: int, stock: Sequence[str]) -> list[Variant]:
    """Every dispatch with every S, and the stock ones with nothing re-routed nor compiled by us."""
    found = [Variant(f"Inductor, {experts}", experts, INNER) for experts in stock]
    for select in selects:
        options = {"select_top_k": select, "strict": True, "inner": INNER}
        name = "S = K" if select >= top_k else f"S = {select}"
        found += [Variant(f"{name}, {e}", e, sere_backend.with_options(**options), select) for e in stock]
        ours = sere_backend.with_options(lower_experts="always", **options)
        found.append(Variant(f"{name}, ours", "grouped_mm", ours, select))
    return found


def bench_decode(dtype: torch.dtype, batch: int, rounds: int) -> None:
    """Print milliseconds of a decode step."""
    decode_step.all_variants, decode_step.with_own_experts = variants, lambda *_: []
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.1f} GB/s; decode step, batch {batch}, {dtype}\n")
    print("| variant | ms, median [p20 .. p80] | active experts | error |\n| --- | --- | --- | --- |")
    subject = make_subject("", make_model(dtype), None, "")
    for row in decode_step.bench_decode_step(subject, batch, [TOP_K, 2, 1], STOCK, bandwidth, rounds=rounds):
        ms = [time / 1e3 for time in (row.timing.median, row.timing.low, row.timing.high)]
        print(f"| {row.variant} | {ms[0]:.1f} [{ms[1]:.1f} .. {ms[2]:.1f}] | {row.active:.1f} | {row.error:.0e} |")


def bench_alone(dtype: torch.dtype, batch: int, rounds: int) -> None:
    """Print milliseconds of the operator by the number of experts that `batch` tokens with K slots each name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    gate_up, down = normal(EXPERTS, 2 * INNER_SIZE, HIDDEN), normal(EXPERTS, HIDDEN, INNER_SIZE)
    hidden, weights = normal(batch, HIDDEN), torch.rand(batch, TOP_K, generator=generator)
    size = 3 * HIDDEN * INNER_SIZE * gate_up.element_size()
    print(f"copy {copy_bandwidth() / 1e9:.1f} GB/s; the experts alone, {batch} tokens, {TOP_K} slots each, {dtype}\n")
    print("| active experts | ms, median [p20 .. p80] | GB/s |\n| --- | --- | --- |")
    runs, counts = {}, {}
    for among in (TOP_K, 14, 28, EXPERTS):
        ids = torch.stack([torch.randperm(among, generator=generator)[:TOP_K] for _ in range(batch)])
        counts[str(among)] = ids.unique().numel()
        runs[str(among)] = lambda ids=ids: expert_mlp(hidden, ids, weights, gate_up, down)
    for name, timing in time_in_turn(runs, 1, rounds).items():
        ms = [time / 1e3 for time in (timing.median, timing.low, timing.high)]
        speed = counts[name] * size / ms[0] / 1e6
        print(f"| {counts[name]} | {ms[0]:.2f} [{ms[1]:.2f} .. {ms[2]:.2f}] | {speed:.1f} |")


def main() -> None:
    """Parse the command line and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true")
    given = parser.parse_args()
    print(f"{machine_name()}, torch {torch.__version__}")
    with torch.no_grad():
        (bench_alone if given.alone else bench_decode)(getattr(torch, given.dtype), given.batch, given.rounds)


if __name__ == "__main__":
    main()
