"""`token_places`: dispatches where the place of a token depends on the ids of others."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from sere_compile.passes.evidence.token_places import drops_tokens, is_counted, split_at_fixed_places
from sere_compile.passes.graph import nodes

from ..moe_modules import EXPERTS, TOKENS, TOP_K, TRACERS, Used, from_dynamo, from_export, rows


def in_graph(function, operation, tracer="export"):
    """The first node of that kind behind the ids of a block whose ids also go through the function."""
    graph = TRACERS[tracer](Used(lambda b, x, ids, s: function(ids)), rows()).graph
    ids = next(node for node in graph.nodes if nodes.kind(node) == "topk")
    return next(node for node in graph.nodes if nodes.kind(node) == operation and ids < node)


def first_rows(ids):
    """Where each expert's slots begin in sorted order."""
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    return counts.cumsum(0) - counts


def capacity(ids):
    """The GShard way: places from a running sum of the mask, and those below the capacity kept."""
    mask = F.one_hot(ids.flatten(), EXPERTS)
    return mask * (mask.cumsum(0) < 2)


def sorted_capacity(ids):
    """The same in sorted order, counted from each expert's first row."""
    sorted_ids, _ = ids.flatten().sort()
    return torch.arange(sorted_ids.shape[0]) - first_rows(ids)[sorted_ids] < 2


def load(ids):
    """A running sum that nothing is compared with."""
    return F.one_hot(ids.flatten(), EXPERTS).cumsum(0)


def dropless(ids):
    """Sorted slots whose scales are looked up: no place is counted."""
    sorted_ids, _ = ids.flatten().sort()
    return torch.linspace(0, 1, EXPERTS)[sorted_ids] < 0.5


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize(
    ("function", "operation", "drops"),
    [
        (capacity, "one_hot", True),
        (sorted_capacity, "sort", True),
        (load, "one_hot", False),
        (dropless, "sort", False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_drops_tokens(function, operation, drops, tracer):
    """An expert's tokens are numbered and compared with a limit, or not."""
    assert drops_tokens(in_graph(function, operation, tracer)) == drops


def test_is_counted():
    """A table made of counts is told from one that the model has; no table is none."""
    table = in_graph(lambda ids: first_rows(ids)[ids], "sub")
    assert is_counted(table)
    assert not is_counted(in_graph(lambda ids: torch.linspace(0, 1, EXPERTS)[ids], "linspace"))
    assert not is_counted(None)


def from_real_make_fx(module, *inputs):
    """make_fx on real numbers, which `tolist` needs."""
    with torch.no_grad():
        return make_fx(module)(*inputs)


class TestSplitAtFixedPlaces:
    """make_fx writes the counts of the traced call down, torch.export keeps them symbolic."""

    @staticmethod
    def split(ids):
        counts = torch.zeros(TOKENS, EXPERTS).scatter(1, ids, 1.0).long().sum(0).tolist()
        return ids.flatten().argsort().split(counts)

    @staticmethod
    def sort(trace, function):
        graph = trace(Used(lambda b, x, ids, s: function(ids)), rows()).graph
        return next(node for node in graph.nodes if nodes.kind(node) in ("argsort", "sort"))

    def test_written_down(self):
        """The splitting node is named."""
        found = split_at_fixed_places(self.sort(from_real_make_fx, self.split), TOKENS * TOP_K)
        assert nodes.kind(found) in ("split", "split_with_sizes")

    def test_computed(self):
        """Sizes that the graph computes hold for every call."""
        assert split_at_fixed_places(self.sort(from_export, self.split), TOKENS * TOP_K) is None

    @pytest.mark.parametrize("trace", [from_real_make_fx, from_export, from_dynamo])
    @pytest.mark.parametrize("take", [lambda order: order[3:7], lambda order: order.narrow(0, 2, 4)])
    def test_a_part_by_constants(self, trace, take):
        """Wherever it was written: it stands at the same places in every call."""
        found = split_at_fixed_places(self.sort(trace, lambda ids: take(ids.flatten().argsort()) + 1), TOKENS * TOP_K)
        assert nodes.kind(found) in ("slice", "narrow")

    def test_a_symbolic_number_of_slots(self):
        """Nothing can have been written down then."""
        assert split_at_fixed_places(self.sort(from_real_make_fx, self.split), None) is None

    @pytest.mark.parametrize("trace", [from_export, from_dynamo])
    def test_sizes_that_depend_on_the_data(self, trace):
        """How many numbers `bincount` gives is not asked: that would be an error of torch's."""
        sort = self.sort(trace, lambda ids: torch.bincount(ids.flatten().sort()[0], minlength=EXPERTS))
        assert split_at_fixed_places(sort, TOKENS * TOP_K) is None

    def test_the_whole_order(self):
        """Reading every slot takes no part."""
        sort = self.sort(from_real_make_fx, lambda ids: ids.flatten().argsort() // TOP_K)
        assert split_at_fixed_places(sort, TOKENS * TOP_K) is None
