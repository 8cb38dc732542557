"""Run a model and see, at each of its gates, what every expert would give for the tokens that arrive there.

The model is compiled with a backend that leaves Dynamo's graphs as they are, but for one call in
front of each gate's dispatch. Where the experts run outside the graph, the module beside the router
stands in for them; where nothing does, or no gate is in a graph at all, the model is traced with
sizes that depend on data, as `sere_compile.compile` does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..compiler import dynamo
from ..compiler.dynamo_graph import DynamoGraph
from ..compiler.gate_plan import GatePlan, experts_are_live, plan_gates
from ..compiler.obstacle import diagnose, no_gate_ran
from ..compiler.same_numbers import buffers_restored
from ..config import SereConfig
from ..errors import CalibrationError
from ..experts.counterfactual import CounterfactualExperts, agree, of_module, of_region
from ..experts.experts_module import Experts, find_experts
from ..experts.hidden_states import draw, scale_at
from ..experts.owner import Owners, routers_in
from ..passes import DispatchRegion, NormScale, UseKind, find_gates
from ..passes.graph import nodes
from ..report import SKIPPED
from ..similarity.profile_file import some

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """What arrived at one gate in one forward.

    Attributes:
        name: of the router's weight.
        num_experts: E.
        tokens: T.
        device: where it runs.
        experts: gives the outputs of all experts for chosen tokens.
    """

    name: str
    num_experts: int
    tokens: int
    device: torch.device
    experts: CounterfactualExperts


class _NotShownError(Exception):
    """No graph of this call shows the experts of a gate; another way to trace the model may."""


@contextlib.contextmanager
def _wrong_arguments_told() -> Iterator[None]:
    """An operation of the model that does not take what it is given is told in a line, not with all of Dynamo's."""
    try:
        yield
    except RuntimeError as error:
        reason = dynamo.refused_operation(error)
        if reason is None:
            raise
        raise CalibrationError(f"the model cannot be called with this batch: {reason}") from error


class ObservedModel:
    """A model that reports to `see` what arrives at its gates.

    Args:
        model: an nn.Module, compiled or not.
        see: called at each gate that runs.
        drawn: None; or how many hidden states to put in the place of those that arrive, at the
            scale of the norm in front of the gate, and the seed to draw them with.
    """

    def __init__(self, model: nn.Module, see: Callable[[Arrival], None], drawn: tuple[int, int] | None = None) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.see, self.drawn = see, drawn
        self.refused: list[str] = []
        self.arrived = 0  # how often tokens arrived at a gate
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._compiled = torch.compile(self.model, backend=dynamo.OwnBackend(self._compile))
        self._captures: bool | None = None  # None before the first call
        self._needs_region = False
        self._not_shown = ""  # why a graph with a gate did not show its experts
        self._owners = Owners()
        self._fast: dict[int, bool] = {}
        self._modules: dict[int, Experts | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run the model, without gradients; its buffers are what they were afterwards.

        Raises:
            CalibrationError: no gate ran in a graph, the experts of one cannot be run, or the model does not take the
                arguments.
        """
        with (
            _wrong_arguments_told(),
            dynamo.unlimited_recompiles(),
            torch.no_grad(),
            dynamo.without_own_compile(self.model),
            buffers_restored(self.model),
        ):
            if self._captures is None:
                self._captures = self._first_call(args, kwargs)
            elif self._captures:
                with dynamo.running, dynamo.dynamic_shape_capture():
                    self._compiled(*args, **kwargs)
            else:
                with dynamo.running:
                    self._compiled(*args, **kwargs)

    def _first_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Run the model in the way that shows most of its gates; whether that is dynamic-shape capture.

        What a graph shows of the experts is what the model computes. Modules beside the router, which stand in for
        what no graph shows, come last.
        """
        for captures, needs_region in ((False, True), (True, True), (False, False)):
            if captures or not needs_region:
                dynamo.forget_codes(self.model)
            self._needs_region = needs_region
            try:
                with dynamo.running, dynamo.dynamic_shape_capture() if captures else contextlib.nullcontext():
                    self._compiled(*args, **kwargs)
            except _NotShownError as error:
                self._not_shown = str(error)
            except Exception:  # what capture raises has no common class
                # Part of the sums cannot be taken back.
                if self.arrived or not captures:
                    raise
                log.info("dynamic-shape capture raises", exc_info=True)
            if self.arrived:
                return captures
        raise CalibrationError(self._nothing_ran(args, kwargs))

    def _nothing_ran(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self.refused:
            return (
                f"no MoE gate of this model can be observed: {some(self.refused)}; see sere_compile.explain(model, ...)"
            )
        if self._not_shown:
            return (
                f"{self._not_shown}. Let the loop over experts make new tensors instead of writing into one: "
                "out = out.index_add(0, tokens, result)"
            )
        outside = [router.name for router in routers_in(self.model)]
        if not outside:
            return no_gate_ran()
        why = diagnose(self.model, args, kwargs, captured=True)
        return f"no MoE gate ran in a graph of this model; {some(outside)} ran outside. {why}"

    def _compile(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(module, inputs)
        findings = find_gates(graph.module, experts_are_live(graph.value_of, self._owners))
        plans = plan_gates(findings.gates, SereConfig(), graph.own_inputs.nodes, graph.value_of, self._owners)
        for plan in plans:
            if plan.status == SKIPPED:
                self.refused.append(f"{plan.name}: {plan.reason}")
            else:
                self._insert(plan)
        return graph.finish().forward

    def _insert(self, plan: GatePlan) -> None:
        region = plan.region if isinstance(plan.region, DispatchRegion) else None
        inputs, activations = (region.inputs, region.activations) if region is not None else ((), ())
        read = (*activations, plan.gate.router_input) if self.drawn is not None else ()
        scales = tuple(scale_at(node, plan.gate.router_input, plan.name) for node in read)
        norms = tuple(dict.fromkeys(node for scale in scales for node in scale.parameters))
        arguments = (plan.gate.router_weight, plan.gate.router_input, plan.gate.ids, inputs, activations, norms)
        call = _Arrive(self, plan, region, scales, norms)
        graph = plan.gate.selection.graph
        with graph.inserting_after(max(plan.gate.ids, plan.gate.router_input, *activations, *norms)):
            graph.call_function(call, arguments)

    @property
    def needs_region(self) -> bool:
        """Whether to give up a call whose graphs do not show the experts: nothing of it counts yet."""
        return self._needs_region and not self.arrived

    def name(self, weight: torch.Tensor, fallback: str) -> str:
        """The name of a router's weight in the model."""
        return self._names.get(id(weight), fallback)

    def module_beside(self, weight: torch.Tensor, num_experts: int) -> Experts | None:
        """The experts module beside a router; looked for once."""
        if id(weight) not in self._modules:
            self._modules[id(weight)] = find_experts(self._owners.find(weight), num_experts)
        return self._modules[id(weight)]

    def is_fast(self, weight: torch.Tensor, decide: Callable[[], bool]) -> bool:
        """Whether a gate's experts run with one slot per row; decided at its first tokens."""
        if id(weight) not in self._fast:
            self._fast[id(weight)] = decide()
        return self._fast[id(weight)]


class _Arrive:
    """The function that a graph calls at one gate."""

    def __init__(
        self,
        observed: ObservedModel,
        plan: GatePlan,
        region: DispatchRegion | None,
        scales: tuple[NormScale, ...],
        norms: tuple[Node, ...],
    ) -> None:
        self.__name__ = self.__qualname__ = "tokens_arrive"
        self.observed, self.plan, self.region, self.scales, self.norms = observed, plan, region, scales, norms

    def __call__(
        self,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        inputs: Sequence[Any],
        activations: Sequence[torch.Tensor],
        norms: Sequence[torch.Tensor],
    ) -> None:
        gate = self.plan.gate
        name = self.observed.name(weight, self.plan.name)
        rows = hidden.reshape(-1, hidden.shape[-1])
        tables: list[torch.Tensor] | None = None
        if self.observed.drawn is not None:
            value = dict(zip(self.norms, norms, strict=True)).__getitem__
            count, seed = self.observed.drawn
            # One seed for all: what the dispatch and the router read are mostly casts of the same
            # hidden states.
            drawn = [
                draw(count, tensor.shape[-1], seed, tensor.dtype, tensor.device, scale, value)
                for scale, tensor in zip(self.scales, (*activations, hidden), strict=True)
            ]
            tables, rows = drawn[:-1], drawn[-1]
        experts = self._experts(name, weight, rows, ids, inputs, activations, tables)
        self.observed.arrived += 1
        self.observed.see(Arrival(name, gate.num_experts, len(rows), ids.device, experts))

    def _experts(
        self,
        name: str,
        weight: torch.Tensor,
        rows: torch.Tensor,
        ids: torch.Tensor,
        inputs: Sequence[Any],
        activations: Sequence[torch.Tensor],
        tables: Sequence[torch.Tensor] | None,
    ) -> CounterfactualExperts:
        """The quickest dispatch that gives the right numbers."""
        gate, top_k = self.plan.gate, self.plan.gate.top_k
        sure: CounterfactualExperts | None = None
        if self.region is not None:
            dtype = nodes.value(self.region.weights).dtype
            sure = of_region(self.region, ids, dtype, inputs, activations, tables)
        elif self.observed.needs_region:
            raise _NotShownError(f"the experts of {name} cannot be run apart from its graph: {self.plan.region}")
        module = self.observed.module_beside(weight, gate.num_experts)
        if module is None:
            if sure is None:
                raise CalibrationError(
                    f"the experts of {name} cannot be run: {self.plan.region}, and no experts module stands beside the "
                    "router"
                )
            return sure
        # Only weights that are gathered by slot are copied for each row.
        size = _expert_bytes(module, gate.num_experts)
        copied = size if any(use.kind is UseKind.EXPERT_INDEX for use in gate.dispatch_uses) else 0
        one_slot = of_module(module, rows, 1, copied)
        sure = sure or of_module(module, rows, top_k, copied)
        tokens = torch.arange(min(2, len(rows)), device=rows.device)
        reference = sure

        def decide() -> bool:
            try:
                return agree(reference, one_slot, tokens, gate.num_experts)
            except (RuntimeError, IndexError, TypeError) as error:
                log.debug("%s: its experts take no single slot: %s", name, error)
                return False

        fast = self.observed.is_fast(weight, decide)
        log.debug("%s: experts run by %s", name, "module, one slot per row" if fast else "its own dispatch")
        return one_slot if fast else sure


def _expert_bytes(module: Any, num_experts: int) -> int:
    """Size of one expert's weights."""
    owner = module if isinstance(module, nn.Module) else getattr(module, "experts", None)
    if owner is None:
        return 0
    return sum(p.numel() * p.element_size() for p in owner.parameters()) // num_experts
