"""Gates that ran outside every graph: found in an eager run, named, with what to do."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sere_compile
from sere_compile.compiler import eager_selections
from sere_compile.compiler.eager_selections import WatchSelections

from ..tiny_models import build, gate_names, tokens
from ..zoo import registry as zoo
from ..zoo.outside.loops import EXPERTS, HIDDEN, TOP_K, Loop, MaskLoop

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def rows():
    return torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))


def watched(model, *args):
    with torch.no_grad(), WatchSelections() as watch:
        model(*args)
    return watch.found


def test_every_gate_of_an_eager_run():
    """Router weight, E, K and the line of the selection in the model's own code."""
    model = build("qwen2_moe", "eager")
    found = watched(model, tokens())
    assert [selection.weight for selection in found] == [model.get_parameter(name) for name in gate_names()]
    assert all((selection.num_experts, selection.top_k) == (12, 4) for selection in found)
    assert all(selection.place.startswith("modeling_qwen2_moe.py:") for selection in found)


class Chosen(Loop):
    """Selects in one of several ways and does no more."""

    def __init__(self, select):
        super().__init__()
        self.select = select

    def forward(self, x):
        return self.select(self.gate(x))


@pytest.mark.parametrize(
    ("select", "top_k"),
    [
        (lambda scores: scores.topk(TOP_K), TOP_K),
        (lambda scores: torch.topk(scores.sigmoid() + 1.0, TOP_K, sorted=False), TOP_K),
        (lambda scores: scores.topk(TOP_K, 2), TOP_K),
        (lambda scores: scores.argmax(-1), 1),
        (lambda scores: scores.float().softmax(-1).max(-1), 1),
        (lambda scores: scores.masked_fill(scores < 0, float("-inf")).to(torch.bfloat16).topk(TOP_K), TOP_K),
        (lambda scores: scores.sort(descending=True), None),
    ],
)
def test_ways_to_select(select, top_k):
    [selection] = watched(Chosen(select), rows())
    assert (selection.num_experts, selection.top_k) == (EXPERTS, top_k)


@pytest.mark.parametrize(
    "select",
    [
        lambda scores: scores.max(),
        lambda scores: scores.argmax(),
        lambda scores: scores.argmax(0),
        lambda scores: scores.topk(2, dim=1),
        lambda scores: scores.sum(-1).topk(2),
        lambda scores: (scores @ torch.ones(EXPERTS, EXPERTS)).topk(2),
    ],
)
def test_selections_that_are_none(select):
    """Over other dimensions, over everything, or over scores that no longer belong to experts."""
    assert watched(Chosen(select), rows()) == []


def test_each_weight_is_found_once():
    """By its first selection, also where others have been found before."""
    first, second = (
        Chosen(lambda scores: (scores.topk(TOP_K), scores.topk(1))),
        Chosen(lambda scores: scores.argmax(-1)),
    )
    found = watched(lambda x: (first(x), second(x), first(x)), rows())
    assert [selection.top_k for selection in found] == [TOP_K, 1]
    assert found[0].weight is first.gate.weight
    assert found[1].weight is second.gate.weight


def test_what_is_watched_gives_what_it_gives():
    """Whatever it is told by name."""
    with torch.no_grad(), WatchSelections():
        made = torch.zeros_like(torch.ones(2), dtype=torch.float64)
        best = torch.tensor([3.0, 1.0, 2.0]).sort(descending=True)
        cast = torch.ones(2).to(dtype=torch.int64)
    assert (made.dtype, cast.dtype, best.values.tolist()) == (torch.float64, torch.int64, [3, 2, 1])
    assert torch.equal(best.indices, torch.tensor([0, 2, 1]))


class Classifier(nn.Module):
    """A selection over classes with no experts beside it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, x):
        return self.head(x).topk(TOP_K)


def test_selection_without_experts():
    assert watched(Classifier(), rows()) == []


def test_explain_names_a_gate_that_no_graph_shows():
    model = MaskLoop().eval()
    report = sere_compile.explain(model, rows())
    [row] = report.gates
    assert (row.name, row.num_experts, row.top_k, row.status) == ("gate.weight", EXPERTS, TOP_K, "skipped")
    lines, start = inspect.getsourcelines(MaskLoop.forward)
    number = start + next(i for i, line in enumerate(lines) if "topk" in line)
    assert row.reason == f"it ran outside every graph, at loops.py:{number}"
    assert "sere_compile.compile(model, ...)" in report.hint
    assert "1 MoE gate found, 0 rewritten" in str(report)


def test_model_in_one_graph_runs_once():
    """A second run is for what graphs do not show."""
    calls = []
    model = build("mixtral")
    original = model.model.forward

    def counted(*args, **kwargs):
        if not torch.compiler.is_compiling():
            calls.append(1)
        return original(*args, **kwargs)

    model.model.forward = counted
    assert len(sere_compile.explain(model, tokens(), use_cache=False).rewritten) == len(gate_names())
    assert not calls


class Appending(MaskLoop):
    """Changes an argument at each call, as a cache does."""

    def forward(self, x, cache):
        cache.append(F.relu(x))
        return super().forward(x)


def test_second_run_leaves_the_arguments_alone():
    cache = []
    sere_compile.explain(Appending().eval(), rows(), cache)
    assert len(cache) == 1


@pytest.mark.parametrize(("name", "top_k"), [("zaya", 1), ("inkling", 3), ("longcat_flash", 3), ("nllb_moe", 1)])
def test_routers_with_further_columns_and_experts_of_their_own(name, top_k):
    """E counts experts that compute: no skip slot, no shared expert's column, none that return their input."""
    model = zoo.build(name, "eager")
    with torch.no_grad(), WatchSelections() as watch:
        model(**zoo.inputs(name))
    assert len(watch.found) >= 3
    assert {(selection.num_experts, selection.top_k) for selection in watch.found} == {(12, top_k)}
    assert all(selection.place.startswith(f"modeling_{name}.py:") for selection in watch.found)


class TestFollowed:
    """What is known of tensors while a router runs by itself: its weight, and scores."""

    def scores_of(self, function):
        """Whether what the function of (x, weight) gives are a router's scores."""
        weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        with torch.no_grad(), WatchSelections() as watch:
            result = function(torch.randn(3, HIDDEN), weight)
        return watch._scores.get(result) is weight

    @pytest.mark.parametrize(
        "function",
        [
            F.linear,
            lambda x, w: x @ w.T,
            lambda x, w: x @ w.t().contiguous(),
            lambda x, w: torch.addmm(torch.zeros(EXPERTS), x, w.T),
            lambda x, w: F.linear(x.double(), w.double()),
            lambda x, w: F.linear(x, w).softmax(-1) * 2,
            lambda x, w: torch.zeros(3, 1) + F.linear(x, w),
            lambda x, w: F.linear(x, w)[:, :3],
            lambda x, w: F.linear(x, w).narrow(1, 0, 2),
            lambda x, w: F.linear(x[None], w).view(-1, EXPERTS),
        ],
    )
    def test_scores(self, function):
        assert self.scores_of(function)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, w: w.T,
            lambda x, w: F.linear(x, w).sum(),
            lambda x, w: F.linear(x, w).sum(-1),
            lambda x, w: F.linear(x, w) > 0,
            lambda x, w: x @ torch.randn(HIDDEN, EXPERTS),
            lambda x, w: x @ (w[:3]).T,
            lambda x, w: F.linear(x[:, :EXPERTS], w[:, :EXPERTS]),
            lambda x, w: F.linear(x, w) @ torch.ones(EXPERTS, EXPERTS),
        ],
    )
    def test_what_are_none(self, function):
        assert not self.scores_of(function)


@pytest.mark.parametrize(
    ("packet", "args", "dim"),
    [
        ("topk", ("x", 2), -1), ("topk", ("x", 2, 1), 1), ("topk", ("x", 2, 0, True), 0), ("argmax", ("x",), None),
        ("argmax", ("x", 1), 1), ("argmax", ("x", None), None), ("max", ("x",), None), ("max", ("x", 0, True), 0),
        ("topk", ("x", 2, None), -1), ("sort", ("x", None), -1), ("max", ("x", "y"), None),
        ("sort", ("x",), -1), ("sort", ("x", 0, True), 0), ("sort", ("x", True), -1), ("argsort", ("x", 1), 1),
    ],
)  # fmt: skip
def test_the_dimension_of_a_selection(packet, args, dim):
    assert eager_selections._dimension(getattr(torch.ops.aten, packet), args) == dim


def test_the_line_of_the_user():
    def line():
        return eager_selections._users_line(inspect.currentframe())

    assert line() == f"test_eager_selections.py:{line.__code__.co_firstlineno + 1}"
    assert eager_selections._users_line(None) == ""
    own = eval("lambda: sys._getframe()", {"sys": sys, "__name__": eager_selections.__name__})()
    assert eager_selections._users_line(own) == f"test_eager_selections.py:{inspect.currentframe().f_lineno}"
