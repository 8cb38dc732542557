"""The passes, in the order in which they run over a gate.

`find_gates` finds the gates of a graph, once; `extract_dispatch` cuts a gate's dispatch out of it,
where it can. Then every gate goes through `PIPELINE`, at the end of this file. What differs between
tracers and engines comes in with the `Run`: passes see a graph, numbers and devices, and ask for
the inputs that they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from .count_routing import count_routing
from .extract_dispatch import DispatchRegion
from .fill_dispatch import fill_dispatch
from .fuse_experts import fuse_experts
from .fuse_reroute import fuse_reroute
from .fuse_router import fuse_router
from .gate import Evidence, Gate, Skip, SkipReason
from .kernel_gains import check_experts_gain, check_router_gains
from .reroute_dispatch import Rewrite, RoutingSettings, reroute_dispatch
from .verify_rewrite import Proof

_REROUTE = "reroute"  # the switch of all that re-routing takes


@dataclass
class Run:
    """One gate on its way through the passes.

    Attributes:
        gate: as the passes so far have left it.
        region: its dispatch as it was traced, or why that cannot be cut out.
        settings: what re-routing it takes.
        sizes: numbers for the graph inputs that are symbolic sizes, as one call would have them.
        device: where the graph runs.
        has_gradients: whether a call may ask for gradients, which the kernels do not give.
        fuses_experts: whether experts become one operator whatever it gains, for what is then made of that operator.
        fuses_fp8: whether experts with FP8 weights may, whose kernels were not compared.
        prove: how the gate can be rewritten with proof, or the refusal where nothing is proven. With
            True: so that its weights may change as well.
        input_for: the graph input for a "similarity" or "projection" matrix [E, E], or for
            "counts".
        find_matrix: why there is no similarity matrix for the gate, or None; asked where it falls back from filling.
        projecting: whether weights are multiplied by projection coefficients.
        filling: whether lost slots are filled by the tokens' own scores; where that is refused, and
            `strict` is off, they are re-routed.
        strict: whether a refusal to fill is one to re-route.
        counting: whether what re-routing does is counted.
        proof: what was proven.
        weighed: what was proven of other weights, where there will be some.
        rewrite: how the gate was re-routed.
        done: the passes that changed the gate.
        refused: the passes that refused it, and why.
    """

    gate: Gate
    region: DispatchRegion | Skip
    settings: RoutingSettings
    sizes: Mapping[Node, int]
    device: torch.device
    has_gradients: bool
    prove: Callable[[Gate, bool], Proof | Skip]
    input_for: Callable[[str], Node]
    find_matrix: Callable[[], Skip | None] = lambda: None
    projecting: bool = False
    filling: bool = False
    strict: bool = False
    counting: bool = False
    fuses_experts: bool = False
    fuses_fp8: bool = False
    proof: Proof | None = None
    weighed: Proof | Skip | None = None
    rewrite: Rewrite | None = None
    done: list[str] = field(default_factory=list)
    refused: dict[str, Skip] = field(default_factory=dict)

    @property
    def merged(self) -> bool:
        """Whether a token's duplicates are merged: as proven, unless the experts are one operator of ours by now."""
        return self.gate.needs_merge if self.proof is None or self._is_fused else self.proof.merged

    @property
    def readers(self) -> tuple[Node, ...] | None:
        """The consumers of the weights that may see others, as proven; None for all that a fused dispatch has."""
        proof = self.weighed if isinstance(self.weighed, Proof) else self.proof
        return None if proof is None or self._is_fused else proof.readers

    @property
    def tables(self) -> tuple[tuple[Node, Node], ...]:
        """Where weights are picked out of a table by a mask of the ids, as proven."""
        return () if self.proof is None or self._is_fused else self.proof.tables

    @property
    def _is_fused(self) -> bool:
        """Whether the experts are one operator of ours by now, which takes ids and weights."""
        return self.proof is not None and self.gate.dispatch_uses != self.proof.gate.dispatch_uses

    @property
    def refused_weights(self) -> Skip | None:
        """Why its weights may not change, if so."""
        return self.weighed if isinstance(self.weighed, Skip) and not self._is_fused else None


@dataclass(frozen=True)
class Pass:
    """One entry of the pipeline.

    Attributes:
        name: the name of its file.
        switch: what turns it on, see `run_pipeline`.
        check: a refusal by sizes and settings, before the graph is looked at.
        rewrite: finds its part of the gate and changes it, or returns a refusal with the graph
            unchanged.
        replaces: the part of the gate that keeps stock kernels after a refusal; empty where speed
            is not the aim.
        unless: the passes whose work makes this one unnecessary.
        required: whether the gate is not re-routed after a refusal. Passes for speed run all the same.
        only_filling: whether it is for gates whose lost slots are filled.
    """

    name: str
    switch: str
    check: Callable[[Run], Skip | None]
    rewrite: Callable[[Run], Skip | None]
    replaces: str = ""
    unless: tuple[str, ...] = ()
    required: bool = False
    only_filling: bool = False


def run_pipeline(run: Run, is_on: Callable[[str], bool]) -> Skip | None:
    """Take a gate through the passes that are on. What was done and refused is recorded in `run`.

    Args:
        run: changed to what was done.
        is_on: whether the caller's options turn a switch on. A switch is asked when its pass is
            reached and not before: comparing a symbolic batch with a limit makes Dynamo guard on
            the answer.

    Returns:
        The refusal of a required pass, after which the gate must count as not re-routed.
    """
    required: Skip | None = None
    for entry in PIPELINE:
        if any(name in run.done for name in entry.unless) or (entry.only_filling and not run.filling):
            continue
        stays = required is not None and entry.switch == _REROUTE
        if stays or not is_on(entry.switch):
            continue
        refusal = entry.check(run) or entry.rewrite(run)
        if refusal is None:
            run.done.append(entry.name)
            continue
        run.refused[entry.name] = refusal
        if entry.required:
            required = refusal
    return required


def _nothing(run: Run) -> None:
    """A pass without conditions of its own."""


def _prove(run: Run) -> Skip | None:
    proof = run.prove(run.gate, False)
    if isinstance(proof, Skip):
        return proof
    if (run.projecting or run.filling) and run.gate.weights is not None:
        run.weighed = proof if proof.merged else run.prove(run.gate, True)
    if proof.tables and isinstance(run.weighed, Proof):
        proof = run.weighed  # weights of the slots can be scaled, a table's cannot
    run.proof, run.gate = proof, proof.gate
    return None


def _check_experts(run: Run) -> Skip | None:
    return None if run.fuses_experts else check_experts_gain(run.gate, run.has_gradients)


def _fuse_experts(run: Run) -> Skip | None:
    if isinstance(run.region, Skip):
        return run.region
    found = fuse_experts(run.gate, run.region, run.sizes, run.device, fp8=run.fuses_fp8)
    return _keep(run, found)


def _check_router(run: Run) -> Skip | None:
    return check_router_gains(run.gate, run.has_gradients)


def _fuse_router(run: Run) -> Skip | None:
    return _keep(run, fuse_router(run.gate, run.sizes, run.device))


def _check_joining(run: Run) -> Skip | None:
    if run.filling and run.refused_weights is not None:
        return run.refused_weights
    if run.merged or run.tables:
        return Skip(SkipReason.MERGES, run.gate.ids, f"its dispatch: {run.gate.dispatch}")
    # A count of what changed reads the ids as they were.
    return Skip(SkipReason.COUNTED, run.gate.ids, "collect_stats is on") if run.counting else None


def _fuse_reroute(run: Run) -> Skip | None:
    similarity = None if run.filling else run.input_for("similarity")
    return _keep(run, fuse_reroute(run.gate, similarity, run.settings, _projection(run)))


def _check_filling(run: Run) -> Skip | None:
    return run.refused_weights


def _fill_dispatch(run: Run) -> Skip | None:
    return _keep(run, fill_dispatch(run.gate, run.settings, run.readers))


def _check_fallback(run: Run) -> Skip | None:
    """What could not be filled is re-routed instead, unless that has to be an error or there is no matrix for it."""
    if not run.filling:
        return run.refused_weights
    unfilled = run.refused["fill_dispatch"]
    if run.strict:
        return replace(unfilled, evidence=max(unfilled.evidence, Evidence.EXPERTS))  # it is proven to be a gate
    missing = run.find_matrix()
    return None if missing is None else replace(missing, detail=f"{missing.detail}; it cannot be filled: {unfilled}")


def _reroute_dispatch(run: Run) -> Skip | None:
    # What fell back from filling has a threshold that is no similarity.
    settings = replace(run.settings, threshold=0.0) if run.filling else run.settings
    inputs = run.input_for("similarity"), settings, _projection(run)
    return _keep(run, reroute_dispatch(run.gate, *inputs, merged=run.merged, readers=run.readers, tables=run.tables))


def _projection(run: Run) -> Node | None:
    return run.input_for("projection") if run.projecting else None


def _count_routing(run: Run) -> None:
    if run.rewrite is not None:
        count_routing(run.rewrite, run.input_for("counts"))


def _keep(run: Run, found: Gate | Rewrite | Skip) -> Skip | None:
    if isinstance(found, Skip):
        return found
    if isinstance(found, Rewrite):
        run.rewrite = found
    else:
        run.gate = found
    return None


PIPELINE = (
    # The proof comes before the speed passes, which replace what it runs.
    Pass("verify_rewrite", _REROUTE, _nothing, _prove, required=True),
    Pass("fuse_experts", "lower_experts", _check_experts, _fuse_experts, replaces="experts"),
    Pass("fuse_router", "fuse_router", _check_router, _fuse_router, replaces="routing"),
    # One of the three re-routes.
    Pass("fuse_reroute", _REROUTE, _check_joining, _fuse_reroute),
    Pass("fill_dispatch", _REROUTE, _check_filling, _fill_dispatch, unless=("fuse_reroute",), only_filling=True),
    Pass(
        "reroute_dispatch",
        _REROUTE,
        _check_fallback,
        _reroute_dispatch,
        unless=("fuse_reroute", "fill_dispatch"),
        required=True,
    ),
    Pass("count_routing", "collect_stats", _nothing, _count_routing),
)
