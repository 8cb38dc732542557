"""Put any routing rule into a model: the gates are found in Dynamo's graphs, each calls back with what it decided.

The graphs run eagerly, so that a rule is ordinary PyTorch on concrete tensors and may keep what it
sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..compiler import dynamo
from ..compiler.dynamo_graph import DynamoGraph
from ..compiler.gate_plan import experts_are_live
from ..compiler.obstacle import no_gate_ran
from ..errors import EvaluationError
from ..experts.owner import Owners
from ..passes import Gate, Skip, SkipReason, find_gates, redirect_dispatch
from ..passes.evidence.gate_scores import gate_scores
from ..passes.graph import nodes


@dataclass(frozen=True)
class GateCall:
    """What one gate decided in one forward, tokens in the model's order.

    Attributes:
        name: of the router's weight, fully qualified.
        router_weight: the parameter.
        hidden: [T, H], what the router was given.
        scores: [T, E], what its weights are made from; probabilities, whatever the model selects by.
        ids: [T, K], its experts in descending order.
        weights: [T, K], their weights as the dispatch uses them.
        choice: [T, E], what it selected by where that is not `scores`: with a bias, limited to groups; or None.
    """

    name: str
    router_weight: torch.Tensor
    hidden: torch.Tensor
    scores: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    choice: torch.Tensor | None = None


# Gets what a gate decided and gives ids [T, K] and weights [T, K] in its place; a token may name an
# expert twice.
Decide = Callable[[GateCall], tuple[torch.Tensor, torch.Tensor]]


class RoutedModel:
    """A model whose gates ask `decide`, an attribute to set before every call.

    Raises:
        EvaluationError: at the first call, where there is no gate or one that cannot be re-routed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decide: Decide = lambda call: (call.ids, call.weights)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._compiled = torch.compile(model, backend=dynamo.OwnBackend(self._compile), dynamic=False)
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without gradients."""
        self._calls = 0
        with dynamo.unlimited_recompiles(), torch.no_grad():
            output = self._compiled(*args, **kwargs)
        if not self._calls:
            raise EvaluationError(no_gate_ran())
        return output

    def _compile(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(module, inputs)
        for gate in find_gates(graph.module, experts_are_live(graph.value_of, Owners())).gates:
            self._insert(gate)
        return graph.finish().forward

    def _insert(self, gate: Gate) -> None:
        """Let the dispatch read the ids and weights that a call gives, in place of the gate's own."""
        weights, scores = gate.weights, gate_scores(gate)
        if weights is None or scores is None:
            refusal = gate.weights_skip or Skip(SkipReason.NO_WEIGHTS, gate.ids, nodes.place(gate.ids))
            raise EvaluationError(_refused(gate, refusal))
        call = _Call(self, probabilities=scores.probabilities, merge=gate.needs_merge)
        choice = None if scores.choice is scores.worth else scores.choice
        arguments = (gate.ids, weights, scores.worth, choice, gate.router_input, gate.router_weight)

        def ask() -> tuple[Node, Node]:
            graph = gate.selection.graph
            both = graph.call_function(call, arguments)
            new = [graph.call_function(operator.getitem, (both, position)) for position in (0, 1)]
            new[0].meta, new[1].meta = dict(gate.ids.meta), dict(weights.meta)
            return new[0], new[1]

        done = redirect_dispatch(gate, ask, with_weights=True)
        if isinstance(done, Skip):
            raise EvaluationError(_refused(gate, done))

    def answer(self, call: GateCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the rule of the day."""
        self._calls += 1
        return self.decide(call)


def _refused(gate: Gate, refusal: Skip) -> str:
    return f"the gate at {nodes.source_line(gate.selection)} cannot be re-routed: {refusal}"


class _Call:
    """The function that a rewritten graph calls at one gate."""

    def __init__(self, routed: RoutedModel, probabilities: bool, merge: bool) -> None:
        self.__name__ = self.__qualname__ = "ask_routing_rule"
        self._routed, self._probabilities, self._merge = routed, probabilities, merge

    def __call__(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor,
        choice: torch.Tensor | None,
        hidden: torch.Tensor,
        router_weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        name = self._routed._names.get(id(router_weight), "?")
        scores = scores.reshape(-1, scores.shape[-1]).float()
        call = GateCall(
            name,
            router_weight,
            hidden.reshape(-1, hidden.shape[-1]),
            scores if self._probabilities else scores.softmax(-1),
            ids.reshape(-1, ids.shape[-1]),
            weights.reshape(-1, weights.shape[-1]),
            None if choice is None else choice.reshape(-1, choice.shape[-1]).float(),
        )
        new_ids, new_weights = self._routed.answer(call)
        if self._merge:
            new_ids, new_weights = merge_slots(new_ids, new_weights, call.scores.shape[-1])
        return new_ids.to(ids.dtype).view(ids.shape), new_weights.to(weights.dtype).view(weights.shape)


def merge_slots(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sum with distinct experts in a token, for dispatches that are wrong when one is named twice.

    Args:
        ids: [T, K] in [0, E).
        weights: [T, K].
        num_experts: E, at least K.

    Returns:
        ids and weights [T, K]: weights summed in an expert's first slot; other slots get experts
        that the token does not name, at weight 0.
    """
    same = ids[:, :, None] == ids[:, None, :]
    repeated = same.tril(-1).any(-1)
    weights = (same.to(weights.dtype) @ weights[:, :, None])[:, :, 0].masked_fill(repeated, 0.0)
    named = torch.zeros(len(ids), num_experts, device=ids.device).scatter_(1, ids.long(), 1.0)
    others = named.argsort(dim=1, stable=True)[:, : ids.shape[1]]  # experts not named come first
    place = repeated.long().cumsum(1) - 1
    return torch.where(repeated, others.gather(1, place.clamp_min(0)).to(ids.dtype), ids), weights
