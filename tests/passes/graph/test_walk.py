"""`walk`: every node once, as far as steps lead or the limit allows."""

import torch
from torch.fx import Graph

from sere_compile.passes.graph.walk import walk


def chain(length, branches=1):
    """A node, and `branches` chains of `length` nodes behind it that meet in one."""
    graph = Graph()
    start = graph.placeholder("x")
    ends = []
    for _ in range(branches):
        node = start
        for _ in range(length):
            node = graph.call_function(torch.relu, (node,))
        ends.append(node)
    return start, graph.call_function(torch.stack, (ends,))


def users(node):
    return node.users


def test_each_node_once():
    """Where branches meet again the walk does not go twice."""
    start, end = chain(3, branches=2)
    visited = list(walk([start, start], users))
    assert len(visited) == len(set(visited)) == 8
    assert visited[0] is start
    assert visited.count(end) == 1


def test_latest_first():
    """One branch is followed to its end before the other."""
    start, end = chain(2, branches=2)
    first, second = list(start.users)
    visited = list(walk([start], users))
    assert visited.index(end) < visited.index(first)
    assert visited.index(second) < visited.index(first)


def test_steps_decide():
    """Nothing lies behind a node that has no step."""
    start, end = chain(3)
    stop = next(iter(start.users))
    assert list(walk([start], lambda node: [] if node is stop else node.users)) == [start, stop]
    assert end not in walk([], users)


def test_limit():
    """The walk ends when as many nodes are found, the one that is not visited any more included."""
    start, _ = chain(9)
    assert [len(list(walk([start], users, limit))) for limit in (1, 2, 5, None)] == [0, 1, 4, 11]


def test_a_step_may_depend_on_the_visit():
    """It is asked when the walk is taken up again, so a caller can end it."""
    start, _ = chain(5)
    seen = []
    for node in walk([start], lambda node: node.users if len(seen) < 3 else []):
        seen.append(node)
    assert len(seen) == 3
