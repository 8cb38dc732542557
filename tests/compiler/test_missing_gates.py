"""Gates that are not re-routed beside gates that are: told in a warning, or an error with `strict=True`."""

import logging
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sere_compile
from sere_compile import GateNotFoundError, SereConfig, SimilarityProfile, sere_backend
from sere_compile.compiler import missing_gates
from sere_compile.compiler.missing_gates import routers_outside
from sere_compile.experts.owner import routers_in
from sere_compile.passes import Evidence, Skip, SkipReason

from ..zoo.outside.loops import EXPERTS, HIDDEN, Loop, MaskLoop


class Stacked(nn.Module):
    """A layer that Dynamo captures whole."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, x):
        weights, ids = torch.topk(self.gate(x).softmax(-1), 3)
        return ((x[..., None, None, :] @ self.experts[ids]).squeeze(-2) * weights[..., None]).sum(-2)


class Both(nn.Module):
    """A captured layer, then another, both under names of their own; further modules that no call runs."""

    def __init__(self, second, **unused):
        super().__init__()
        self.first, self.second = Stacked(), second
        for name, module in unused.items():
            setattr(self, name, module)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


class Router(nn.Module):
    """A router whose ids leave its graph."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, rows):
        return torch.topk(self.gate(rows).softmax(-1), 3)


class RoutedLoop(MaskLoop):
    """A loop whose frame Dynamo skips, with a router that is captured for itself."""

    def __init__(self):
        super().__init__()
        self.router = Router(self.gate)
        del self.gate

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = self.router(rows)
        y = torch.zeros_like(rows)
        for mask, expert in zip((ids[..., None] == torch.arange(EXPERTS)).permute(2, 0, 1), self.experts, strict=True):
            token, slot = torch.where(mask)
            y[token] += weights[token, slot, None] * expert(rows[token])
        return y.view(x.shape)


class Checkpointed(Stacked):
    """The same layer in a nested graph."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    """The model with a random profile for every router, and rows for a call."""
    model.eval().requires_grad_(False)
    matrix = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1)).fill_diagonal_(1.0)
    names = [router.name for router in routers_in(model)]
    sere_compile.attach(model, SimilarityProfile(dict.fromkeys(names, (matrix + matrix.T) / 2)))
    backend = sere_backend.with_options(select_top_k=1, inner="eager", **options)
    return torch.compile(model, backend=backend), torch.randn(2, 4, HIDDEN)


def test_routers_are_known_by_what_stands_around_them():
    """The experts' own weights and other matrices are none."""
    model = Both(MaskLoop(), head=nn.Linear(HIDDEN, EXPERTS), shared=nn.ModuleList([Loop()]))
    assert [router.name for router in routers_in(model)] == [
        "first.gate.weight",
        "second.gate.weight",
        "shared.0.gate.weight",
    ]


class WithBiases(nn.Module):
    """Stacked experts with `biases` vectors for each, in one module with their weights, as gpt-oss has them."""

    def __init__(self, biases):
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, HIDDEN))
        for number in range(biases):
            self.register_parameter(f"bias{number}", nn.Parameter(torch.zeros(EXPERTS, HIDDEN)))


@pytest.mark.parametrize(("biases", "gate", "names"), [
    (2, True, ["gate.weight"]),
    (1, True, ["experts.bias0"]),  # by its looks the router of a block that is one module, and the other a head
    (2, False, ["experts.bias0", "experts.bias1"]),
])  # fmt: skip
def test_biases_of_experts_are_no_routers(biases, gate, names):
    """Where there are several, and a router beside them."""
    model = nn.Module()
    model.gate, model.experts = nn.Linear(HIDDEN, EXPERTS if gate else 3), WithBiases(biases)
    assert [router.name for router in routers_in(model)] == names


def test_a_table_of_words_is_no_router():
    """Also where a model has as many words as layers."""
    model = nn.Module()
    model.words, model.layers = nn.Embedding(EXPERTS, HIDDEN), nn.ModuleList([nn.Linear(1, 1) for _ in range(EXPERTS)])
    assert routers_in(model) == []
    model.words = nn.Linear(HIDDEN, EXPERTS, bias=False)
    assert [router.name for router in routers_in(model)] == ["words.weight"]


def test_layers_are_no_experts():
    """A head with as many labels as there are layers is no router: layers list modules of their own."""
    model = nn.Module()
    model.head, model.layers = nn.Linear(HIDDEN, EXPERTS), nn.ModuleList([MaskLoop() for _ in range(EXPERTS)])
    assert "head.weight" not in [router.name for router in routers_in(model)]


def told(caplog):
    """Our own records: torch has words of its own while capture makes a model's first call again."""
    return [record for record in caplog.records if record.name.startswith("sere_compile")]


class TestOutsideEveryGraph:
    def test_it_is_told_once_when_the_second_call_begins(self, caplog):
        model, x = compiled(Both(MaskLoop()))
        with caplog.at_level(logging.WARNING, logger="sere_compile"):
            model(x)
            assert told(caplog) == []
            model(x)
            model(x)
        [record] = told(caplog)
        assert "these gates run outside every graph" in record.message
        assert "second.gate.weight" in record.message
        assert "first" not in record.message

    def test_strict_raises(self):
        model, x = compiled(Both(MaskLoop()), strict=True)
        model(x)
        with pytest.raises(GateNotFoundError, match=r"second\.gate\.weight"):
            model(x)

    @pytest.mark.slow
    def test_captured_loops_are_no_reason(self, caplog):
        """Capture brings both into a graph."""
        model = Both(MaskLoop())
        compiled(model)
        auto = sere_compile.compile(model, select_top_k=1, inner="eager", strict=True)
        for _ in range(2):
            auto(torch.randn(2, 4, HIDDEN))
        assert told(caplog) == []

    @pytest.mark.parametrize(
        ("second", "later"),
        [(nn.Linear(HIDDEN, HIDDEN), Stacked), (RoutedLoop(), RoutedLoop), (RoutedLoop(), MaskLoop)],
    )
    def test_what_no_call_runs_is_no_reason(self, caplog, second, later):
        """A layer that waits for another call: of captured code, around a captured router, or never met."""
        model, x = compiled(Both(second, later=later()), strict=True)
        for _ in range(3):
            model(x)
        assert told(caplog) == []

    def test_without_weights_nothing_is_known(self):
        assert routers_outside(nn.Linear(2, 2), []) == []


class TestHooksOfTheModel:
    """Each is a frame of its own, with a graph of its own."""

    @pytest.mark.parametrize("own", [torch.compile, sere_compile.compile])
    def test_one_without_a_gate_is_no_reason(self, own, caplog):
        model, x = Stacked().eval(), torch.randn(5, HIDDEN)
        sere_compile.attach(model, SimilarityProfile({"gate.weight": torch.eye(EXPERTS)}))
        model.register_forward_hook(lambda module, args, output: output * 2)
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        options = {"select_top_k": 1, "min_active": 0, "inner": "eager", "strict": True}
        with torch.no_grad():
            run = own(model, **(options if own is sere_compile.compile else {"backend": "sere", "options": options}))
            for _ in range(3):
                assert not torch.allclose(run(x), model(x), atol=1e-3)
        assert told(caplog) == []

    @pytest.mark.parametrize("own", [torch.compile, sere_compile.compile])
    def test_no_gate_in_any_is_told_once(self, own, caplog):
        class Dense(nn.Module):
            def forward(self, x):
                return x * 3

        model = Dense()
        model.register_forward_hook(lambda module, args, output: output * 2)
        run = own(
            model,
            **(
                {"inner": "eager"}
                if own is sere_compile.compile
                else {"backend": sere_backend.with_options(inner="eager")}
            ),
        )
        for _ in range(3):
            run(torch.ones(3))
        [record] = told(caplog)
        assert "sere found no MoE gate" in record.message


class TestRefusedBesideOthers:
    """A nested graph's gate is refused while the layer before it is re-routed."""

    def test_it_is_told_at_compile_time(self, caplog):
        model, x = compiled(Both(Checkpointed()))
        with caplog.at_level(logging.WARNING, logger="sere_compile"):
            model(x)
        [record] = told(caplog)
        assert "is not re-routed: it is inside a nested graph" in record.message
        assert "switch checkpointing off" in record.message

    def test_strict_raises(self):
        model, x = compiled(Both(Checkpointed()), strict=True)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="inside a nested graph"):
            model(x)


STRICT, WARNING = SereConfig().replace(strict=True), SereConfig()


class TestWords:
    """What is said, and with strict=True raised."""

    @staticmethod
    def skip(reason=SkipReason.NO_ROUTER, evidence=Evidence.SELECTION, stack=""):
        node = torch.fx.Graph().placeholder("scores")
        node.meta["stack_trace"] = stack
        return Skip(reason, node, evidence=evidence)

    def test_the_nearest_candidate(self):
        assert missing_gates.describe_nearest_miss(None) == "It holds no top-k selection at all."
        skip = self.skip()
        assert missing_gates.describe_nearest_miss(skip) == f"The nearest candidate is scores: {skip}."
        skip = self.skip(stack='  File "/a/model.py", line 12, in forward')
        assert missing_gates.describe_nearest_miss(skip) == f"The nearest candidate is scores at model.py:12: {skip}."

    def test_the_nearer_of_two(self):
        near, far = self.skip(evidence=Evidence.EXPERTS), self.skip(evidence=Evidence.NONE)
        for pair, nearer in (((near, far), near), ((far, near), near), ((None, far), far), ((near, None), near)):
            assert missing_gates._nearer(*pair) is nearer
        assert missing_gates._nearer(None, None) is None

    def test_no_gate(self, caplog):
        missing_gates.tell(None, WARNING)
        [record] = told(caplog)
        assert record.message.startswith("sere found no MoE gate in the compiled code: it runs unchanged. It holds no")
        assert record.message == record.message.strip()
        with pytest.raises(GateNotFoundError, match="no MoE gate"):
            missing_gates.tell(None, STRICT)

    def test_refused_gates(self, caplog):
        """Those that are gates by all evidence, each with its line."""
        refused = self.skip(SkipReason.SHARED_ROUTER, Evidence.EXPERTS, '  File "/a/model.py", line 12, in forward')
        missing_gates.tell_refused([self.skip(), refused], WARNING)
        [record] = told(caplog)
        assert record.message == f"the gate scores at model.py:12 is not re-routed: {refused}."
        with pytest.raises(GateNotFoundError, match=r"the gate scores at model\.py:12"):
            missing_gates.tell_refused([refused], STRICT)

    def test_no_graph(self, caplog, monkeypatch):
        monkeypatch.setattr(missing_gates, "diagnose", lambda *args, captured: f"diagnosed {captured}")
        missing_gates.tell_no_graph(Loop(), (), {}, WARNING, captured=True)
        missing_gates.tell_no_graph(compiled, (), {}, WARNING, captured=False)
        missing_gates.tell_no_graph(3, (), {}, WARNING, captured=False)
        assert [record.message.partition(":")[0] for record in caplog.records] == [
            "Dynamo made no graph of Loop",
            "Dynamo made no graph of compiled",
            "Dynamo made no graph of 3",
        ]
        assert [record.message.rpartition(" ")[2] for record in caplog.records] == ["True", "False", "False"]
        with pytest.raises(GateNotFoundError, match="Dynamo made no graph of Loop"):
            missing_gates.tell_no_graph(Loop(), (), {}, STRICT, captured=True)


class TestOneCall:
    """What the graphs of a call show, for who knows when it ends."""

    def settled(self, caplog, monkeypatch, *, model=None, outside=(), **state):
        monkeypatch.setattr(missing_gates, "routers_outside", lambda model, seen: list(outside))
        monkeypatch.setattr(missing_gates, "diagnose", lambda *args, captured: "diagnosed")
        caplog.clear()
        call = missing_gates.OneCall(**state)
        missing_gates.settle(call, model, (), {}, WARNING, captured=True)
        return [record.message.partition(":")[0].partition(" in ")[0] for record in caplog.records]

    def test_what_is_said(self, caplog, monkeypatch):
        model, skip = Loop(), TestWords.skip()
        none, outside = ["sere found no MoE gate"], ["these gates run outside every graph, where nothing is re-routed"]
        outside = [text.partition(" in ")[0] for text in outside]
        weights = [torch.ones(1)]
        say = lambda **given: self.settled(caplog, monkeypatch, **given)  # noqa: E731
        assert say() == none
        assert say(settled=True) == []
        assert say(model=model, routers=weights) == []
        assert say(model=model, outside=["a"]) == outside
        assert say(model=model, outside=["a"], routers=weights) == outside
        assert say(model=model, outside=["a"], routers=weights, nearest=skip) == outside
        assert say(model=model, outside=["a"], nearest=skip) == none
        assert say(model=3, outside=["a"]) == none
        assert say(held=weights) == []
        assert say(model=model, outside=["a"], held=weights) == outside

    def test_a_graph_of_a_way_that_was_given_up(self, caplog, monkeypatch):
        """It was all of the call, with gates that it told of."""
        call = missing_gates.OneCall()
        missing_gates.runs.with_gates += 1
        call.forget()
        assert call.was_held
        assert not call.was_one_graph
        missing_gates.settle(call, None, (), {}, STRICT, captured=True)
        assert told(caplog) == []

    def test_a_warning_is_given_once_in_a_call(self, caplog):
        for _ in range(2):
            missing_gates.warn(missing_gates.log, "a")
        assert caplog.messages == ["a", "a"]
        caplog.clear()
        with missing_gates.one_call() as call:
            for text in "aba":
                missing_gates.warn(missing_gates.log, text)
            call.forget()
            missing_gates.warn(missing_gates.log, "a")
        assert caplog.messages == ["a", "b"]

    @pytest.mark.parametrize("given_up", [False, True])
    def test_warnings_of_a_way_that_may_be_given_up(self, given_up, caplog):
        """They wait. Those of gates that the other way re-routes or warns of, and of what is re-routed no more, go."""
        first, second, third = (torch.zeros(2) for _ in range(3))
        say, log = missing_gates.warn, missing_gates.log
        with missing_gates.one_call() as call:
            call.trying = True
            say(log, "the first", first)
            say(log, "the second", second)
            say(log, "the third", third)
            say(log, "a line", "model.py:3")
            say(log, "another line", "model.py:4")
            say(log, "somewhere", "")
            say(log, "re-routed, but")
            missing_gates.note_rerouted(lambda: [third])
            assert caplog.messages == []
            if given_up:
                call.forget()
                missing_gates.note_rerouted(lambda: [first, "model.py:3", ""])
                say(log, "the second, now", second)
        if given_up:
            assert caplog.messages == ["the second, now", "the third", "another line", "somewhere"]
        else:
            assert caplog.messages == [
                "the first", "the second", "the third", "a line", "another line", "somewhere", "re-routed, but"
            ]  # fmt: skip

    def test_graphs_are_asked_what_they_re_route_only_if_a_warning_waits(self):
        asked = []
        missing_gates.note_rerouted(lambda: asked.append("no call") or [])
        with missing_gates.one_call():
            missing_gates.note_rerouted(lambda: asked.append("no warning") or [])
        assert asked == []

    def test_a_refusal_of_a_way_that_was_given_up(self):
        refusal = GateNotFoundError("why")
        call = missing_gates.OneCall(refusal=refusal)
        with pytest.raises(GateNotFoundError, match="why"):
            missing_gates.settle(call, None, (), {}, STRICT, captured=True)

    def test_graphs_of_a_call_that_is_watched(self):
        """They leave the report to the caller, and so does the graph that is all of the call."""
        findings = types.SimpleNamespace(nearest_miss=TestWords.skip())
        with missing_gates.one_call() as call:
            before = missing_gates.runs.graphs
            run = missing_gates.watch(lambda *args: args, findings, WARNING, whole_call=False)
            assert run(1, 2) == (1, 2)
            assert missing_gates.runs.graphs == before + 1
            assert call.nearest is findings.nearest_miss
            weights = [torch.ones(1)]
            assert missing_gates.watch_others(WARNING)(weights) is False
            assert call.routers == weights
            assert not call.settled
            call.forget()
            # What graphs of the other way hold may be less: that they do not hold it is no news.
            assert (call.held, call.routers, call.settled, call.was_held) == (weights, [], False, False)
            assert call.nearest is findings.nearest_miss
            whole = missing_gates.watch(lambda *args: args, findings, WARNING, whole_call=True)
            assert call.settled
            assert whole(3) == (3,)
        assert missing_gates._watched.get() is None

    def test_a_graph_that_is_the_whole_call_is_told_of_at_once(self, caplog):
        findings = types.SimpleNamespace(nearest_miss=TestWords.skip())
        missing_gates.watch(lambda *args: args, findings, WARNING, whole_call=True)
        [record] = told(caplog)
        assert "The nearest candidate is scores" in record.message
        with pytest.raises(GateNotFoundError):
            missing_gates.watch(lambda *args: args, findings, STRICT, whole_call=True)

    def test_a_call_that_is_made_again_if_it_re_routes_nothing(self, caplog):
        """A graph without gates is noted, and not told of, though it is all of the call."""
        findings = types.SimpleNamespace(nearest_miss=TestWords.skip())
        with missing_gates.one_call() as call:
            call.trying = True
            run = missing_gates.watch(lambda *args: args, findings, STRICT, whole_call=True)
            assert not call.settled
            assert call.nearest is None
            run(1)
            assert call.nearest is findings.nearest_miss
            call.forget()
            assert not call.trying
        assert told(caplog) == []

    def test_a_refusal_beside_gates_that_ran(self, caplog, monkeypatch):
        """It is raised where gates run outside every graph, and only there."""
        refusal, weights = GateNotFoundError("why"), [torch.ones(1)]
        assert self.settled(caplog, monkeypatch, model=Loop(), refusal=refusal, routers=weights) == []
        with pytest.raises(GateNotFoundError, match="why"):
            self.settled(caplog, monkeypatch, model=Loop(), outside=["a"], refusal=refusal, routers=weights)

    def test_what_stands_outside_is_said_with_all_that_was_seen(self, caplog, monkeypatch):
        """Gates of both ways to make the call are inside."""
        asked = []
        held, routers = [torch.ones(1)], [torch.ones(2)]
        call = missing_gates.OneCall(held=held, routers=routers)
        monkeypatch.setattr(missing_gates, "routers_outside", lambda model, seen: asked.append(seen) or ["a", "b"])
        monkeypatch.setattr(missing_gates, "diagnose", lambda *args, captured: f"{args[1:]} {captured}")
        missing_gates.settle(call, Loop(), (1,), {"k": 2}, WARNING, captured=False)
        assert asked == [[*routers, *held]]
        [record] = told(caplog)
        assert "nothing is re-routed: a, b. ((1,), {'k': 2}) False" in record.message
        with pytest.raises(GateNotFoundError, match="a, b"):
            missing_gates.settle(call, Loop(), (), {}, STRICT, captured=False)


class TestCallsOfDynamo:
    """A callable's graphs are reported when its next call begins, which is another frame."""

    @pytest.fixture
    def frames(self, monkeypatch):
        """Gives calls one after the other: `now(function)` begins one."""
        current = []

        def now(function, **more):
            current[:] = [types.SimpleNamespace(f_locals={"fn": function, **more}, f_code=None)]

        monkeypatch.setattr(missing_gates.dynamo, "current_call", lambda: current[0] if current else None)
        monkeypatch.setattr(missing_gates, "_calls", missing_gates._Calls())
        return now

    def test_outside_of_calls_nothing_is_noted(self, frames, caplog):
        assert missing_gates._note(STRICT, None, []) is False
        assert missing_gates._calls.by_callable == {}

    def test_the_next_call_reports(self, frames, caplog):
        def function():
            pass

        near, far = TestWords.skip(evidence=Evidence.IDS), TestWords.skip(evidence=Evidence.NONE)
        frames(function)
        assert missing_gates._note(WARNING, far, []) is False
        assert missing_gates._note(WARNING, near, []) is False
        assert told(caplog) == []
        frames(function)
        assert missing_gates._note(WARNING, None, []) is True
        [record] = told(caplog)
        assert str(near) in record.message
        assert missing_gates._note(WARNING, None, []) is True
        assert len(caplog.records) == 1

    def test_with_strict_every_further_call_raises(self, frames):
        def function():
            pass

        frames(function)
        missing_gates._note(STRICT, None, [])
        for _ in range(2):
            frames(function)
            with pytest.raises(GateNotFoundError, match="no MoE gate"):
                missing_gates._note(STRICT, None, [])

    def test_calls_of_others_are_no_next_call(self, frames, caplog):
        def function():
            pass

        def other():
            pass

        for called in (function, other):
            frames(called)
            assert missing_gates._note(STRICT, None, []) is False

    @pytest.mark.parametrize("outside", [[], ["second.gate.weight"]])
    def test_gates_outside_are_told_beside_those_that_ran(self, frames, caplog, monkeypatch, outside):
        """Of the model that owns the weights; where there are none all is well."""
        model = Both(MaskLoop())
        weight, asked = model.first.gate.weight, []

        def told(root, seen):
            asked.append((root, seen))
            return outside

        monkeypatch.setattr(missing_gates, "routers_outside", told)
        monkeypatch.setattr(missing_gates, "diagnose", lambda given, args, kwargs, captured: f"{given is model} {args}")
        frames(model)
        assert missing_gates._note(WARNING, None, [weight]) is False
        missing_gates.runs.with_gates += 1
        frames(model, args=(5,))
        assert missing_gates._note(WARNING, None, [weight]) is True
        [(root, seen)] = asked
        assert root is model
        assert [one is weight for one in seen] == [True]
        assert [record.message.rpartition(". ")[2] for record in caplog.records] == ["True (5,)"] * len(outside)

    def test_gates_outside_of_a_function_that_was_compiled(self, frames, caplog, monkeypatch):
        """What is diagnosed is what the user compiled: a module, or the function that calls it."""
        model = Both(MaskLoop())

        def function():
            pass

        monkeypatch.setattr(missing_gates, "routers_outside", lambda root, seen: ["gate.weight"])
        monkeypatch.setattr(missing_gates, "diagnose", lambda given, *_, captured: f"{given is function}")
        frames(function)
        missing_gates._note(WARNING, None, [model.first.gate.weight])
        missing_gates.runs.with_gates += 1
        frames(function)
        assert missing_gates._note(WARNING, None, []) is True
        assert caplog.records[0].message.endswith("True")

    def test_without_gates_those_outside_are_named(self, frames, caplog, monkeypatch):
        """Where no selection was seen either: else that is what is told of."""
        model = Both(MaskLoop())
        monkeypatch.setattr(missing_gates, "routers_outside", lambda root, seen: ["gate.weight"])
        monkeypatch.setattr(missing_gates, "diagnose", lambda *_, captured: "diagnosed")
        for nearest, said in ((None, "run outside every graph"), (TestWords.skip(), "found no MoE gate")):
            caplog.clear()
            monkeypatch.setattr(missing_gates, "_calls", missing_gates._Calls())
            frames(model)
            missing_gates._note(WARNING, nearest, [])
            frames(model)
            assert missing_gates._note(WARNING, None, []) is True
            assert said in caplog.text


class TestRoutersOutside:
    """By what Dynamo skipped, and what graphs held."""

    class Skipped(nn.Module):
        def forward(self, x):
            return x

    class Traced(nn.Module):
        def forward(self, x):
            return x

    class Layer(nn.Module):
        def forward(self, x):
            return x

    @pytest.fixture
    def outside(self, monkeypatch):
        """Names of the routers outside, of which each is given with the modules around it; some were seen."""

        def found(*seen, codes=(self.Skipped.forward.__code__, nn.Linear.forward.__code__), **around):
            routers = [
                types.SimpleNamespace(name=name, weight=torch.zeros(1), modules=modules)
                for name, modules in around.items()
            ]
            model = nn.Identity()
            monkeypatch.setattr(missing_gates, "routers_in", lambda one: routers if one is model else [])
            monkeypatch.setattr(missing_gates.dynamo, "skipped_codes", lambda: set(codes))
            return routers_outside(model, [router.weight for router in routers if router.name in seen])

        return found

    def test_code_that_dynamo_skipped(self, outside):
        """Of any of the modules around a router that are no torch's."""
        skipped, traced, linear = self.Skipped(), self.Traced(), nn.Linear(1, 1)
        assert outside(a=(linear, skipped), b=(linear, traced), c=(skipped, traced), d=(linear,)) == ["a", "c"]
        assert outside(a=(linear, skipped), codes=()) == []

    def test_what_graphs_held(self, outside):
        """Nor another layer of the same code, which did not run; the outermost module says which code that is."""
        skipped = self.Skipped
        assert outside("a", a=(skipped(),), b=(skipped(),)) == []
        assert outside("a", a=(skipped(), self.Layer()), b=(skipped(), self.Layer())) == []
        assert outside("a", a=(skipped(), self.Layer()), b=(skipped(), self.Traced())) == ["b"]
        assert outside("a", a=(skipped(), self.Layer()), b=(skipped(), skipped(), self.Traced())) == ["b"]
        around = {"a": (skipped(), skipped(), self.Layer()), "b": (self.Traced(), skipped(), self.Layer())}
        assert outside("a", **around) == []
        assert outside("b", **around) == []
        around = {"a": (skipped(), self.Traced(), self.Layer()), "b": (skipped(), self.Traced(), skipped())}
        assert outside("a", **around) == ["b"]
