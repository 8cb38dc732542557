"""One walk over a graph, for every search that visits nodes once and carries nothing along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node


def walk(starts: Iterable[Node], step: Callable[[Node], Iterable[Node]], limit: int | None = None) -> Iterator[Node]:
    """Visit everything that steps lead to, each node once, the latest found first.

    Args:
        starts: where the walk begins; they are visited too.
        step: the nodes to go on to from a node. It is asked when the walk is taken up again after
            the visit.
        limit: how many nodes may be found, visited or not, before the walk ends; None for all.
    """
    pending = list(dict.fromkeys(starts))
    found = set(pending)
    while pending and (limit is None or len(found) < limit):
        node = pending.pop()
        yield node
        fresh = [following for following in dict.fromkeys(step(node)) if following not in found]
        found.update(fresh)
        pending.extend(fresh)
