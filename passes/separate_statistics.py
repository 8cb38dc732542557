"""Statistics of a gate get a table of their own.

A dispatch and a loss that balances load often read one table of the ids, or one count of them:

    table = zeros.scatter(1, ids, weights)                   table = zeros.scatter(1, ids, weights)
    loss  = table.sum(0).var()                  ──>          apart = zeros.scatter(1, ids, weights)
    where = nonzero(table)                                   loss  = apart.sum(0).var()
                                                             where = nonzero(table)

Re-routing gives the dispatch new ids, and a statistic is of what the router chose: where both read one
table, no rewrite is right. With two of them each is a use of the ids by itself.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from .evidence.classify_uses import is_statistic, load_sizes
from .evidence.duplicate_safety import consumers, counts_ids
from .evidence.selections import Selection, find_selections
from .evidence.token_places import MASKING
from .graph import nodes

_FRESH = frozenset({"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"})


def separate_statistics(graph: Graph) -> list[Node]:
    """Copy tables and counts of a selection's ids that a statistic and something else read.

    Args:
        graph: is changed where there are such tables; what it computes stays the same, bit for bit.

    Returns:
        The copies, which the statistics read from then on.
    """
    made = []
    for selection in find_selections(graph):
        if isinstance(selection, Selection):
            for ids in selection.ids:
                for consumer, _ in list(consumers(ids)):
                    made += _separated(consumer, load_sizes(selection))
    return made


def _separated(table: Node, sizes: set[int]) -> list[Node]:
    """The copy that the statistics of a table read, if it is read by others too."""
    if not counts_ids(table) and nodes.kind(table) not in MASKING:
        return []
    memory = _memory(table)
    if memory is None:
        return []
    readers = [reader for reader in nodes.followers(table) if nodes.reads_numbers(reader, memory)]
    statistics = [reader for reader in readers if is_statistic(reader, table, sizes)]
    if not statistics or len(statistics) == len(readers):
        return []
    copied: dict[Node, Node] = {}
    last = table
    for node in dict.fromkeys((memory, table)):
        with table.graph.inserting_after(last):
            last = copied[node] = table.graph.node_copy(node, lambda source: copied.get(source, source))
    for reader in statistics:
        for node, copy in copied.items():
            reader.replace_input_with(node, copy)
    return [copied[table]]


def _memory(table: Node) -> Node | None:
    """What holds the table: itself, or a fresh tensor of which nothing else is known; None where that is shared."""
    written = nodes.writes(table)
    if not written:
        return table
    [memory] = written
    alone = nodes.kind(memory) in _FRESH and nodes.writers(memory) == [table]
    return memory if alone and not any(user < table for user in memory.users) else None
