"""The torch.compile backend: find gates, re-route them, bind similarity to weights, hand over to an inner compiler."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import binding, dynamo, missing_gates
from .calibration.probe import module_dispatch, probe_similarity, region_dispatch
from .config import SereConfig, split_options
from .errors import ConfigError, ProbeError, ProfileError
from .module_tree import find_experts, find_owner
from .passes import (
    DispatchRegion,
    COUNTED,
    Gate,
    Rewrite,
    RoutingSettings,
    Skip,
    extract_dispatch,
    find_gates,
    insert_count,
    rewrite_gate,
)
from .passes.nodes import source_line
from .report import IDENTITY, REWRITTEN, SKIPPED, GateRow

log = logging.getLogger(__name__)

Observer = Callable[[GateRow], None]


class SereBackend:
    """A backend for `torch.compile`: SERE re-routing in front of an inner compiler.

    Two backends with equal options are equal, so making one anew does not recompile a model. Options given to
    `torch.compile(options={...})` are laid over the backend's own.

    Example:
        >>> torch.compile(model, backend="sere", options={"select_top_k": 2})
        >>> torch.compile(model, backend=sere_backend.with_options(select_top_k=2), mode="reduce-overhead")
    """

    def __init__(self, config: SereConfig | None = None, observer: Observer | None = None) -> None:
        self.config = config or SereConfig()
        self._observer = observer
        self.__name__ = "sere"

    def with_options(self, **options: Any) -> SereBackend:
        """A backend with some options changed, see `SereConfig`. Unknown names raise `ConfigError`."""
        return SereBackend(self.config.replace(**options), self._observer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SereBackend) and (self.config, self._observer) == (other.config, other._observer)

    def __hash__(self) -> int:
        return hash((self.config, self._observer))

    def __repr__(self) -> str:
        return f"SereBackend({self.config})"

    def __call__(
        self,
        module: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph; torch.compile calls this.

        Raises:
            ConfigError: an unknown option, or a mode or option that the inner compiler does not take.
            GateNotFoundError: with strict=True, nothing in the compiled callable is a gate.
            ProfileError: a profile is attached to the model and lacks a matrix for a gate.
            ProbeError: no matrix is attached and the experts could not be run to measure one.
        """
        config, inner_options = split_options(self.config, options)
        graph = dynamo.copy_graph(module)
        inputs = list(example_inputs)
        findings = find_gates(graph, _experts_are_live(graph, inputs))
        plans = [_plan(gate, config, graph, inputs) for gate in findings.gates]
        appended = [item for plan in plans for item in _apply(plan, config, graph, inputs, example_inputs)]
        graph.graph.lint()
        graph.recompile()
        if self._observer is not None:
            for skip in findings.skips:
                self._observer(skip_row(skip))
            return _BoundGraph(module.forward, [], plans, self._observer)
        log.debug("rewritten graph:\n%s", _LazyCode(graph))
        compiled = _compile_inner(graph, inputs, config, mode, inner_options)
        if plans:
            bound = _BoundGraph(compiled, appended, plans)
            bound.bind(example_inputs)
            return bound
        if dynamo.is_outermost():
            return missing_gates.watch(compiled, findings, config, whole_call=not dynamo.has_graph_break())
        return compiled

    def reset(self) -> None:
        """Drop recorded CUDA graphs; torch._dynamo.reset() calls this."""
        if torch.cuda.is_available():
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()


class _LazyCode:
    """Renders a graph only if the log level asks for it."""

    def __init__(self, graph: GraphModule) -> None:
        self._graph = graph

    def __str__(self) -> str:
        return self._graph.print_readable(print_output=False)


@dataclass
class _Plan:
    """One gate of one graph: where its weight comes from and what is done to it."""

    gate: Gate
    position: int | None  # of the weight among the graph's inputs; None where it is an attribute of the graph
    attribute: torch.Tensor | None
    fallback_name: str
    select_top_k: int
    region: DispatchRegion | str
    inputs: list[Node]  # the graph's own inputs, in order
    status: str = IDENTITY
    reason: str = ""

    def weight(self, arguments: Sequence[Any]) -> torch.Tensor:
        return self.attribute if self.position is None else arguments[self.position]  # type: ignore[return-value]


@dataclass
class _Appended:
    """One input appended to the graph: a gate's matrix or its counters."""

    plan: _Plan
    counts: bool


def _experts_are_live(graph: GraphModule, inputs: Sequence[Any]) -> Callable[[Node, int], bool]:
    """Evidence for ids that leave the graph: experts stand beside the module that owns the router weight."""
    placeholders = list(graph.graph.find_nodes(op="placeholder"))

    def evidence(weight: Node, num_experts: int) -> bool:
        tensor = _attribute(graph, weight) if weight.op == "get_attr" else inputs[placeholders.index(weight)]
        return isinstance(tensor, torch.Tensor) and find_experts(tensor, num_experts) is not None

    return evidence


def _attribute(graph: GraphModule, node: Node) -> torch.Tensor:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def _plan(gate: Gate, config: SereConfig, graph: GraphModule, inputs: Sequence[Any]) -> _Plan:
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    lifted = gate.router_weight.op == "placeholder"
    return _Plan(
        gate=gate,
        position=placeholders.index(gate.router_weight) if lifted else None,
        attribute=None if lifted else _attribute(graph, gate.router_weight),
        fallback_name=dynamo.input_name(gate.router_weight),
        select_top_k=config.resolved_top_k(gate.top_k),
        region=extract_dispatch(gate),
        inputs=placeholders,
    )


def _apply(
    plan: _Plan, config: SereConfig, graph: GraphModule, inputs: list[Any], example_inputs: Sequence[Any]
) -> list[_Appended]:
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
        log.warning("%s is not re-routed: %s", plan.fallback_name, done)
        return []
    inputs.append(fake)
    plan.status = REWRITTEN
    appended = [_Appended(plan, counts=False)]
    if config.collect_stats:
        appended.append(_apply_count(plan, done, graph, inputs, weight.device))
    return appended


def _apply_count(plan: _Plan, done: Rewrite, graph: GraphModule, inputs: list[Any], device: torch.device) -> _Appended:
    buffer = torch.zeros(len(COUNTED), dtype=torch.int64, device=device)
    node, fake = dynamo.append_input(graph, f"sere_counts_{len(inputs)}", buffer, inputs)
    insert_count(done, node)
    inputs.append(fake)
    return _Appended(plan, counts=True)


def _too_many_tokens(gate: Gate, max_tokens: int | None) -> bool:
    """Compares the batch with the limit. A symbolic batch makes Dynamo guard on the answer: two graphs at most."""
    if max_tokens is None:
        return False
    ids = gate.ids.meta.get("example_value", gate.ids.meta.get("val"))
    return bool(ids.numel() > max_tokens * gate.top_k)


def _compile_inner(
    graph: GraphModule, inputs: list[Any], config: SereConfig, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    if config.inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(graph, inputs)
    from torch._dynamo.backends.registry import lookup_backend

    if mode not in (None, "default"):
        raise ConfigError(f'mode={mode!r} is for inner="inductor"; inner={config.inner!r} takes no mode')
    return lookup_backend(config.inner)(graph, inputs, **({"options": options} if options else {}))


class _BoundGraph:
    """A compiled graph that gets each gate's matrix by the identity of the weight that a call passes."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        appended: list[_Appended],
        plans: list[_Plan],
        observer: Observer | None = None,
    ) -> None:
        self._compiled = compiled
        self._appended = appended
        self._plans = plans
        self._observer = observer
        self._last: list[Callable[[], torch.Tensor | None]] = []
        self._version = -1
        self._extra: list[torch.Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        missing_gates.gate_runs.count += 1
        return self._compiled(*arguments, *self.bind(arguments))

    def bind(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The appended inputs for a call with these arguments; the same list while the weights stay the same."""
        weights = [plan.weight(arguments) for plan in self._plans]
        same = self._version == binding.version() and all(
            last() is weight for last, weight in zip(self._last, weights, strict=True)
        )
        if not same:
            for plan, weight in zip(self._plans, weights, strict=True):
                self._resolve(plan, weight, arguments)
            self._extra = [self._value(item, item.plan.weight(arguments)) for item in self._appended]
            self._last = [weakref.ref(weight) for weight in weights]
            self._version = binding.version()
        return self._extra

    def _value(self, item: _Appended, weight: torch.Tensor) -> torch.Tensor:
        entry = binding.lookup(weight)
        assert entry is not None  # noqa: S101  (_resolve made it)
        return entry.counts_on(weight.device) if item.counts else entry.matrix_on(weight.device)

    def _resolve(self, plan: _Plan, weight: torch.Tensor, arguments: Sequence[Any]) -> None:
        """Name the gate at first sight, and find or measure its matrix."""
        entry = binding.lookup(weight)
        if entry is None:
            owner = find_owner(weight)
            entry = binding.name(weight, owner.name if owner is not None else plan.fallback_name)
            if owner is not None:
                _refuse_partial_profile(owner.root, entry.name)
        if self._observer is not None:
            self._observer(_row(plan, entry))
        elif plan.status == REWRITTEN and entry.matrix is None:
            binding.assign(weight, entry.name, _probe(plan, weight, arguments, entry.name), "probed", from_profile=False)
        _check_size(plan.gate, entry)


def _check_size(gate: Gate, entry: binding.GateEntry) -> None:
    if entry.matrix is not None and entry.matrix.shape[0] != gate.num_experts:
        raise ProfileError(
            f"the matrix attached for {entry.name} is {list(entry.matrix.shape)}, but its gate selects from "
            f"{gate.num_experts} experts"
        )


def _refuse_partial_profile(root: torch.nn.Module, name: str) -> None:
    for parameter in root.parameters():
        other = binding.lookup(parameter)
        if other is not None and other.from_profile:
            raise ProfileError(
                f"a similarity profile is attached to this model, but it has no matrix for the gate {name}. "
                f"Calibrate the whole model again, or call sere_compile.detach(model) to probe every gate"
            )


def _probe(plan: _Plan, weight: torch.Tensor, arguments: Sequence[Any], name: str) -> torch.Tensor:
    """Measure the similarity of a gate's experts, in the graph where its dispatch is there, else beside its router."""
    gate = plan.gate
    log.info("no similarity attached for %s: probing its %d experts on random hidden states", name, gate.num_experts)
    _say_once_that_probing_happens()
    if isinstance(plan.region, DispatchRegion):
        values = {node: _number(value) for node, value in zip(plan.inputs, arguments, strict=False)}
        for node in plan.region.inputs:
            if node.op == "get_attr":
                values[node] = _attribute(node.graph.owning_module, node)
        dispatch, rows = region_dispatch(plan.region, values)
        return probe_similarity(dispatch, rows, gate.num_experts, gate.top_k, weight.device)
    experts = find_experts(weight, gate.num_experts)
    if experts is None:
        raise ProbeError(
            f"no similarity is attached for the gate {name}, and its experts cannot be probed: {plan.region}, and no "
            f"experts module stands beside the router. Attach a profile: sere_compile.attach(model, profile)"
        )
    hidden = weight.shape[1] if weight.shape[0] == gate.num_experts else weight.shape[0]
    dispatch = module_dispatch(experts, hidden, weight.dtype, weight.device)
    return probe_similarity(dispatch, 512, gate.num_experts, gate.top_k, weight.device)


def _number(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


class _Once:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: set[str] = set()

    def __call__(self, text: str) -> bool:
        with self._lock:
            first = text not in self._done
            self._done.add(text)
            return first


_first_time = _Once()


def _say_once_that_probing_happens() -> None:
    if _first_time("probing"):
        log.warning(
            "no similarity profile is attached: experts are probed with random hidden states, once per gate. "
            "A calibrated profile is better: sere_compile.attach(model, SimilarityProfile.load(path))"
        )


def _row(plan: _Plan, entry: binding.GateEntry) -> GateRow:
    gate = plan.gate
    rewritten = plan.status == REWRITTEN
    return GateRow(
        name=entry.name,
        num_experts=gate.num_experts,
        top_k=gate.top_k,
        select_top_k=plan.select_top_k if rewritten else gate.top_k,
        scoring=gate.scoring,
        is_sorted=gate.is_sorted,
        dispatch=gate.dispatch + (", merged" if rewritten and gate.needs_merge else ""),
        status=plan.status,
        reason=plan.reason,
        similarity=(entry.source or "none attached: probed at compile time") if rewritten else "",
    )


def skip_row(skip: Skip) -> GateRow:
    """A refused selection as a line of a report."""
    place = source_line(skip.node)
    name = f"{skip.node.name} ({place})" if place else skip.node.name
    return GateRow(name, None, None, None, "", None, "", SKIPPED, str(skip))


sere_backend = SereBackend()
