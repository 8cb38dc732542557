"""`run_graph`: a graph on given values."""

import collections
import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx import symbolic_trace

from sere_compile.passes.graph.failures import ProgramError
from sere_compile.passes.graph.run_part import copied, plain_number, run_graph


def test_half_precision_becomes_single():
    graph = symbolic_trace(lambda x: x.to(torch.bfloat16).half() * 1.001)
    given = {next(iter(graph.graph.nodes)): torch.ones(3)}
    values = {dtype: list(run_graph(graph.graph, graph, given, single=dtype).values())[-1] for dtype in (True, False)}
    assert values[True].dtype is torch.float32
    assert values[False].dtype is torch.float16


def test_noise_is_the_same_and_generators_stay():
    graph = symbolic_trace(lambda x: x + torch.randn_like(x))
    given = {next(iter(graph.graph.nodes)): torch.ones(3)}
    state = torch.get_rng_state()
    first, second = (list(run_graph(graph.graph, graph, given).values())[-1] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_every_gpu_is_the_same(monkeypatch):
    """Each that holds a value, once, and no other. Without a GPU these are generators of the CPU."""
    generators, forked = tuple(torch.Generator() for _ in range(3)), []
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: forked.append(sorted(devices)) or contextlib.nullcontext()
    )
    graph = symbolic_trace(lambda a, b, c, d: a)
    with FakeTensorMode():
        values = [torch.empty(2, device=device) for device in ("cuda:0", "cuda:2", "cuda:2", "cpu")]
    seeds = [generator.initial_seed() for generator in generators]
    run_graph(graph.graph, graph, dict(zip(graph.graph.nodes, values, strict=False)))
    assert forked == [[0, 2]]
    assert [generator.initial_seed() for generator in generators] == [0, seeds[1], 0]


def test_writes_go_to_copies():
    graph = symbolic_trace(lambda x: x.add_(1))
    value = torch.zeros(2)
    run_graph(graph.graph, graph, {next(iter(graph.graph.nodes)): value})
    assert torch.equal(value, torch.zeros(2))


def last_of(graph, value, **options):
    return list(run_graph(graph.graph, graph, {next(iter(graph.graph.nodes)): value}, **options).values())[-1]


class Normalising(nn.Module):
    """Statistics of a module that stays one, and of an attribute."""

    def __init__(self):
        super().__init__()
        self.inside = nn.BatchNorm1d(3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return torch.batch_norm(self.inside(x), None, None, self.mean, self.inside.running_var, True, 0.1, 1e-5, False)


def test_statistics_that_the_module_holds_stay():
    model = Normalising()
    graph = symbolic_trace(model)
    run_graph(graph.graph, graph, {next(iter(graph.graph.nodes)): torch.randn(5, 3) + 1})
    assert not model.mean.any()
    assert torch.equal(model.inside.running_var, torch.ones(3))
    assert not model.inside.running_mean.any()
    assert model.inside.num_batches_tracked == 0


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.float16),
        lambda x: x.to(dtype=torch.bfloat16),
        lambda x: torch.softmax(x, -1, dtype=torch.float16),
    ],
    ids=["half", "bfloat16", "to", "keyword", "softmax"],
)
def test_every_cast_to_half_precision(cast):
    """Becomes one to float32; casts to other types stay."""
    graph = symbolic_trace(lambda x: cast(x))
    assert last_of(graph, torch.ones(3)).dtype is torch.float32
    assert last_of(graph, torch.ones(3).double()).dtype is torch.float32
    assert last_of(graph, torch.ones(3), single=False).dtype in (torch.float16, torch.bfloat16)
    assert last_of(symbolic_trace(lambda x: x.double()), torch.ones(3)).dtype is torch.float64
    assert last_of(symbolic_trace(lambda x: x.to(torch.int32)), torch.ones(3)).dtype is torch.int32


class Owning(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.inner.register_buffer("shift", torch.arange(3.0))

    def forward(self, x):
        return torch.dropout(self.inner(x), 0.5, True) + self.inner.shift


def test_modules_attributes_and_dropout():
    """What a module holds is read from it; nothing is dropped."""
    module = Owning()
    x = torch.randn(2, 3)
    torch.testing.assert_close(last_of(symbolic_trace(module), x), module.inner(x) + module.inner.shift)


def test_what_is_given_is_not_computed():
    graph = symbolic_trace(lambda x: (x + 1) * 2)
    x, added, product, output = graph.graph.nodes
    values = run_graph(graph.graph, None, {x: torch.ones(1), added: torch.full((1,), 5.0)})
    assert values[product] == 10
    assert output not in values
    assert not values[product].requires_grad


def test_copies():
    """Of tensors, also in tuples, whose form stays."""
    pair = collections.namedtuple("pair", "values indices")
    given = pair(torch.ones(2), (torch.zeros(2), 3))
    made = copied(given)
    assert type(made) is pair
    assert type(made.indices) is tuple
    assert made.indices[1] == 3
    made.values.add_(1)
    made.indices[0].add_(1)
    assert given.values.tolist() == [1, 1]
    assert given.indices[0].tolist() == [0, 0]
    assert copied("x") == "x"
    assert plain_number(7) == 7


def test_noise_does_not_depend_on_the_caller_s_generator():
    graph = symbolic_trace(lambda x: x + torch.randn_like(x))
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(last_of(graph, torch.ones(3)))
    assert torch.equal(*made)


def test_writes_to_what_nobody_writes_are_spared():
    """Only what is written is copied."""
    graph = symbolic_trace(lambda x, y: x.add_(1) + y)
    x, y, *_ = graph.graph.nodes
    given = {x: torch.zeros(2), y: torch.ones(2)}
    values = run_graph(graph.graph, None, given)
    assert values[y] is given[y]
    assert values[x] is not given[x]


def test_dropout_of_what_is_no_tensor():
    """Only a tensor is handed through."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("dropout", (x, 3))
    holder = type("Holder", (), {"dropout": lambda self, number: number + 1})()
    assert list(run_graph(graph, None, {x: holder}).values())[-1] == 4


def test_an_operation_of_the_program_raises_what_it_likes():
    """It is told to callers as what they expect."""

    def checked(x):
        assert x.sum() > 0, "no mass"
        return x

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(checked, (x,))
    assert run_graph(graph, None, {x: torch.ones(2)})[node].tolist() == [1, 1]
    with pytest.raises(ProgramError, match="AssertionError: no mass"):
        run_graph(graph, None, {x: torch.zeros(2)})
