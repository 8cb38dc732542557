"""A rewrite is right where the block gives what it gives, as traced, with exchanged experts."""

import functools
import types

import pytest
import torch
from torch import nn

from sere_compile.compiler.outside import compare_versions as module
from sere_compile.compiler.outside.compare_versions import Verdict, compare_versions
from sere_compile.compiler.outside.where_tokens_go import SENT_ELSEWHERE

from ...passes.graph.written import Written
from ...thinned import thinned
from .blocks import EXPERTS, HIDDEN, SEEN, TOP_K, Block, Chained, Counting, Experts, Keeping, Split, Unweighted, rows
from .trials import VERSIONS, EagerTrial, parameters, raising, returning, trial_of, verdicts, watched_compiling


class ReturningIds(Block):
    """What it returns is what the router chose, and the same tensor goes to the experts."""

    def forward(self, x):
        weights, ids = self.gate(x.view(-1, HIDDEN)).softmax(-1).topk(TOP_K)
        return self.experts(x.view(-1, HIDDEN), ids, weights).view(x.shape), ids


class Capped(Experts):
    """Each expert takes its first tokens only: some are dropped where there are many."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            token, slot = token[:40], slot[:40]
            out.index_add_(0, token, self.expert(x[token], expert) * weights[token, slot, None])
        return out


class OneIsSpecial(Experts):
    """The last of many experts has another activation."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(40, HIDDEN, HIDDEN))

    def expert(self, x, number):
        out = super().expert(x, number)
        return torch.relu(out) if number == 39 else out


@pytest.mark.slow
def test_experts_that_are_counted_by_a_table_take_merged_ids():
    """Plain ids make sizes that do not fit: that ends the trial of plain ids, and is not the reason of merged ones."""
    assert [v.merged for v in verdicts(Block(Split()), rows())] == [True]
    [refused] = verdicts(ReturningIds(Split()), rows())
    assert refused.merged is None
    assert "returns other things" in refused.reason


def test_a_buffer_that_new_ids_would_change_is_seen():
    """Dynamo ends the graph before it."""
    block = Counting(Experts(), lambda load, ids: load.add_(torch.bincount(ids.flatten(), minlength=EXPERTS)))
    [verdict] = verdicts(block, rows())
    assert verdict.merged is None
    assert "returns other things" in verdict.reason


@pytest.mark.parametrize(
    "weigh",
    [
        lambda weights: weights.softmax(-1),
        pytest.param(lambda weights: weights**2, marks=pytest.mark.slow),
        pytest.param(lambda weights: weights / weights.amax(-1, keepdim=True), marks=pytest.mark.slow),
        pytest.param(lambda weights: torch.where(weights > 0.3, weights, 0), marks=pytest.mark.slow),
        pytest.param(lambda weights: torch.nn.functional.normalize(weights, dim=-1), marks=pytest.mark.slow),
    ],
)
def test_weights_that_pass_another_function_are_not_merged(weigh):
    """Merging before the function gives another number; the new ids alone are right, for slots stay apart."""
    assert [v.merged for v in verdicts(Block(Experts(weigh)), rows())] == [False]


def test_experts_in_order_of_rank_take_plain_ids():
    assert [v.merged for v in verdicts(Block(Chained()), rows())] == [False]


def test_weights_that_are_returned_stay_what_the_router_chose():
    block = Block(Experts(), returns=lambda output, weights: (output, weights))
    assert [v.merged for v in verdicts(block, rows())] == [False]


@pytest.mark.parametrize(
    ("place", "told"),
    thinned([
        ("an attribute", "leaves other things in last"),
        ("a list", "leaves other things in log"),
        ("a global", "leaves other things in SEEN"),
        ("a module that is no part of it", "leaves other things in owner.log"),
        ("a buffer of a module that is no part of it", "leaves other things in owner.buffers"),
        ("by numbers that go on", "leaves other things in log"),
        ("numbers", "returns other things"),
        ("an array", "returns other things"),
    ], (1, 4, 5, 7)),
)  # fmt: skip
def test_ids_that_are_kept_stay_what_the_router_chose(place, told):
    """What a block returns or keeps as no tensor is a result as well; the trial leaves a user's lists as they were."""
    SEEN.clear()
    model = Keeping(place)
    found = verdicts(model, rows())
    assert all(v.merged is None and v.is_gate for v in found)
    assert told in found[0].reason
    assert len(SEEN) == (1 if place == "a global" else 0)
    assert len(model.owner[0].log) == (1 if place == "a module that is no part of it" else 0)


def test_tokens_that_are_dropped_only_where_there_are_many():
    found = verdicts(Block(Capped()), rows())
    assert all(v.merged is None for v in found)
    assert "where there are 4096 tokens" in found[0].reason


def test_one_of_many_experts_that_is_told_by_its_number():
    """Every expert is re-routed once."""
    block = Block(OneIsSpecial())
    block.gate = nn.Linear(HIDDEN, 40, bias=False)
    found = verdicts(block, rows())
    assert all(v.merged is None for v in found)
    assert "is off by" in found[0].reason


class Masking(Block):
    """One column of what it returns is minus infinity, as the scores of words are that nobody may say."""

    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x), (0, 1), value=float("-inf"))


@pytest.mark.parametrize("kind", [Block, Masking])
def test_where_no_rewrite_is_right_it_says_how_far_it_is_off(kind):
    [verdict] = verdicts(kind(Unweighted()), rows())
    assert verdict.merged is None
    assert verdict.is_gate
    assert f"run with the code that receives its ids, {kind.__name__} is off by 0." in verdict.reason


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested elsewhere."""

    def test_what_re_routing_makes_of_each_expert(self):
        trial = EagerTrial(Experts())
        trial.run(trial.inputs())
        found = module._expert_map(trial)
        ids = trial.graphs.ids[0]
        assert {u: found[u] for u in ids.flatten().tolist()} == found
        assert set(found.values()) <= set(ids[:, 0].flatten().tolist())


class TestWhichRewriteIsRight:
    X = ((torch.randn(5, HIDDEN),), {})

    def compare(self, *right, needs_merge=True, kept=False, alone=True, known=None, fails=(), monkeypatch):
        """The verdict where these versions are right, and the versions that were asked for."""
        asked = []
        trial = EagerTrial(Experts(), needs_merge=needs_merge)
        trial.graphs.found = ["found"]
        monkeypatch.setattr(module, "ids_alone", lambda gate: "another" if alone and gate == "found" else None)

        def problem(trial, version, experts, inputs):
            asked.append(version)
            if version in fails:
                raise ValueError(version)
            return None if version in right else f"not {version}"

        monkeypatch.setattr(module, "_problem_with", problem)
        trial.graphs.versions = dict.fromkeys(known if known is not None else (*VERSIONS, "original"))
        return compare_versions(trial, [], self.X, kept), asked

    def test_the_first_that_is_right(self, monkeypatch):
        compare = functools.partial(self.compare, monkeypatch=monkeypatch)
        for needs_merge, first in ((True, True), (False, False)):
            names = ["merged", "plain"] if first else ["plain", "merged"]
            order = [*names, *(f"{name}, ids alone" for name in names)]
            for place, version in enumerate(order):
                verdict, asked = compare(version, needs_merge=needs_merge)
                alone = place > 1
                assert verdict == Verdict(version.startswith("merged"), ids_alone=alone, rows=4096)
                assert asked == order[: place + 1]
            verdict, asked = compare(needs_merge=needs_merge)
            assert verdict == Verdict(None, f"not {order[0]}", off=frozenset({True, False}))
            assert asked == order
            assert compare(needs_merge=needs_merge, alone=False)[1] == names

    def test_where_ids_are_kept(self, monkeypatch):
        compare = functools.partial(self.compare, kept=True, monkeypatch=monkeypatch)
        verdict, asked = compare("plain, ids kept")
        assert (verdict, asked) == (Verdict(False, rows=4096), ["merged, ids kept", "plain, ids kept"])
        verdict, _ = compare(known=["plain, ids kept"])
        assert verdict.off == {False}

    def test_a_run_that_fails_is_not_off(self, monkeypatch):
        """An expert named twice may not fit: that is a reason, and shows no other numbers."""
        verdict, _ = self.compare(alone=False, fails=("merged",), monkeypatch=monkeypatch)
        assert verdict.reason == "Plain could not be run on made-up choices: ValueError: merged"
        assert verdict.off == {False}
        assert self.compare("plain", fails=("merged",), monkeypatch=monkeypatch)[0] == Verdict(False, rows=4096)

    def test_how_a_version_differs(self, monkeypatch):
        problems, asked = {}, []
        trial = trial_of(other_calls=returning(["other"]), versions={"plain": None}, refused={"merged": "refused"})
        monkeypatch.setattr(module, "_problem_with_more", returning("more"))

        def in_draws(trial, version, experts, given):
            asked.append(given)
            return problems.get("own" if given is self.X else given)

        monkeypatch.setattr(module, "_problem_in_draws", in_draws)
        problem = functools.partial(module._problem_with, trial, experts=[], inputs=self.X)
        assert problem("merged") == "refused"
        assert problem("unknown") == "it cannot be rewritten"
        assert asked == []
        assert problem("plain") == "more"
        assert asked == [self.X, "other"]
        problems["other"] = "off"
        assert problem("plain") == f"off under another mask: {SENT_ELSEWHERE}"
        problems["own"] = "own"
        assert problem("plain") == "own"

    def test_draws_until_each_expert_was_re_routed(self, monkeypatch):
        """Three at least; the others are chosen then, with even seeds."""
        maps, asked = [], []
        monkeypatch.setattr(module, "_problem_in_draw", lambda *given: asked.append(given[4:]))
        monkeypatch.setattr(module, "_expert_map", lambda trial: maps.pop(0))
        draws = functools.partial(module._problem_in_draws, trial_of(), "plain", [], self.X)
        maps += [dict.fromkeys(range(1, 6), 0), {0: 1, 6: 6}, {}, {6: 0}, {7: 0}]
        assert draws() is None
        assert asked == [(0, ()), (1, ()), (2, ()), (6, [6, 7]), (8, [7])]
        maps += [{n: (n + 1) % EXPERTS for n in range(EXPERTS)}] * 3
        asked.clear()
        assert draws() is None
        assert asked == [(0, ()), (1, ()), (2, ())]
        asked.clear()
        maps += [{}] * 30
        assert draws() is None
        assert [seed for seed, _ in asked] == [0, 1, 2, *range(6, 48, 2)]
        monkeypatch.setattr(module, "_problem_in_draw", lambda *given: "off" if given[4] == 6 else None)
        assert draws() == "off"

    @pytest.mark.parametrize(
        ("got", "wanted", "left", "told"),
        [
            (1.0, 1.0, ({}, {}), None),
            (1.00009, 1.0, ({}, {}), None),
            (1.0002, 1.0, ({}, {}), "is off by 0.0002 of its scale"),
            (None, 1.0, ({}, {}), "returns other things"),
            (1.0, 1.0, ({"": 1}, {"": 2}), "returns other things"),
            (1.0, 1.0, ({"log": 1, "last": 1}, {"log": 1, "last": 2}), "leaves other things in last, where"),
            (1.0, 1.0, ({"last": 1}, {}), "leaves other things in last, where"),
            (1.0, 1.0, ({}, {"last": 1}), "leaves other things in last, where"),
            (1.0, 1.0, ({"time": 1, "b": 1, "a": 1}, {"time": 2, "b": 2, "a": 2}), "leaves other things in a, where"),
            (1.0, 1.0, ({"time": 1}, {"time": 2}), None),
            (1.5, 1.0, ({"last": 1}, {"last": 2}), "is off by 0.5 of its scale"),
        ],
    )
    def test_what_a_draw_shows(self, got, wanted, left, told, monkeypatch):
        """The version's run against that of the traced one where experts have others' parameters."""
        monkeypatch.setattr(module, "_expert_map", returning({0: 1}))
        trial, ran = trial_of(restless={"time": True}), []
        [w] = parameters(trial, "experts.w")
        kept = w.tensors[0].clone()

        def run(inputs, version, seed, *, chosen):
            trial.kept = left[len(ran)]
            ran.append((version, seed, chosen, torch.equal(w.tensors[0], kept)))
            assert torch.equal(w.tensors[0][0], kept[0 if version == "plain" else 1])
            found = got if version == "plain" else wanted
            return [] if found is None else [torch.tensor([found], dtype=torch.float64)]

        trial.run = run
        problem = module._problem_in_draw(trial, "plain", [w], self.X, 4, [3])
        assert ran == [("plain", 4, [3], True), ("original", 4, [3], False)]
        assert (problem is None) is (told is None)
        assert told is None or f"run with the code that receives its ids, Plain {told}" in problem
        assert torch.equal(w.tensors[0], kept)

    @pytest.mark.parametrize(("tokens", "least"), [(1, 256), (5, 256), (256, 256), (257, 512), (5000, 8192)])
    @pytest.mark.parametrize(("parameters", "most"), [(1 << 10, 4096), (1 << 20, 2048), (1 << 28, 8)])
    def test_how_many_tokens(self, tokens, least, parameters, most):
        """As many as the call has; some thousands where a block is small."""
        ids = Written().input(torch.zeros(tokens, TOP_K, dtype=torch.int64))
        gate = types.SimpleNamespace(ids=ids, top_k=TOP_K)
        assert module.least_rows(gate) == least
        held = nn.Module()
        held.weight = nn.Parameter(torch.empty(parameters, device="meta"))
        trial = types.SimpleNamespace(gate=gate, block=types.SimpleNamespace(module=held))
        assert module.many_rows(trial) == max(least, most)

    @pytest.mark.parametrize(("sizes", "by_tokens"), [((5,), True), ((1, 5), False)])
    def test_many_tokens(self, sizes, by_tokens, monkeypatch):
        """Where the block takes them, and its graph serves them."""
        inside, ran = watched_compiling(monkeypatch), []
        trial = trial_of(ids=[0], run=lambda given: ran.append((given[0][0].shape, bool(inside))))
        trial.counting_dim = returning(0)
        asked = []
        in_draw = lambda _, version, *given: asked.append((version, given[2], bool(inside))) or "off"  # noqa: E731
        monkeypatch.setattr(module, "_problem_in_draw", in_draw)
        given = ((torch.randn(*sizes, HIDDEN),), {})
        more = functools.partial(module._problem_with_more, trial, "plain", [])
        assert more(given) == "off where there are 4096 tokens"
        assert ran == [((4096, *sizes[1:], HIDDEN), by_tokens)]
        assert asked == [("plain", 0, by_tokens)]
        monkeypatch.setattr(module, "_problem_in_draw", returning(None))
        assert more(given) is None
        monkeypatch.setattr(module, "_problem_in_draw", returning("off"))
        trial.graphs.ids = []
        assert more(given) is None
        trial.graphs.ids, trial.run = [0], raising(ValueError())
        assert more(given) is None
        ran.clear()
        assert more(((torch.arange(5),), {})) is None
        assert ran == []
