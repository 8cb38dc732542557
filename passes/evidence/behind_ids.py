"""What is behind the ids of a selection where no experts were found, in words: the detail of a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ..gate import Use, UseKind
from ..graph import nodes
from ..graph.walk import walk
from .expert_evidence import numbers_named

_FAR = 60  # nodes behind the ids
_SHARED = frozenset({"linear", "matmul", "addmm"})
_GATHERS = frozenset({"index", "embedding", "embedding_bag", "_embedding_bag"})


def behind_ids(ids: Sequence[Node], uses: Sequence[Use], columns: int) -> str:
    """The nearest weights that are read behind the ids, and why they are no experts; else who reads the ids.

    Args:
        ids: of the selection.
        uses: of these ids.
        columns: how many scores were selected from.
    """
    mapped: Node | None = None
    for reader in walk(ids, _ahead, _FAR):
        weights = next((source for source in reader.all_input_nodes if _is_weights(source)), None)
        if weights is None:
            continue
        if not nodes.is_floating(weights) and len(nodes.shape(weights) or ()) < 3:
            mapped = mapped or weights
        elif len(_root_sizes(weights)) < 2 and nodes.kind(reader) not in _GATHERS:
            continue  # a norm's, or a bias
        elif nodes.kind(reader) not in _SHARED or len(_root_sizes(weights)) >= 3:
            return _why_none(reader, weights, mapped, columns)
    named = {number for use in uses for number in numbers_named(use.consumer)}
    if len(named) > 1:
        return f"ids are compared with {len(named)} numbers, and there are {columns} scores"
    readers = sorted({nodes.kind(use.consumer) for use in uses})
    if readers == ["output"]:
        return "the graph returns them"
    leave = any(use.kind is UseKind.LEAVES for use in uses)
    text = f"ids are read by {', '.join(readers)}"
    return f"{text}, and what is made of them leaves the graph" if leave else text


def _ahead(node: Node) -> list[Node]:
    """The followers of a node in the order of the graph's, none behind a matrix that all tokens share."""
    if nodes.kind(node) in _SHARED and any(_is_weights(s) and len(_root_sizes(s)) < 3 for s in node.all_input_nodes):
        return []
    # The walk takes the last one first.
    return sorted((user for user in nodes.followers(node) if user.op != "output"), reverse=True)


def _is_weights(node: Node) -> bool:
    root = nodes.parameter_root(node)
    return root is not None and nodes.is_model_state(root) and nodes.is_tensor(root) and len(_root_sizes(node)) >= 1


def _root_sizes(node: Node) -> tuple[object, ...]:
    root = nodes.parameter_root(node)
    return () if root is None else nodes.shape(root) or ()


def _why_none(reader: Node, weights: Node, mapped: Node | None, columns: int) -> str:
    """Why weights that are read behind the ids are no experts."""
    root, sizes, own = nodes.parameter_root(weights), _root_sizes(weights), nodes.shape(weights) or ()
    assert root is not None
    name = f"{root.name} {[str(size) if not isinstance(size, int) else size for size in sizes]}"
    if mapped is not None:
        return f"{mapped.name} maps the ids to other numbers, by which {reader.name} reads {name}"
    if len(sizes) < 3:
        return f"{reader.name} reads {name}, which holds no matrix for each of the {columns} scores"
    if sizes[0] != columns:
        return f"{reader.name} reads {name}, which is no stack of {columns} matrices, one for each score"
    if nodes.kind(reader) in _GATHERS and len(own) < 3:
        return f"{reader.name} reads {name} as vectors: index the stack of matrices as it is"
    return f"{reader.name} reads {name}, and what it reads is not multiplied with hidden states slot by slot"
