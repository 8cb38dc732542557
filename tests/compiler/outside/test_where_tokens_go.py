"""Tokens that the code outside sends to other experts than they chose, or to none."""

import functools

import pytest
import torch
from torch import nn

from sere_compile.compiler.outside import where_tokens_go as module
from sere_compile.compiler.outside.where_tokens_go import sends_elsewhere

from ...thinned import thinned
from .blocks import EXPERTS, HIDDEN, TOP_K, BiasBeside, Experts, MaskedLater, Padding, rows
from .trials import EagerTrial, parameters, returning, trial_of, verdicts


class MarksOutside(nn.Module):
    """Rows of padding get a number for their ids behind the end of the graph; None: the mask scales what comes out."""

    def __init__(self, marked):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.marked = marked

    def forward(self, x, mask):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        torch._dynamo.graph_break()
        if self.marked is None:
            return self.experts(x, ids, weights) * torch.where(mask, 1.0, 0.5)[:, None]
        y = torch.zeros_like(x)
        ids = ids.masked_fill(~mask[:, None], self.marked)
        for expert in range(EXPERTS):
            token, slot = torch.where(ids == expert)
            y.index_add_(0, token, self.experts.expert(x[token], expert) * weights[token, slot, None])
        return y


class Marked(Padding):
    """What a mask marks gets no expert, and had none before."""

    def __init__(self):
        super().__init__(-1)

    def forward(self, x, ids, weights, mask=None):
        return Experts.forward(self, x, ids, weights)


@pytest.mark.parametrize(("marked", "padded"), thinned([(-1, 2), (0, 0), (EXPERTS, 0)], (0,)))
def test_padding_that_is_marked_outside_is_refused(marked, padded):
    """The graph would count it among the tokens; also where the first call has none."""
    mask = torch.arange(5) < 5 - padded
    [verdict] = verdicts(MarksOutside(marked), rows()[0], mask)
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


@pytest.mark.slow
def test_a_mask_that_drops_no_token_is_no_padding():
    assert [v.merged for v in verdicts(MarksOutside(None), rows()[0], torch.arange(5) < 3)] == [True]


@pytest.mark.parametrize(
    ("told", "given"),
    thinned(
        [
            (lambda given: given[:, None].bool(), torch.ones(5, dtype=torch.int64)),
            (lambda given: given[:, None] > 0.5, torch.ones(5)),
            (lambda given: given[:, None] == 0, torch.zeros(5)),
            (lambda given: given[:, None] != 0, torch.arange(5) + 3),
            (lambda given: torch.arange(5)[:, None] < given, torch.tensor(5)),
            (lambda given: given, torch.tensor(True)),
            (lambda given: torch.arange(5)[:, None] < given, 5),
            (lambda given: torch.tensor(given), True),
        ],
        (0, 5, 6),
    ),
)
def test_what_marks_nothing_yet_may_mark_later(told, given):
    """Tokens that are sent to an expert in the middle, by masks of any form."""
    [verdict] = verdicts(MaskedLater(told), rows()[0], given)
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


def test_padding_that_takes_the_choice_of_another_token():
    """What it chose itself makes no primaries, and an exchange of all experts shows in every token."""
    block = MaskedLater(lambda given: given[:, None], lambda ids: ids[:1])
    [verdict] = verdicts(block, rows()[0], torch.ones(5, dtype=torch.bool))
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested elsewhere."""

    def test_masks_of_tokens(self):
        """Padding that a mask says there is none of is asked for."""
        trial = EagerTrial(Padding(0))
        x, full = torch.randn(6, HIDDEN), torch.ones(6, dtype=torch.bool)
        [one] = [c for c in trial.block.candidates() if c.name == "experts.w" and c.dim == 0]
        for target in (0, EXPERTS - 1, -1):
            trial.block.module.experts.target = target
            assert sends_elsewhere(trial, [one], ((x, full), {}))
        trial.block.module.experts = EagerTrial(Marked()).block.module.experts
        [one] = [c for c in trial.block.candidates() if c.name == "experts.w" and c.dim == 0]
        assert sends_elsewhere(trial, [one], ((x, full), {})) is False

    @pytest.mark.parametrize(("mark", "misses"), [(-1, False), (EXPERTS, False), (None, True)])
    def test_tokens_without_a_choice_are_not_missed(self, mark, misses):
        """Their ids are marked before the graph ends; those that are dropped behind it had one."""
        trial = EagerTrial(Padding(-1))
        [one] = [c for c in trial.block.candidates() if c.name == "experts.w" and c.dim == 0]
        real, own = (torch.arange(6) < 3).view(-1, 1), trial.choose
        if mark is not None:

            def choose(picked):
                weights, ids = own(picked)
                return weights, torch.where(real, ids, mark)

            trial.choose = choose
        assert module._misses_tokens(trial, [one], ((torch.randn(6, HIDDEN), real.flatten()), {})) is misses

    def test_every_expert_may_be_chosen(self):
        """With as many choices as experts there is none that nobody chose."""
        trial = EagerTrial(Experts(), top_k=EXPERTS)
        [one] = [c for c in trial.block.candidates() if c.name == "experts.w" and c.dim == 0]
        assert module._adds_tokens(trial, [one], trial.inputs()) is False


class TestWhoIsServed:
    """Tokens that the code outside sends to other experts than they chose, or to none."""

    X = ((torch.randn(4, HIDDEN),), {})

    @pytest.mark.parametrize("where", ["_adds_tokens", "_misses_tokens"])
    def test_every_call_is_asked(self, where, monkeypatch):
        asked, own = [], ((torch.randn(4, HIDDEN), torch.ones(4, dtype=torch.bool)), {})
        trial = trial_of(other_calls=returning(["other"]), run=lambda inputs: None, ids=[torch.zeros(4, TOP_K)])
        for question in ("_adds_tokens", "_misses_tokens"):
            monkeypatch.setattr(module, question, lambda trial, experts, given: asked.append(given) or False)
        assert sends_elsewhere(trial, [], own) is False
        assert [asked[place] is own for place in (0, 1)] == [True, True]
        assert [given[0][1].tolist() for given in asked[2:4]] == [[True, True, False, False]] * 2
        assert asked[4:] == ["other"] * 2
        asked.clear()
        assert sends_elsewhere(trial, [], self.X) is False
        assert asked == [self.X, self.X, "other", "other"]
        monkeypatch.setattr(module, where, lambda trial, experts, given: given == "other")
        assert sends_elsewhere(trial, [], self.X) is True

    @pytest.mark.parametrize("outer", [0, EXPERTS - 1, None])
    def test_experts_that_nobody_chose(self, outer):
        """The first and the last are disturbed in all of their parameters."""
        trial = EagerTrial(BiasBeside())
        experts = parameters(trial, "experts.w", "experts.bias")
        kept = [one.tensors[0].clone() for one in experts]
        ran = []

        def run(inputs, *, seed, absent):
            now = [one.tensors[0] for one in experts]
            at = [{n for n in range(EXPERTS) if not torch.equal(a[n], b[n])} for a, b in zip(now, kept, strict=True)]
            ran.append((seed, absent, *at))
            return [torch.ones(2), torch.full((2,), float(at[0] == {outer}))]

        trial.run = run
        assert module._adds_tokens(trial, experts, self.X) is (outer is not None)
        both = [(1, n, *at) for n in (0, EXPERTS - 1) for at in ((set(), set()), ({n}, {n}))]
        assert ran == both[: 2 if outer == 0 else 4]
        assert all(torch.equal(one.tensors[0], before) for one, before in zip(experts, kept, strict=True))

    @pytest.mark.parametrize(
        ("changed", "ids", "misses"),
        [
            ([[0, 1, 2, 3]] * 3, None, False),
            ([[0, 1], [2], [3]], None, False),
            ([[0, 1], [2], [2]], None, True),
            ([[], [], []], None, False),
            ([[0, 1], [2], [2]], -1, False),
            ([[0, 1], [2], [2]], EXPERTS, False),
            ([[0, 1], [2], [2]], EXPERTS - 1, True),
            ([[0, 1], [2], [2]], 0, True),
        ],
    )
    def test_tokens_that_are_the_same_in_each_draw(self, changed, ids, misses, monkeypatch):
        """One that chose nobody is not missed; where no expert does anything, a flag switches them off."""
        monkeypatch.setattr(module, "_takes_others", returning(False))
        trial, seeds = trial_of(), []
        chosen = torch.ones(4, TOP_K, dtype=torch.int64)
        if ids is not None:
            chosen[3] = ids
        trial.graphs.ids = [chosen.view(1, 4, TOP_K)]

        def exchange(experts, inputs, *, seed):
            seeds.append(seed)
            after = torch.zeros(4, HIDDEN)
            after[changed[seed]] = 1
            return [torch.zeros(4, HIDDEN)], [after]

        trial.with_exchange = exchange
        assert module._misses_tokens(trial, [], self.X) is misses
        assert seeds == [0, 1, 2]

    def test_what_has_no_row_for_each_token_tells_nothing(self, monkeypatch):
        monkeypatch.setattr(module, "_takes_others", returning(True))
        trial = trial_of(with_exchange=returning(([torch.ones(1)], [torch.ones(1)])))
        trial.graphs.ids = [torch.ones(4, TOP_K, dtype=torch.int64)]
        assert module._misses_tokens(trial, [], self.X) is False

    def test_tokens_that_take_others(self, monkeypatch):
        trial = trial_of(ids=[torch.ones(4, TOP_K, dtype=torch.int64)])
        before, asked = [torch.zeros(4, HIDDEN)], []
        trial.with_exchange = returning((before, [torch.ones(4, HIDDEN)]))
        monkeypatch.setattr(module, "_takes_others", lambda _, *given: asked.append(given) or len(asked) == 2)
        assert module._misses_tokens(trial, ["e"], self.X) is True
        assert [given[:4] for given in asked] == [(["e"], self.X, seed, before) for seed in (0, 1)]
        assert asked[0][4].shape == (4, TOP_K)

    def test_who_takes_others(self):
        """Half of the experts are disturbed: no token changes that names none of them."""
        trial = EagerTrial(BiasBeside())
        experts = parameters(trial, "experts.w", "experts.bias")
        kept = [one.tensors[0].clone() for one in experts]
        before, seen, changed = [torch.zeros(EXPERTS, HIDDEN)], [], []
        ids = torch.arange(EXPERTS)[:, None].expand(EXPERTS, TOP_K)

        def run(inputs, *, seed):
            now = [one.tensors[0] for one in experts]
            at = [[n for n in range(EXPERTS) if not torch.equal(a[n], b[n])] for a, b in zip(now, kept, strict=True)]
            assert at[0] == at[1]
            seen.append((seed, at[0]))
            after = torch.zeros(EXPERTS, HIDDEN)
            after[[*at[0], *changed]] = 1
            return [after]

        trial.run = run
        takes = functools.partial(module._takes_others, trial, experts, self.X)
        assert takes(0, before, ids) is False
        assert takes(1, before, ids) is False
        assert [(seed, len(some)) for seed, some in seen] == [(0, EXPERTS // 2), (1, EXPERTS // 2)]
        assert seen[0][1] != seen[1][1]
        changed += [next(n for n in range(EXPERTS) if n not in seen[0][1])]
        assert takes(0, before, ids) is True
        trial.run = returning([torch.zeros(3)])
        assert takes(0, [torch.zeros(3)], ids) is False
