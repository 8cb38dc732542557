"""Many settings on one model: S x threshold x decode batch, and a budget spent gate by gate."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SereConfig
from ..errors import EvaluationError
from ..similarity.profile import SimilarityProfile
from ..whole_file import whole_file
from .configured import ConfiguredRule
from .evaluate import evaluate_rules
from .result import Evaluation, upper_bound
from .rules import RoutingBatch, Rule

# Active experts that differ by less than this share count as equal: rules keep the same number but for chance.
SLACK = 0.02


@dataclass(frozen=True)
class SweepRow:
    """One setting's result; the columns of the CSV file.

    Attributes:
        rule: the substitution, or the name of another rule.
        similarity: the metric of the profile, for rules that have one.
        select_top_k: S, or "auto".
        max_active: the budget of primary experts with "auto", else "".
        threshold: as in `SereConfig`.
        standard_error: of `perplexity_change`.
        decode_batches: how many were measured; 0 in tables of earlier versions.
        model: its name, and
        data: the text, for titles; "" where nobody said.
        step_ms: expected time of a decode step, in milliseconds, where `sere bench` measured what it follows from;
        speedup: what that is over the expected time without re-routing, and
        over_stock: over the fastest stock variant that was measured.
        losses: mean loss of each decoding batch, in nats per token; not in the file.
    """

    rule: str
    similarity: str
    select_top_k: str
    max_active: str
    threshold: str
    decode_batch: int
    perplexity: float
    perplexity_change: float
    standard_error: float
    kl: float
    top1_agreement: float
    active_before: float
    active_after: float
    decode_batches: int = 0
    model: str = ""
    data: str = ""
    step_ms: float | None = None
    speedup: float | None = None
    over_stock: float | None = None
    losses: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, config: SereConfig, result: Evaluation, rule: str | None = None, similarity: str = "") -> SweepRow:
        """A row from an evaluation; `rule` where it is not the substitution of `config`."""
        return cls(
            rule or config.substitution,
            similarity,
            "default" if config.select_top_k is None else str(config.select_top_k),
            "" if config.max_active is None else str(config.max_active),
            f"{config.threshold:g}" if isinstance(config.threshold, (int, float)) else config.threshold,
            result.decode_batch,
            result.perplexity,
            result.perplexity_change,
            result.standard_error,
            result.kl,
            result.top1_agreement,
            result.mean_active_before,
            result.mean_active_after,
            len(result.losses),
            losses=result.losses,
        )

    def named(self, model: str, data: str) -> SweepRow:
        """The row, saying of which model and text it is."""
        return replace(self, model=model, data=data)

    @property
    def upper_bound(self) -> float:
        """Of `perplexity_change`, with 95 % confidence; NaN where too few batches were measured to say."""
        return upper_bound(self.perplexity_change, self.standard_error, self.decode_batches)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the backend for this row, if its rule is one of the backend's."""
        automatic = self.select_top_k == "auto"
        options: dict[str, Any] = {"select_top_k": "auto" if automatic else int(self.select_top_k)}
        if automatic:
            options["max_active"] = int(self.max_active)
        if self.threshold != "0":
            options["threshold"] = self.threshold if self.threshold.startswith("q") else float(self.threshold)
        if self.rule != "reroute":
            options["substitution"] = self.rule
        return options

    @property
    def label(self) -> str:
        """The setting in words, for a plot: S, rule, similarity if there is one, rho if there is one."""
        return ", ".join(filter(None, [self._size, self.rule, self.similarity, self._rho]))

    @property
    def setting(self) -> str:
        """What rules share, in words: S, rho if there is one."""
        return ", ".join(filter(None, [self._size, self._rho]))

    @property
    def _size(self) -> str:
        return f"auto, at most {self.max_active}" if self.max_active else f"S = {self.select_top_k}"

    @property
    def _rho(self) -> str:
        return "" if self.threshold == "0" else f"rho {self.threshold}"

    @property
    def change(self) -> str:
        """Growth of perplexity in percent, with its standard error where there is one."""
        noise = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2%}"
        return f"{self.perplexity_change:+.2%}{noise}"

    @property
    def speed(self) -> str:
        """The expected time and what it gains, in words; "" where it is not known."""
        if self.step_ms is None:
            return ""
        stock = "" if self.over_stock is None else f", {self.over_stock:.2f}x over stock"
        return f"{self.step_ms:.3g} ms per step, {self.speedup:.2f}x over no re-routing{stock}"


def settings(
    select_top_k: Iterable[int],
    max_active: Iterable[int] = (),
    thresholds: Iterable[float | str] = (0.0,),
    substitutions: Iterable[str] = ("reroute",),
    config: SereConfig | None = None,
) -> list[SereConfig]:
    """All combinations; budgets of `max_active` are added to the values of S.

    Args:
        select_top_k: values of S.
        max_active: budgets of primary experts, each as `select_top_k="auto"`.
        thresholds: values of rho, numbers or shares.
        substitutions: of `SereConfig`.
        config: the other options.
    """
    config = config or SereConfig()
    sizes: list[dict[str, Any]] = [{"select_top_k": s, "max_active": None} for s in select_top_k]
    sizes += [{"select_top_k": "auto", "max_active": budget} for budget in max_active]
    return [
        config.replace(threshold=rho, substitution=substitution, **size)
        for substitution, size, rho in itertools.product(substitutions, sizes, thresholds)
    ]


def sweep(
    model: nn.Module,
    tokens: torch.Tensor,
    similarity: Mapping[str, torch.Tensor],
    configs: Iterable[SereConfig],
    decode_batches: Iterable[int] = (4, 16, 64),
    progress: bool = False,
) -> list[SweepRow]:
    """Evaluate every setting at every decode batch; the original model runs once per decode batch.

    Args:
        model: a causal language model.
        tokens: int64 [N, L]; of each decode batch B the first N - N % B sequences are used.
        similarity: [E, E] for each gate; a profile brings its projections.
        configs: the settings.
        decode_batches: values of B.
        progress: show a bar for each of them.
    """
    rules: dict[SereConfig, Rule] = {config: ConfiguredRule.of(config, similarity) for config in configs}
    measured = similarity.metadata.get("method", "") if isinstance(similarity, SimilarityProfile) else ""
    rows = []
    for batch in decode_batches:
        some = whole_batches(tokens, batch)
        results = evaluate_rules(model, some, rules, decode_batch=batch, progress=progress)
        for config, result in results.items():
            rows.append(SweepRow.of(config, result, similarity="" if config.substitution == "fill" else measured))
    return rows


@dataclass(frozen=True)
class PerGate:
    """A rule for each gate; gates without one are left as they are."""

    rules: Mapping[str, Rule]
    top_k: dict[str, int] = field(default_factory=dict, compare=False)  # K by gate, of those that ran

    def __call__(self, batch: RoutingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule`."""
        self.top_k[batch.name] = batch.ids.shape[-1]
        rule = self.rules.get(batch.name)
        return (batch.ids, batch.weights) if rule is None else rule(batch)


@dataclass(frozen=True)
class GateSettings:
    """S of each gate that is re-routed, the evaluation of the model with them, and the K of every gate."""

    select_top_k: Mapping[str, int]
    result: Evaluation
    top_k: Mapping[str, int]

    def options(self) -> dict[str, Any]:
        """The options of the backend: gates without an S of their own keep all K experts of a token."""
        unchanged = {name: k for name, k in self.top_k.items() if name not in self.select_top_k}
        most = max(unchanged.values(), default=max(self.top_k.values()))
        fewer = {name: k for name, k in unchanged.items() if k < most}
        return {
            "select_top_k": most,
            "per_gate": {n: {"select_top_k": s} for n, s in {**fewer, **self.select_top_k}.items()},
        }


def spend_budget(
    model: nn.Module,
    tokens: torch.Tensor,
    similarity: Mapping[str, torch.Tensor],
    *,
    budget: float,
    select_top_k: Sequence[int],
    decode_batch: int = 16,
    config: SereConfig | None = None,
    on_step: Callable[[GateSettings], None] = lambda settings: None,
    progress: bool = False,
) -> GateSettings:
    """Lower S gate by gate, always where the most active experts are saved per perplexity lost, within a budget.

    Greedy: each round evaluates one step down for every gate, at most (number of gates) x (number of S) rounds.

    Args:
        model: a causal language model.
        tokens: int64 [N, L].
        similarity: [E, E] for each gate; a profile brings its projections.
        budget: relative growth of perplexity, 0.01 for one percent.
        select_top_k: values of S to go through; each gate starts unchanged, then takes them from the largest down.
        decode_batch: B.
        config: the other options.
        on_step: called after each step taken.
        progress: show a bar for each round.

    Raises:
        EvaluationError: no value of S.
    """
    config = config or SereConfig()
    steps = sorted(set(select_top_k), reverse=True)
    if not steps:
        raise EvaluationError("select_top_k has no values to go through")
    tokens = whole_batches(tokens, decode_batch)
    level = dict.fromkeys(similarity, -1)
    top_k: dict[str, int] = {}

    def rule(levels: Mapping[str, int]) -> PerGate:
        chosen = {name: steps[index] for name, index in levels.items() if index >= 0}
        rules = {n: ConfiguredRule.of(config.replace(select_top_k=s), similarity) for n, s in chosen.items()}
        return PerGate(rules, top_k)

    first = evaluate_rules(model, tokens, {"": rule(level)}, decode_batch=decode_batch, progress=progress)
    state = GateSettings({}, first[""], top_k)
    while True:
        trials = {name: {**level, name: index + 1} for name, index in level.items() if index + 1 < len(steps)}
        rules = {name: rule(levels) for name, levels in trials.items()}
        results = evaluate_rules(model, tokens, rules, decode_batch=decode_batch, progress=progress)
        fitting = {n: r for n, r in results.items() if r.upper_bound <= budget}
        if not fitting:
            return state
        best = max(fitting, key=lambda name: _gain(state.result, fitting[name]))
        level = trials[best]
        chosen = {name: steps[index] for name, index in level.items() if index >= 0}
        state = replace(state, select_top_k=chosen, result=fitting[best])
        on_step(state)


def _gain(now: Evaluation, then: Evaluation) -> tuple[bool, float]:
    """Experts saved per cost; steps that cost nothing come first, by what they save."""
    saved = now.mean_active_after - then.mean_active_after
    cost = then.perplexity - now.perplexity
    return (True, saved) if cost <= 0 and saved > 0 else (False, saved / max(cost, 1e-12))


def whole_batches(tokens: torch.Tensor, decode_batch: int) -> torch.Tensor:
    """The sequences that fill whole decoding batches.

    Raises:
        EvaluationError: they do not fill even one.
    """
    usable = len(tokens) // decode_batch * decode_batch
    if not usable:
        raise EvaluationError(f"{len(tokens)} sequences do not make one decoding batch of {decode_batch}")
    return tokens[:usable]


# Columns that tables of earlier versions lack.
_LATER = ("decode_batches", "model", "data", "step_ms", "speedup", "over_stock")
# By type of a column, what reads it.
_READERS: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "float | None": lambda text: float(text) if text else None
}  # fmt: skip
# Columns with what reads them.
_COLUMNS = {
    column.name: _READERS[str(column.type)] for column in dataclasses.fields(SweepRow) if column.name != "losses"
}


def write_csv(rows: Iterable[SweepRow], path: str | Path) -> None:
    """One line per row, columns named after the fields.

    Raises:
        OutputError: the file cannot be written.
    """
    with whole_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows([getattr(row, name) for name in _COLUMNS] for row in rows)


def read_csv(path: str | Path) -> list[SweepRow]:
    """Rows that `write_csv` wrote.

    Raises:
        EvaluationError: another kind of file, or a table without rows.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
            known = [n for n in _COLUMNS if n not in _LATER or n in (lines[0] if lines else {})]
            rows = [SweepRow(**{n: _COLUMNS[n](line[n]) for n in known}) for line in lines]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise EvaluationError(f"{path} is not a table that `sere sweep` wrote: {error!r}") from error
    if not rows:
        raise EvaluationError(f"{path} has no rows; `sere sweep --csv` writes one for each setting")
    return rows


def format_table(rows: Sequence[SweepRow]) -> str:
    """Rows as a table in Markdown; changes with their standard error, where there are enough batches for one.

    Expected times and what they gain are in it where they are known.
    """
    columns = ["rule", "similarity", "S", "threshold", "decode batch", "perplexity", "change", "KL", "top-1 same"]
    columns += ["active experts"]
    timed = any(row.step_ms is not None for row in rows)
    columns += ["expected ms per step", "over no re-routing", "over stock"] if timed else []
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(_cells(row, timed)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: SweepRow, timed: bool) -> list[str]:
    cells = [
        row.rule,
        row.similarity,
        f"auto, {row.max_active} active" if row.max_active else row.select_top_k,
        row.threshold,
        str(row.decode_batch),
        f"{row.perplexity:.3f}",
        row.change,
        f"{row.kl:.4f}",
        f"{row.top1_agreement:.1%}",
        f"{row.active_before:.1f} -> {row.active_after:.1f}",
    ]
    speeds = ((row.step_ms, ".3g", ""), (row.speedup, ".2f", "x"), (row.over_stock, ".2f", "x"))
    return cells + ["" if value is None else f"{value:{form}}{unit}" for value, form, unit in speeds if timed]
