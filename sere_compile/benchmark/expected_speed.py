"""What a decode step is expected to take under a setting: from measurements of `sere bench`, or from bytes alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..evaluation.sweep import SLACK, SweepRow
from .result import Results, Row, batches
from .subject import dense_bytes, find_blocks
from .variant import OWN_EXPERTS

WHAT = "decode step"
# Times farther from their line than this share are too noisy to choose by.
FAR = 0.1


@dataclass(frozen=True)
class StepLine:
    """Time of a decode step at one batch size: `fixed + per_expert * active`, in milliseconds.

    Attributes:
        fixed: what a step would take without any expert.
        per_expert: what one active expert more in every layer adds; 0 where steps with more experts took no longer.
        active: mean active experts per layer that were measured, ascending.
        deviation: the largest difference of a measured time from the line, relative to the measured one.
        stock: the fastest stock variant and its time, or None if none was measured.
        own: on a CPU, the line with `lower_experts="always"`, which the default options do not switch on there; None
            if it was not measured.
    """

    fixed: float
    per_expert: float
    active: tuple[float, ...]
    deviation: float
    stock: tuple[str, float] | None
    own: StepLine | None = None

    def time(self, active: float) -> float:
        """Milliseconds of a step with so many active experts per layer."""
        return self.fixed + self.per_expert * active

    def is_outside(self, active: float) -> bool:
        """Whether so few or so many were not measured."""
        return not self.active[0] / (1 + SLACK) <= active <= self.active[-1] * (1 + SLACK)

    def __str__(self) -> str:
        text = (
            f"{self.fixed:.3g} ms + {self.per_expert:.3g} ms per active expert (measured with "
            f"{', '.join(f'{active:.1f}' for active in self.active)}; off by at most {self.deviation:.0%})"
        )
        if self.deviation > FAR:
            text += ", too far: measure again on a quiet machine"
        if self.per_expert == 0:
            text += ", so re-routing gains no time here"
        return text if self.stock is None else f"{text}; stock ({self.stock[0]}): {self.stock[1]:.3g} ms"


@dataclass(frozen=True)
class StepTimes:
    """A line for each batch size.

    Attributes:
        path: the file that the measurements come from.
        subject: the model that was measured.
        machine: device and versions.
        gates: E and K of each of its Mixture-of-Experts layers.
        lines: by batch size.
    """

    path: str
    subject: str
    machine: str
    gates: list[list[int]]
    lines: dict[int, StepLine]

    @classmethod
    def read(cls, path: str | Path, sizes: Iterable[int]) -> StepTimes:
        """What `sere bench --json` wrote, at the batch sizes of a sweep.

        Raises:
            EvaluationError: another kind of file, or a batch size without times of at least two numbers of active
                experts. Nothing is made up between batch sizes: other kernels may run there.
        """
        try:
            results = Results.load(path)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path} is not a file that `sere bench --json` wrote: {error!r}") from error
        rows = [row for row in results.rows if row.what == WHAT]
        if not rows:
            raise EvaluationError(f"{path} has no decode steps: sere bench --what decode --json measures them")
        lines = {size: _line(path, size, rows) for size in sizes}
        return cls(Path(path).name, results.subject, results.machine, results.gates, lines)

    def check(self, model: Any) -> None:
        """That the model's experts are those of the one that was measured: as many layers, E and K.

        Raises:
            EvaluationError: they are not.
        """
        if not self.gates:
            raise EvaluationError(
                f"{self.path} does not say what experts its model has (it is old): run sere bench again"
            )
        here = [[block.experts, block.top_k] for block in find_blocks(model)]
        if here != self.gates:
            raise EvaluationError(
                f"{self.path} is of another model, {self.subject}, with {_layers(self.gates)}; this one has "
                f"{_layers(here)}: run sere bench on it"
            )

    def of(self, row: SweepRow) -> SweepRow:
        """The row with what its step is expected to take."""
        line = self.lines[row.decode_batch]
        time, before = line.time(row.active_after), line.time(row.active_before)
        return replace(
            row, step_ms=time, speedup=before / time, over_stock=None if line.stock is None else line.stock[1] / time
        )

    def said(self, name: str, rows: Sequence[SweepRow]) -> list[str]:
        """Where the expected times of a sweep's rows come from: machine, model, formulas, what is uncertain."""
        lines = [
            f"expected time: decode steps of {self.subject} with re-routing, whatever the rule, measured by sere bench "
            f"on {self.machine} ({self.path})"
        ]
        if Path(self.subject).name != Path(name).name:
            lines.append(f"that is {self.subject}, not {name}: times hold if all sizes and the dtype are the same")
        for size, line in self.lines.items():
            lines.append(f"decode batch {size}: {line}")
            if line.own is not None:
                lines.append(f'decode batch {size} with lower_experts="always", which is no default: {line.own}')
            mine = [row for row in rows if row.decode_batch == size]
            reached = {active for row in mine for active in (row.active_before, row.active_after)}
            if outside := sorted(filter(line.is_outside, reached)):
                lines.append(
                    f"decode batch {size}: times with {', '.join(dict.fromkeys(f'{a:.1f}' for a in outside))} active "
                    "experts are extrapolated"
                )
        return lines


def _line(path: str | Path, size: int, rows: Sequence[Row]) -> StepLine:
    """The least squares line through our rows of a batch size, with the options that a user has by default."""
    again = f"sere bench --what decode --batch {size} --select-top-k K,2,1 --json"
    here = [row for row in rows if row.batch == size]
    if not here:
        known = ", ".join(map(str, batches(rows)))
        raise EvaluationError(f"{path} has decode steps at batch {known}, but not at {size}: {again}")
    if wrong := [row.variant for row in here if not row.agrees]:
        raise EvaluationError(f"{path}: at batch {size} the output of {wrong[0]} was wrong, so that no time counts")
    points = _points(here, own=False)
    if not _differ(points):
        raise EvaluationError(
            f"{path}: at batch {size}, re-routing was timed with "
            f"{f'{points[0][0]:.1f} active experts only' if points else 'no S'}, and a line needs two numbers of "
            f"active experts that differ by more than {SLACK:.0%}: {again}"
        )
    stock = min((row for row in here if not row.ours), key=lambda row: row.timing.median, default=None)
    line = _fit(points)
    own = _points(here, own=True)
    return replace(
        line,
        stock=None if stock is None else (stock.variant, stock.timing.median / 1e3),
        own=_fit(own) if _differ(own) else None,
    )


def _points(rows: Iterable[Row], *, own: bool) -> list[tuple[float, float]]:
    """Active experts and milliseconds, ascending, of what ours took: two dispatches lie on two lines."""
    ours = (row for row in rows if row.ours and row.variant.endswith(OWN_EXPERTS) == own)
    return sorted((row.active, row.timing.median / 1e3) for row in ours if row.active is not None)


def _differ(points: Sequence[tuple[float, float]]) -> bool:
    return bool(points) and points[-1][0] > points[0][0] * (1 + SLACK)


def _fit(points: Sequence[tuple[float, float]]) -> StepLine:
    slope, fixed = statistics.linear_regression(*zip(*points, strict=True))
    if slope < 0:  # noise, or experts that cost nothing
        slope, fixed = 0.0, statistics.mean(time for _, time in points)
    deviation = max(abs((fixed + slope * count) / time - 1) for count, time in points)
    return StepLine(fixed, slope, tuple(count for count, _ in points), deviation, None)


def _layers(gates: Sequence[Sequence[int]]) -> str:
    """Layers in words: how many of which E and K."""
    kinds = Counter(map(tuple, gates))
    return (
        ", ".join(f"{n} layers of {e} experts, top-{k}" for (e, k), n in kinds.items())
        or "no experts that sere bench finds"
    )


def speedup_by_bytes(model: Any) -> Callable[[SweepRow], float] | None:
    """What a decode step gains whose time follows the bytes of weights that it reads; None if experts are not found."""
    blocks = tuple(find_blocks(model))
    if not blocks:
        return None
    rest, expert = dense_bytes(model, blocks), sum(block.expert_bytes for block in blocks)
    return lambda row: (rest + row.active_before * expert) / (rest + row.active_after * expert)
