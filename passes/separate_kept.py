"""What leaves a graph beside the dispatch gets a copy of its own.

Many layers keep what they dispatched, return it, or make a loss of it:

    order = sort(flat(ids))                                  order = sort(flat(ids))
    sizes = count(ids)                                       sizes = count(ids)
    y = experts(x[order], sizes)                    ──>      y = experts(x[order], sizes)
    return y, order, sizes                                   return y, sort(flat(ids)), count(ids)

Re-routing gives the dispatch new ids, and what leaves the graph is of what the router chose: where both are one
tensor, no rewrite is right. With two of them each is a use of the ids by itself. A copy costs what sorting and
counting ids costs; products with parameters are never copied. Random numbers and what is written in place are not
either, nor what meets parameters again behind the dispatch: such a graph stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

from .find_gates import Findings, OutsideEvidence, find_gates
from .gate import Gate, Skip
from .graph import nodes
from .graph.state import computed_of_state
from .graph.walk import walk
from .proof.region import ends_of

log = logging.getLogger(__name__)

# Parts of the names of what draws random numbers, or may.
_RANDOM = frozenset(
    {"rand", "dropout", "bernoulli", "multinomial", "exponential", "uniform", "geometric", "poisson", "binomial"}
    | {"cauchy", "gumbel", "rrelu", "attention"}
)
# What an operation raises that takes no tensors without numbers.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)


def find_separate_gates(module: GraphModule, experts_outside: OutsideEvidence) -> Findings:
    """`find_gates`, with a copy of its own for what leaves the graph beside a dispatch in it.

    For a graph that is all of a call. Where others follow, they may send tokens to further experts by what this one
    leaves behind, and those have to be of one choice with its own.
    """
    found = find_gates(module, experts_outside)
    return find_gates(module, experts_outside) if separate_kept(module.graph, found.gates) else found


def separate_kept(graph: Graph, gates: Sequence[Gate]) -> list[Node]:
    """Copy what the dispatch of a gate and an output, or what leads to one, both read.

    Args:
        graph: is changed where there is such a thing; what it computes stays the same, bit for bit.
        gates: of the graph. They are out of date where something was copied.

    Returns:
        The copies, which the outputs read from then on.
    """
    made: list[Node] = []
    for gate in gates:
        made += _separated(graph, gate)
    return made


def _separated(graph: Graph, gate: Gate) -> list[Node]:
    parts = _parts(gate)
    if parts is None or not all(map(_can_be_copied, parts.shared)):
        return []
    values = _values_apart(parts)
    if values is None:
        return []
    copies: dict[Node, Node] = {}
    for node in parts.shared:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda source: copies.get(source, source))
    for source, copy in copies.items():
        for user in list(source.users):
            if user in parts.kept or user in parts.beyond:
                user.replace_input_with(source, copy)
    for node, value in values.items():
        value.describe(copies.get(node, node))
    return list(copies.values())


@dataclass(frozen=True)
class _Parts:
    """What is made of a gate's ids alone.

    Attributes:
        shared: nodes that the dispatch reads, and that something else is made of, in graph order.
        kept: what is made of these for something else alone, in graph order.
        beyond: what reads either and is no part of the dispatch.
    """

    shared: Sequence[Node]
    kept: Sequence[Node]
    beyond: frozenset[Node]


def _parts(gate: Gate) -> _Parts | None:
    """The parts of a gate whose dispatch is in the graph; None where nothing is shared."""
    ends = ends_of(gate)
    if isinstance(ends, Skip):
        return None
    with_experts: set[Node] = set()  # what was made with their parameters
    made: list[Node] = []
    for node in sorted(ends.inside):
        sources = {*node.all_input_nodes, *(w for source in node.all_input_nodes for w in nodes.writers(source))}
        if sources & with_experts or _reads_parameters(node, gate):
            with_experts.update((node, *(base for written in nodes.writes(node) for base in nodes.bases(written))))
        else:
            made.append(node)
    inside = {*ends.inside, ends.complete}
    to_experts: set[Node] = set()
    elsewhere: set[Node] = set()
    beyond: set[Node] = set()
    for node in reversed(made):
        followers = nodes.followers(node)
        others = [user for user in followers if user not in inside]
        if others or any(user in elsewhere for user in followers):
            elsewhere.add(node)
            beyond.update(others)
        if any(user is ends.complete or user in with_experts or user in to_experts for user in followers):
            to_experts.add(node)
    shared = [node for node in made if node in to_experts and node in elsewhere]
    kept = [node for node in made if node in elsewhere and node not in to_experts]
    if not shared or _meets_parameters(beyond, gate):
        return None
    return _Parts(shared, kept, frozenset(beyond))


def _meets_parameters(beyond: set[Node], gate: Gate) -> bool:
    """Whether a matrix of the model acts on what is made of the ids beyond the dispatch: it may be another part of it.

    Attention of experts keeps where its tokens are, and sends them to a second matrix of each expert by that.
    """
    reached = walk((node for node in beyond if node.op != "output"), nodes.followers)
    return any(node.op != "output" and _reads_parameters(node, gate) for node in reached)


def _reads_parameters(node: Node, gate: Gate) -> bool:
    """Whether a node reads a matrix of the model other than the router's, or a number of each expert."""
    return any(
        source is not gate.router_weight and nodes.is_tensor(source) and computed_of_state(source)
        for source in node.all_input_nodes
    )


def _can_be_copied(node: Node) -> bool:
    """Whether a second run of a node gives the same, and nothing else changes."""
    if node.op not in ("call_function", "call_method") or nodes.writes(node) or nodes.writers(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    name = nodes.raw_name(node)
    known = isinstance(node.target, (str, torch._ops.OpOverload)) or _of_torch(node.target)
    drawn = name == "normal" or any(part in name for part in _RANDOM)
    return known and not drawn and not nodes.exchanges(node)


def _of_torch(function: Any) -> bool:
    home = (getattr(function, "__module__", None) or "torch").split(".")[0]
    return home in ("torch", "_operator", "operator", "builtins", "math") and not isinstance(
        function, torch._ops.HigherOrderOperator
    )


def _values_apart(parts: _Parts) -> dict[Node, _Value] | None:
    """What tracing would have recorded of the copies, and of what reads them, where sizes of their own come with them.

    Counts and sizes that depend on the ids are symbols of a graph: those of the original ids are others than those of
    new ones. Empty where there are none, None where they cannot be told.
    """
    if not any("unbacked_bindings" in node.meta for node in parts.shared):
        return {}
    mode = next((v.fake_mode for node in parts.shared if isinstance(v := nodes.value(node), FakeTensor)), None)
    if mode is None or mode.shape_env is None:
        return None
    pending = mode.shape_env.pending_fresh_unbacked_symbols
    before, found = list(pending), dict[Node, _Value]()

    def value_of(source: Node) -> Any:
        return found[source].value if source in found else nodes.value(source)

    try:
        for node in sorted([*parts.shared, *parts.kept]):
            if node in parts.shared or any(source in found for source in node.all_input_nodes):
                with mode, enable_python_dispatcher(), torch.no_grad():
                    value = _computed(node, value_of)
                found[node] = _Value(value, compute_unbacked_bindings(mode.shape_env, value))
    except _FAILURES as error:
        log.debug("what is kept of %s is not copied: %s", parts.shared[0].name, error)
        pending[:] = before
        return None
    return found


def _computed(node: Node, value_of: Callable[[Node], Any]) -> Any:
    arguments, keywords = map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


@dataclass(frozen=True)
class _Value:
    """What tracing records of a node: its value, and the symbols that it makes."""

    value: Any
    symbols: Any

    def describe(self, node: Node) -> None:
        node.meta["example_value"] = self.value
        node.meta.pop("unbacked_bindings", None)
        if self.symbols:
            node.meta["unbacked_bindings"] = self.symbols
