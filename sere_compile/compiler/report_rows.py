"""Plans and refused selections as lines of a report."""

from __future__ import annotations

from ..idle import never_reached
from ..passes import Skip
from ..passes.graph import nodes
from ..report import REWRITTEN, SKIPPED, GateRow
from ..similarity.binding import GateEntry
from ..similarity.threshold import resolve_threshold
from .gate_plan import GatePlan


def row_of(plan: GatePlan, entry: GateEntry) -> GateRow:
    """What was done to a gate, for the layer whose entry is given."""
    gate = plan.gate
    rewritten = plan.status == REWRITTEN
    return GateRow(
        name=entry.name,
        num_experts=gate.num_experts,
        top_k=gate.top_k,
        select_top_k=plan.select_top_k if rewritten else gate.top_k,
        scoring=gate.scoring,
        is_sorted=gate.is_sorted,
        dispatch=gate.dispatch + (", merged" if rewritten and plan.merged else ""),
        status=plan.status,
        reason=plan.reason or plan.fallback or ((plan.saves_nothing or _idle(plan, entry)) if rewritten else ""),
        similarity=_similarity(plan, entry) if rewritten else "",
        threshold=_threshold(plan, entry) if rewritten else 0.0,
        substitution=_substitution(plan) if rewritten else "reroute",
        kernels=plan.kernels,
        proof=plan.proof if rewritten else "",
    )


def row_of_skip(skip: Skip) -> GateRow:
    """A selection that is no gate, or none that can be re-routed."""
    place = nodes.source_line(skip.node)
    name = f"{skip.node.name} ({place})" if place else skip.node.name
    return GateRow(name, None, None, None, "", None, "", SKIPPED, str(skip))


def _substitution(plan: GatePlan) -> str:
    return "reroute" if plan.fallback else plan.config.substitution


def _idle(plan: GatePlan, entry: GateEntry) -> str:
    """Why the threshold of a gate leaves nothing to re-route, where its matrix is known."""
    return "" if entry.matrix is None or plan.is_filled else never_reached(plan.config.threshold, entry.matrix)


def _similarity(plan: GatePlan, entry: GateEntry) -> str:
    return "" if plan.is_filled else entry.source or "none attached: probed at compile time"


def _threshold(plan: GatePlan, entry: GateEntry) -> float | str:
    """The threshold of a gate, as a number where its matrix is known."""
    threshold = 0.0 if plan.fallback else plan.config.threshold
    return threshold if entry.matrix is None or plan.is_filled else resolve_threshold(threshold, entry.matrix)
