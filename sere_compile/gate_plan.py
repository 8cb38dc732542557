"""Decide for each gate of a Dynamo graph what is done to it, and do it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import dynamo
from .config import SereConfig
from .errors import GateNotFoundError
from .module_tree import find_experts
from .passes import (
    COUNTED,
    DispatchRegion,
    Gate,
    Rewrite,
    RoutingSettings,
    Skip,
    extract_dispatch,
    insert_count,
    nodes,
    rewrite_gate,
)
from .report import IDENTITY, REWRITTEN, SKIPPED

log = logging.getLogger(__name__)


@dataclass
class GatePlan:
    """One gate of one graph: where its weight comes from and what is done to it."""

    gate: Gate
    position: int | None  # of the weight among the graph's inputs; None where it is an attribute of the graph
    attribute: torch.Tensor | None
    fallback_name: str
    select_top_k: int
    region: DispatchRegion | str
    graph: GraphModule
    inputs: list[Node]  # the graph's own inputs, in order
    status: str = IDENTITY
    reason: str = ""

    def weight(self, arguments: Sequence[Any]) -> torch.Tensor:
        """The router weight that a call with these graph inputs uses."""
        return self.attribute if self.position is None else arguments[self.position]  # type: ignore[return-value]


@dataclass
class AppendedInput:
    """One input appended to the graph: a gate's matrix or its counters."""

    plan: GatePlan
    counts: bool


def plan_gate(gate: Gate, config: SereConfig, graph: GraphModule) -> GatePlan:
    """A plan before anything is done: identity until `apply_plan` rewrites the gate."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    lifted = gate.router_weight.op == "placeholder"
    return GatePlan(
        gate=gate,
        position=placeholders.index(gate.router_weight) if lifted else None,
        attribute=None if lifted else attribute(graph, gate.router_weight),
        fallback_name=dynamo.input_name(gate.router_weight),
        select_top_k=config.resolved_top_k(gate.top_k),
        region=extract_dispatch(gate),
        graph=graph,
        inputs=placeholders,
    )


def apply_plan(
    plan: GatePlan, config: SereConfig, graph: GraphModule, inputs: list[Any], example_inputs: Sequence[Any]
) -> list[AppendedInput]:
    """Rewrite one gate; its new inputs are appended to the graph and, as fake values, to `inputs`."""
    gate = plan.gate
    if plan.select_top_k >= gate.top_k:
        plan.reason = f"S = {plan.select_top_k}: nothing to re-route"
        return []
    if _too_many_tokens(gate, config.max_tokens):
        plan.reason = f"more than max_tokens = {config.max_tokens} tokens"
        return []
    weight = plan.weight(example_inputs)
    matrix = torch.empty(gate.num_experts, gate.num_experts, device=weight.device)
    index = len(inputs)
    node, fake = dynamo.append_input(graph, f"sere_similarity_{index}", matrix, inputs)
    settings = RoutingSettings(plan.select_top_k, config.threshold, config.resolved_min_active(gate.top_k))
    done = rewrite_gate(gate, node, settings)
    if isinstance(done, Skip):
        graph.graph.erase_node(node)
        plan.status, plan.reason = SKIPPED, str(done)
        if config.strict:
            raise GateNotFoundError(f"strict=True, and {plan.fallback_name} cannot be re-routed: {done}")
        log.warning("%s is not re-routed: %s", plan.fallback_name, done)
        return []
    inputs.append(fake)
    plan.status = REWRITTEN
    appended = [AppendedInput(plan, counts=False)]
    if config.collect_stats:
        appended.append(_apply_count(plan, done, graph, inputs, weight.device))
    return appended


def _apply_count(
    plan: GatePlan, done: Rewrite, graph: GraphModule, inputs: list[Any], device: torch.device
) -> AppendedInput:
    buffer = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
    node, fake = dynamo.append_input(graph, f"sere_counts_{len(inputs)}", buffer, inputs)
    insert_count(done, node)
    inputs.append(fake)
    return AppendedInput(plan, counts=True)


def _too_many_tokens(gate: Gate, max_tokens: int | None) -> bool:
    """Compares the batch with the limit. A symbolic batch makes Dynamo guard on the answer: two graphs at most."""
    if max_tokens is None:
        return False
    return bool(nodes.value(gate.ids).numel() > max_tokens * gate.top_k)


def experts_are_live(graph: GraphModule, inputs: Sequence[Any]) -> Callable[[Node, int], bool]:
    """Evidence for ids that leave the graph: experts stand beside the module that owns the router weight."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))

    def evidence(weight: Node, num_experts: int) -> bool:
        tensor = attribute(graph, weight) if weight.op == "get_attr" else inputs[placeholders.index(weight)]
        return isinstance(tensor, torch.Tensor) and find_experts(tensor, num_experts) is not None

    return evidence


def attribute(graph: GraphModule, node: Node) -> torch.Tensor:
    """The tensor behind a get_attr node."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)
