"""Results of one call in two ways."""

import threading

import pytest
import torch
from torch import nn

from sere_compile.compiler import same_numbers as module
from sere_compile.compiler.same_numbers import (
    HeldBuffers,
    buffers_restored,
    copy_of,
    eager_results,
    is_same,
    shows_wrong,
)

X = torch.randn(4, 8)


def test_rounding_is_no_difference():
    assert is_same((X * 1.001, "text"), (X, "other"))
    assert not is_same(X * 1.1, X)
    assert is_same(X.bfloat16() * 1.05, X.bfloat16())
    assert not is_same(X.bfloat16() * 1.5, X.bfloat16())


@pytest.mark.parametrize("got", [X[:2], (X, X), ()])
def test_other_things(got):
    assert not is_same(got, X)


def test_what_shows_that_a_result_is_wrong():
    """A model that gives others each time shows nothing, and one that gives this shows that it is right."""
    assert shows_wrong(X * 2, lambda: X)
    assert not shows_wrong(X * 1.001, lambda: X)
    assert not shows_wrong(X * 2, iter([X, X * 3]).__next__)


def test_whole_numbers_count_where_there_is_nothing_else():
    """A choice between two close ones may be another in each."""
    ids = torch.arange(4)
    assert is_same((X, ids), (X, ids.flip(0)))
    assert not is_same(ids, ids.flip(0))
    assert is_same(ids, ids.clone())


def test_what_is_no_number_in_both():
    assert is_same(X.log(), X.log())
    assert not is_same(X.log() * 2, X.log())


def test_copies():
    leaf = X.clone().requires_grad_()
    (made, kept), named = copy_of(((leaf, "text"), {"x": X}))
    assert kept == "text"
    assert made.requires_grad
    assert torch.equal(made, leaf)
    assert named["x"] is not X


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_buffers_of_torchscript_are_put_back():
    norm = torch.jit.script(nn.BatchNorm1d(8)).train()
    with buffers_restored(norm):
        norm(X + 1)
        assert norm.running_mean.any()
    assert not norm.running_mean.any()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.mul_(2)


def test_nothing_is_left_changed():
    model, x = Counting(), X.clone()
    assert torch.equal(eager_results(model, (x,), {}), X * 2)
    assert torch.equal(x, X)
    assert model.calls == 0
    with buffers_restored(model):
        model(x)
    assert model.calls == 0


class Stateful(nn.Module):
    """Buffers that a call changes in each way, two of which no version counter shows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        for name in ("data", "replaced", "same"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("unwritten", torch.full((2,), float("nan")))
        self.register_buffer("none", None)

    def forward(self, x, way):
        if way == "norm":
            self.norm(x)
        elif way == "data":
            self.data.data.add_(1)
        elif way == "size":
            self.data.data = torch.ones(3)
        elif way == "replaced":
            self.replaced = self.replaced + 1
        elif way == "none":
            self.none = torch.zeros(2)


@pytest.mark.parametrize("way", ["norm", "data", "size", "replaced", "none", ""])
def test_every_way_to_change_a_buffer(way):
    model = Stateful().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = HeldBuffers(model)
    model(X + 1, way)
    assert held.are_same() is (way == "")
    held.put_back()
    assert held.are_same()
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "unwritten")
    assert after["unwritten"].isnan().all()


def test_what_nobody_wrote_to_is_not_written_back():
    """It may be saved for a backward pass."""
    model = Stateful()
    unwritten = model.same, model.unwritten
    versions = [buffer._version for buffer in unwritten]
    with buffers_restored(model):
        model(X, "data")
    assert [buffer._version for buffer in unwritten] == versions


def test_other_threads_miss_no_buffer():
    """What was not replaced stays where it is, at every moment."""
    model = Stateful()

    class Staying(dict):
        def clear(self):
            pytest.fail("a thread that calls the model finds none")

    model._buffers = Staying(model._buffers)
    with buffers_restored(model):
        model(X, "data")
    assert model.data.tolist() == [0, 0]


def test_large_buffers_are_told_by_their_counters(monkeypatch):
    """And not put back: they may not fit twice. The smallest are copied."""
    monkeypatch.setattr(module, "MOST_BYTES", 8)
    model = nn.Module()
    for name, size in (("large", 9), ("small", 2)):
        model.register_buffer(name, torch.zeros(size))
    held = HeldBuffers(model)
    model.small.add_(1)
    held.put_back()
    assert (model.small.tolist(), held.are_same()) == ([0, 0], True)
    model.large.add_(1)
    held.put_back()
    assert (bool(model.large.all()), held.are_same()) == (True, False)


def test_a_nested_buffer_is_told_by_its_counter():
    """Nobody compares two of them."""
    model = nn.Module()
    model.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    held = HeldBuffers(model)
    assert held.are_same()
    model.nested.mul_(2)
    assert not held.are_same()


def test_what_is_no_module_has_no_buffers():
    assert HeldBuffers(print).are_same()


def test_a_compiled_part_runs_in_eager_mode():
    def fails(graph, inputs):
        raise AssertionError("compiled")

    compiled = torch.compile(Counting(), backend=fails)
    assert torch.equal(eager_results(lambda x: compiled(x), (X,), {}), X * 2)


def test_other_threads_stay_compiled():
    """A first call of theirs would find no gate in any graph, and give up capture for it."""
    graphs = []
    compiled = torch.compile(lambda x: x * 2, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    def model(x):
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        thread.join()
        return compiled(x)

    assert torch.equal(eager_results(model, (X,), {}), X * 2)
    assert len(graphs) == 1
