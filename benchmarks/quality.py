"""Quality of every routing rule on the shipped models: measures docs/quality.csv and writes docs/quality.md from it.

    python examples/tiny_moe_corpus.py --austen austen --out data
    python -m benchmarks.quality all --corpus data

On several devices at once, or to write the page anew:

    python -m benchmarks.quality measure --corpus data --model qwen3 --out qwen3.csv
    python -m benchmarks.quality page [qwen3.csv mixtral.csv upcycled.csv]

Rows of the shipped models in docs/quality_fine.csv, which compares filling:

    python -m benchmarks.quality filling --corpus data --out filling.csv

`measure` calibrates on training text and evaluates on text of held-out documents: rules are chosen by the first third
of it ("validation"), and reported on the rest ("test").
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sere_compile
from benchmarks import quality_fine, quality_page
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.evaluation import ConfiguredRule, Evaluation, evaluate_rules
from sere_compile.evaluation.comparison import Setting, calibrated_profiles, comparison_rules
from sere_compile.evaluation.filling import FillKept
from sere_compile.evaluation.rules import Fill, Rule

DOMAINS = ("code", "prose")
MODELS = ("qwen3", "mixtral", "upcycled")
LENGTH, CALIBRATION, FEW = 128, 400, 48
# Sequences of one draw, half of each domain; every decode batch divides it.
DRAW = 64
FILLS, RESTORES = (0.0, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)
COLUMNS = (
    "model", "part", "data", "decode_batch", "rule", "similarity", "select_top_k", "threshold", "draw",
    "original", "perplexity_change", "kl", "top1_agreement", "active_before", "active_after", "growth_by_draw",
)  # fmt: skip


def measure(corpus: Path, name: str, draws: int, calibration: int, decode_batches: Iterable[int]) -> Iterator[dict]:
    """All rows of one model."""
    model = shipped(name).to("cuda" if torch.cuda.is_available() else "cpu")
    profiles = calibrated(model, corpus, calibration)
    mixed = {kind: profile for kind, profile in profiles.items() if kind not in DOMAINS}
    select = [s for s in (1, 2) if s < model.config.num_experts_per_tok]
    search = comparison_rules(mixed, select_top_k=select, thresholds=(0.0,), fills=FILLS, restores=RESTORES)
    everything = comparison_rules(mixed, select_top_k=select)
    yield from rows(model, name, "validation", "mixed", sequences(corpus, "validation", DOMAINS, 3), search, (16,))
    test = sequences(corpus, "test", DOMAINS, draws)
    first, *others = decode_batches
    yield from rows(model, name, "test", "mixed", test, everything, (first,))
    of_domains = {
        Setting(substitution, f"calibrated on {kind}", s): ConfiguredRule.of(
            SereConfig(select_top_k=s, substitution=substitution), profiles[origin]
        )
        for kind, origin in (("code", "code"), ("prose", "prose"), ("both", "frobenius"))
        for substitution in ("reroute", "projection")
        for s in select
    }
    for domain in DOMAINS:
        yield from rows(model, name, "test", domain, sequences(corpus, "test", (domain,), draws), of_domains, (first,))
    yield from rows(model, name, "test", "mixed", test, everything, others)


def calibrated(model: Any, corpus: Path, count: int) -> dict[str, SimilarityProfile]:
    """A profile for each metric from both domains, one without data, and one for each domain alone."""
    halves = training(corpus, count)
    profiles = calibrated_profiles(model, of_both(halves))
    for domain, half in halves.items():
        profiles[domain] = sere_compile.calibrate(model, [{"input_ids": part} for part in half.split(8)])
    return profiles


def shipped(name: str) -> Any:
    """One of the package's models, on the CPU."""
    from transformers import AutoModelForCausalLM

    path = Path(sere_compile.__file__).parent / "models" / name
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def training(corpus: Path, count: int) -> dict[str, torch.Tensor]:
    """`count` windows of each domain's training text."""
    return {domain: windows(np.load(corpus / f"train_{domain}.npy"), count) for domain in DOMAINS}


def of_both(halves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As many windows as one domain has, half of them of each."""
    return torch.cat([half[::2] for half in halves.values()])


def sequences(corpus: Path, part: str, domains: tuple[str, ...], draws: int) -> torch.Tensor:
    """Windows [draws x DRAW, LENGTH], the domains in turn, so that decode batches are mixed."""
    found = []
    for domain in domains:
        tokens = np.load(corpus / f"held_out_{domain}.npy").reshape(-1)
        cut = len(tokens) // 3
        tokens = tokens[:cut] if part == "validation" else tokens[cut:]
        found.append(windows(tokens, draws * DRAW // len(domains)))
    return torch.stack(found, 1).flatten(0, 1)


def windows(tokens: np.ndarray, count: int) -> torch.Tensor:
    """`count` windows, evenly spread."""
    rows = torch.from_numpy(tokens.reshape(-1)[: tokens.size // LENGTH * LENGTH].astype("int64")).view(-1, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def rows(
    model: Any,
    name: str,
    part: str,
    data: str,
    tokens: torch.Tensor,
    rules: Mapping[Setting, Any],
    decode_batches: Iterable[int],
) -> Iterator[dict]:
    """One row a rule and decode batch."""
    for size in decode_batches:
        started = time.perf_counter()
        found = evaluate_rules(model, tokens, rules, decode_batch=size)
        print(f"{name} {part} {data} {size}: {len(rules)} rules, {time.perf_counter() - started:.0f} s", flush=True)
        for setting, result in found.items():
            yield row(name, part, data, setting, result)


def row(name: str, part: str, data: str, setting: Setting, result: Evaluation) -> dict:
    """Numbers as they are written."""
    growth = torch.tensor(result.losses) - torch.tensor(result.original_losses)
    by_draw = growth.view(-1, DRAW // result.decode_batch).mean(1).tolist()
    numbers = {
        "original": f"{result.original_perplexity:.4f}",
        "perplexity_change": f"{result.perplexity_change:.5f}",
        "kl": f"{result.kl:.5f}",
        "top1_agreement": f"{result.top1_agreement:.4f}",
        "active_before": f"{result.mean_active_before:.2f}",
        "active_after": f"{result.mean_active_after:.2f}",
        "growth_by_draw": " ".join(f"{value:.4f}" for value in by_draw) if part == "test" else "",
    }
    place = {"model": name, "part": part, "data": data, "decode_batch": result.decode_batch}
    return {**place, **vars(setting), **numbers}


def filling(corpus: Path) -> Iterator[dict]:
    """What filling loses beside SERE and opportunistic fill, S = 1 and 2 below K, decode batches 16 and 4."""
    tokens, few = sequences(corpus, "test", DOMAINS, 2), of_both(training(corpus, FEW))
    for name in MODELS:
        model = shipped(name)
        profile = sere_compile.calibrate(model, [{"input_ids": part} for part in few.split(8)])
        rules: dict[tuple[str, int], Rule] = {}
        for s in (s for s in (1, 2) if s < model.config.num_experts_per_tok):
            rules["SERE, frobenius", s] = ConfiguredRule.of(SereConfig(select_top_k=s), profile)
            rules["opportunistic fill", s] = Fill(s)
            rules["fill", s] = FillKept(s)
        for size in (16, 4):
            for (rule, s), result in evaluate_rules(model, tokens, rules, decode_batch=size).items():
                yield {
                    "model": name,
                    "decode_batch": size,
                    "rule": rule,
                    "select_top_k": s,
                    "original": f"{result.original_perplexity:.3f}",
                    "perplexity_change": f"{result.perplexity_change:.5f}",
                    "standard_error": f"{result.standard_error:.5f}",
                    "active_after": f"{result.mean_active_after:.2f}",
                }


def write(rows: Iterable[dict], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """One line per row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for line in rows:
            writer.writerow(line)
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    every, one = commands.add_parser("all"), commands.add_parser("measure")
    for command in (every, one):
        command.add_argument("--corpus", type=Path, required=True, help="what examples/tiny_moe_corpus.py wrote")
        command.add_argument("--draws", type=int, default=8, help=f"of {DRAW} sequences")
        command.add_argument("--calibration", type=int, default=CALIBRATION, help=f"sequences of {LENGTH} tokens")
        command.add_argument("--batches", type=int, nargs="+", default=[16, 64, 4])
    one.add_argument("--model", required=True, choices=MODELS)
    one.add_argument("--out", type=Path, required=True)
    fills = commands.add_parser("filling")
    fills.add_argument("--corpus", type=Path, required=True, help="as above")
    fills.add_argument("--out", type=Path, required=True)
    page = commands.add_parser("page")
    page.add_argument("tables", type=Path, nargs="*", help="of `measure`; none: docs/quality.csv is left unchanged")
    parsed = parser.parse_args()
    if parsed.what == "filling":
        write(filling(parsed.corpus), parsed.out, quality_fine.COLUMNS)
        return
    if parsed.what == "page":
        if parsed.tables:
            write((line for path in parsed.tables for line in quality_page.read(path)), quality_page.TABLE)
    else:
        names, out = ([parsed.model], parsed.out) if parsed.what == "measure" else (MODELS, quality_page.TABLE)
        each = (measure(parsed.corpus, name, parsed.draws, parsed.calibration, parsed.batches) for name in names)
        write(itertools.chain.from_iterable(each), out)
    if parsed.what != "measure":
        quality_page.PAGE.write_text(quality_page.page(quality_page.read()), "utf-8")


if __name__ == "__main__":
    main()
