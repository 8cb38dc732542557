"""`sere.route` takes re-routing over where only the dispatch reads its ids, and only there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sere_compile.ops import reroute
from sere_compile.passes import RoutingSettings, UseKind, fuse_reroute, fuse_router
from sere_compile.passes.gate import Use
from sere_compile.passes.graph.nodes import kind
from sere_compile.passes.reroute_dispatch import Rewrite

from .test_fuse_experts import E, H, T, trace
from .test_fuse_router import Routed, renormalised


def routed_gate():
    """The graph, its gate behind `fuse_router`, and two matrices as graph inputs."""
    graph, _, gate = trace(Routed(renormalised), torch.randn(T, H))
    gate = fuse_router(gate, {}, torch.device("cpu"))
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        matrices = [graph.graph.placeholder(name) for name in ("similarity", "projection")]
    return graph, gate, matrices


@pytest.mark.parametrize("projecting", [False, True])
def test_one_operator_routes_and_re_routes(projecting):
    """The operator gives what routing, re-routing and projecting one after the other give."""
    graph, gate, (similarity, projection) = routed_gate()
    before = dataclasses.replace(gate)
    settings = RoutingSettings(1, 0.25, 2, 0)
    done = fuse_reroute(gate, similarity, settings, projection if projecting else None)
    assert isinstance(done, Rewrite)
    graph.graph.lint()
    assert (done.gate, done.new_ids, done.merged, done.filled) == (before, gate.ids, False, False)
    (call,) = [node for node in graph.graph.nodes if kind(node) == "sere.route"]
    assert not [node for node in graph.graph.nodes if kind(node) == "sere.reroute"]
    logits, matrix, factors = torch.randn(T, E), torch.rand(E, E), torch.rand(E, E)
    values = {similarity: matrix, projection: factors}
    arguments = {name: values.get(argument, argument) for name, argument in call.kwargs.items()}
    weights, ids = torch.ops.sere.route.default(logits, **arguments)
    rerouting = {"similarity", "select_top_k", "threshold", "min_active", "max_active", "projection"}
    assert rerouting <= arguments.keys()
    alone = {name: argument for name, argument in arguments.items() if name not in rerouting}
    old_weights, old_ids = torch.ops.sere.route.default(logits, **alone)
    want = reroute(old_ids, matrix, 1, 0.25, 2)
    assert torch.equal(ids, want)
    assert not torch.equal(ids, old_ids)
    factor = torch.where(old_ids == want, 1.0, factors[old_ids, want])
    assert torch.equal(weights, old_weights * factor if projecting else old_weights)


def test_without_a_matrix_slots_are_filled():
    """By the operator itself, as the settings say; that duplicates would have to be merged is no matter."""
    graph, gate, _ = routed_gate()
    done = fuse_reroute(merging(graph, gate), None, RoutingSettings(1, 0.25, 5, 0))
    assert isinstance(done, Rewrite)
    assert (done.new_ids, done.merged, done.filled) == (gate.ids, False, True)
    arguments = gate.selection.kwargs
    assert {name: arguments[name] for name in ("fill", "select_top_k", "threshold", "min_active")} == {
        "fill": True, "select_top_k": 1, "threshold": 0.25, "min_active": 5,
    }  # fmt: skip


def test_matrices_have_to_be_there_first():
    graph, gate, (similarity, _) = routed_gate()
    with graph.graph.inserting_after(gate.selection):
        late = graph.graph.call_method("clone", (similarity,))
    for matrices in ((late, None), (similarity, late)):
        refusal = fuse_reroute(gate, matrices[0], RoutingSettings(1), matrices[1])
        assert str(refusal).startswith("its matrix comes after it (route_default at ")


def unfused(graph, gate):
    return trace(Routed(renormalised), torch.randn(T, H))[2]


def merging(graph, gate):
    uses = tuple(dataclasses.replace(use, kind=UseKind.UNKNOWN) for use in gate.uses)
    return dataclasses.replace(gate, uses=uses)


def looked_up(graph, gate):
    with graph.graph.inserting_after(gate.ids):
        node = graph.graph.call_method("clone", (gate.ids,))
    return dataclasses.replace(gate, uses=(*gate.uses, Use(node, gate.ids, UseKind.LOOK_UP)))


def written(graph, gate):
    with graph.graph.inserting_after(gate.ids):
        graph.graph.call_method("add_", (gate.ids, 0))
    return gate


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (unfused, "its routing is not ours (topk at "),
        (merging, "its slots have to be merged (its dispatch: unknown dispatch)"),
        (looked_up, "more than its dispatch reads its results (clone reads its ids as well)"),
        (written, "its memory is shared with the rest of the graph (add_ writes to its ids or weights)"),
    ],
)
def test_what_it_cannot_take_over_stays(change, reason):
    """Each refusal has its reason, and leaves the operator alone."""
    graph, gate, (similarity, _) = routed_gate()
    gate = change(graph, gate)
    arguments = gate.selection.args, gate.selection.kwargs
    assert str(fuse_reroute(gate, similarity, RoutingSettings(1))).startswith(reason)
    assert (gate.selection.args, gate.selection.kwargs) == arguments
