"""Beyond perplexity: what rules do to single tokens, short continuations and mixed batches, docs/quality_beyond.md.

    python examples/tiny_moe_corpus.py --austen austen --out data
    python -m benchmarks.quality_beyond measure --corpus data      # docs/quality_beyond.csv, and the page
    python -m benchmarks.quality_beyond page                       # the page anew

The shipped models on text of held-out documents ("test" of `benchmarks.quality`), at decode batch 16. Batches are all
code or all prose ("alike"), half of each ("mixed"), or one sequence of the one among 15 of the other ("outlier"). The
same sequences stand in all of them, so that what changes for them is the company alone.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import sere_compile
from benchmarks.quality import DOMAINS, FEW, MODELS, of_both, sequences, shipped, training
from sere_compile import SereConfig
from sere_compile.evaluation import ConfiguredRule, Evaluation, evaluate_rules
from sere_compile.evaluation.filling import FillKept
from sere_compile.evaluation.predictions import Predictions
from sere_compile.evaluation.rules import Fill, Rule

DOCS = Path(__file__).parents[1] / "docs"
TABLE, PAGE = DOCS / "quality_beyond.csv", DOCS / "quality_beyond.md"
TEMPLATE = Path(__file__).parent / "quality_beyond_page.md"
BATCH, LENGTH, SAMPLES = 16, 3, (1, 16)
COMPANIES = ("alike", "mixed", "outlier")
RULES = ("SERE, frobenius", "projection, frobenius", "opportunistic fill", "fill")
NUMBERS = (
    "accuracy", "worst_loss", "greedy_match", *(f"sampled_match_{n}" for n in SAMPLES), "sampled_agreement", "loss",
)  # fmt: skip
# Of these the table has the standard error of their difference from the original's.
ERRORS = tuple(name for name in NUMBERS if name != "sampled_agreement")
GROUPS = 16  # of sequences, for the errors
COLUMNS = (
    "model", "company", "domain", "rule", "select_top_k", "active", *NUMBERS, *(f"{name}_error" for name in ERRORS),
)  # fmt: skip


@dataclass(frozen=True)
class Batches:
    """Sequences in the order in which they decode together.

    Attributes:
        tokens: int64 [N, L].
        domains: int64 [N], -1 for what only keeps others company.
        in_all: bool [N], whether every company has the sequence.
    """

    tokens: torch.Tensor
    domains: torch.Tensor
    in_all: torch.Tensor


def batches(corpus: Path, company: str, count: int, outliers: int) -> Batches:
    """`count` sequences of each domain; of a batch with an outlier that one is measured, `outliers` of each domain."""
    apart = [sequences(corpus, "test", (domain,), count // 64) for domain in DOMAINS]
    domains = torch.arange(len(DOMAINS)).repeat_interleave(count)
    in_all = (torch.arange(count) % (count // outliers) == 0).repeat(len(DOMAINS))
    if company == "alike":
        return Batches(torch.cat(apart), domains, in_all)
    if company == "mixed":
        in_turn = torch.arange(2 * count).view(2, count).T.flatten()
        return Batches(torch.cat(apart)[in_turn], domains[in_turn], in_all[in_turn])
    rows, of = [], []
    for domain, number in itertools.product(range(2), range(0, count, count // outliers)):
        others = apart[1 - domain][torch.arange(number, number + BATCH - 1) % count]
        rows.append(torch.cat([apart[domain][number : number + 1], others]))
        of.append(torch.tensor([domain] + [-1] * (BATCH - 1)))
    return Batches(torch.cat(rows), torch.cat(of), torch.ones(len(rows) * BATCH, dtype=torch.bool))


def rules(model: torch.nn.Module, calibration: torch.Tensor) -> dict[tuple[str, int], Rule]:
    """By name and S."""
    profile = sere_compile.calibrate(model, [{"input_ids": part} for part in calibration.split(8)])
    found: dict[tuple[str, int], Rule] = {}
    for s in (s for s in (1, 2) if s < model.config.num_experts_per_tok):  # type: ignore[union-attr, operator]
        for name, substitution in (("SERE", "reroute"), ("projection", "projection")):
            config = SereConfig(select_top_k=s, substitution=substitution)
            found[f"{name}, frobenius", s] = ConfiguredRule.of(config, profile)
        found["opportunistic fill", s], found["fill", s] = Fill(s), FillKept(s)
    return found


def measure(corpus: Path, count: int, outliers: int) -> Iterator[dict[str, object]]:
    """Rows of every model, company, domain and rule; the original as a rule with S = 0."""
    calibration = of_both(training(corpus, FEW))
    for name in MODELS:
        model = shipped(name)
        compared = rules(model, calibration)
        for company in COMPANIES:
            made = batches(corpus, company, count, outliers)
            results = evaluate_rules(model, made.tokens, compared, decode_batch=BATCH, progress=True)
            for number, domain in enumerate(DOMAINS):
                place = {"model": name, "company": company, "domain": domain}
                first = next(iter(results.values()))
                yield {**place, "rule": "original", "select_top_k": 0} | numbers(first, made, number, original=True)
                for (rule, s), result in results.items():
                    yield {**place, "rule": rule, "select_top_k": s} | numbers(result, made, number)


def numbers(result: Evaluation, made: Batches, domain: int, *, original: bool = False) -> dict[str, str]:
    """What the sequences of a domain say; the agreement of samples and the experts are those of the whole batches."""
    before, after = result.original_predictions, result.predictions
    assert before is not None
    assert after is not None
    own, common = made.domains == domain, (made.domains == domain) & made.in_all
    values, errors = {"sampled_agreement": 1.0 if original else result.sampled_agreement}, {}
    for name in ERRORS:
        rows = common if name == "loss" else own
        kept = before if original else after
        values[name] = statistic(kept.rows(rows), name)
        errors[f"{name}_error"] = 0.0 if original else error(before.rows(rows), after.rows(rows), name)
    active = result.mean_active_before if original else result.mean_active_after
    return {"active": f"{active:.2f}"} | {name: f"{value:.5f}" for name, value in (values | errors).items()}


def statistic(found: Predictions, name: str) -> float:
    """One number of `ERRORS`."""
    if name == "loss":
        return found.loss
    if name == "accuracy":
        return found.accuracy
    if name == "worst_loss":
        return found.worst_loss()
    if name == "greedy_match":
        return found.greedy_match(LENGTH)
    return found.sampled_match(int(name.rpartition("_")[2]), LENGTH)


def error(before: Predictions, after: Predictions, name: str) -> float:
    """The standard error of a number's change, over sequences: the jackknife that leaves a group out at a time.

    (Kott, The Delete-a-Group Jackknife, Journal of Official Statistics 17, 2001; groups of equal size, in turn.)
    """
    group = torch.arange(len(before.losses)) % GROUPS
    changes = [
        statistic(after.rows(group != g), name) - statistic(before.rows(group != g), name) for g in range(GROUPS)
    ]
    mean = sum(changes) / GROUPS
    return math.sqrt((GROUPS - 1) / GROUPS * sum((change - mean) ** 2 for change in changes))


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The lines of the table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def page(lines: list[dict[str, str]]) -> str:
    """The whole page."""
    template = TEMPLATE.read_text("utf-8")
    for name, text in (("TOKENS", token_table(lines)), ("COMPANY", company_table(lines))):
        template = template.replace(f"<!-- {name} -->", text)
    return template


def token_table(lines: list[dict[str, str]]) -> str:
    """Mixed batches: every number of each rule, by model and domain."""
    head = ["model", "text", "rule", "accuracy", "worst 5 %", "greedy", "1 sample", "16 samples", "same samples"]
    body = [
        [
            line["model"], line["domain"], _title(line), _cell(line, "accuracy", 100, 1),
            _cell(line, "worst_loss", 1, 2), _cell(line, "greedy_match", 100, 1),
            _cell(line, "sampled_match_1", 100, 1), _cell(line, "sampled_match_16", 100, 1),
            f"{100 * float(line['sampled_agreement']):.1f}",
        ]
        for line in lines
        if line["company"] == "mixed"
    ]  # fmt: skip
    return _table(head, body)


def company_table(lines: list[dict[str, str]]) -> str:
    """Growth of the loss, in nats per token, of the same sequences in other company."""
    found = {(line["model"], line["domain"], _title(line), line["company"]): line for line in lines}
    body = []
    for model, domain, title in dict.fromkeys(key[:3] for key in found):
        if title == "original":
            continue
        cells = []
        for company in COMPANIES:
            line, original = (found[model, domain, name, company] for name in (title, "original"))
            cells.append(f"{float(line['loss']) - float(original['loss']):+.3f} ± {float(line['loss_error']):.3f}")
        body.append([model, domain, title, *cells])
    return _table(["model", "text", "rule", *COMPANIES], body)


def _cell(line: dict[str, str], name: str, scale: float, digits: int) -> str:
    """A number, and the error of its change where there is a change."""
    value = f"{scale * float(line[name]):.{digits}f}"
    return value if line["rule"] == "original" else f"{value} ± {scale * float(line[name + '_error']):.{digits}f}"


def _title(line: dict[str, str]) -> str:
    return line["rule"] if line["rule"] == "original" else f"{line['rule']}, S = {line['select_top_k']}"


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "page"))
    parser.add_argument("--corpus", type=Path, help="what examples/tiny_moe_corpus.py wrote")
    parser.add_argument("--count", type=int, default=64, help="sequences of each domain, a multiple of 64")
    parser.add_argument(
        "--outliers", type=int, default=32, help="of these, how many stand beside 15 of the other domain"
    )
    parsed = parser.parse_args()
    if parsed.what == "measure":
        if parsed.corpus is None:
            parser.error("measure needs --corpus")
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for line in measure(parsed.corpus, parsed.count, parsed.outliers):
                writer.writerow(line)
                file.flush()
    PAGE.write_text(page(read()), "utf-8")


if __name__ == "__main__":
    main()
