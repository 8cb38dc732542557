"""Copy a graph, so that the tracer's own stays as it is."""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule, Node


def copy_module(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy with a graph of its own that shares parameters and buffers, and the copy of each node.

    Names of nodes, metadata, the tracer and the form of inputs and outputs are those of the
    original.
    """
    source = module.graph
    graph = Graph(tracer_cls=source._tracer_cls)
    mapping: dict[Node, Node] = {}
    old_output = source.output_node()
    mapping[old_output] = graph.output(graph.graph_copy(source, mapping))
    mapping[old_output].meta.update(old_output.meta)
    for old, new in mapping.items():
        # A copy renames what is called like a builtin, `input` for one; signatures go by the name.
        if new.name != old.name:
            new.name = old.name
    graph._codegen = copy.deepcopy(source._codegen)
    copied = GraphModule(module, graph, class_name=module.__class__.__name__)
    copied.meta = dict(module.meta)
    return copied, mapping
