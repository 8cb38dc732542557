"""Whether the dispatch reads the ids that re-routing saw."""

import types

import pytest
import torch

from sere_compile.passes.proof.changed_ids import changed_id

from ..graph.written import Written

IDS = torch.tensor([[0, 3], [2, -1], [4, 1]])


def told(*reads, experts=4):
    """Of a gate whose ids the dispatch reads in these forms; 4 and -1 name none of 4 experts."""
    w = Written()
    ids, *nodes = (w.input(value) for value in (IDS, *reads))
    uses = [types.SimpleNamespace(read=node) for node in (ids, *nodes)]
    gate = types.SimpleNamespace(ids=ids, num_experts=experts, dispatch_uses=uses)
    return changed_id(gate, dict(zip((ids, *nodes), (IDS, *reads), strict=True)))


@pytest.mark.parametrize(
    "read",
    [
        IDS.view(-1), IDS.T, IDS.int(), IDS.clamp(0, 3), IDS[:, 0], IDS.float() * 2, IDS + 0,
        torch.where(IDS == 4, 0, IDS),
    ],
    ids=["flat", "transposed", "cast", "of none", "a column", "no numbers", "equal", "one of none"],
)  # fmt: skip
def test_the_same_ids(read):
    assert told(read) is None


@pytest.mark.parametrize(
    ("read", "words"),
    [
        ((IDS + 1) % 4, "id 0 becomes 1 in x1"),
        (torch.where(torch.tensor([[True], [False], [True]]), IDS, IDS[:1]), "id 2 becomes 0 in x1"),
        (IDS.clamp(max=2), "id 3 becomes 2 in x1"),
    ],
    ids=["next", "first token's", "fewer"],
)
def test_other_ids(read, words):
    assert words in told(read)


def test_every_form_is_looked_at():
    assert "in x2, behind re-routing" in told(IDS.view(-1), IDS * 0)


def test_the_last_expert_counts():
    """Of 5 experts 4 names one."""
    assert told(IDS.clamp(max=3)) is None
    assert "id 4 becomes 3" in told(IDS.clamp(max=3), experts=5)
