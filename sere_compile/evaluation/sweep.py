"""Many settings on one model: S x threshold x decode batch, and a budget spent gate by gate."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..config import SereConfig
from ..errors import EvaluationError
from .evaluate import ConfiguredRule, Evaluation, evaluate_rules
from .rules import RoutingBatch, Rule


@dataclass(frozen=True)
class SweepRow:
    """One setting's result; the columns of the CSV file."""

    rule: str
    select_top_k: int
    threshold: str
    decode_batch: int
    perplexity: float
    perplexity_change: float
    kl: float
    top1_agreement: float
    active_before: float
    active_after: float

    @classmethod
    def of(cls, rule: str, select_top_k: int, threshold: object, result: Evaluation) -> SweepRow:
        """A row from an evaluation."""
        return cls(
            rule,
            select_top_k,
            str(threshold),
            result.decode_batch,
            result.perplexity,
            result.perplexity_change,
            result.kl,
            result.top1_agreement,
            result.mean_active_before,
            result.mean_active_after,
        )


def sweep(
    model: nn.Module,
    tokens: torch.Tensor,
    similarity: Mapping[str, torch.Tensor],
    *,
    select_top_k: Iterable[int],
    thresholds: Iterable[float] = (0.0,),
    decode_batches: Iterable[int] = (4, 16, 64),
    config: SereConfig | None = None,
) -> list[SweepRow]:
    """Evaluate every combination; the original model runs once for each decode batch.

    Args:
        model: a causal language model.
        tokens: int64 [N, L]; of each decode batch B the first N - N % B sequences are used.
        similarity: [E, E] for each gate.
        select_top_k: values of S.
        thresholds: values of rho.
        decode_batches: values of B.
        config: the other options.
    """
    config = config or SereConfig()
    settings = [(s, rho) for s in select_top_k for rho in thresholds]
    rules = {(s, rho): ConfiguredRule(config.replace(select_top_k=s, threshold=rho), similarity) for s, rho in settings}
    rows = []
    for batch in decode_batches:
        results = evaluate_rules(
            model, whole_batches(tokens, batch), {f"{s} {rho}": rule for (s, rho), rule in rules.items()},
            decode_batch=batch,
        )  # fmt: skip
        rows += [SweepRow.of("sere", s, rho, results[f"{s} {rho}"]) for s, rho in settings]
    return rows


def recommend(rows: Iterable[SweepRow], budget: float) -> dict[int, SweepRow | None]:
    """For each decode batch the setting with fewest active experts whose perplexity grows by at most `budget`."""
    best: dict[int, SweepRow | None] = {}
    for row in rows:
        current = best.setdefault(row.decode_batch, None)
        fits = row.perplexity_change <= budget
        if fits and (current is None or row.active_after < current.active_after):
            best[row.decode_batch] = row
    return best


@dataclass(frozen=True)
class PerGate:
    """A rule for each gate; gates without one are left as they are."""

    rules: Mapping[str, Rule]

    def __call__(self, batch: RoutingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule`."""
        rule = self.rules.get(batch.name)
        return (batch.ids, batch.weights) if rule is None else rule(batch)


@dataclass(frozen=True)
class GateSettings:
    """S of each gate that is re-routed, and what the model is like with them."""

    select_top_k: Mapping[str, int]
    result: Evaluation


def spend_budget(
    model: nn.Module,
    tokens: torch.Tensor,
    similarity: Mapping[str, torch.Tensor],
    *,
    budget: float,
    select_top_k: Sequence[int],
    decode_batch: int = 16,
    config: SereConfig | None = None,
    progress: Callable[[GateSettings], None] = lambda settings: None,
) -> GateSettings:
    """Lower S gate by gate, always where most active experts are saved for the perplexity lost, within a budget.

    Greedy: each round evaluates one step down for every gate, at most (number of gates) x (number of S) rounds.

    Args:
        model: a causal language model.
        tokens: int64 [N, L].
        similarity: [E, E] for each gate.
        budget: relative growth of perplexity, 0.01 for one percent.
        select_top_k: values of S to go through; each gate begins unchanged, then takes them from the largest down.
        decode_batch: B.
        config: the other options.
        progress: called after each step taken.

    Raises:
        EvaluationError: no value of S.
    """
    config = config or SereConfig()
    steps = sorted(set(select_top_k), reverse=True)
    if not steps:
        raise EvaluationError("select_top_k has no values to go through")
    tokens = whole_batches(tokens, decode_batch)
    level = dict.fromkeys(similarity, -1)

    def rule(levels: Mapping[str, int]) -> PerGate:
        chosen = {name: steps[index] for name, index in levels.items() if index >= 0}
        return PerGate({n: ConfiguredRule(config.replace(select_top_k=s), similarity) for n, s in chosen.items()})

    state = GateSettings({}, evaluate_rules(model, tokens, {"": rule(level)}, decode_batch=decode_batch)[""])
    while True:
        trials = {name: {**level, name: index + 1} for name, index in level.items() if index + 1 < len(steps)}
        results = evaluate_rules(model, tokens, {n: rule(t) for n, t in trials.items()}, decode_batch=decode_batch)
        fitting = {n: r for n, r in results.items() if r.perplexity_change <= budget}
        if not fitting:
            return state
        best = max(fitting, key=lambda name: _gain(state.result, fitting[name]))
        level = trials[best]
        chosen = {name: steps[index] for name, index in level.items() if index >= 0}
        state = replace(state, select_top_k=chosen, result=fitting[best])
        progress(state)


def _gain(now: Evaluation, then: Evaluation) -> tuple[bool, float]:
    """Experts saved for what they cost; steps that cost nothing come first, by what they save."""
    saved = now.mean_active_after - then.mean_active_after
    cost = then.perplexity - now.perplexity
    return (True, saved) if cost <= 0 and saved > 0 else (False, saved / max(cost, 1e-12))


def whole_batches(tokens: torch.Tensor, decode_batch: int) -> torch.Tensor:
    """The sequences that make whole decoding batches.

    Raises:
        EvaluationError: not even one.
    """
    usable = len(tokens) // decode_batch * decode_batch
    if not usable:
        raise EvaluationError(f"{len(tokens)} sequences do not make one decoding batch of {decode_batch}")
    return tokens[:usable]


_COLUMNS = tuple(SweepRow.__dataclass_fields__)


def write_csv(rows: Iterable[SweepRow], path: str | Path) -> None:
    """One line a row, columns named as the fields."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows([getattr(row, name) for name in _COLUMNS] for row in rows)


def read_csv(path: str | Path) -> list[SweepRow]:
    """Rows that `write_csv` wrote.

    Raises:
        EvaluationError: another kind of file.
    """
    kinds = {"rule": str, "threshold": str, "select_top_k": int, "decode_batch": int}
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return [SweepRow(**{n: kinds.get(n, float)(line[n]) for n in _COLUMNS}) for line in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is not a table that `sere sweep` wrote: {error!r}") from error


def format_table(rows: Sequence[SweepRow]) -> str:
    """Rows as a table in Markdown."""
    lines = ["| rule | S | threshold | decode batch | perplexity | change | KL | top-1 same | active experts |"]
    lines.append("| --- " * 9 + "|")
    for row in rows:
        lines.append(
            f"| {row.rule} | {row.select_top_k} | {row.threshold} | {row.decode_batch} | {row.perplexity:.3f} | "
            f"{row.perplexity_change:+.2%} | {row.kl:.4f} | {row.top1_agreement:.1%} | "
            f"{row.active_before:.1f} -> {row.active_after:.1f} |"
        )
    return "\n".join(lines)
