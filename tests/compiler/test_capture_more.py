"""Lines at which Dynamo breaks a graph without need are traced where gates are looked for, and nowhere else."""

import functools
import types
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.variables import ctx_manager

import sere_compile
from sere_compile.compiler import capture_more, dynamo
from sere_compile.compiler.capture_more import _watch_grad_mode

from ..passes.graph.written import Written


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


class Constant:
    """A value as Dynamo knows it while it traces: one that is written in the program, or one that is computed."""

    def __init__(self, value=None, known=True):
        self.value, self.known = value, known

    def is_python_constant(self):
        return self.known

    def as_python_constant(self):
        assert self.known
        return self.value


class TestCallsThatAreTracedOtherwise:
    """Each is asked of one call that Dynamo traces; None says that it is not its own."""

    def test_first_asked_then_dynamos_own(self):
        """And only where more is to be captured."""

        class Kind:
            def call_function(self, tx, args, kwargs):
                return "own", tx, args, kwargs

        own, asked = Kind.call_function, []
        capture_more._wrap(Kind, lambda *given: asked.append(given) or given[2])
        one = Kind()
        assert one.call_function("tx", 1, 2) == ("own", "tx", 1, 2)
        assert asked == []
        with capture_more.capturing_more():
            assert one.call_function("tx", 1, 2) == "tx"
            assert one.call_function(None, 1, 2) == ("own", None, 1, 2)
        assert asked[0] == (own, one, "tx", 1, 2)
        assert one.call_function("tx", 1, 2) == ("own", "tx", 1, 2)

    def test_what_another_dynamo_does_not_have(self):
        class Unknown:
            pass

        for kind in (None, Unknown):
            capture_more._wrap(kind, None)
        assert not hasattr(Unknown, "call_function")

    @staticmethod
    def factory(value=torch.zeros_like, asked=True, at_start=False, known=True, **more):
        """What becomes of a call of a function, and what Dynamo was asked to make instead."""
        made, calls = types.SimpleNamespace(requires_grad=False, put=[]), []
        made.as_proxy = lambda: types.SimpleNamespace(
            node=types.SimpleNamespace(update_kwarg=lambda *given: made.put.append(given))
        )
        state = {} if at_start is None else {"grad_enabled": (None, at_start)}
        context = types.SimpleNamespace(global_context=types.SimpleNamespace(global_state=state))
        tx = types.SimpleNamespace(output=types.SimpleNamespace(tracing_context=context))
        function = types.SimpleNamespace(value=value)
        kwargs = more if asked is None else {"requires_grad": Constant(asked, known), **more}

        def own(*given):
            calls.append(given)
            return made

        found = capture_more._made_without_gradients(own, function, tx, ["x"], kwargs)
        assert found is None or (found is made and calls == [(function, tx, ["x"], more)])
        return found

    @pytest.mark.parametrize("factory", capture_more._FACTORIES)
    def test_a_factory_is_made_without_gradients(self, factory):
        """The program sees that its result asks for them, and the graph's call is as it was written."""
        with torch.no_grad():
            made = self.factory(factory, dtype="int")
        assert made.requires_grad is True
        assert made.put == [("requires_grad", True)]

    @pytest.mark.parametrize(
        "other",
        [
            {"asked": None},
            {"asked": False},
            {"known": False},
            {"value": torch.randn},
            {"at_start": True},
            {"at_start": None},
        ],
        ids=["not asked", "asked not to", "not known", "another function", "at start", "perhaps at start"],
    )
    def test_other_calls_of_functions(self, other):
        with torch.no_grad():
            assert self.factory(**other) is None

    def test_a_factory_where_gradients_are_taken(self):
        with torch.enable_grad():
            assert self.factory() is None

    def test_functions_of_scripts_are_traced_as_they_were_written(self):
        traced = []

        class Traced:
            def __init__(self, function):
                self.function = function

            def call_function(self, *given):
                traced.append((self.function, given))
                return "traced"

        call = capture_more._scripted(Traced)

        def asked(value):
            return call(None, types.SimpleNamespace(value=value), "tx", [1], {"a": 2})

        assert asked(doubled) == "traced"
        assert traced == [(doubled._torchdynamo_inline, ("tx", [1], {"a": 2}))]
        written = types.SimpleNamespace(_torchdynamo_inline=rows)
        assert [asked(value) for value in (rows, written)] == [None, None]

    @staticmethod
    def warned(*args, value=warnings.warn, source="source", later=True, monkeypatch, **kwargs):
        """What is put off of a warning, or None where it is left to Dynamo."""
        put = []
        tx = types.SimpleNamespace(output=types.SimpleNamespace(root_tx=types.SimpleNamespace(debug_locals=put)))
        monkeypatch.setattr(capture_more, "_may_come_later", lambda asked: asked is tx and later)
        call = capture_more._warned(lambda value, source: (value, source))
        found = call(None, types.SimpleNamespace(value=value, source=source), tx, args, kwargs)
        if found is None:
            assert put == []
            return None
        assert found.as_python_constant() is None
        [((deferred, of), given)] = put
        assert (deferred, of) == (warnings.warn, "source")
        return given

    def test_warnings_are_put_off(self, monkeypatch):
        """The message, and of which kind it is; which frame gives it does not matter."""
        put_off = functools.partial(self.warned, monkeypatch=monkeypatch)
        text, kind, level = Constant("text"), Constant(UserWarning), Constant(2)
        assert put_off(text) == [text]
        assert put_off(text, kind) == [text, kind]
        assert put_off(text, category=kind, stacklevel=level) == [text, kind]
        assert put_off(category=kind, message=text) == [text, kind]
        assert put_off(text, stacklevel=level) == [text]

    def test_other_warnings_are_left_to_dynamo(self, monkeypatch):
        put_off = functools.partial(self.warned, monkeypatch=monkeypatch)
        text, kind = Constant("text"), Constant(UserWarning)
        assert put_off(text, value=print) is None
        assert put_off(text, source=None) is None
        assert put_off(text, later=False) is None
        assert put_off() is None
        assert put_off(text, kind, Constant(2)) is None
        assert put_off(text, kind, message=text) is None
        assert put_off(text, skip_file_prefixes=Constant(())) is None
        assert put_off(Constant(known=False)) is None
        assert put_off(text, Constant(known=False)) is None


class TestWhenAWarningMayCome:
    """Later, where no block or graph around it could tell."""

    @staticmethod
    def frame(*blocks, entry=None, parent=None, nested=None):
        contexts = [types.SimpleNamespace(with_context=context, target=target) for context, target in blocks]
        tracer = types.SimpleNamespace(parent=nested)
        return types.SimpleNamespace(
            block_stack=contexts, parent=parent, output=types.SimpleNamespace(current_tracer=tracer),
            current_instruction=types.SimpleNamespace(exn_tab_entry=entry and types.SimpleNamespace(target=entry)),
        )  # fmt: skip

    def test_blocks(self):
        frame, may = self.frame, capture_more._may_come_later
        known = [object.__new__(kind) for kind in (ctx_manager.GradModeVariable, ctx_manager.AutocastModeVariable)]
        assert may(frame())
        for context in known:
            assert may(frame((context, "end"), entry="end"))
            assert may(frame(parent=frame((context, "end"), entry="end")))
            assert not may(frame((None, "end"), (context, "end"), entry="end"))
            assert not may(frame((context, "end"), (None, "end"), entry="end"))
        assert not may(frame((None, "end"), entry="end"))
        assert not may(frame((object(), "end"), entry="end"))
        assert not may(frame(parent=frame((object(), "end"), entry="end")))

    def test_try(self):
        """What an error leads to is no end of the innermost block."""
        frame, may = self.frame, capture_more._may_come_later
        inside = object.__new__(ctx_manager.GradModeVariable)
        assert not may(frame(entry="except"))
        assert not may(frame(parent=frame(entry="except")))
        assert not may(frame((inside, "end"), entry="except"))
        assert not may(frame((inside, "outer"), (inside, "end"), entry="outer"))
        assert may(frame((inside, "outer"), (inside, "end"), entry="end"))

    def test_graphs_in_graphs(self):
        assert not capture_more._may_come_later(self.frame(nested="outer"))
        with torch._dynamo.config.patch(nested_graph_breaks=True):
            assert not capture_more._may_come_later(self.frame())


class TestResultsThatAskForGradients:
    def test_they_do_behind_a_compiler_that_lost_it(self):
        w = Written()
        x = w.given(2)
        asks = w.call(torch.zeros_like, x, requires_grad=True)
        silent = w.call(torch.zeros_like, x, requires_grad=False)
        written = w.call(torch.Tensor.add_, asks, 1)
        again = w.call("add_", written, 1)
        w.graph.output((x, asks, silent, again, None, w.call(torch.neg, asks)))
        results = [torch.zeros(2) for _ in range(6)]
        run = capture_more.asking_for_gradients(lambda *given: results if given == (1, 2) else None, w.graph)
        assert run(1, 2) is results
        assert [result.requires_grad for result in results] == [False, True, False, True, False, False]

    def test_a_graph_of_which_none_asks(self):
        w = Written()
        w.graph.output((w.given(2), w.call(torch.zeros, 2)))
        assert capture_more.asking_for_gradients(print, w.graph) is print

    def test_whether_a_graph_has_such_a_factory(self):
        w = Written()
        x = w.given(2)
        w.call(torch.zeros_like, x, requires_grad=False)
        assert not capture_more._has_factory(w.graph)
        w.call(torch.zeros_like, x, requires_grad=True)
        w.call(torch.neg, x)
        assert capture_more._has_factory(w.graph)

    def test_a_graph_ends_where_gradients_are_switched_on_behind_one(self):
        """And nowhere else."""

        class Known:
            def _call_func(self, tx, values):
                return "switched"

        _watch_grad_mode(Known)
        w, one = Written(), Known()
        w.call(torch.neg, w.given(2))
        tx = types.SimpleNamespace(output=types.SimpleNamespace(graph=w.graph))
        with torch.no_grad(), capture_more.capturing_more():
            assert one._call_func(tx, [True]) == "switched"
            w.call(torch.zeros, 2, requires_grad=True)
            assert one._call_func(tx, [False]) == "switched"
            assert one._call_func(tx, (True, True)) == "switched"
            with pytest.raises(torch._dynamo.exc.Unsupported, match="gradients behind a factory"):
                one._call_func(tx, (True,))
            with torch.enable_grad():
                assert one._call_func(tx, [True]) == "switched"
        with torch.no_grad():
            assert one._call_func(tx, [True]) == "switched"
