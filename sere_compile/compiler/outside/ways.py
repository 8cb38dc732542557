"""Which of the ids that leave a graph are new ones: the ways to rewrite a gate, and what they are called."""

from __future__ import annotations

from dataclasses import replace

from ...passes import Gate, Skip, UseKind
from ...passes.proof.region import ends_of
from ...passes.proof.ways import leads_to

# How the names of versions end in which not all that leaves is of new ids.
IDS_ALONE = ", ids alone"
IDS_KEPT = ", ids kept"


def ids_alone(gate: Gate) -> Gate | None:
    """The gate where new ids leave the graph as they are, and what else leaves is made of the router's own.

    `load = (zeros.scatter(1, ids, weights) > 0).sum(0); return ids, load`: whether the code outside dispatches by the
    load or returns it shows when it is run. None where that is no way of its own.
    """
    leaves = [use.consumer.op == "output" for use in gate.uses if use.kind.dispatches]
    if all(leaves) or not any(leaves):
        return None
    made = tuple(
        replace(use, kind=UseKind.STATISTIC) if use.kind.dispatches and use.consumer.op != "output" else use
        for use in gate.uses
    )
    return replace(gate, uses=made)


def ids_kept(gate: Gate) -> Gate | None:
    """The gate where its dispatch in the graph gets new ids, and whatever leaves is of the router's own."""
    ends = ends_of(gate)
    if isinstance(ends, Skip):
        return None
    kept = [
        replace(use, kind=UseKind.STATISTIC)
        if use.kind.dispatches and not leads_to(use.consumer, ends.complete)
        else use
        for use in gate.uses
    ]
    return replace(gate, uses=tuple(kept)) if any(use.kind.dispatches for use in kept) else None


def version_name(merged: bool, way: str) -> str:
    """The name of a way to rewrite a graph."""
    return ("merged" if merged else "plain") + way
