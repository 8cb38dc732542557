"""`token_places`: dispatches where the place of a token depends on the ids of others."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from sere_compile.passes.evidence.token_places import drops_tokens, is_counted, split_at_fixed_places
from sere_compile.passes.graph import nodes

from ..graph.written import Written
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

    def test_a_part_of_a_symbolic_number_of_slots(self):
        """Constants that the program itself has among them."""
        module = Used(lambda b, x, ids, s: ids.flatten().argsort()[3:7] + 1)
        graph = from_dynamo(module, rows(), dynamic=True).graph
        [sort] = [node for node in graph.nodes if nodes.kind(node) == "argsort"]
        [slots] = nodes.shape(sort)
        assert not isinstance(slots, int)
        assert split_at_fixed_places(sort, slots) is None

    @pytest.mark.parametrize("trace", [from_export, from_dynamo])
    def test_sizes_that_depend_on_the_data(self, trace):
        """How many numbers `bincount` gives is not asked: that would be an error of torch's."""
        sort = self.sort(trace, lambda ids: torch.bincount(ids.flatten().sort()[0], minlength=EXPERTS))
        assert split_at_fixed_places(sort, TOKENS * TOP_K) is None

    def test_the_whole_order(self):
        """Reading every slot takes no part."""
        sort = self.sort(from_real_make_fx, lambda ids: ids.flatten().argsort() // TOP_K)
        assert split_at_fixed_places(sort, TOKENS * TOP_K) is None


class Ids(Written):
    """Ids of four tokens, three each, by hand."""

    def __init__(self):
        super().__init__()
        self.ids = self.input(torch.zeros(4, 3, dtype=torch.int64))

    def flat(self):
        return self.call("view", self.ids, -1)

    def sorted(self):
        return self.pick(self.call(torch.sort, self.flat()), 0)

    def counts(self):
        return self.call(torch.bincount, self.flat(), minlength=8)

    def mask(self):
        return self.call(torch.nn.functional.one_hot, self.ids, 8)

    def column(self):
        return self.call("unsqueeze", self.ids, -1)

    def places(self, mask=None):
        return self.call(torch.cumsum, self.mask() if mask is None else mask, 0)


# What is made of the ids, and whether tokens are dropped by their place.
PLACES = {
    "a running sum that is compared": (lambda w: w.call(torch.lt, w.places(), 2), True),
    "compared the other way": (lambda w: w.call(torch.ge, w.places(), 2), True),
    "a running sum that is read": (lambda w: w.call(torch.neg, w.places()), False),
    "compared for equality": (lambda w: w.call(torch.eq, w.places(), 2), False),
    "a mask that is compared": (lambda w: w.call(torch.gt, w.mask(), 0), False),
    "through what keeps the mask": (
        lambda w: w.call(torch.le, w.places(w.mul(w.call("float", w.call("permute", w.mask(), 2, 0, 1)), 2)), 2),
        True,
    ),
    "through what does not": (lambda w: w.call(torch.lt, w.places(w.call(torch.sum, w.mask(), 1)), 2), False),
    "numbers that are moved": (lambda w: w.call(torch.lt, w.call(torch.sub, w.places(), 1), 2), True),
    "a slot's own number": (lambda w: w.call(torch.lt, w.call(torch.sum, w.mul(w.places(), w.mask()), -1), 2), True),
    "picked by the ids": (lambda w: w.call(torch.lt, w.call(torch.gather, w.places(), -1, w.column()), 2), True),
    "the largest": (lambda w: w.call(torch.lt, w.call(torch.amax, w.places(), -1), 2), True),
    "where it is chosen": (
        lambda w: w.call(torch.ge, w.call(torch.where, w.call(torch.gt, w.mask(), 0), w.places(), 0), 2),
        True,
    ),
    "cut off": (lambda w: w.call(torch.clamp, w.places(), 0, 2), True),
    "cut off below": (lambda w: w.call(torch.clamp, w.places(), 0), False),
    "the less": (lambda w: w.call(torch.clamp_max, w.places(), 2), True),
    "whether there are any": (lambda w: w.call(torch.gt, w.places(), 0), False),
    "whether it is marked": (lambda w: w.call(torch.ge, w.call(torch.sub, w.places(), 1), 0), False),
    "ids in another order": (
        lambda w: w.call(torch.lt, w.places(w.call(torch.eq, w.call(torch.t, w.ids), 3)), 2),
        True,
    ),
    "other numbers": (lambda w: w.call(torch.lt, w.places(w.call(torch.eq, w.call(torch.neg, w.ids), 3)), 2), False),
    "sorted, from the first row of each": (
        lambda w: w.call(torch.lt, w.pick(w.call(torch.cumsum, w.counts(), 0), w.sorted()), 2),
        True,
    ),
    "sorted, by a gather": (lambda w: w.call(torch.lt, w.call(torch.gather, w.counts(), 0, w.sorted()), 2), True),
    "sorted, of another table": (lambda w: w.call(torch.lt, w.pick(w.weight(8), w.sorted()), 0.5), False),
    "sorted, compared": (lambda w: w.call(torch.lt, w.sorted(), 2), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    write, drops = PLACES[name]
    w = Ids()
    write(w)
    assert any(drops_tokens(user) for user in w.ids.users) is drops


def test_no_parts():
    w = Ids()
    order = w.call(torch.argsort, w.flat())
    parts = w.call(torch.split, w.pick(w.given(12, 2), order), 12)
    parts.meta["example_value"] = ()
    assert split_at_fixed_places(order, 12) is None


@pytest.mark.parametrize(("steps", "drops"), [(150, True), (250, False)])
def test_places_far_behind_are_not_looked_for(steps, drops):
    w = Ids()
    mask = w.call("float", w.mask())
    for _ in range(steps):
        mask = w.mul(mask, 1)
    w.call(torch.lt, w.places(mask), 2)
    assert any(drops_tokens(user) for user in w.ids.users) is drops


def test_tables_of_counts():
    w = Ids()
    counts = w.counts()
    assert is_counted(counts)
    assert is_counted(w.call(torch.sub, w.call(torch.cumsum, counts, 0), counts))
    assert not is_counted(w.weight(8))
    assert not is_counted(w.call(torch.exp, w.ids))
    assert not is_counted(None)
    far = counts
    for _ in range(14):
        far = w.call(torch.neg, far)
    assert not is_counted(far)


# What is taken of rows in sorted order, and whether it is at places that tracing wrote down.
PARTS = {
    "split": (lambda w, rows: w.call(torch.split, rows, [5, 7]), True),
    "narrow": (lambda w, rows: w.call(torch.narrow, rows, 0, 0, 5), True),
    "slice": (lambda w, rows: w.pick(rows, slice(2, 5)), True),
    "all rows": (lambda w, rows: w.pick(rows, slice(0, 12)), False),
    "columns": (lambda w, rows: w.pick(rows, (slice(None), slice(0, 1))), False),
    "one part": (lambda w, rows: w.call(torch.split, rows, 12), False),
    "by a computed number": (lambda w, rows: w.call(torch.narrow, rows, 0, 0, w.input(5)), False),
    "behind a function of rows": (lambda w, rows: w.call(torch.split, w.call(torch.exp, rows), [5, 7]), True),
    "of other rows": (lambda w, rows: w.call(torch.split, w.call("view", rows, 2, -1), [1, 1]), False),
    "an index": (lambda w, rows: w.pick(rows, w.input(torch.arange(5))), False),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    write, fixed = PARTS[name]
    w = Ids()
    order = w.call(torch.argsort, w.flat())
    part = write(w, w.pick(w.given(12, 2), order))
    assert (split_at_fixed_places(order, 12) is part) is fixed
    assert (split_at_fixed_places(order, 12) is None) is not fixed
    assert split_at_fixed_places(order, 13) is None
    assert split_at_fixed_places(order, "twelve") is None
    assert split_at_fixed_places(w.ids, 12) is None
