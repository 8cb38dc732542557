"""Take one gate of a graph through the passes: the one place where a graph's routing changes, and is proven."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from ..experts.owner import Owners
from ..passes import (
    COUNTED,
    PIPELINE,
    Evidence,
    Gate,
    Proof,
    Run,
    Skip,
    SkipReason,
    check_savings,
    run_pipeline,
    verify_rewrite,
)
from ..passes.graph import nodes
from ..passes.graph.walk import walk
from ..passes.proof.region import ends_of
from ..passes.verify_rewrite import SHOWN
from ..report import REWRITTEN, SKIPPED
from . import dynamo
from .gate_plan import GatePlan
from .missing_gates import warn
from .outside.compare_versions import Verdict
from .outside.prove_outside import computes_the_same, prove_outside
from .outside.ways import ids_alone
from .traced_graph import TracedGraph

log = logging.getLogger(__name__)

_CUT = (
    "the buckets of DistributedDataParallel cut the graph where its ids are still to be read: raise bucket_cap_mb, or "
    "set torch._dynamo.config.optimize_ddp = False before the first call"
)


def rewrite_gate(
    plan: GatePlan,
    graph: TracedGraph,
    matrices: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    owners: Owners,
    find_matrix: Callable[[], Skip | None],
) -> Skip | None:
    """Do what a plan says, and record in it what was done.

    Args:
        plan: of a gate of the graph.
        graph: is changed.
        matrices: what re-routing reads, by kind, see `TracedGraph.place`; empty where there is
            nothing to re-route.
        weight: the router's.
        owners: of the router weights.
        find_matrix: asked once the gate is proven and reads a similarity matrix: why there is none, or None.

    Returns:
        Why the gate cannot be re-routed, where that was to be done.
    """
    if plan.status == SKIPPED:
        plan.unfused = plan.refusal
        return plan.refusal
    run = _run(plan, graph, matrices, weight, owners, find_matrix)
    refusal = run_pipeline(run, _switches(plan, run, graph.takes_kernels))
    plan.kernels, plan.unfused = _kernels(run), run.refused.get("fuse_experts")
    plan.merged = run.rewrite is not None and run.rewrite.merged
    if run.proof is not None:
        plan.gate, plan.proof = run.proof.gate, run.proof.shown if run.rewrite is not None else ""
    plan.is_filled = run.rewrite is not None and run.rewrite.filled
    if run.rewrite is not None and "fill_dispatch" in run.refused:
        plan.fallback = f"re-routed, not filled: {run.refused['fill_dispatch']}"
        warn(log, f"{plan.name} is {plan.fallback}")
    if run.rewrite is not None and plan.saves_nothing:
        warn(log, f"{plan.name} is re-routed, but {plan.saves_nothing}")
    _log(plan, run)
    if refusal is not None:
        graph.drop_unused(plan)
        plan.refuse(refusal)
    elif run.rewrite is not None:
        plan.status = REWRITTEN
    return refusal


def _run(
    plan: GatePlan,
    graph: TracedGraph,
    matrices: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    owners: Owners,
    find_matrix: Callable[[], Skip | None],
) -> Run:
    """What the passes ask of the graph and of the call that it is rewritten for."""

    def input_for(kind: str) -> Node:
        counting = kind == "counts"
        value = torch.zeros(len(COUNTED), dtype=torch.int64, device=weight.device) if counting else matrices[kind]
        return graph.place(plan, kind, value)

    filling = plan.config.substitution == "fill"

    def prove(gate: Gate, weighing: bool) -> Proof | Skip:
        proof = _prove(plan, gate, weight, graph, owners, weighing=weighing)
        if isinstance(proof, Skip):
            return proof
        plan.saves_nothing = plan.saves_nothing or _saves_nothing(plan, graph, proof, weight.device)
        # What fills lost slots reads no matrix, until that is refused. Nobody measures one for what is not re-routed.
        return proof if filling else find_matrix() or proof

    inputs = graph.module.graph.find_nodes(op="placeholder")
    return Run(
        gate=plan.gate,
        region=plan.region,
        settings=plan.settings,
        sizes={node: value for node in inputs if isinstance(value := graph.value_of(node), int)},
        device=weight.device,
        has_gradients=graph.has_gradients,
        prove=prove,
        input_for=input_for,
        find_matrix=find_matrix,
        projecting=plan.config.substitution == "projection",
        filling=filling,
        strict=plan.config.strict,
        counting=plan.config.collect_stats,
        fuses_experts=graph.fuses_experts,
        fuses_fp8=plan.config.lower_experts == "always",
    )


def _saves_nothing(plan: GatePlan, graph: TracedGraph, proof: Proof, device: torch.device) -> str:
    """Why re-routing reads no fewer weights, unless the experts may become an operator that runs the chosen ones."""
    may_fuse = not isinstance(plan.region, Skip) and graph.takes_kernels and plan.config.acts("lower_experts", device)
    found = None if may_fuse else check_savings(proof.gate, proof.experts)
    return "" if found is None else f"{found.reason.value} ({found.detail})"


def _switches(plan: GatePlan, run: Run, takes_kernels: bool) -> Callable[[str], bool]:
    """Which of the pipeline's switches the options of a gate turn on."""
    config = plan.config

    def is_on(switch: str) -> bool:
        match switch:
            case "lower_experts" if run.fuses_experts:
                return True
            case "lower_experts" | "fuse_router":
                return takes_kernels and config.acts(switch, run.device)
            case "reroute":
                return plan.is_to_reroute
            case "collect_stats":
                return config.collect_stats and run.rewrite is not None
        raise ValueError(f"no option turns on {switch}")

    return is_on


def _kernels(run: Run) -> str:
    """What the speed passes did, and why not more."""
    speed = [entry for entry in PIPELINE if entry.replaces]
    replaced = " and ".join(entry.replaces for entry in speed if entry.name in run.done)
    kept = [f"stock {entry.replaces}: {run.refused[entry.name]}" for entry in speed if entry.name in run.refused]
    return "; ".join([*([replaced] if replaced else []), *kept])


def _log(plan: GatePlan, run: Run) -> None:
    if run.proof is not None and run.rewrite is not None:  # else a refusal follows, and nothing is what was proven
        log.info("%s: proven: S = K changes no bit; S < K gives %s", plan.name, run.proof.shown)
    for entry in PIPELINE:
        if entry.replaces and entry.name in run.refused:
            log.info("%s keeps its %s: %s", plan.name, entry.replaces, run.refused[entry.name])


def _prove(
    plan: GatePlan, gate: Gate, weight: torch.Tensor, graph: TracedGraph, owners: Owners, *, weighing: bool
) -> Proof | Skip:
    """How a gate can be rewritten, and what is proven of that, or the refusal where nothing is.

    Ids and weights that leave the graph go to code that it does not show: that is run.
    """

    def run_outside(gate: Gate) -> Proof | Skip:
        if graph.is_piece:  # what is behind the cut is no code that could be run
            return Skip(SkipReason.UNVERIFIED, gate.selection, _CUT, Evidence.EXPERTS)
        verdict = prove_outside(gate, owners.find(weight))
        if verdict.merged is None:
            evidence = Evidence.EXPERTS if verdict.is_gate else Evidence.ROUTER
            reason = SkipReason.UNVERIFIED if verdict.is_gate else SkipReason.NO_DISPATCH
            return Skip(reason, gate.selection, verdict.reason, evidence)
        if weighing and not verdict.merged:
            detail = "the code that receives its weights does more than multiply what the experts give by them"
            return Skip(SkipReason.UNVERIFIED, gate.selection, detail, Evidence.EXPERTS)
        plan.saves_nothing = verdict.saves_nothing
        _hold_to(graph, gate, verdict)
        shown = ids_alone(gate) if verdict.ids_alone else gate
        return Proof(shown or gate, verdict.merged, None, frozenset(), f"{SHOWN}; the code outside the graph was run")

    proof = verify_rewrite(gate, graph.value_of, run_outside, weighing=weighing)
    if not graph.others_follow or not isinstance(proof, Proof) or proof.shown != SHOWN or not _leaves_beside(gate):
        return proof
    if graph.is_piece:
        return Skip(SkipReason.UNVERIFIED, gate.selection, _CUT, Evidence.EXPERTS)
    # The graph holds a dispatch, and others may send the same tokens to more of the same experts.
    verdict = prove_outside(gate, owners.find(weight), kept=True)
    if verdict.block >= 0:  # a layer whose code outside does something else has a graph of its own
        _hold_to(graph, gate, verdict)
    if proof.merged in verdict.off:
        return Skip(SkipReason.UNVERIFIED, gate.selection, verdict.reason, Evidence.EXPERTS)
    return proof


def _hold_to(graph: TracedGraph, gate: Gate, verdict: Verdict) -> None:
    """Let the graph serve what the code outside it was tried for; for other calls Dynamo compiles anew.

    Dynamo reuses the graph for other layers with the same code: those whose experts differ compile their own. And it
    serves any number of tokens, where code that drops those beyond a number was tried on some.
    """
    dynamo.guard_input(gate.router_weight, lambda other: computes_the_same(other, verdict), "sere proof of experts")
    if verdict.rows:
        slots = math.prod(nodes.value(gate.ids).shape)
        dynamo.serve_at_most(graph.module.graph, slots, verdict.rows * gate.top_k)


def _leaves_beside(gate: Gate) -> bool:
    """Whether the ids, or what is made of them, leave the graph ahead of what their dispatch gives."""
    ends = ends_of(gate)
    if isinstance(ends, Skip):
        return False
    reached = walk(gate.all_ids, lambda node: [] if node in (ends.complete, ends.exit) else nodes.followers(node))
    return any(node.op == "output" for node in reached)
