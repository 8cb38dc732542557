"""Parameters are the experts' where exchanging them shows it."""

import functools

import pytest
import torch
from torch import nn

from sere_compile.compiler.outside import which_experts as module
from sere_compile.compiler.outside.arguments import turned
from sere_compile.compiler.outside.which_experts import find_experts, weighs_nothing

from .blocks import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    BiasBeside,
    Block,
    Experts,
    OneOutput,
    Prompts,
    Scaled,
    ScaledModules,
    ScalingValues,
    TwoLayers,
    Values,
    rows,
)
from .trials import EagerTrial, parameters, returning, trial_of, verdicts


class ScaledResidual(Scaled):
    """The scaled weights say as well how much of the hidden states stays, whatever the experts give."""

    def forward(self, x, ids, weights):
        weights = weights * self.scale[ids].view(weights.shape)
        return Experts.forward(self, x, ids, weights) + (1 - weights[:, :1]) * x


class Biased(Experts):
    """A number that each expert adds to all that it gives."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS))

    def expert(self, x, number):
        return super().expert(x, number) + self.bias[number]


class ScaledLoss(Scaled):
    """Its loss reads the scaled weights, whatever the experts give."""

    def forward(self, x, ids, weights):
        weights = weights * self.scale[ids].view(weights.shape)
        ids.sum().item()
        return Experts.forward(self, x, ids, weights), weights.std()


class WithLoss(Block):
    """Its experts return a loss beside what they give."""

    def forward(self, x):
        (out, loss), _ = self.routed(x)
        return out.view(x.shape), loss


class Classifier(nn.Module):
    """As many labels as layers: its three best labels are no experts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.head = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).softmax(-1).topk(TOP_K)


class Counted(Classifier):
    """Layers with counters, and places that index a table: whole numbers with a part per label."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(HIDDEN) for _ in range(EXPERTS))
        self.places = nn.Buffer(torch.arange(EXPERTS) % 2)
        self.table = nn.Parameter(torch.randn(2, HIDDEN))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.table[self.places].sum(0)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        return self.head(x).softmax(-1).topk(TOP_K)


@pytest.mark.parametrize("values", [Values, ScalingValues])
def test_a_table_of_values_is_no_gate(values):
    found = verdicts(Block(values()), rows())
    assert all(v.merged is None and not v.is_gate and "values of a table" in v.reason for v in found)


@pytest.mark.parametrize("sizes", [(EXPERTS,), pytest.param((EXPERTS, 1), marks=pytest.mark.slow)])
def test_a_scale_per_expert_outside_keeps_what_the_router_chose(sizes):
    """New ids would fetch another scale: exchanged experts keep the old one, and nothing is proven."""
    assert [v.merged for v in verdicts(Block(Scaled(sizes)), rows())] == [None]


def test_a_scale_whose_weights_are_read_beside_the_experts():
    """It shows without any expert, and scales what they give: no bias of theirs."""
    assert [v.merged for v in verdicts(Block(ScaledResidual(EXPERTS)), rows())] == [None]


def test_a_number_that_experts_add_goes_with_them():
    assert [v.merged for v in verdicts(Block(Biased()), rows())] == [True]


@pytest.mark.slow
def test_a_scale_that_a_loss_of_the_weights_reads_is_no_experts_either():
    block = WithLoss(ScaledLoss())
    assert [v.merged for v in verdicts(block, rows())] == [None]


@pytest.mark.slow
def test_the_bias_of_experts_with_one_output_is_their_own():
    block = Block(OneOutput())
    assert [v.merged for v in verdicts(block, rows())] == [True]


def test_prompts_that_are_attended_to_are_no_experts():
    [verdict] = verdicts(Block(Prompts()), rows())
    assert verdict.merged is None
    assert "its scores do not weight what is computed" in verdict.reason


def test_a_classifier_with_as_many_labels_as_layers_is_no_gate():
    [verdict] = verdicts(Classifier(), torch.arange(6))
    assert verdict.merged is None
    assert not verdict.is_gate


def test_whole_numbers_that_have_to_be_what_they_are_are_no_experts():
    """Disturbing them raises: that says nothing of the gate."""
    [verdict] = verdicts(Counted().eval(), torch.arange(6))
    assert not verdict.is_gate
    assert verdict.reason == "no parameter that comes once per score (8) acts on the tokens of one expert alone"


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested elsewhere."""

    @pytest.mark.parametrize(
        ("experts", "names"),
        [
            (Experts(), ["experts.w"]),
            (BiasBeside(), ["experts.bias", "experts.w"]),
            (OneOutput(), ["experts.bias", "experts.w"]),
            (Scaled(), ["experts.w"]),
            (Scaled((EXPERTS, 1)), ["experts.w"]),
            (TwoLayers(), ["experts.mlps.*.bias", "experts.mlps.*.weight"]),
            (
                ScaledModules(),
                [
                    *(f"experts.mlps.*.linear.{name}" for name in ("bias", "weight")),
                    *(f"experts.mlps.*.norm.{name}" for name in ("bias", "running_mean", "running_var", "weight")),
                    "experts.mlps.*.scale",
                ],
            ),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_whose_parameters(self, experts, names):
        trial = EagerTrial(experts)
        found = find_experts(trial, trial.block.candidates(), trial.inputs())
        assert sorted(one.name for one in found) == names

    def test_a_tensor_is_taken_once(self):
        """In the first of the ways to cut it that fits; those behind it are looked at all the same."""
        trial = EagerTrial(BiasBeside())
        wanted = ("experts.w", "experts.bias")
        w, bias = (next(c for c in trial.block.candidates() if c.name == name and c.dim == 0) for name in wanted)
        assert find_experts(trial, [w, w, bias], trial.inputs()) == [w, bias]

    def test_one_expert_a_token(self):
        """There is no weight to tell by: one score for one choice."""
        trial = EagerTrial(Experts(), top_k=1)
        assert not weighs_nothing(trial, [], ((), {}))


class TestWhoseParametersTheyAre:
    """What is concluded from the outputs of runs with others in their place."""

    X = ((torch.randn(5, HIDDEN),), {})

    @pytest.fixture
    def answer(self, monkeypatch):
        """Puts another answer in place of a question's."""
        return functools.partial(monkeypatch.setattr, module)

    def test_a_number_that_may_scale_weights(self, answer):
        """Not what is no number, nor what is all that there is; else its effect has to show without the others."""
        trial = EagerTrial(OneOutput())
        [w, bias] = parameters(trial, "experts.w", "experts.bias")
        answer("_changes_with", returning([True]))
        answer("_adds_alone", returning(False))
        scales = functools.partial(module._scales_weights, trial)
        assert scales(bias, [w, bias], self.X) is True
        assert scales(bias, [bias], self.X) is False
        assert scales(w, [w, bias], self.X) is False
        answer("_adds_alone", returning(True))
        assert scales(bias, [w, bias], self.X) is False
        for changes in ([False, True], [True, False]):  # of all else, and of the number alone
            found = iter([[changes[0], True], [changes[1], False]])
            answer("_changes_with", lambda *_, found=found: next(found))
            assert scales(bias, [w, bias], self.X) is True

    def test_what_is_exchanged_to_tell_a_scale(self, answer):
        """First the others; then the number, where the others are zero."""
        trial = EagerTrial(OneOutput())
        [w, bias] = parameters(trial, "experts.w", "experts.bias")
        asked = []

        def changes(trial, exchanged, inputs):
            asked.append((exchanged, bool(w.tensors[0].any()), bool(bias.tensors[0].any())))
            return [True]

        answer("_changes_with", changes)
        answer("_adds_alone", lambda *given: asked.append(given))
        assert module._scales_weights(trial, bias, [w, bias], self.X) is True
        assert asked == [([w], True, True), ([bias], False, True), (trial, bias, [w], self.X)]

    def test_what_adds_the_same_whatever_a_number_is(self):
        trial = EagerTrial(OneOutput())
        [w, bias] = parameters(trial, "experts.w", "experts.bias")
        words, runs = torch.tensor([1]), {}
        kept = bias.tensors[0].clone()

        def exchange(experts, inputs):
            return runs[torch.equal(bias.tensors[0], kept)]

        trial.with_exchange = exchange
        one, two = torch.tensor([1.0]), torch.tensor([2.0])
        runs[True] = [one, words], [two, words + 1]
        for before, after, alone in ((two, two + 1, True), (two, two + 1.5, False), (two, two, False)):
            runs[False] = [before, words], [after, words]
            assert module._adds_alone(trial, bias, [w], self.X) is alone
        assert torch.equal(bias.tensors[0], kept)

    def test_which_outputs_change(self):
        trial = trial_of(with_exchange=returning(([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)])))
        assert module._changes_with(trial, [], self.X) == [False, True]

    @pytest.mark.parametrize(("second", "same"), [((3.0, 5.0), True), ((3.0, 6.0), False), ((0.0, -2.0), False)])
    def test_the_same_effect(self, second, same):
        """Whole numbers do not count."""
        words = torch.arange(2)
        runs = {"own": (1.0, 3.0), "others": second}
        asked = []

        def exchange(experts, inputs, *, scores):
            asked.append((experts, inputs, scores))
            before, after = runs[scores]
            return [torch.tensor([before]), words], [torch.tensor([after]), words + int(after)]

        trial = trial_of(with_exchange=exchange)
        assert module._is_same_effect(trial, ["e"], ("a", "own"), ("b", "others")) is same
        assert asked == [(["e"], "a", "own"), (["e"], "b", "others")]

    def test_what_is_asked_of_an_effect(self, answer):
        """Other scores, and other hidden states at equal ones."""
        trial, asked = trial_of(), []
        for same in (True, False):
            answer("_is_same_effect", lambda _, *given, same=same: asked.append(given) or same)
            assert weighs_nothing(trial, ["e"], self.X) is same
            assert module._acts_on_hidden(trial, ["e"], self.X) is not same
        assert asked[0] == (["e"], (self.X, "own"), (self.X, "others"))
        experts, (inputs, scores), (others, scores_of_others) = asked[1]
        assert (experts, inputs is self.X, scores, scores_of_others) == (["e"], True, "equal", "equal")
        assert torch.equal(others[0][0], turned(self.X[0][0]))

    @pytest.mark.parametrize(
        ("changed", "weights", "belongs"),
        [
            ([0, 1], 0.0, True),
            ([1], 0.0, True),
            ([], 0.0, False),
            ([0, 1, 3], 0.0, False),
            ([0, 1], 1.0, False),
            (None, 0.0, False),
            (RuntimeError("no such place"), 0.0, False),
        ],
    )
    def test_only_tokens_that_name_an_expert_change(self, changed, weights, belongs):
        """At the same weights; expert 2 is named by tokens 0 and 1, expert 4 by 0 and 3."""
        trial = trial_of()
        [one] = parameters(trial, "experts.w")
        kept, disturbed = one.tensors[0].clone(), []
        ids = torch.tensor([[-1, 2, 4], [5, 2, 6], [EXPERTS, 1, 0], [4, 3, 1]])
        base = torch.zeros(4, HIDDEN)

        def run(inputs):
            [expert] = [n for n in range(EXPERTS) if not torch.equal(one.tensors[0][n], kept[n])]
            disturbed.append(expert)
            trial.graphs.weights = [torch.ones(4, TOP_K) + weights]
            if isinstance(changed, Exception):
                raise changed
            if changed is None:
                return [torch.zeros(3)]
            result = base.clone()
            result[{2: changed, 4: [0, 3]}[expert]] = 1
            return [result]

        trial.run = run
        given = [torch.zeros(3)] if changed is None else [base]
        assert module._belongs_to_experts(trial, one, self.X, given, ids, [torch.ones(4, TOP_K)]) is belongs
        assert disturbed == ([2, 4] if belongs else [2])
        assert torch.equal(one.tensors[0], kept)

    @pytest.mark.parametrize("of_first", [True, False])
    def test_both_experts_are_asked(self, of_first):
        """What is right for one may be chance."""
        trial, runs = trial_of(), []
        [one] = parameters(trial, "experts.w")
        ids = torch.tensor([[2, 3, 4], [5, 6, 7]])

        def run(inputs):
            runs.append(1)
            result = torch.zeros(2, HIDDEN)
            result[0 if (len(runs) == 1) is of_first else 1] = 1
            return [result]

        trial.run = run
        assert module._belongs_to_experts(trial, one, self.X, [torch.zeros(2, HIDDEN)], ids, []) is False
        assert len(runs) == (2 if of_first else 1)

    def test_why_there_are_none(self, answer):
        trial = EagerTrial(BiasBeside())
        bias, w = parameters(trial, "experts.bias", "experts.w")
        answer("_scales_weights", returning(False))
        answer("_acts_on_hidden", returning(True))
        belonging = {"experts.bias": True, "experts.w": True}
        answer("_belongs_to_experts", lambda trial, one, *_: belonging[one.name])
        find = functools.partial(find_experts, trial, [bias, w], trial.inputs())
        assert find() == [bias, w]
        belonging["experts.w"] = False
        assert find().startswith("what its indices fetch are vectors")
        belonging.update({"experts.w": True, "experts.bias": False})
        assert find() == [w]
        answer("_acts_on_hidden", returning(False))
        assert find().startswith("what its indices fetch is added up whatever the hidden states are")
        answer("_scales_weights", returning(True))
        assert find() == "no parameter that comes once per score (8) acts on the tokens of one expert alone"


class TestCallsInGraphs:
    """What stands in a block's graph while it is tried."""

    def test_vectors(self):
        for sizes, vector in (((3,), True), ((1, 3), True), ((), True), ((1, 1), True), ((2, 2), False)):
            assert module._is_vector(torch.zeros(sizes)) is vector
