"""`sere_compile.compile`: dynamic-shape capture where it brings a gate into a graph, the default elsewhere."""

import logging
import random
import re
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.torch_version import TorchVersion

import sere_compile
from sere_compile import ConfigError, GateNotFoundError, SereConfig

from .compiler.test_missing_gates import Stacked
from .zoo.outside.loops import EXPERTS, HIDDEN, TOP_K, CountLoop, MaskLoop, SortedLoop, prepared

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
# `number in ids[t].tolist()`: earlier versions take it for false under dynamic-shape capture, and compute on.
BRANCHES_ON_LISTS = TorchVersion(torch.__version__) >= "2.15"


def told(caplog):
    """What sere logged; torch 2.11 logs of its own."""
    return [record for record in caplog.records if record.name.startswith("sere")]


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen_before", [False, True])
def test_gate_in_a_skipped_frame_is_captured(seen_before):
    """Every call is re-routed, also where an earlier compile had Dynamo skip the frame."""
    model, matrix, x = prepared(MaskLoop)
    expected = model.expected(x, matrix, 1)
    assert not torch.allclose(expected, model(x), atol=1e-2)
    if seen_before:
        close(torch.compile(model, backend="eager")(x), model(x))
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for _ in range(2):
        close(compiled(x), expected)


class ScaledLater(MaskLoop):
    """Its experts give what scales say that may be changed, which no graph holds."""

    def __init__(self):
        super().__init__()
        self.scales = [1.0] * EXPERTS

    @torch.compiler.disable
    def dispatch(self, rows, weights, ids):
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            y[token] += weights[token, slot, None] * F.silu(expert(rows[token])) * self.scales[number]
        return y

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), TOP_K)
        return self.dispatch(rows, weights, ids).view(x.shape)


@pytest.mark.parametrize("strict", [False, True])
def test_a_setting_of_code_outside_graphs_that_changes_later(strict, caplog):
    """Re-routed experts would get the scale of others: the later call is not re-routed, and that is said once."""
    model, matrix, x = prepared(ScaledLater)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager", strict=strict)
    close(compiled(x), model.expected(x, matrix, 1))
    assert not told(caplog)
    model.scales[2:4] = [3.0, 0.0]
    if strict:
        with pytest.raises(Exception, match="was not proven"):
            compiled(x)
        return
    for _ in range(2):
        close(compiled(x), model(x))
    assert sum("is not re-routed" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_later_call_without_a_gate(strict, caplog):
    """Experts that give nothing show none: what is said of a first call is said of a later one, too."""
    model, matrix, x = prepared(ScaledLater)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager", strict=strict)
    close(compiled(x), model.expected(x, matrix, 1))
    model.scales[:] = [0.0] * EXPERTS
    if strict:
        for _ in range(2):
            with pytest.raises(GateNotFoundError, match="no experts are found behind"):
                compiled(x)
        return
    for _ in range(2):
        close(compiled(x), model(x))
    assert sum("no experts are found behind" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("capture", ["default", "auto"])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_model_that_is_one_graph_raises_nothing(capture, compiled_before):
    """Such a graph is not watched, and its gates ran all the same; also where another callable compiled it."""
    model, x = Stacked(), torch.randn(3, HIDDEN)
    options = {"select_top_k": 1, "inner": "eager", "strict": True, "capture": capture}
    if compiled_before:
        sere_compile.compile(model, **options)(x)
    compiled = sere_compile.compile(model, **options)
    for _ in range(2):
        compiled(x)


def test_default_capture_misses_it():
    """What the option is for: undo it and nothing is re-routed."""
    model, _, x = prepared(MaskLoop)
    close(sere_compile.compile(model, capture="default", select_top_k=1, inner="eager")(x), model(x))


def test_model_that_raises_under_capture_goes_back(caplog):
    """The call that failed is run again by default rules, and every later one."""
    model, matrix, x = prepared(CountLoop)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    with caplog.at_level(logging.INFO, logger="sere_compile.capture"):
        for _ in range(2):
            close(compiled(x), model.expected(x, matrix, 1))
    assert len(told(caplog)) == 1
    assert "it raises GuardOnDataDependentSymNode" in caplog.text


@pytest.mark.slow
def test_what_is_ahead_of_a_loop_is_kept(caplog):
    """Slices by counts that are read from a tensor break the graph in the loop; the gate is in the graph before it."""
    model, matrix, x = prepared(SortedLoop)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    with caplog.at_level(logging.INFO, logger="sere_compile.capture"):
        for _ in range(2):
            close(compiled(x), model.expected(x, matrix, 1))
    assert not caplog.records


class Loop(torch.nn.Module):
    """Lists of numbers that depend on the data inside a `for`: Dynamo gives up the frame.

    With numbers read from tensors as symbols it takes each list for empty.
    """

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x):
        x = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = [t for t in range(len(x)) if number in ids[t].tolist()]
            if rows:
                y[rows] += expert(x[rows]) * weights[rows].sum(-1, keepdim=True)
        return y


class Weighed(Loop):
    """Each expert by what its own slots weigh."""

    def forward(self, x):
        x = x.reshape(-1, HIDDEN)
        weights, ids = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = [t for t in range(len(x)) if number in ids[t].tolist()]
            if rows:
                y[rows] += expert(x[rows]) * (weights * (ids == number))[rows].sum(-1, keepdim=True)
        return y


class Inside(Loop):
    """The router itself is in a loop that branches on data."""

    def forward(self, x):
        out = torch.zeros(0, HIDDEN)
        for start in range(0, len(x), 4):
            rows = x[start : start + 4]
            weights, ids = self.gate(rows).softmax(-1).topk(2)
            for number, expert in enumerate(self.experts):
                if (ids == number).any():
                    out = torch.cat([out, expert(rows) * weights.sum(-1, keepdim=True)])
        return out


class TestNoGraphAtAll:
    """The backend is never called then: `compile`, which owns the call, has to say so."""

    def test_it_warns_once_and_says_what_helps(self, caplog):
        compiled = sere_compile.compile(Loop(), select_top_k=1, inner="eager", capture="default")
        for _ in range(2):
            compiled(torch.randn(2, 4, HIDDEN))
        [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert "Dynamo made no graph of Loop" in record.message
        helps = "compiles what is ahead of such a loop" if BRANCHES_ON_LISTS else "captures expert loops"
        assert f"ompile with sere_compile.compile(model, ...), which {helps}" in record.message

    @pytest.mark.parametrize("capture", ["auto", "default"])
    def test_strict_raises_at_every_call(self, capture):
        compiled = sere_compile.compile(Inside(), select_top_k=1, inner="eager", strict=True, capture=capture)
        for _ in range(2):
            with pytest.raises(GateNotFoundError, match="Dynamo made no graph of Inside"):
                compiled(torch.randn(8, HIDDEN))


@pytest.mark.parametrize("strict", [False, True])
def test_what_capture_traces_wrongly_is_compiled_without(strict, caplog):
    """The graph of what is ahead of the loop holds the gate; nothing is said of the one that had none."""
    model, x = Weighed().eval().requires_grad_(False), torch.randn(2, 4, HIDDEN)
    half = torch.rand(EXPERTS, EXPERTS)
    sere_compile.attach(model, sere_compile.SimilarityProfile({"gate.weight": (half + half.T).fill_diagonal_(2) / 2}))
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager", strict=strict)
    before = sere_compile.capture.runs.rewritten
    for _ in range(2):
        compiled(x)
    assert sere_compile.capture.runs.rewritten == before + 2
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("sere_compile")]


class IfAny(CountLoop):
    """The commonest loop of all: experts without tokens are left out by an `if` on a size."""

    def forward(self, x):
        rows = x.view(-1, HIDDEN)
        weights, ids = torch.topk(self.gate(rows).softmax(-1), 3)
        y = torch.zeros_like(rows)
        for number in range(EXPERTS):
            token, slot = torch.where(ids == number)
            if token.numel():
                y.index_add_(0, token, self.expert(number, rows[token]) * weights[token, slot, None])
        return y.view(x.shape)


class TestOneDiagnosis:
    """Whoever is asked names the line that depends on data, and what to change there."""

    LINE = re.compile(
        r"gate\.weight.*test_capture\.py:\d+, `if token\.numel\(\):`, cannot be part.*drop the condition", re.DOTALL
    )

    def test_the_backend(self, caplog):
        model, _, x = prepared(IfAny)
        compiled = torch.compile(model, backend="sere", options={"inner": "eager"})
        for _ in range(3):
            close(compiled(x), model(x))
        [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert self.LINE.search(record.message)

    def test_explain(self):
        model, _, x = prepared(IfAny)
        assert self.LINE.search(str(sere_compile.explain(model, x, config=SereConfig(capture="default"))))

    def test_compile_at_its_first_call(self, caplog):
        model, _, x = prepared(IfAny)
        compiled = sere_compile.compile(model, inner="eager", capture="default")
        close(compiled(x), model(x))
        [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert self.LINE.search(record.message)
        compiled(x)
        assert sum(r.levelno == logging.WARNING for r in caplog.records) == 1

    def test_strict_raises_from_the_first_call_on(self):
        model, _, x = prepared(IfAny)
        compiled = sere_compile.compile(model, inner="eager", strict=True, capture="default")
        for _ in range(3):
            with pytest.raises(GateNotFoundError, match=self.LINE):
                compiled(x)


class Noisy(torch.nn.Module):
    """No gate, and random numbers."""

    def forward(self, x):
        return x + torch.rand_like(x)


def test_a_call_that_is_made_again_draws_the_same_numbers():
    x = torch.zeros(3, 4)
    torch.manual_seed(0)
    expected = [Noisy()(x), Noisy()(x)]
    compiled = sere_compile.compile(Noisy(), select_top_k=1, inner="eager")
    torch.manual_seed(0)
    assert all(torch.equal(compiled(x), wanted) for wanted in expected)


class NoisyByOthers(torch.nn.Module):
    """No gate, and random numbers of Python and numpy, outside of graphs."""

    def forward(self, x):
        return x + drawn()


@torch._dynamo.disable
def drawn():
    return random.random() + numpy.random.random()


def test_a_call_that_is_made_again_draws_the_same_numbers_of_other_generators():
    def seed():
        random.seed(0)
        numpy.random.seed(0)

    x = torch.zeros(3, 4)
    seed()
    expected = [NoisyByOthers()(x), NoisyByOthers()(x)]
    compiled = sere_compile.compile(NoisyByOthers(), select_top_k=1, inner="eager")
    seed()
    assert all(torch.equal(compiled(x), wanted) for wanted in expected)


@pytest.mark.parametrize("kind", [MaskLoop, IfAny])
@pytest.mark.parametrize("strict", [False, True])
def test_capture_is_kept_only_where_a_gate_is_re_routed(kind, strict, caplog):
    """torch computes some scalars wrongly under capture; with S = K nothing would be gained for that.

    Nor is it said that no graph holds the gate: one did.
    """
    model, _, x = prepared(kind)
    compiled = sere_compile.compile(model, select_top_k=EXPERTS, inner="eager", strict=strict)
    with caplog.at_level(logging.INFO, logger="sere_compile.capture"):
        for _ in range(2):
            close(compiled(x), model(x))
    assert compiled.forward._dynamic is False
    assert "compiling without dynamic-shape capture" in caplog.text
    assert "outside every graph" not in caplog.text
    assert "made no graph" not in caplog.text


class State:
    """An argument that may change without anyone seeing it."""


class Stateful(CountLoop):
    def forward(self, x, state):
        return super().forward(x)


def test_call_with_hidden_state_is_not_run_twice():
    """A cache could have been written to: the error is raised, with what happens next."""
    model, matrix, x = prepared(Stateful)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode) as raised:
        compiled(x, State())
    assert "switched off now" in raised.value.__notes__[0]
    close(compiled(x, State()), model.expected(x, matrix, 1))


def test_wrong_call_raises_the_model_s_own_error():
    model, _, _ = prepared(MaskLoop)
    with pytest.raises(Exception, match=r"view|shape|invalid"):
        sere_compile.compile(model, inner="eager")(torch.randn(3))


def test_function_and_module_stay_what_they_are():
    model, _, x = prepared(MaskLoop)
    compiled = sere_compile.compile(model, inner="eager")
    assert compiled._orig_mod is model
    assert list(dict(compiled.named_parameters())) == [f"_orig_mod.{name}" for name, _ in model.named_parameters()]

    def function(x):
        """Its text."""
        return model(x)

    wrapped = sere_compile.compile(function, select_top_k=8, inner="eager")
    assert wrapped.__doc__ == "Its text."
    close(wrapped(x), model(x))


def test_backend_alone_cannot_capture():
    model, _, x = prepared(MaskLoop)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"use sere_compile\.compile"):
        torch.compile(model.gate, backend="sere", options={"capture": "auto"})(x)
    with pytest.raises(ConfigError, match='capture must be "default" or "auto"'):
        sere_compile.compile(model, capture="always")


def test_explain_captures_the_same_way():
    model, _, x = prepared(MaskLoop)
    assert not sere_compile.explain(model, x).rewritten
    torch._dynamo.reset()
    report = sere_compile.explain(model, x, config=SereConfig(capture="auto"))
    assert [row.status for row in report.gates] == ["rewritten"]


class TestExplainWithCapture:
    """`explain` with capture="auto" reports what `compile` would do."""

    def test_it_goes_back_where_capture_raises(self):
        model, _, x = prepared(CountLoop)
        report = sere_compile.explain(model, x, config=SereConfig(capture="auto"))
        assert [row.status for row in report.gates] == ["rewritten"]
        assert "Traced without capture" in report.hint
        assert "raises GuardOnDataDependentSymNode" in report.hint

    def test_it_does_not_advise_capture_that_was_tried(self):
        report = sere_compile.explain(Inside(), torch.randn(8, HIDDEN), config=SereConfig(capture="auto"))
        assert [row.name for row in report.gates] == ["gate.weight"]
        assert "captures expert loops" not in report.hint
        assert "move router and top-k into a function" in report.hint


class Refused(torch.nn.Module):
    """Scores over several lines: the refusal names another line than the selection's."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x):
        scores = self.gate(x).softmax(-1) + x[..., :EXPERTS].cumsum(-1)
        weights, ids = scores.topk(2)
        print(end="")
        return x + weights.sum(-1, keepdim=True) * ids.sum(-1, keepdim=True)


def test_a_selection_that_a_graph_refused_is_not_listed_as_outside_too():
    report = sere_compile.explain(Refused(), torch.randn(4, HIDDEN))
    assert not [row for row in report if "outside every graph" in row.reason]


class Remembers(torch.nn.Module):
    """No gate, and state of a call that the next one reads, in every place but a buffer."""

    def __init__(self):
        super().__init__()
        self.calls, self.sums, self.log = 0, torch.zeros(3), []

    def forward(self, x):
        self.calls += 1
        self.sums = self.sums + x
        self.log.append(self.calls)
        return self.sums * self.calls


@pytest.mark.parametrize("breaks", [False, True])
def test_a_call_that_is_made_again_finds_what_the_first_try_kept_as_it_was(breaks, monkeypatch):
    """The first call is made a second time where capture lets no gate be re-routed."""
    if breaks:
        own = Remembers.forward
        monkeypatch.setattr(Remembers, "forward", lambda self, x: (own(self, x), torch._dynamo.graph_break())[0])
    model, plain = Remembers(), Remembers()
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for number in range(1, 4):
        assert torch.equal(compiled(torch.ones(3)), plain(torch.ones(3)))
        assert (model.calls, len(model.log)) == (number, number)
        assert torch.equal(model.sums, plain.sums)


TOLD = []


def tell(x):
    TOLD.append(float(x.sum()))


class Tells(torch.nn.Module):
    """No gate; a helper keeps a list, and each call warns."""

    def forward(self, x):
        tell(x)
        warnings.warn("a default is taken", stacklevel=1)
        torch._dynamo.graph_break()
        return x + 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_is_made_again_says_things_once(fails, monkeypatch):
    """Also what one try alone says is said."""
    if fails:
        own = Tells.forward

        def forward(self, x):
            y = own(self, x)
            if torch._dynamo.config.capture_scalar_outputs:
                warnings.warn("capture is on", stacklevel=1)
                raise NotImplementedError
            return y

        monkeypatch.setattr(Tells, "forward", torch._dynamo.disable(forward))
    compiled = sere_compile.compile(Tells(), select_top_k=1, inner="eager")
    TOLD.clear()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(torch.ones(3))
    assert TOLD == [3.0, 3.0]
    told = [str(one.message) for one in given if one.category is UserWarning]
    assert [text for text in told if text == "a default is taken"] == ["a default is taken"] * 2
    assert ("capture is on" in told) == fails


def test_a_call_that_has_changed_what_is_not_copied_is_not_made_again():
    """A cache of many numbers: what the first try gives is right, and stays."""

    class Caches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = torch.zeros(1 << 21)

        def forward(self, x):
            self.cache += 1
            return x + self.cache[0]

    model, x = Caches(), torch.zeros(3)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for number in range(1, 4):
        assert torch.equal(compiled(x), x + number)


class Both(torch.nn.Module):
    """A loop that capture traces, and one that torch computes wrongly under capture."""

    def __init__(self, seen=None):
        super().__init__()
        self.first, self.second = prepared(MaskLoop)[0], Weighed()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = seen

    def forward(self, x):
        self.calls += 1
        if self.seen is not None:
            x.add_(self.seen)
        y = self.first(x)
        return self.second(y.view(x.shape)).view(x.shape)


class OfChance(MaskLoop):
    """Other numbers in each call, whatever torch's own generator is at."""

    generator = torch.Generator()

    def forward(self, x):
        return super().forward(x) * torch.tensor(float(torch.rand((), generator=self.generator)))


class TestWhatTorchComputesWrongly:
    """Another gate of the model would keep the capture, and with it what torch makes of the loop."""

    @pytest.mark.skipif(BRANCHES_ON_LISTS, reason="torch 2.15 computes it as it is")
    @pytest.mark.parametrize("seen", [pytest.param(None, marks=pytest.mark.slow), 1.0])
    def test_it_goes_back(self, seen, caplog):
        model, x = Both(seen).eval().requires_grad_(False), torch.randn(2, 4, HIDDEN)
        half = torch.rand(EXPERTS, EXPERTS)
        matrix = (half + half.T).fill_diagonal_(2) / 2
        names = {"first.gate.weight": matrix, "second.gate.weight": matrix}
        sere_compile.attach(model, sere_compile.SimilarityProfile(names))
        # With S = K of all gates the model's own numbers are right.
        compiled = sere_compile.compile(model, select_top_k=1, threshold=1.0, inner="eager")
        with caplog.at_level(logging.INFO, logger="sere_compile.capture"):
            for _ in range(2):
                given = x.clone()
                close(compiled(given), model(x.clone()))
                close(given, x + (seen or 0.0))
        assert "gives other numbers than the model" in caplog.text
        assert model.calls == 4

    @pytest.mark.skipif(BRANCHES_ON_LISTS, reason="torch 2.15 computes it as it is")
    def test_explain_says_so(self):
        model, x = Both().eval().requires_grad_(False), torch.randn(2, 4, HIDDEN)
        report = sere_compile.explain(model, x, config=SereConfig(capture="auto"))
        assert "dynamic-shape capture gives other numbers than the model" in report.hint
        assert len(report.rewritten) == 2  # by the graphs ahead of the loops

    def test_what_is_right_is_kept(self):
        model, matrix, x = prepared(MaskLoop)
        compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
        close(compiled(x), model.expected(x, matrix, 1))
        assert compiled.forward._dynamic is True

    def test_numbers_of_chance_tell_nothing(self):
        model, _, x = prepared(OfChance)
        compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
        compiled(x)
        assert compiled.forward._dynamic is True


class Counts(MaskLoop):
    """Takes a number of an iterator in each call, which nobody can put back."""

    def __init__(self, rises):
        super().__init__()
        self.numbers, self.taken, self.rises = iter(range(100)), [], rises

    def forward(self, x):
        self.taken.append(next(self.numbers))
        return super().forward(x) if self.rises else super().forward(x) + float(x.sum().item() > 1e9)


@pytest.mark.parametrize("rises", [True, False])
def test_a_first_call_that_moves_an_iterator_is_made_once(rises):
    """Whether capture brings a gate or is given up."""
    model, _, x = prepared(lambda: Counts(rises))
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for _ in range(2):
        compiled(x)
    assert model.taken == [0, 1]


class OfSome(Stacked):
    """A layer for the tokens that a mask marks: how many, the data say."""

    def forward(self, x, mask):
        y = torch.zeros_like(x)
        y[mask] = super().forward(x[mask])
        return y


def test_a_warning_of_the_way_that_was_given_up_is_not_given(caplog):
    """Captured, the gate's rows have no number; by default its graph begins behind the mask, and it is re-routed."""
    model, x = OfSome().eval().requires_grad_(False), torch.randn(12, HIDDEN)
    sere_compile.attach(model, sere_compile.SimilarityProfile({"gate.weight": torch.eye(EXPERTS)}))
    compiled, mask = sere_compile.compile(model, select_top_k=1, min_active=0, inner="eager"), torch.arange(12) % 3 > 0
    for _ in range(2):
        assert not torch.allclose(compiled(x, mask), model(x, mask), atol=1e-2)
    assert told(caplog) == []


class Scripted(nn.Module):
    """A norm in TorchScript, with running statistics, and a router behind it."""

    def __init__(self):
        super().__init__()
        self.norm = torch.jit.script(nn.BatchNorm1d(16))
        self.gate = nn.Linear(16, 8, bias=False)
        self.experts = nn.Parameter(torch.randn(8, 16, 16))

    def forward(self, x):
        weights, ids = self.gate(self.norm(x)).softmax(-1).topk(2)
        return torch.einsum("th,tkhf,tk->tf", x, self.experts[ids], weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_of_torchscript_run_as_they_are(caplog):
    """And are told of: Dynamo looks into no TorchScript, whose classes give no code of their own."""
    x = torch.randn(6, 16)
    for model in (Scripted().eval(), torch.jit.trace(Scripted().eval(), x)):
        assert torch.equal(sere_compile.compile(model, select_top_k=1)(x), model(x))
        assert "Dynamo made no graph of" in caplog.text
        caplog.clear()
        assert not sere_compile.explain(model, x).rewritten
        with pytest.raises(sere_compile.CalibrationError, match="no MoE gate"):
            sere_compile.calibrate(model, [{"x": x}])
