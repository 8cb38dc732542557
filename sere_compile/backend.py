"""The torch.compile backend: find gates, re-route them, bind similarity to weights, hand over to an inner compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from .compiler import dynamo, missing_gates
from .compiler.bound_graph import BoundGraph
from .compiler.capture_more import asking_for_gradients
from .compiler.dynamo_graph import DynamoGraph
from .compiler.gate_matrices import examples, find_matrix
from .compiler.gate_plan import GatePlan, experts_are_live, plan_gates, without_look_alikes
from .compiler.observed_graph import ObservedGraph
from .compiler.pack_attention import pack_attention
from .compiler.rewrite_gate import rewrite_gate
from .config import SereConfig, split_options
from .errors import ConfigError, GateNotFoundError
from .experts.owner import Owners
from .passes import find_gates, find_separate_gates
from .report import REWRITTEN
from .similarity import binding

log = logging.getLogger(__name__)


class SereBackend:
    """A backend for `torch.compile`: SERE re-routing in front of an inner compiler.

    Two backends with equal options are equal, so making one anew does not recompile a model.
    Options given to `torch.compile(options={...})` are laid over the backend's own.

    Example:
        >>> torch.compile(model, backend="sere", options={"select_top_k": 2})
        >>> torch.compile(model, backend=sere_backend.with_options(select_top_k=2),
        mode="reduce-overhead")
    """

    def __init__(self, config: SereConfig | None = None, *, explaining: bool = False) -> None:
        self.config = config or SereConfig()
        self._explaining = explaining
        self.__name__ = "sere"

    def with_options(self, **options: Any) -> SereBackend:
        """A backend with some options changed, see `SereConfig`. Unknown names raise `ConfigError`."""
        return SereBackend(self.config.replace(**options), explaining=self._explaining)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SereBackend):
            return NotImplemented
        return (self.config, self._explaining) == (other.config, other._explaining)

    def __hash__(self) -> int:
        return hash((self.config, self._explaining))

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

        torch wraps what is raised here in its `BackendCompilerFailed`, with the error as its cause.

        Raises:
            ConfigError: an unknown option, or a mode or option that the inner compiler does not
                take.
            GateNotFoundError: with strict=True, no gate in the compiled callable, or one that
                cannot be re-routed.
            ProfileError: a profile is attached to the model and lacks a matrix for a gate.
            ProbeError: with strict=True, no matrix is attached for a layer that uses a compiled graph again,
                and its experts could not be run to measure one.
        """
        config, inner_options = split_options(self.config, options)
        if config.capture == "auto":
            raise ConfigError('capture="auto" acts before a backend is called: use sere_compile.compile(model, ...)')
        graph, owners = DynamoGraph(module, example_inputs), Owners()
        whole_call = dynamo.is_outermost() and not dynamo.has_graph_break(module)
        find = find_separate_gates if whole_call else find_gates
        findings = find(graph.module, experts_are_live(graph.value_of, owners))
        plans = plan_gates(findings.gates, config, graph.own_inputs.nodes, graph.value_of, owners)
        for plan in plans:
            self._rewrite(plan, graph, owners)
        plans, findings = without_look_alikes(plans, findings)
        if plans:
            pack_attention(graph.module, config, plans[0].weight(graph.held).device)
        rewritten = graph.finish()
        if self._explaining:
            return ObservedGraph(module, plans, findings.skips, whole_call=whole_call)
        if plans or not whole_call:  # else the warning below names it
            missing_gates.tell_refused(findings.skips, config)
        log.debug("rewritten graph:\n%s", _LazyCode(rewritten))
        compiled = _compile_inner(rewritten, graph.inputs, config, mode, inner_options)
        compiled = asking_for_gradients(compiled, rewritten.graph)
        if not plans:
            return missing_gates.watch(compiled, findings, config, whole_call=whole_call)
        watch = None if whole_call else missing_gates.watch_others(config)
        bound = BoundGraph(compiled, module.forward, graph, plans, watch)
        if not any(isinstance(plan.weight(graph.held), FakeTensor) for plan in plans):
            bound.bind(graph.held, owners)
        return bound

    def _rewrite(self, plan: GatePlan, graph: DynamoGraph, owners: Owners) -> None:
        """Rewrite one gate; raise if it cannot be re-routed and has to be, unless refusals become rows of a report."""
        weight = plan.weight(graph.held)
        matrices = examples(plan, weight) if plan.is_to_reroute else {}
        refusal = rewrite_gate(
            plan,
            graph,
            matrices,
            weight,
            owners,
            lambda: find_matrix(plan, weight, graph.value_of, owners, probing=not self._explaining),
        )
        if plan.config.collect_stats and plan.status != REWRITTEN and not self._explaining:
            binding.note_uncounted(weight, plan.reason)
        if refusal is None or not refusal.is_refused_gate:
            return
        if plan.config.strict and not self._explaining:
            raise GateNotFoundError(f"strict=True, and {plan.name} cannot be re-routed: {refusal}")
        missing_gates.warn(log, f"{plan.name} is not re-routed: {refusal}", weight)

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


def _compile_inner(
    graph: GraphModule, inputs: list[Any], config: SereConfig, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    if config.inner == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)(graph, inputs)
    from torch._dynamo.backends.registry import lookup_backend

    if mode not in (None, "default"):
        raise ConfigError(f'mode={mode!r} is for inner="inductor"; inner={config.inner!r} takes no mode')
    return lookup_backend(config.inner)(graph, inputs, **({"options": options} if options else {}))


sere_backend = SereBackend()
