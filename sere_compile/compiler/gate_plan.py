"""Decide for each gate of a graph what is to be done to it; what was done is recorded in the plan as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ..config import SereConfig
from ..experts.experts_module import count_experts_beside
from ..experts.owner import Owners
from ..idle import tell_once, too_many_primary
from ..passes import (
    DispatchRegion,
    Evidence,
    Findings,
    Gate,
    RoutingSettings,
    Skip,
    SkipReason,
    extract_dispatch,
    has_more_tokens,
    verify_rewrite,
)
from ..passes.graph import nodes
from ..passes.graph.run_part import ValueOf
from ..report import IDENTITY, SKIPPED
from ..similarity import binding
from ..similarity.threshold import threshold_in_graph
from . import dynamo, gate_options


@dataclass
class GatePlan:
    """One gate of one graph: where its weight comes from, what is to be done to it, and what was done."""

    gate: Gate  # as it was found
    name: str  # of its router's weight, as the graph has it
    config: SereConfig  # of this gate
    given: SereConfig  # of all gates
    region: DispatchRegion | Skip
    constant: torch.Tensor | None  # the weight, where every call has the same
    position: int | None = None  # of the weight among the graph's inputs, where a call brings it
    status: str = IDENTITY
    reason: str = ""  # why it is not re-routed
    refusal: Skip | None = None  # the same, where it should have been
    kernels: str = ""  # what the speed passes did, and why not more; empty where they are off
    unfused: Skip | None = None  # why its experts are not one operator, where they should be
    proof: str = ""  # what was shown of the rewrite
    merged: bool = False  # whether a token's duplicates are merged
    is_filled: bool = False  # by the tokens' own scores, for which there is no matrix
    fallback: str = ""  # why it is re-routed where it should have been filled
    saves_nothing: str = ""  # why no fewer weights are read where it is re-routed
    # Gates of the graph with the same router, and so the same experts; the plan itself is one of them.
    sharing: Sequence[GatePlan] = field(default=(), compare=False, repr=False)

    @property
    def select_top_k(self) -> int:
        """S."""
        return self.config.resolved_top_k(self.gate.top_k)

    @property
    def is_to_reroute(self) -> bool:
        """Whether there is something to re-route, and nothing is known against it."""
        return self.status != SKIPPED and not self.reason

    @property
    def settings(self) -> RoutingSettings:
        """What the options come to for this gate."""
        config, top_k = self.config, self.gate.top_k
        rho, least = threshold_in_graph(config.threshold), config.resolved_min_active(top_k)
        return RoutingSettings(self.select_top_k, rho, least, config.max_active or 0)

    def weight(self, arguments: Sequence[Any]) -> torch.Tensor:
        """The router weight that a call with these graph inputs uses."""
        return self.constant if self.position is None else arguments[self.position]  # type: ignore[return-value]

    @property
    def showing_experts(self) -> list[GatePlan]:
        """Plans of which each may show the experts of this one; its own is the first."""
        return [self, *(plan for plan in self.sharing if plan is not self)]

    def decide(self, exceeds: Callable[[Gate, int], bool]) -> None:
        """Record why there is nothing to re-route, if so; `exceeds`: whether a batch has more tokens than a limit."""
        limit = self.config.max_tokens
        if (idle := too_many_primary(self.config, self.gate.top_k)) != "":
            self.reason = idle
            tell_once(self.name, idle)
        elif self.select_top_k >= self.gate.top_k:
            self.reason = f"S = {self.select_top_k}: nothing to re-route"
        elif 0 in [size for size in nodes.shape(self.gate.ids) or () if isinstance(size, int)]:
            self.reason = "no tokens: nothing to re-route"
        elif limit is not None and exceeds(self.gate, limit):
            self.reason = f"more than max_tokens = {limit} tokens"

    def refuse(self, refusal: Skip) -> None:
        """Record that the gate cannot be re-routed."""
        self.status, self.reason, self.refusal = SKIPPED, str(refusal), refusal


def plan_gates(
    gates: Sequence[Gate], config: SereConfig, inputs: Sequence[Node], value_of: ValueOf, owners: Owners
) -> list[GatePlan]:
    """Plans for the gates of a Dynamo graph, before anything is done to them.

    Args:
        gates: of the graph.
        config: of all gates.
        inputs: of the graph.
        value_of: what they hold in the call that is compiled.
        owners: of the router weights.
    """
    plans = [_plan_gate(gate, config, inputs, value_of, owners) for gate in gates]
    refuse_shared_routers(plans, value_of)
    return plans


def without_look_alikes(plans: Sequence[GatePlan], findings: Findings) -> tuple[list[GatePlan], Findings]:
    """The plans of gates, and findings in which the others are refused selections.

    That ids which leave the graph reach no experts shows only when the code that receives them is run.
    """
    others = [plan.refusal for plan in plans if plan.refusal is not None and not plan.refusal.is_refused_gate]
    gates = [plan for plan in plans if plan.refusal is None or plan.refusal.is_refused_gate]
    return gates, replace(findings, skips=(*findings.skips, *others))


def _plan_gate(gate: Gate, config: SereConfig, inputs: Sequence[Node], value_of: ValueOf, owners: Owners) -> GatePlan:
    router, weight = gate.router_weight, value_of(gate.router_weight)
    is_input = router.op == "placeholder"
    name, own = dynamo.input_name(router), config
    if config.per_gate:
        gate_options.tell_unknown_of_model(config, owners.find(weight), gate.num_experts)
        own = gate_options.config_of(config, weight, name, owners)
        gate_options.guard(config, own, router, name)
    plan = GatePlan(
        gate=gate,
        name=name,
        config=own,
        given=config,
        region=extract_dispatch(gate),
        constant=None if is_input else weight,
        position=inputs.index(router) if is_input else None,
    )
    plan.decide(has_more_tokens)
    return plan


def refuse_shared_routers(plans: Sequence[GatePlan], value_of: ValueOf) -> None:
    """Skip gates that share a router weight but not their experts: one matrix cannot describe both."""
    sharing: dict[tuple[str, Any], list[GatePlan]] = {}
    for plan in plans:
        if plan.is_to_reroute:
            sharing.setdefault(_identity(plan.gate.router_weight), []).append(plan)
    for found in sharing.values():
        for plan in found:
            plan.sharing = found
        experts = {_experts_of(plan, value_of) for plan in found} if len(found) > 1 else set()
        if len(experts - {frozenset()}) > 1:
            selections = ", ".join(nodes.place(plan.gate.selection) for plan in found)
            for plan in found:
                plan.refuse(Skip(SkipReason.SHARED_ROUTER, plan.gate.selection, selections, Evidence.EXPERTS))


def _experts_of(plan: GatePlan, value_of: ValueOf) -> frozenset[tuple[str, Any]]:
    """The parameters of a gate's experts, where its dispatch is in the graph and proven."""
    proof = verify_rewrite(plan.gate, value_of)
    return frozenset() if isinstance(proof, Skip) else frozenset(map(_identity, proof.experts))


def _identity(node: Node) -> tuple[str, Any]:
    """What tells a graph input or attribute from others: make_fx reads an attribute anew for each use."""
    return node.op, node.target


def experts_are_live(value_of: ValueOf, owners: Owners) -> Callable[[Node, int], int]:
    """Evidence for ids that leave the graph: experts stand beside the module that owns the router weight."""

    def evidence(router: Node, columns: int) -> int:
        weight = value_of(router)
        if not isinstance(weight, torch.Tensor):
            return 0
        entry = binding.lookup(weight)
        if entry is not None and entry.from_profile and entry.matrix is not None:
            return min(entry.matrix.shape[0], columns)
        return count_experts_beside(owners.find(weight), columns)

    return evidence
