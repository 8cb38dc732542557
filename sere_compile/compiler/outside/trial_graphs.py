"""The graph with a block's gate, in each of its versions, on choices that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...experts.trial_block import TrialBlock
from ...passes import (
    Gate,
    RoutingSettings,
    Skip,
    SkipReason,
    find_gates,
    reroute_dispatch,
    separate_statistics,
)
from ...passes.evidence.router import Router, trace_router
from ...passes.graph import nodes
from .. import dynamo
from .made_up_choices import Choose, Draw, Score, Tell
from .ways import IDS_ALONE, IDS_KEPT, ids_alone, ids_kept, version_name


class TrialGraphs:
    """The graphs of a block that is compiled to be tried: that with the gate is there in several versions.

    Args:
        block: whose router has the gate.

    Attributes:
        version: of the run that is under way.
        draw: of the choices that are made in it.
        found: the gates of the router in what was compiled.
        versions: of the last graph with the gate that was compiled.
        refused: why there is no other.
        ids: that were chosen, int [.., K] of each graph with the gate that ran.
        weights: of these, where the gate's are known.
        matrix: by which experts are re-routed, float [E, E].
    """

    def __init__(self, block: TrialBlock) -> None:
        self._block = block
        self.version = "original"
        self.draw = Draw()
        self.found: list[Gate] = []
        self.versions: dict[str, Callable[..., Any]] = {}
        self.refused: dict[str, str] = {}
        self.ids: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        matrix = torch.rand(block.num_experts, block.num_experts, generator=torch.Generator().manual_seed(1))
        self.matrix = matrix.to(block.weight.device)

    def compile(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend of torch.compile: a graph with the gate runs in the version of the run, any other as it is."""
        gates = _gates_of(dynamo.copy_graph(module), inputs, self._block)
        if not gates:
            return module.forward
        self.found += gates
        versions: dict[str, Callable[..., Any]] = {}  # of this graph: other sizes make another
        self.versions, self.refused = versions, {}
        ways = [(merged, way) for merged in (False, True) for way in ("", IDS_ALONE, IDS_KEPT)]
        for version in ("original", *(version_name(*way) for way in ways)):
            made = self._rewritten(module, inputs, version)
            if isinstance(made, Skip):
                self.refused[version] = str(made)
            else:
                versions[version] = made
        return lambda *arguments: versions[self.version](*arguments)

    def _rewritten(self, module: GraphModule, inputs: Sequence[Any], version: str) -> Callable[..., Any] | Skip:
        """The graph with the choice put in, what it chose told, and re-routed as the version says."""
        copy = dynamo.copy_graph(module)
        [gate] = _gates_of(copy, inputs, self._block)
        graph = copy.graph
        if version.endswith((IDS_ALONE, IDS_KEPT)):
            other = ids_alone(gate) if version.endswith(IDS_ALONE) else ids_kept(gate)
            if other is None:
                return Skip(SkipReason.NO_IDS, gate.selection, "all of it leaves in one way")
            gate = other
        if version != "original":
            copy.register_buffer("sere_trial_similarity", self.matrix)
            with graph.inserting_before(next(iter(graph.nodes))):
                similarity = graph.get_attr("sere_trial_similarity")
            done = reroute_dispatch(gate, similarity, RoutingSettings(1), merged=version.startswith("merged"))
            if isinstance(done, Skip):
                return done
        for node, told in ((gate.ids, self.ids), (gate.weights, self.weights)):
            if node is not None:
                with graph.inserting_after(node):
                    graph.call_function(Tell(told), (node,))
        scores = nodes.operand(gate.selection)
        assert scores is not None
        chosen = scores if gate.form == "steps" else gate.selection
        with graph.inserting_after(chosen):
            forced = graph.call_function(Choose(lambda: self.draw, scores, gate), (chosen,))
        chosen.replace_all_uses_with(forced, delete_user_cb=lambda user: user is not forced)
        router = trace_router(scores, nodes.last_size(scores) or 0)
        assert isinstance(router, Router)
        with graph.inserting_after(router.projection):
            given = graph.call_function(Score(lambda: self.draw), (router.projection,))
        router.projection.replace_all_uses_with(given, delete_user_cb=lambda user: user is not given)
        graph.lint()
        copy.recompile()
        return copy.forward


def _gates_of(module: GraphModule, inputs: Sequence[Any], block: TrialBlock) -> list[Gate]:
    """The gates of the block's router in a copy of its graph."""
    separate_statistics(module.graph)
    placeholders = list(module.graph.find_nodes(op="placeholder"))

    def is_router(node: Node) -> bool:
        held = inputs[placeholders.index(node)] if node.op == "placeholder" else nodes.value(node)
        return held is block.weight

    found = find_gates(module, lambda node, columns: min(block.num_experts, columns) if is_router(node) else 0)
    return [gate for gate in found.gates if is_router(gate.router_weight)]
