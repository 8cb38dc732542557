"""Decide for each gate of a Dynamo graph what is done to it, and do it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..config import SereConfig
from ..errors import GateNotFoundError
from ..experts.module_tree import count_experts_beside
from ..passes import (
    COUNTED,
    PIPELINE,
    DispatchRegion,
    Gate,
    RoutingSettings,
    Run,
    Skip,
    extract_dispatch,
    has_more_tokens,
    run_pipeline,
)
from ..report import IDENTITY, REWRITTEN, SKIPPED
from ..similarity import binding
from ..similarity.threshold import RANKED_THRESHOLD
from . import dynamo, gate_options
from .verify_gate import verify_gate

log = logging.getLogger(__name__)


@dataclass
class GatePlan:
    """One gate of one graph: where its weight comes from and what is done to it."""

    gate: Gate
    position: int | None  # of the weight among the graph's inputs; None where it is an attribute of the graph
    attribute: torch.Tensor | None
    fallback_name: str
    config: SereConfig  # of this gate
    given: SereConfig  # of all gates
    region: DispatchRegion | Skip
    graph: GraphModule
    inputs: list[Node]  # the graph's own inputs, in order
    status: str = IDENTITY
    reason: str = ""
    kernels: str = ""  # what the speed passes did, and why not more; empty where they are off
    proof: str = ""  # what strict=True has shown of the rewrite

    @property
    def select_top_k(self) -> int:
        """S."""
        return self.config.resolved_top_k(self.gate.top_k)

    def weight(self, arguments: Sequence[Any]) -> torch.Tensor:
        """The router weight that a call with these graph inputs uses."""
        return self.attribute if self.position is None else arguments[self.position]  # type: ignore[return-value]


@dataclass(frozen=True)
class AppendedInput:
    """One input appended to the graph: what a gate reads or writes beside the graph's own inputs."""

    plan: GatePlan
    kind: str  # "similarity", "projection" or "counts"


class AppendedInputs:
    """The inputs appended to a graph, one of a kind for each router weight.

    A weight that two gates of a graph share has one matrix and one counter: two graph inputs with the same memory
    would be taken for different memory.
    """

    def __init__(self, graph: GraphModule, inputs: list[Any]) -> None:
        self._graph = graph
        self.inputs = list(inputs)
        self.items: list[AppendedInput] = []
        self._nodes: dict[tuple[Node, str], Node] = {}

    def input_for(self, plan: GatePlan, value: torch.Tensor, kind: str) -> Node:
        """The placeholder for a gate's matrix or counters, where calls will pass tensors like `value`."""
        key = (plan.gate.router_weight, kind)
        if key not in self._nodes:
            name = f"sere_{kind}_{len(self.inputs)}"
            self._nodes[key], fake = dynamo.append_input(self._graph, name, value, self.inputs)
            self.inputs.append(fake)
            self.items.append(AppendedInput(plan, kind))
        return self._nodes[key]

    def drop_unused(self, plan: GatePlan) -> None:
        """Take back the matrices that were appended last for a gate, unless another gate reads them."""
        for kind in ("projection", "similarity"):
            key = (plan.gate.router_weight, kind)
            if key in self._nodes and not self._nodes[key].users:
                node = self._nodes.pop(key)
                node.graph.erase_node(node)
                self.inputs.pop()
                self.items.pop()


def plan_gate(gate: Gate, config: SereConfig, graph: GraphModule, example_inputs: Sequence[Any] = ()) -> GatePlan:
    """A plan before anything is done: identity until `apply_plan` rewrites the gate."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    lifted = gate.router_weight.op == "placeholder"
    position = placeholders.index(gate.router_weight) if lifted else None
    constant = None if lifted else attribute(graph, gate.router_weight)
    name, own = dynamo.input_name(gate.router_weight), config
    if config.per_gate:
        weight: torch.Tensor = example_inputs[position] if position is not None else constant  # type: ignore[assignment]
        gate_options.tell_unknown_of_model(config, weight, gate.num_experts)
        own = gate_options.config_of(config, weight, name)
        gate_options.guard(config, own, gate.router_weight, name)
    return GatePlan(
        gate=gate,
        position=position,
        attribute=constant,
        fallback_name=name,
        config=own,
        given=config,
        region=extract_dispatch(gate),
        graph=graph,
        inputs=placeholders,
    )


def routing_settings(gate: Gate, config: SereConfig) -> RoutingSettings:
    """What the options come to for one gate."""
    top_k, threshold = config.resolved_top_k(gate.top_k), config.threshold
    rho = RANKED_THRESHOLD if isinstance(threshold, str) else float(threshold)
    return RoutingSettings(top_k, rho, config.resolved_min_active(gate.top_k), config.max_active or 0)


def apply_plan(
    plan: GatePlan, appended: AppendedInputs, example_inputs: Sequence[Any], *, reporting: bool = False
) -> None:
    """Rewrite one gate; what its calls need beyond the graph's own inputs is recorded in `appended`.

    Args:
        plan: changed to what was done.
        appended: inputs of the graph so far.
        example_inputs: the graph's own inputs.
        reporting: refusals become rows of a report, also with strict=True.

    Raises:
        GateNotFoundError: with strict=True, the gate cannot be re-routed.
    """
    if plan.status == SKIPPED:
        return
    run = _run(plan, appended, example_inputs)
    refused = run_pipeline(run, _switches(plan, run))
    plan.proof, plan.kernels = run.proof, _kernels(run)
    for entry in PIPELINE:
        if entry.replaces and entry.name in run.refused:
            log.info("%s keeps its %s: %s", plan.fallback_name, entry.replaces, run.refused[entry.name])
    if refused is not None:
        appended.drop_unused(plan)
        _skip(plan, refused, raising=plan.config.strict and not reporting)
    elif run.rewrite is not None:
        plan.status = REWRITTEN
    else:
        plan.reason = _why_identity(plan, run.gate)


def _run(plan: GatePlan, appended: AppendedInputs, example_inputs: Sequence[Any]) -> Run:
    """What the passes ask of a Dynamo graph and of the call that it is compiled for."""
    config, weight, experts = plan.config, plan.weight(example_inputs), plan.gate.num_experts

    def input_for(kind: str) -> Node:
        counting = kind == "counts"
        shape, dtype = ((len(COUNTED),), torch.int64) if counting else ((experts, experts), torch.float32)
        return appended.input_for(plan, torch.zeros(shape, dtype=dtype, device=weight.device), kind)

    return Run(
        gate=plan.gate,
        region=plan.region,
        settings=routing_settings(plan.gate, config),
        sizes={
            node: value.node.hint if isinstance(value, torch.SymInt) else value
            for node, value in zip(plan.inputs, example_inputs, strict=False)
            if isinstance(value, (int, torch.SymInt))
        },
        device=weight.device,
        has_gradients=torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in example_inputs),
        prove=lambda gate: verify_gate(gate, weight, _known_values(plan, example_inputs)),
        input_for=input_for,
        projecting=config.substitution == "projection",
        counting=config.collect_stats,
    )


def _switches(plan: GatePlan, run: Run) -> Callable[[str], bool]:
    """Which of the pipeline's switches the options of a gate turn on."""
    config = plan.config

    def is_on(switch: str) -> bool:
        match switch:
            case "lower_experts" | "fuse_router":
                option = getattr(config, switch)
                return option == "always" or (bool(option) and run.device.type == "cuda")
            case "strict":
                return config.strict and plan.select_top_k < plan.gate.top_k
            case "reroute":
                return not _why_identity(plan, run.gate)
            case "collect_stats":
                return config.collect_stats and run.rewrite is not None
        raise ValueError(f"no option turns on {switch}")

    return is_on


def _why_identity(plan: GatePlan, gate: Gate) -> str:
    """Why a gate's ids stay as they are, by the options; empty where they do not."""
    if plan.select_top_k >= gate.top_k:
        return f"S = {plan.select_top_k}: nothing to re-route"
    limit = plan.config.max_tokens
    return f"more than max_tokens = {limit} tokens" if has_more_tokens(gate, limit) else ""


def _kernels(run: Run) -> str:
    """What the speed passes did, and why not more."""
    speed = [entry for entry in PIPELINE if entry.replaces]
    replaced = " and ".join(entry.replaces for entry in speed if entry.name in run.done)
    kept = [f"stock {entry.replaces}: {run.refused[entry.name]}" for entry in speed if entry.name in run.refused]
    return "; ".join([*([replaced] if replaced else []), *kept])


def _skip(plan: GatePlan, refusal: Skip, *, raising: bool) -> None:
    plan.status, plan.reason = SKIPPED, str(refusal)
    if raising:
        raise GateNotFoundError(f"strict=True, and {plan.fallback_name} cannot be re-routed: {refusal}")
    log.warning("%s is not re-routed: %s", plan.fallback_name, refusal)


def _known_values(plan: GatePlan, example_inputs: Sequence[Any]) -> Callable[[Node], Any]:
    """What the graph's inputs hold at compile time, and its attributes."""
    held = dict(zip(plan.inputs, example_inputs, strict=False))

    def value_of(node: Node) -> Any:
        return attribute(plan.graph, node) if node.op == "get_attr" else held.get(node)

    return value_of


def refuse_shared_routers(plans: list[GatePlan]) -> None:
    """Skip gates that share a router weight but not their experts: one matrix cannot describe both."""
    experts: dict[Node, set[tuple[Node, ...]]] = {}
    for plan in plans:
        if isinstance(plan.region, DispatchRegion):
            experts.setdefault(plan.gate.router_weight, set()).add(plan.region.inputs)
    for plan in plans:
        if len(experts.get(plan.gate.router_weight, ())) > 1:
            plan.status, plan.reason = SKIPPED, "its router weight also selects from other experts"
            log.warning("%s is not re-routed: %s", plan.fallback_name, plan.reason)


def experts_are_live(graph: GraphModule, inputs: Sequence[Any]) -> Callable[[Node, int], int]:
    """Evidence for ids that leave the graph: experts stand beside the module that owns the router weight."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))

    def evidence(weight: Node, columns: int) -> int:
        tensor = attribute(graph, weight) if weight.op == "get_attr" else inputs[placeholders.index(weight)]
        if not isinstance(tensor, torch.Tensor):
            return 0
        entry = binding.lookup(tensor)
        if entry is not None and entry.from_profile and entry.matrix is not None:
            return min(entry.matrix.shape[0], columns)
        return count_experts_beside(tensor, columns)

    return evidence


def attribute(graph: GraphModule, node: Node) -> torch.Tensor:
    """The tensor behind a get_attr node."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)
