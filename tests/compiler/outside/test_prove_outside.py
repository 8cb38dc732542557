"""Ids that leave their graph are re-routed only where running the code that receives them proves it right."""

import contextlib
import dataclasses
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile import SimilarityProfile, attach
from sere_compile.compiler import dynamo
from sere_compile.compiler.outside import compare_versions
from sere_compile.compiler.outside import prove_outside as module
from sere_compile.compiler.outside.compare_versions import Verdict
from sere_compile.compiler.outside.prove_outside import computes_the_same, prove_outside
from sere_compile.experts.trial_block import Settings

from ...passes.graph.written import Written
from .blocks import EXPERTS, HIDDEN, TOP_K, Block, Experts, InVmap, Keeping, Listed, Overwriting, Plain, Split, rows
from .trials import gate_of, verdicts


@pytest.mark.parametrize(
    "experts", [Experts, InVmap, *(pytest.param(e, marks=pytest.mark.slow) for e in (Overwriting, Listed))]
)
def test_a_sum_over_experts_is_proven_with_merged_slots(experts):
    assert [v.merged for v in verdicts(Block(experts()), rows())] == [True]


def sparsemixer(scores):
    """As the code of Phi-3.5-MoE has it: the weight of a step's best is 1 where no other comes within 2 % of it."""
    weights, ids, left = [], [], scores
    for _ in range(TOP_K):
        best, chosen = left.max(-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 0.02
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(ids, -1)


@pytest.mark.slow
def test_weights_that_are_told_by_close_scores_alone():
    assert [v.merged for v in verdicts(Plain(Experts(), sparsemixer), rows())] == [True]


class Adapted(Experts):
    """As peft adapts stacked weights: the experts of the first factor in a row, of the second by turns."""

    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2 * EXPERTS, HIDDEN))
        self.up = nn.Parameter(torch.randn(HIDDEN, 2 * EXPERTS))

    def expert(self, x, number):
        down, up = self.down.view(EXPERTS, 2, HIDDEN)[number], self.up.view(HIDDEN, 2, EXPERTS)[..., number]
        return torch.tanh(x @ (self.w[number] + (up @ down).T))


@pytest.mark.slow
def test_adapters_of_stacked_weights():
    assert [v.merged for v in verdicts(Block(Adapted()), rows())] == [True]


class NormedByAll(Experts):
    """Each expert normalises, and all tokens come to each."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(HIDDEN) for _ in range(EXPERTS)).eval()

    @torch.compiler.disable
    def forward(self, x, ids, weights):
        share = [((ids == expert) * weights).sum(-1, keepdim=True) for expert in range(EXPERTS)]
        return sum(self.norms[expert](self.expert(x, expert)) * share[expert] for expert in range(EXPERTS))


@pytest.mark.slow
def test_norms_of_experts_that_get_all_tokens():
    assert [v.merged for v in verdicts(Block(NormedByAll()), rows())] == [True]


class TooStrange(Exception):
    """Of the program's own."""


class WithoutMasks(Block):
    """Its code refuses what a trial makes up, as no call of the model has it."""

    def forward(self, x, mask=None, scale=None):
        out = super().forward(x)
        assert mask is None
        if scale is not None:
            raise TooStrange
        return out


def test_what_a_program_raises_on_made_up_arguments_does_not_end_it():
    assert [v.merged for v in verdicts(WithoutMasks(Experts()), rows())] == [True]


class Router(nn.Module):
    """With a number per expert beside its weight, which could be an expert's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.bias = nn.Parameter(torch.zeros(EXPERTS))

    def forward(self, x):
        return (F.linear(x, self.weight).softmax(-1) + self.bias).topk(TOP_K)


class Loaded(nn.Module):
    """A layer whose graph holds a count of the ids behind its router."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = Router(), Overwriting()

    def forward(self, x):
        weights, ids = self.router(x.view(-1, HIDDEN))
        load = ids.flatten().bincount(minlength=EXPERTS).tolist()
        return self.experts(x.view(-1, HIDDEN), ids, weights * (len(load) > 0)).view(x.shape)


def test_a_router_that_is_a_module_shows_less_of_the_graph_than_its_layer():
    """`bincount` of the ids is part of the graph, and not of the router."""
    found = verdicts(Loaded(), rows())
    assert [v.merged for v in found] == [True], found


@pytest.mark.slow
def test_what_capture_cannot_trace_is_tried_again_without_it():
    for capturing in (False, True):
        with dynamo.dynamic_shape_capture() if capturing else contextlib.nullcontext():
            verdicts(Block(Split()), rows())
        assert {key[2] for key in module._verdicts} == {(capturing, capturing)}


def test_layers_that_compute_the_same_are_tried_once(monkeypatch):
    tried = []
    try_block = module.try_block
    monkeypatch.setattr(module, "try_block", lambda *args: tried.append(args[1]) or try_block(*args))
    first, second = Block(Experts()), Block(Experts())
    first.layer_idx, second.layer_idx = 0, 1
    second.returns, second.experts.weigh = first.returns, first.experts.weigh
    [verdict] = verdicts(nn.Sequential(first, second), rows())
    assert verdict.merged
    assert tried.count(first) == 1
    assert second not in tried
    assert computes_the_same(second.gate.weight, verdict)
    monkeypatch.setattr(module, "Owners", None)  # each call asks: the heap is searched once for a weight
    assert all(computes_the_same(layer.gate.weight, verdict) for layer in (first, second))


@pytest.mark.slow
def test_a_layer_with_another_setting_is_not_covered_by_the_proof():
    first, second = Block(Experts()), Block(Experts(lambda weights: weights**2))
    [verdict] = verdicts(nn.Sequential(first, nn.Sequential(second)), rows())
    assert not computes_the_same(second.gate.weight, verdict)


class TestWhoseBlock:
    def test_without_an_owner_nothing_is_proven(self):
        verdict = prove_outside(None, None)
        assert (verdict.merged, verdict.is_gate, verdict.block) == (None, False, -1)
        assert verdict.reason == "no module of this process owns its router weight"

    def test_modules_that_compute_the_same_have_one_number(self):
        first, second, other = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 4)
        assert module._number(first) == module._number(second)
        assert module._number(first) != module._number(other)

    def test_two_threads_get_two_numbers(self, monkeypatch):
        """Also where one asks while the other is about to note its own."""
        numbers = []

        class Noting(dict):
            def setdefault(self, key, number):
                if not numbers:
                    numbers.append(None)
                    numbers.append(module._number(nn.Linear(2, 4)))
                return super().setdefault(key, number)

        monkeypatch.setattr(module, "_numbers", Noting())
        assert module._number(nn.Linear(2, 3)) != numbers[1]

    def test_verdicts_hold_for_blocks_that_compute_the_same(self):
        layers = [nn.Sequential(nn.Linear(2, 3), nn.Tanh()) for _ in range(2)]
        verdict = Verdict(True, block=module._number(layers[0]))
        assert computes_the_same(layers[0][0].weight, verdict)
        assert computes_the_same(layers[1][0].weight, verdict)
        assert not computes_the_same(layers[0][0].weight, Verdict(True, block=-1))
        assert not computes_the_same(torch.zeros(3, 2), verdict)
        assert not computes_the_same(None, verdict)

    def test_a_verdict_holds_until_a_setting_changes(self):
        """Code outside graphs reads it anew in each call."""
        layer = Keeping("nowhere")
        verdict = Verdict(True, block=module._number(layer), written=frozenset({"log"}))
        holds = functools.partial(computes_the_same, layer.gate.weight)
        assert holds(verdict)
        layer.log.append(1)
        assert holds(verdict)
        layer.place = "an attribute"
        assert not holds(verdict)
        other = Verdict(True, block=module._number(layer), written=frozenset({"log"}))
        assert (holds(verdict), holds(other)) == (False, True)

    def test_two_threads_see_that_a_setting_changed(self, monkeypatch):
        """A guard must not raise, also where another thread's let go of the settings meanwhile."""
        layer = Keeping("nowhere")
        verdict = Verdict(True, block=module._number(layer), written=frozenset({"log"}))
        holds = functools.partial(computes_the_same, layer.gate.weight, verdict)
        assert holds()
        layer.place = "an attribute"
        ask, answers = Settings.are_the_same, []

        def asked(settings):
            same = ask(settings)
            if not answers:
                answers.append(None)
                answers.append(holds())
            return same

        monkeypatch.setattr(Settings, "are_the_same", asked)
        assert (holds(), answers) == (False, [None, False])


class TestWhichModulesAreTried:
    """Those around the router's weight, from the inside out, until one holds the gate as the model does."""

    @pytest.fixture
    def tried(self, monkeypatch):
        """Sets what is found of each module, and tells of which it was asked."""
        asked = []

        def prove(*found, kept=False, modules=None, spread=()):
            modules = modules or [nn.Linear(2, 3 + place) for place in range(len(found))]
            self.modules, self.numbers = modules, [module._number(one) for one in modules]
            self.weight = nn.Parameter(torch.zeros(3, 2))
            of_modules = dict(zip(modules, found, strict=True))
            asked.clear()

            def verdict_on(one, block, gate, owner, kept):
                assert block == module._number(one)
                asked.append((modules.index(one), kept))
                return of_modules[one]

            monkeypatch.setattr(module, "_verdict_on", verdict_on)
            monkeypatch.setattr(module, "spread_over_ranks", lambda one: dict(spread).get(modules.index(one), ""))
            owner = types.SimpleNamespace(surroundings=tuple(modules), weight=self.weight)
            gate = types.SimpleNamespace(num_experts=EXPERTS, ids=Written().given(5, TOP_K))
            return prove_outside(gate, owner, kept=kept)

        prove.asked = asked
        return prove

    def test_none_could_be_run(self, tried):
        verdict = tried(None, None)
        assert (verdict.merged, verdict.is_gate, verdict.block, verdict.written) == (None, False, -1, None)
        assert verdict.reason == "no module around its router could be run"
        assert tried.asked == [(0, False), (1, False)]
        assert module._blocks_around[self.weight] == frozenset(self.numbers)
        assert self.weight not in module._settings

    def test_of_what_ranks_exchange_nothing_is_run(self, tried):
        verdict = tried(Verdict(True), None, spread={1: "w is spread over ranks"})
        assert (verdict.merged, verdict.is_gate, tried.asked) == (None, True, [])
        assert verdict.reason.startswith("w is spread over ranks, and a trial of the code outside the graph would wait")

    def test_the_first_that_holds_the_gate_is_the_last_tried(self, tried):
        verdict = tried(None, Verdict(False, written=frozenset("a")), Verdict(True))
        assert (verdict.merged, verdict.block, verdict.written) == (False, self.numbers[1], frozenset("a"))
        assert tried.asked == [(0, False), (1, False)]

    def test_a_part_of_the_gate_is_looked_at_further_out(self, tried):
        part, none = Verdict(None, "part", whole=False), Verdict(None, "none", is_gate=False)
        verdict = tried(part, Verdict(True))
        assert (verdict.merged, verdict.block) == (True, self.numbers[1])
        for outer in (none, None):
            verdict = tried(part, outer)
            assert (verdict.reason, verdict.block, len(tried.asked)) == ("part", self.numbers[0], 2)

    def test_the_outermost_of_those_without_experts_tells_why(self, tried):
        first, second = (Verdict(None, reason, is_gate=False) for reason in ("first", "second"))
        verdict = tried(first, second)
        assert (verdict.reason, verdict.block) == ("second", self.numbers[1])
        assert tried(first, None).reason == "first"

    def test_the_settings_of_what_was_tried_are_watched(self, tried):
        layer = nn.Sequential(nn.Identity())
        tried(Verdict(True, written=frozenset()), modules=[layer])
        assert module._settings[self.weight].are_the_same()
        layer.register_forward_hook(print)
        assert not module._settings[self.weight].are_the_same()
        tried(None, modules=[layer])
        assert self.weight not in module._settings

    @pytest.mark.parametrize("written", [None, frozenset(), frozenset({"log"})])
    def test_what_calls_write_is_no_setting(self, tried, written):
        layer = Keeping("nowhere")
        layer.forward_log = layer.log
        tried(Verdict(True, written=written), modules=[layer])
        layer.log.append(1)
        assert module._settings[self.weight].are_the_same() is (written == {"log"})
        layer.log.clear()
        assert module._settings[self.weight].are_the_same()
        layer.place = "a list"
        assert not module._settings[self.weight].are_the_same()

    def test_what_is_around_is_tried_where_ids_are_kept(self, tried, monkeypatch):
        """It says more only where it is such a gate, and a rewrite gives something else there."""
        around = []

        def holds_more(one, inner, experts):
            around.append((self.modules.index(one), self.modules.index(inner)))
            return experts == EXPERTS

        monkeypatch.setattr(module, "_holds_more_of_experts", holds_more)
        inner = Verdict(None, "inner", written=frozenset("a"), off=frozenset({False}))
        off = {"off": frozenset({True})}

        def kept(*found):
            verdict = tried(*found, kept=True)
            assert (verdict.block, verdict.written) == (self.numbers[-1], None)
            assert self.weight not in module._settings
            return verdict.reason

        assert kept(inner, Verdict(None, "outer", **off)) == "outer"
        assert tried.asked == [(0, True), (1, True)]
        others = [None, Verdict(None, "outer", is_gate=False, **off), Verdict(None, "outer")]
        for outer in (*others, Verdict(None, "outer", whole=False, **off)):
            assert kept(inner, outer) == "inner"
        around.clear()
        assert kept(None, inner, Verdict(None, "outer", **off)) == "outer"
        assert around == [(2, 1)]
        assert kept(inner, None, Verdict(None, "outer", **off)) == "outer"
        assert around[1:] == [(1, 0), (2, 0)]
        monkeypatch.setattr(module, "_holds_more_of_experts", lambda one, inner, experts: False)
        assert kept(inner, Verdict(None, "outer", **off)) == "inner"
        assert tried.asked == [(0, True)]

    def test_what_counts_experts_beside_a_block(self):
        """A parameter or buffer of its own, and not where other blocks of the kind stand in it."""
        inner = nn.Linear(EXPERTS, 3)
        outer = nn.Sequential(inner, nn.LayerNorm(3))
        holds = functools.partial(module._holds_more_of_experts, outer, inner, EXPERTS)
        assert not holds()
        outer.scale = nn.Parameter(torch.zeros(2, EXPERTS))
        assert holds()
        del outer.scale
        outer.register_buffer("load", torch.zeros(EXPERTS, 2))
        assert holds()
        outer.append(nn.Linear(3, 3))
        assert not holds()

    def test_one_trial_for_all_that_compute_the_same(self, monkeypatch):
        """For each kind of call, each way of tracing, and each question."""
        asked, one = [], nn.Linear(2, 3)
        monkeypatch.setattr(module, "_verdicts", {})
        monkeypatch.setattr(module, "try_block", lambda *given: asked.append(given))
        gate = gate_of(Written().input(torch.zeros(5, TOP_K, dtype=torch.int64)))
        other = dataclasses.replace(gate, top_k=1)
        owner, calls = object(), []
        monkeypatch.setattr(dynamo, "arguments_of", lambda one: calls[-1])
        for called in ((), (torch.zeros(2),)):
            calls.append((called, {}))
            for block, of, kept in ((7, gate, False), (7, gate, True), (7, other, False), (8, gate, False)):
                for _ in range(2):
                    assert module._verdict_on(one, block, of, owner, kept) is None
                assert asked[-1] == (of, one, owner, calls[-1], kept)
        assert len(asked) == 8
        for traced in ("captures_dynamic_shapes", "makes_graphs_before_loops"):
            monkeypatch.setattr(dynamo, traced, lambda: True)
            module._verdict_on(one, 7, gate, owner, False)
        assert len(asked) == 10

    def test_a_weight_that_nobody_owns(self):
        verdict = Verdict(True, block=module._number(nn.Linear(2, 3)), written=frozenset())
        weight = nn.Parameter(torch.zeros(3, 2))
        assert not computes_the_same(weight, verdict)
        assert module._blocks_around[weight] == frozenset()

    def test_settings_are_watched_from_the_first_verdict_that_tells_what_calls_write(self):
        layer = Keeping("nowhere")
        holds = functools.partial(computes_the_same, layer.gate.weight)
        other = Verdict(True, block=-2, written=frozenset())
        silent = Verdict(True, block=module._number(layer))
        assert (holds(other), holds(silent)) == (False, True)
        assert layer.gate.weight not in module._settings
        assert holds(Verdict(True, block=silent.block, written=frozenset({"log"})))
        layer.log.append(1)
        assert holds(silent)
        assert module._settings[layer.gate.weight].are_the_same()
        layer.place = "a list"
        assert not holds(silent)
        assert layer.gate.weight not in module._settings


class Dropping(Experts):
    """Drops the slots of an expert beyond some."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            token, slot = token[:40], slot[:40]
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


@pytest.mark.slow
def test_more_tokens_than_were_tried_are_tried_first(monkeypatch, caplog):
    """A graph serves any number, and the code outside it may drop some of many."""
    monkeypatch.setattr(compare_versions, "_LEAST_ROWS", 16)
    monkeypatch.setattr(compare_versions, "_MOST_ROWS", 16)
    module._verdicts.clear()
    model = Block(Dropping())
    attach(model, SimilarityProfile({"gate.weight": torch.eye(EXPERTS)}))
    options = {"select_top_k": 1, "min_active": 0, "inner": "eager"}
    compiled, changed = torch.compile(model, backend="sere", options=options, dynamic=True), []
    for tokens in (5, 400):
        x = 0.1 * torch.randn(tokens, HIDDEN) + model.gate.weight[0].detach()
        with torch.no_grad():
            changed.append(not torch.equal(compiled(x), model(x)))
    assert changed == [True, False]
    assert "where there are 512 tokens" in caplog.text


def test_tokens_that_the_data_count():
    """Nobody knows how many to make up."""

    class OfSome(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), Experts()

        def forward(self, x):
            x = x[x[:, 0] > -9]
            weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
            return torch.compiler.disable(self.experts)(x, ids, weights)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        [verdict] = verdicts(OfSome(), torch.randn(12, HIDDEN))
    assert (verdict.merged, verdict.is_gate) == (None, True)
    assert verdict.reason.startswith("the numbers in a call tell the shape [u0")
