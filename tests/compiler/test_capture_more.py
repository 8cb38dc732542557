"""Lines at which Dynamo breaks a graph without need are traced where gates are looked for, and nowhere else."""

import warnings

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile.compiler import dynamo
from sere_compile.compiler.capture_more import _watch_grad_mode


class Factory(nn.Module):
    """A table that asks for gradients, as many that sum up losses do."""

    def __init__(self, asked=True):
        super().__init__()
        self.asked = asked

    def forward(self, x):
        zeros = torch.zeros_like(x, requires_grad=self.asked)
        return zeros.scatter(1, x.argmax(1, keepdim=True), 1.0) + float(zeros.requires_grad), zeros


@torch.jit.script
def doubled(x: torch.Tensor):
    return x * 2


class Function(torch.autograd.Function):
    """Experts with a backward pass of their own, as published ones have."""

    @staticmethod
    def forward(ctx, x):
        return Function.scripted(x)

    @staticmethod
    @torch.jit.script
    def scripted(x: torch.Tensor):
        made = torch.empty_like(x)
        torch.mul(x, 3.0, out=made)
        return made

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class Scripted(nn.Module):
    def forward(self, x):
        return Function.apply(doubled(x))


class Warns(nn.Module):
    """What each call says, as of a default."""

    def forward(self, x):
        y = x + 1
        warnings.warn("a default is taken", DeprecationWarning, stacklevel=2)
        return y * 2


MODELS = [Factory, Scripted, Warns]


def rows():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    pass


def whole(model, inner="eager"):
    return torch.compile(model, backend=inner, fullgraph=True)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph(kind):
    model = kind()
    with torch.no_grad(), dynamo.graphs_before_loops():
        wanted, got = model(rows()), whole(model)(rows())
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in pairs)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_elsewhere_dynamo_is_as_it_was(kind):
    with dynamo.graphs_before_loops():
        pass
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        whole(kind())(rows())


def test_a_factory_that_gradients_may_reach_ends_the_graph():
    with dynamo.graphs_before_loops(), pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad"):
        whole(Factory())(rows())


def test_a_factory_that_asks_for_none():
    with torch.no_grad(), dynamo.graphs_before_loops():
        made, zeros = whole(Factory(asked=False))(rows())
    assert not zeros.requires_grad
    assert made.sum() == 4


def test_a_warning_is_given_in_each_call():
    with torch.no_grad(), dynamo.graphs_before_loops():
        compiled = whole(Warns())
        for _ in range(2):
            with pytest.warns(DeprecationWarning, match="a default is taken"):
                compiled(rows())


def test_a_warning_that_is_an_error_is_raised():
    with torch.no_grad(), dynamo.graphs_before_loops():
        compiled = whole(Warns())
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            with pytest.raises(DeprecationWarning, match="a default is taken"):
                compiled(rows())


def test_a_warning_of_what_a_call_computes_ends_the_graph():
    class Computed(nn.Module):
        def forward(self, x):
            warnings.warn(f"{x.sum()}")  # noqa: B028
            return x

    with torch.no_grad(), dynamo.graphs_before_loops(), pytest.raises(torch._dynamo.exc.Unsupported):
        whole(Computed())(rows())


class Inner(nn.Module):
    """Two layers of which each warns."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Warns(), Warns()

    def forward(self, x):
        with torch.no_grad():
            return self.second(self.first(x))


def test_each_warning_of_an_inner_layer_is_given():
    with torch.no_grad(), dynamo.graphs_before_loops():
        compiled = whole(Inner())
        for _ in range(2):
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                compiled(rows())
            assert [str(one.message) for one in given] == ["a default is taken"] * 2


class Recorded(nn.Module):
    """What is warned of is counted."""

    def __init__(self):
        super().__init__()
        self.layer = Warns()

    def forward(self, x):
        with warnings.catch_warnings(record=True) as given:
            y = self.layer(x)
        return y + len(given)


class Caught(nn.Module):
    """A warning may be an error, and is caught."""

    def forward(self, x):
        try:
            warnings.warn("a default is taken", DeprecationWarning, stacklevel=2)
        except DeprecationWarning:
            x = x * 2
        return x + 1


@pytest.mark.parametrize(("kind", "action"), [(Recorded, "always"), (Caught, "always"), (Caught, "error")])
def test_a_program_that_could_see_when_a_warning_is_given_finds_it_as_ever(kind, action):
    model = kind()
    with torch.no_grad(), dynamo.graphs_before_loops(), warnings.catch_warnings():
        warnings.simplefilter(action, DeprecationWarning)
        got = torch.compile(model, backend="eager")(rows())
        assert torch.equal(got, model(rows()))


class LaterGradients(nn.Module):
    """What is made of a factory's tensor asks for gradients where they are on again."""

    def forward(self, x):
        zeros = torch.zeros_like(x, requires_grad=True)
        with torch.enable_grad():
            y = zeros * 2
            return y + float(y.requires_grad), x


class EarlierBlock(nn.Module):
    """The same, where a block switched them off."""

    def forward(self, x):
        with torch.no_grad():
            zeros = torch.zeros_like(x, requires_grad=True)
        y = zeros * 2
        return y + float(y.requires_grad), x


@pytest.mark.parametrize(("kind", "grad"), [(LaterGradients, False), (EarlierBlock, True)])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_that_are_on_behind_a_factory(kind, grad, inner):
    model = kind()
    with torch.set_grad_enabled(grad), dynamo.graphs_before_loops():
        wanted, got = model(rows()), torch.compile(model, backend=inner)(rows())
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(got, wanted, strict=True))


def test_a_dynamo_that_does_not_show_where_gradients_are_switched_on():
    """There no factory may be traced as one that asks for none: nothing would end its graph."""

    class Unknown:
        def call(self, tx, values):
            return values

    class Known:
        def _call_func(self, tx, values):
            return values

    assert [_watch_grad_mode(kind) for kind in (None, Unknown, Known)] == [False, False, True]
    assert Known()._call_func(None, [True]) == [True]


def test_results_ask_for_gradients_as_those_of_the_program():
    """Inner compilers trace the tensor without that."""
    model = Factory()
    with torch.no_grad():
        wanted = model(rows())
        got = sere_compile.compile(model, inner="aot_eager")(rows())
    assert [result.requires_grad for result in got] == [result.requires_grad for result in wanted] == [False, True]
