"""What was found, rewritten and skipped, and why, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REWRITTEN, IDENTITY, SKIPPED = "rewritten", "identity", "skipped"


@dataclass(frozen=True)
class GateRow:
    """One gate, or one selection that was looked at and refused.

    Attributes:
        name: fully qualified name of the router weight; for a refused selection, its place in the user's code.
        num_experts: E, or None where there is no gate.
        top_k: K.
        select_top_k: S in force; K where nothing is re-routed.
        scoring: how router logits become scores, e.g. "softmax".
        is_sorted: whether the model asked its top-k for sorted results.
        dispatch: how the ids reach the experts.
        status: "rewritten", "identity" (nothing to re-route, by S >= K) or "skipped".
        reason: why it was not rewritten, or re-routed where it should have been filled; else empty.
        similarity: where the similarity matrix comes from.
        threshold: rho in force; "q0.2" becomes the number that it stands for in this gate once its matrix is known.
        substitution: "reroute", "projection" or "fill".
        kernels: which of "experts" and "routing" our kernels compute, and why stock operations stay for the others;
            empty where both are switched off, as by default on a CPU.
        proof: what running the gate has proven for S < K; with S = K no bit changes.
    """

    name: str
    num_experts: int | None
    top_k: int | None
    select_top_k: int | None
    scoring: str
    is_sorted: bool | None
    dispatch: str
    status: str
    reason: str = ""
    similarity: str = ""
    threshold: float | str = 0.0
    substitution: str = "reroute"
    kernels: str = ""
    proof: str = ""


@dataclass(frozen=True)
class GateReport:
    """All gates of a model in the order in which they ran. `str()` is an aligned table.

    Attributes:
        rows: gates, and refused selections with status "skipped" and no E.
        hint: what to do when nothing was found.
    """

    rows: tuple[GateRow, ...]
    hint: str = ""

    @property
    def gates(self) -> tuple[GateRow, ...]:
        """The rows that are gates."""
        return tuple(row for row in self.rows if row.num_experts is not None)

    @property
    def rewritten(self) -> tuple[GateRow, ...]:
        """The rows that re-route."""
        return tuple(row for row in self.rows if row.status == REWRITTEN)

    def __iter__(self) -> Iterator[GateRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        summary = f"{len(self.gates)} MoE gate{'s' * (len(self.gates) != 1)} found, {len(self.rewritten)} rewritten"
        lines = [summary, *_table(self.rows)] if self.rows else [summary]
        return "\n".join([*lines, self.hint] if self.hint else lines)


_COLUMNS = (
    "gate",
    "E",
    "K",
    "S",
    "rho",
    "weights",
    "scoring",
    "sorted",
    "dispatch",
    "status",
    "similarity",
    "proven",
    "reason",
    "kernels",
)


def _table(rows: Sequence[GateRow]) -> list[str]:
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    shown = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in shown}
    lines = ["  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in cells]
    return [lines[0], "  ".join("-" * widths[i] for i in shown), *lines[1:]]


def _cells(row: GateRow) -> tuple[str, ...]:
    numbers = ("" if n is None else str(n) for n in (row.num_experts, row.top_k, row.select_top_k))
    rho = row.threshold if isinstance(row.threshold, str) else (f"{row.threshold:.4g}" if row.threshold else "")
    weights = "" if row.substitution == "reroute" else row.substitution
    ordered = "" if row.is_sorted is None else ("yes" if row.is_sorted else "no")
    texts = (row.scoring, ordered, row.dispatch, row.status, row.similarity, row.proof, row.reason, row.kernels)
    return (row.name, *numbers, rho, weights, *texts)
