"""What was measured: rows, their table, their JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..whole_file import write_whole
from .timing import Timing


@dataclass(frozen=True)
class Row:
    """One variant at one batch size.

    Attributes:
        what: "gating", "MoE layer" or "decode step".
        batch: tokens.
        variant: its name.
        ours: whether it is not a stock variant.
        timing: microseconds.
        error: median relative error of a token against the reference of the same S; None where there is none.
        tolerance: the largest error allowed.
        active: mean number of active experts per layer, None where there are no experts.
        bytes_read: weights that have to be read: those of the active experts, and all others in the layer or model.
        bandwidth_share: of the copy bandwidth.
    """

    what: str
    batch: int
    variant: str
    ours: bool
    timing: Timing
    error: float | None
    tolerance: float
    active: float | None = None
    bytes_read: float | None = None
    bandwidth_share: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the output is that of the reference; NaN never is."""
        return self.error is None or self.error <= self.tolerance


@dataclass
class Results:
    """Everything one run of `sere bench` measured.

    Attributes:
        subject: the model.
        machine: device and versions.
        copy_bandwidth: bytes per second, measured in the same run.
        routing: where ids come from.
        notes: what a reader of the figures has to know, such as gates whose experts could not be fused.
        failures: what was asked for but could not be measured, and why.
        gates: E and K of each Mixture-of-Experts layer.
    """

    subject: str
    machine: str
    copy_bandwidth: float
    routing: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    gates: list[list[int]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether everything asked for was measured, and every output agrees."""
        return not self.failures and all(row.agrees for row in self.rows)

    def speedup(self, row: Row, over: str | None = None) -> float | None:
        """Over the fastest stock variant at this batch size, or over the one named; None if an output disagrees.

        One wrong output withholds all speed-ups of that batch size: the reference itself may be wrong.
        """
        same = [r for r in self.rows if (r.what, r.batch) == (row.what, row.batch)]
        stock = [r for r in same if not r.ours and over in (None, r.variant)]
        if not row.ours or not stock or not all(r.agrees for r in same):
            return None
        return min(r.timing.median for r in stock) / row.timing.median

    def table(self) -> str:
        """Markdown: one section per kind of measurement."""
        copied = self.copy_bandwidth
        speed = f"{copied / 1e12:.2f} TB/s" if copied >= 1e12 else f"{copied / 1e9:.1f} GB/s"
        lines = [f"{self.subject}", f"{self.machine}, copy {speed}; {self.routing}"]
        for what in dict.fromkeys(row.what for row in self.rows):
            lines += ["", f"### {what}", "", "| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
            lines += ["| " + " | ".join(self._cells(row)) + " |" for row in self.rows if row.what == what]
        notes = [*(f"Not measured: {failure}" for failure in self.failures), *(f"Note: {note}" for note in self.notes)]
        lines += ["", *notes] if notes else []
        return "\n".join(lines)

    def _cells(self, row: Row) -> list[str]:
        def factor(over: str | None) -> str:
            speedup = self.speedup(row, over)
            return "" if speedup is None else f"{speedup:.2f}"

        return [
            str(row.batch), row.variant, str(row.timing), "" if row.active is None else f"{row.active:.1f}",
            "" if row.bytes_read is None else f"{row.bytes_read / 1e6:.0f}",
            "" if row.bytes_read is None else f"{row.bytes_read / self.copy_bandwidth * 1e6:.0f}",
            "" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
            factor(None), factor("inductor batched_mm"),
            ("" if row.error is None else f"{row.error:.1e}")
            + ("" if row.agrees else f" DISAGREES (at most {row.tolerance:.0e}), no speed-up given"),
        ]  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write JSON: the fields of this object and of its rows.

        Raises:
            OutputError: the file cannot be written.
        """
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """What `save` wrote."""
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [Row(**row | {"timing": Timing(**row["timing"])}) for row in data.pop("rows")]
        return cls(**data, rows=rows)


HEADINGS = (
    "batch", "variant", "us, median [p20 .. p80]", "active experts", "MB read", "floor", "of copy bandwidth",
    "speed-up over best stock", "over batched_mm", "error",
)  # fmt: skip


def batches(rows: Iterable[Row]) -> list[int]:
    """The batch sizes of the rows, ascending."""
    return sorted({row.batch for row in rows})
