"""Every routing rule on the models of `examples/train_fine_moe.py`, which are too large to ship.

    python -m benchmarks.quality_fine --model fine-shared --data data --out fine-shared.csv

Held-out windows of three domains in turn, so that decode batches are mixed; three seeds choose them. No rule has a
setting that was chosen here. One row a rule, S, decode batch: growth of perplexity, its standard error over decode
batches, the growth of the loss by seed, and active experts.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

import sere_compile
from sere_compile.evaluation import evaluate_rules
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.filling import FillKept
from sere_compile.evaluation.recombine import Recombine
from sere_compile.evaluation.rules import Drop, Fill, Rule, TopS

DOMAINS = ("books", "documentation", "sources")
LENGTH = 128
COLUMNS = (
    "model", "decode_batch", "rule", "select_top_k", "original", "perplexity_change", "standard_error", "kl",
    "top1_agreement", "active_before", "active_after", "growth_by_seed",
)  # fmt: skip


def windows(data: Path, part: str, count: int, seed: int) -> torch.Tensor:
    """`count` random windows of LENGTH tokens, the domains in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        tokens = np.load(data / f"{part}_{DOMAINS[index % len(DOMAINS)]}.npy", mmap_mode="r")
        start = int(torch.randint(len(tokens) - LENGTH, (), generator=generator))
        found.append(torch.from_numpy(tokens[start : start + LENGTH].astype(np.int64)))
    return torch.stack(found)


def rules(model: torch.nn.Module, calibration: torch.Tensor, selects: list[int]) -> dict[tuple[str, int], Rule]:
    """By name and S."""
    batches = [{"input_ids": part} for part in calibration.split(16)]
    profiles = {name: sere_compile.calibrate(model, batches, method=name) for name in ("frobenius", "cosine")}
    found: dict[tuple[str, int], Rule] = {}
    for s in selects:
        found["naive top-S", s] = TopS(s)
        found["drop", s] = Drop(s)
        found["drop, renormalised", s] = Drop(s, renormalise=True)
        found["opportunistic fill", s] = Fill(s)
        for name, profile in profiles.items():
            for rule, substitution in (("SERE", "reroute"), ("projection", "projection")):
                config = sere_compile.SereConfig(select_top_k=s, substitution=substitution)
                found[f"{rule}, {name}", s] = ConfiguredRule.of(config, profile)
        found["recombine", s] = Recombine(None, s)
        found["recombine, primary", s] = Recombine(None, s, heaviest=False)
        found["fill", s] = FillKept(s)
    return found


def measure(arguments: argparse.Namespace) -> None:
    """Write the table, a decode batch at a time."""
    from transformers import AutoModelForCausalLM

    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval().to(device)
    started = time.perf_counter()
    found = rules(model, windows(arguments.data, "train", arguments.calibration, 0).to(device), arguments.selects)
    print(f"calibrated in {time.perf_counter() - started:.0f} s", flush=True)
    tokens = torch.cat([windows(arguments.data, "held_out", arguments.sequences, seed) for seed in (1, 2, 3)])
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for size in arguments.batches:
            started = time.perf_counter()
            results = evaluate_rules(model, tokens, found, decode_batch=size)
            print(f"decode batch {size}: {time.perf_counter() - started:.0f} s", flush=True)
            for (name, s), result in results.items():
                growth = torch.tensor(result.losses) - torch.tensor(result.original_losses)
                by_seed = growth.view(3, -1).mean(1).tolist()
                row = {
                    "model": arguments.model.name,
                    "decode_batch": size,
                    "rule": name,
                    "select_top_k": s,
                    "original": f"{result.original_perplexity:.4f}",
                    "perplexity_change": f"{result.perplexity_change:.5f}",
                    "standard_error": f"{result.standard_error:.5f}",
                    "kl": f"{result.kl:.5f}",
                    "top1_agreement": f"{result.top1_agreement:.4f}",
                    "active_before": f"{result.mean_active_before:.2f}",
                    "active_after": f"{result.mean_active_after:.2f}",
                    "growth_by_seed": " ".join(f"{value:.4f}" for value in by_seed),
                }
                writer.writerow(row)
            file.flush()


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 4, 64])
    parser.add_argument("--selects", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--sequences", type=int, default=64, help="of each seed")
    parser.add_argument("--calibration", type=int, default=128, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
