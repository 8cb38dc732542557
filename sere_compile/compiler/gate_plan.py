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
    MAX_SLOTS,
    MAX_TOKENS,
    DispatchRegion,
    Gate,
    RoutingSettings,
    Skip,
    extract_dispatch,
    fuse_experts,
    fuse_reroute,
    fuse_router,
    insert_count,
    reroute_dispatch,
)
from ..passes.graph import nodes
from ..report import IDENTITY, REWRITTEN, SKIPPED
from ..similarity import binding
from ..similarity.threshold import RANKED_THRESHOLD
from . import dynamo, gate_options
from .verify_gate import verify_gate

log = logging.getLogger(__name__)

# Slots an expert, on average, up to which the expert kernels were never measured slower than stock (docs/kernels.md).
MAX_SLOTS_PER_EXPERT = 24


@dataclass
class GatePlan:
    """One gate of one graph: where its weight comes from and what is done to it."""

    gate: Gate
    position: int | None  # of the weight among the graph's inputs; None where it is an attribute of the graph
    attribute: torch.Tensor | None
    fallback_name: str
    config: SereConfig  # of this gate
    given: SereConfig  # of all gates
    region: DispatchRegion | str
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
    config = plan.config
    if plan.status == SKIPPED:
        return
    if config.strict and plan.select_top_k < plan.gate.top_k:
        # Before the speed passes: they replace what the check runs.
        shown = verify_gate(plan.gate, plan.weight(example_inputs), _known_values(plan, example_inputs))
        if isinstance(shown, Skip):
            _skip(plan, shown, raising=not reporting)
            return
        plan.proof = shown
    gate = lower(plan, config, example_inputs)
    if plan.select_top_k >= gate.top_k:
        plan.reason = f"S = {plan.select_top_k}: nothing to re-route"
        return
    if too_many_tokens(gate, config.max_tokens):
        plan.reason = f"more than max_tokens = {config.max_tokens} tokens"
        return
    weight = plan.weight(example_inputs)
    matrix = torch.empty(gate.num_experts, gate.num_experts, dtype=torch.float32, device=weight.device)
    node = appended.input_for(plan, matrix, "similarity")
    scale = appended.input_for(plan, matrix, "projection") if config.substitution == "projection" else None
    settings = routing_settings(gate, config)
    # A count of what changed reads the ids as they were.
    joined = "its ids are counted" if config.collect_stats else fuse_reroute(gate, node, settings, scale)
    done = reroute_dispatch(gate, node, settings, scale) if isinstance(joined, str) else joined
    if isinstance(done, Skip):
        appended.drop_unused(plan)
        _skip(plan, done, raising=config.strict and not reporting)
        return
    plan.status = REWRITTEN
    if config.collect_stats:
        buffer = torch.zeros(len(COUNTED), dtype=torch.int64, device=weight.device)
        insert_count(done, appended.input_for(plan, buffer, "counts"))


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


def lower(plan: GatePlan, config: SereConfig, example_inputs: Sequence[Any]) -> Gate:
    """Apply the speed passes that are on to a gate, re-routed or not; the gate as it is then. The plan says why not."""
    gate, device = plan.gate, plan.weight(example_inputs).device
    options = {"experts": config.lower_experts, "routing": config.fuse_router}
    wanted = [part for part, option in options.items() if option == "always" or (option and device.type == "cuda")]
    sizes = {
        node: value.node.hint if isinstance(value, torch.SymInt) else value
        for node, value in zip(plan.inputs, example_inputs, strict=False)
        if isinstance(value, (int, torch.SymInt))
    }
    replaced, kept = [], []
    for part in wanted:
        done: Gate | str | None = _stays(gate, part, example_inputs)
        if done is None and part == "routing":
            done = fuse_router(gate, sizes, device)
        elif done is None:
            done = plan.region if isinstance(plan.region, str) else fuse_experts(gate, plan.region, sizes, device)
        if isinstance(done, str):
            log.info("%s keeps its %s: %s", plan.fallback_name, part, done)
            kept.append(f"stock {part}: {done}")
        elif done is not None:
            gate = done
            replaced.append(part)
    plan.kernels = "; ".join([*([" and ".join(replaced)] if replaced else []), *kept])
    return gate


def _stays(gate: Gate, part: str, example_inputs: Sequence[Any]) -> str | None:
    """Why a part of a gate is left alone without looking at it."""
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in example_inputs):
        return "gradients are on"
    if too_many_tokens(gate, MAX_TOKENS):
        return f"more than {MAX_TOKENS} tokens"
    if part == "experts" and nodes.value(gate.ids).numel() > MAX_SLOTS_PER_EXPERT * gate.num_experts:
        return (
            f"more than {MAX_SLOTS_PER_EXPERT} slots for each of its {gate.num_experts} experts, where stock is as fast"
        )
    if part == "experts" and nodes.value(gate.ids).numel() > MAX_SLOTS:
        return f"more than {MAX_SLOTS} slots, which no kernel takes"
    return None


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


def too_many_tokens(gate: Gate, max_tokens: int | None) -> bool:
    """Compares the batch with the limit. A symbolic batch makes Dynamo guard on the answer: two graphs at most."""
    if max_tokens is None:
        return False
    return bool(nodes.value(gate.ids).numel() > max_tokens * gate.top_k)


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
