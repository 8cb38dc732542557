"""Run a rewritten graph with each gate's own similarity matrix."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import GateNotFoundError, ProbeError
from ..experts.owner import Owners
from ..passes import SkipReason
from ..passes.graph.nodes import source_line
from ..report import REWRITTEN
from ..similarity import binding
from . import dynamo, missing_gates
from .dynamo_graph import DynamoGraph
from .gate_matrices import appended_value, bind_weight, stand_in, unprobed
from .gate_plan import GatePlan

log = logging.getLogger(__name__)


class BoundGraph:
    """A compiled graph that gets each gate's matrix by the identity of the weight that a call passes.

    Args:
        compiled: the rewritten graph, compiled.
        original: the graph as it was traced, for layers whose experts cannot be run to measure a matrix.
        graph: the same before that; only its inputs are kept, since its example inputs would keep
            the weights alive.
        plans: of its gates.
        watch: told which gates run until it has nothing left to tell, see
            `missing_gates.watch_others`.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        original: Callable[..., Any],
        graph: DynamoGraph,
        plans: list[GatePlan],
        watch: Callable[[list[torch.Tensor]], bool] | None = None,
    ) -> None:
        self._compiled = compiled
        self._original = original
        self._unprobed = WeakTensorKeyDictionary()  # weights of these layers
        self._routers = 0  # different weights in the first call
        self._shared: set[str] = set()  # gates that were told about
        self._watch = watch
        self._inputs = graph.own_inputs
        self._appended = graph.appended
        self._plans = plans
        self._is_rewritten = any(plan.status == REWRITTEN for plan in plans)
        # What the last call bound: version of the registry, weights, extra inputs. One tuple, so
        # that threads that share the graph never see one call's weights with another's matrices.
        self._last: tuple[int, list[Callable[[], torch.Tensor | None]], list[torch.Tensor]] = (-1, [], [])

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled graph with what Dynamo passes and the gates' own inputs behind it."""
        if dynamo.is_fake_call():  # nothing is computed, and no weight has an identity
            return self._compiled(*arguments, *self._stand_ins(arguments))
        if self._watch is not None and self._watch([plan.weight(arguments) for plan in self._plans]):
            self._watch = None
        missing_gates.runs.graphs += 1
        missing_gates.runs.with_gates += 1
        extra = self._bind_or_tell(arguments)
        if self._is_rewritten and extra is not None:
            missing_gates.runs.rewritten += 1
            missing_gates.note_rerouted(lambda: self._rerouted(arguments))
        if extra is None or missing_gates.runs.as_traced:
            return self._original(*arguments)
        return self._compiled(*arguments, *extra)

    def _rerouted(self, arguments: Sequence[Any]) -> list[missing_gates.GateKey]:
        done = [plan for plan in self._plans if plan.status == REWRITTEN]
        return [key for plan in done for key in (plan.weight(arguments), source_line(plan.gate.selection))]

    def _stand_ins(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """Tensors like the appended inputs, in the fake mode of this call."""
        return [stand_in(item.plan, item.kind, item.plan.weight(arguments)) for item in self._appended]

    def _bind_or_tell(self, arguments: Sequence[Any]) -> list[torch.Tensor] | None:
        """See `bind`; None, and a warning, for layers not compiled for whose experts cannot be run or share a router.

        Raises:
            ProbeError, GateNotFoundError: the same, with strict=True.
        """
        weights = [plan.weight(arguments) for plan in self._plans]
        if (extra := self._of_last_call(weights)) is not None:
            return extra
        if len(set(map(id, weights))) < self._routers:
            self._tell_shared(weights)
            return None
        if self._unprobed and any(weight in self._unprobed for weight in weights):
            return None
        try:
            return self.bind(arguments)
        except ProbeError as error:
            if any(plan.config.strict for plan in self._plans):
                raise
            for plan in self._plans:
                self._unprobed[plan.weight(arguments)] = True
            text = f"a layer with the code of {plan.name} is not re-routed: {unprobed(plan, error)}"
            missing_gates.warn(log, text, plan.weight(arguments))
            return None

    def _of_last_call(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """The appended inputs of the last call, if it had the same weights and matrices."""
        version, last, extra = self._last
        same = version == binding.version() and all(ref() is w for ref, w in zip(last, weights, strict=True))
        return extra if same else None

    def _tell_shared(self, weights: Sequence[torch.Tensor]) -> None:
        """Dynamo uses a graph for other models with the same code, also where routers are one that were several."""
        for plan, weight in zip(self._plans, weights, strict=True):
            if sum(weight is other for other in weights) > 1 and plan.is_to_reroute and plan.name not in self._shared:
                text = f"a layer with the code of {plan.name} is not re-routed: {SkipReason.SHARED_ROUTER.value}"
                if plan.config.strict:
                    raise GateNotFoundError(text)
                self._shared.add(plan.name)
                missing_gates.warn(log, text, weight)

    def bind(self, arguments: Sequence[Any], owners: Owners | None = None) -> list[torch.Tensor]:
        """The appended inputs for a call with these arguments; the same list while the weights stay the same.

        Args:
            arguments: of the graph's own inputs.
            owners: of the router weights, where they were asked for already.
        """
        weights = [plan.weight(arguments) for plan in self._plans]
        self._routers = self._routers or len(set(map(id, weights)))
        if (extra := self._of_last_call(weights)) is not None:
            return extra
        owners = owners or Owners()
        value_of = self._inputs.values_of(arguments)
        for plan, weight in zip(self._plans, weights, strict=True):
            bind_weight(plan, weight, value_of, owners)
        version = binding.version()
        extra = [appended_value(item, item.plan.weight(arguments)) for item in self._appended]
        self._last = (version, [weakref.ref(weight) for weight in weights], extra)
        return extra
