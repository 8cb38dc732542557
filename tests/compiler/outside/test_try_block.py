"""What a trial of one block concludes."""

import dataclasses
import types

import pytest
import torch
from torch import nn

from sere_compile.compiler.outside import try_block as module
from sere_compile.compiler.outside.compare_versions import Verdict
from sere_compile.compiler.outside.try_block import signature, try_block
from sere_compile.compiler.outside.where_tokens_go import SENT_ELSEWHERE
from sere_compile.passes import SkipReason, UseKind

from ...passes.graph.written import Written
from .blocks import (
    EXPERTS,
    TOP_K,
    BiasBeside,
    Chained,
    Experts,
    Keeping,
    OneOutput,
    Overwriting,
    Padding,
    Prompts,
    Scaled,
    ScalingValues,
    Split,
    TwoLayers,
    Unweighted,
    Values,
    rows,
)
from .trials import EagerTrial, gate_of, ids_that_leave, raising, returning, trial_of, verdicts


class Flat(Experts):
    """No output has a row per token."""

    def forward(self, x, ids, weights):
        return super().forward(x, ids, weights).sum(0)


class Failing(Experts):
    """What new ids make it do raises."""

    def forward(self, x, ids, weights):
        if any(len(set(row)) < len(row) for row in ids.tolist()):
            raise ValueError("named twice\nand more")
        return super().forward(x, ids, weights)


def concluded(trial):
    """The verdict of a trial."""
    return module._conclude(trial, trial.block.candidates(), kept=False)


def test_what_runs_write_is_told():
    """So that it is no setting."""
    [verdict] = verdicts(Keeping("a list"), rows())
    assert "log" in verdict.written


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested elsewhere."""

    @pytest.mark.parametrize(
        ("experts", "merged"),
        [
            (Experts(), True),
            (Overwriting(), True),
            (Chained(), False),
            (Experts(lambda weights: weights**2), False),
            (Experts(lambda weights: weights.softmax(-1)), False),
            (OneOutput(), True),
            (TwoLayers(), True),
            (BiasBeside(), True),
            (Failing(), True),
            (Split(), True),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_proven(self, experts, merged):
        verdict = concluded(EagerTrial(experts))
        assert (verdict.merged, verdict.reason, verdict.is_gate, verdict.whole) == (merged, "", True, True)

    def test_what_is_tried_first(self):
        """A rewrite that merges where the gate needs it, else plain ids: both are right of a plain sum."""
        assert concluded(EagerTrial(Experts(), needs_merge=True)).merged is True
        assert concluded(EagerTrial(Experts(), needs_merge=False)).merged is False

    @pytest.mark.parametrize(
        ("experts", "is_gate", "reason"),
        [
            (Unweighted(), True, "run with the code that receives its ids, Plain is off by"),
            (Values(), False, "values of a table"),
            (ScalingValues(), False, "which act on no hidden states"),
            (Prompts(), True, "its scores do not weight what is computed"),
            (Scaled(), True, "is off by"),
            (Flat(), False, "no parameter that comes once per score (8) acts on the tokens of one expert alone"),
            (Padding(0), False, "no parameter that comes once per score (8) acts on the tokens of one expert alone"),
            (Padding(EXPERTS - 1), True, "is off by"),
            (Padding(-1), True, "mark their ids with -1 before the graph ends"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_refused(self, experts, is_gate, reason):
        verdict = concluded(EagerTrial(experts))
        assert (verdict.merged, verdict.is_gate) == (None, is_gate)
        assert reason in verdict.reason

    def test_the_first_way_tried_is_the_one_told_of(self):
        assert "could not be run on made-up choices: ValueError: named twice" in (
            concluded(EagerTrial(type("Both", (Failing, Unweighted), {})(), needs_merge=False)).reason
        )
        trial = EagerTrial(Unweighted())
        trial.graphs.versions, trial.graphs.refused = {"original": None}, {"merged": "of this", "plain": "of that"}
        assert concluded(trial).reason == "of this"
        trial.graphs.refused = {}
        assert concluded(trial).reason == "it cannot be rewritten"

    def test_another_gate_than_the_models(self):
        trial = EagerTrial(Experts())
        trial.gate = types.SimpleNamespace(**{**vars(trial.gate), "scoring": "sigmoid"})
        verdict = concluded(trial)
        assert (verdict.merged, verdict.is_gate, verdict.whole) == (None, True, False)
        assert verdict.reason == "Plain compiled alone has another gate than it has in the model"

    def test_a_block_without_the_gate(self):
        trial = EagerTrial(Experts())
        trial.block.module.select = lambda logits: logits.softmax(-1).topk(TOP_K)
        assert concluded(trial) is None
        trial = EagerTrial(Experts())
        trial.block.module.select = None
        assert concluded(trial) is None


class TestWhatATrialConcludes:
    """From the answers to each of its questions, in order."""

    RIGHT = Verdict(True, ids_alone=True)

    @pytest.fixture
    def conclude(self, monkeypatch):
        """Gives a trial, the questions that were asked, and its verdict."""

        def conclude(**answers):
            asked = []
            own = {"find_experts": ["one"], "compare_versions": self.RIGHT, "find_restless": {"last": True}}
            own |= {"weighs_nothing": False, "sends_elsewhere": False, "computes_all": False}
            trial = trial_of(inputs=lambda: ((), {}))
            trial.graphs.found = [trial.gate]
            for name, answer in (own | answers).items():
                does = answer if callable(answer) else returning(answer)
                ask = lambda *given, name=name, does=does: asked.append(name) or does(*given)  # noqa: E731
                monkeypatch.setattr(trial if hasattr(trial, name) else module, name, ask)
            return trial, asked, module._conclude(trial, ["candidate"], kept=False)

        return conclude

    def test_all_that_is_asked(self, conclude):
        trial, asked, verdict = conclude()
        assert verdict is self.RIGHT
        assert (trial.restless, trial.is_compiled) == ({"last": True}, True)
        assert asked == [
            *("find_restless", "find_experts", "compare_versions", "weighs_nothing", "sends_elsewhere", "computes_all"),
        ]

    @pytest.mark.parametrize(
        ("answers", "reason", "is_gate"),
        [
            ({"find_experts": "no experts"}, "no experts", False),
            ({"weighs_nothing": True}, SkipReason.NOTHING_WEIGHED.value, True),
            ({"sends_elsewhere": True}, SENT_ELSEWHERE, True),
            ({"find_restless": raising(KeyError("a"))}, "could not be run on made-up choices: KeyError: 'a'", False),
            ({"find_experts": raising(ValueError("a"))}, "could not be run on made-up choices: ValueError: a", False),
            (
                {"compare_versions": raising(IndexError("a"))},
                "could not be run on made-up choices: IndexError: a",
                True,
            ),
            ({"computes_all": raising(TypeError("a"))}, "could not be run on made-up choices: TypeError: a", True),
        ],
    )
    def test_why_nothing_is_proven(self, answers, reason, is_gate, conclude):
        _, asked, verdict = conclude(**answers)
        assert (verdict.merged, verdict.is_gate, verdict.whole, verdict.saves_nothing) == (None, is_gate, True, "")
        assert verdict.reason.removeprefix("Plain ") == reason
        assert asked[-1] == next(iter(answers))

    def test_where_no_rewrite_is_right_nothing_more_is_asked(self, conclude):
        refused = Verdict(None, "off", off=frozenset({True}))
        _, asked, verdict = conclude(compare_versions=refused)
        assert (verdict is refused, asked[-1]) == (True, "compare_versions")

    def test_experts_that_all_compute(self, conclude):
        _, _, verdict = conclude(computes_all=True)
        told = f"{SkipReason.DENSE.value} (seen in a run of Plain)"
        assert verdict == dataclasses.replace(self.RIGHT, saves_nothing=told)

    def test_several_gates_of_one_router(self):
        trial = trial_of(inputs=lambda: ((), {}))
        trial.graphs.found = [trial.gate] * 2
        verdict = module._conclude(trial, [], kept=False)
        assert (verdict.merged, verdict.is_gate, verdict.whole) == (None, True, False)

    def test_programming_errors_are_not_hidden(self, conclude):
        with pytest.raises(ZeroDivisionError):
            conclude(compare_versions=raising(ZeroDivisionError()))


class TestWhichIdsAreNew:
    """Of a gate some of whose ids leave the graph, as they are or in what is made of them."""

    def test_what_tells_gates_of_a_block_apart(self):
        ids, inside, made, _, output = ids_that_leave()
        uses = (output, UseKind.LEAVES), (inside, UseKind.GROUPED)
        gate = gate_of(ids, *uses)
        assert signature(gate) == signature(gate_of(made, *reversed(uses), is_sorted=False))
        others = [{"form": "sort"}, {"num_experts": 9}, {"top_k": 2}, {"scoring": "sigmoid"}, {"weights": ids}]
        others = [gate_of(ids, *uses, **changes) for changes in others]
        others += [gate_of(ids, *uses[:1]), gate_of(ids, *uses, (made, UseKind.LOOK_UP)), gate_of(ids, *uses[1:])]
        assert len({signature(one) for one in [gate, *others]}) == 1 + len(others)


class TestWhichModulesAreTried:
    """Those around the router's weight, from the inside out, until one holds the gate as the model does."""

    @pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, NotImplementedError])
    def test_a_block_that_cannot_be_copied(self, error, monkeypatch):
        def refuse(*_):
            raise error("why\nand where")

        monkeypatch.setattr(module, "TrialBlock", refuse)
        ids = Written().input(torch.zeros(5, TOP_K, dtype=torch.int64))
        owner = types.SimpleNamespace(weight=None, root=None)
        verdict = try_block(gate_of(ids), nn.Linear(2, 3), owner, None, False)
        assert (verdict.merged, verdict.is_gate, verdict.whole, verdict.written) == (None, True, True, None)
        assert verdict.reason == f"Linear cannot be copied to try it: {error.__name__}: why"

    def test_what_a_block_is_tried_with(self, monkeypatch):
        """Its columns are those of the scores, some of which may be no experts'."""
        made, w = [], Written()
        scores = w.given(5, EXPERTS + 2)
        block = types.SimpleNamespace(candidates=lambda: made[-1][-1:] if len(made) < 3 else [])
        trial, answers, asked = types.SimpleNamespace(written={"log"}), [Verdict(True), None], []
        monkeypatch.setattr(module, "TrialBlock", lambda *given: made.append(given) or block)
        monkeypatch.setattr(module, "Trial", lambda *given: made.append(given) or trial)
        monkeypatch.setattr(module, "_conclude", lambda *given: asked.append(given) or answers[len(asked) - 1])
        owner, call = types.SimpleNamespace(weight="w", root="r"), ((), {})
        gate = gate_of(w.top_k(scores, TOP_K)[1])
        gate = dataclasses.replace(gate, selection=gate.ids.args[0])
        verdict = try_block(gate, "the block", owner, call, True)
        assert verdict == Verdict(True, written=frozenset({"log"}))
        assert made == [("the block", "w", "r", EXPERTS, EXPERTS + 2), (gate, block, call)]
        assert asked == [(trial, (EXPERTS + 2,), True)]
        made.clear()
        assert try_block(gate, "the block", owner, call, True) is None
        assert (len(made), len(asked)) == (2, 2)
        alone = dataclasses.replace(gate, selection=scores)
        assert try_block(alone, "the block", owner, call, True) is None
        assert made[2:] == [("the block", "w", "r", EXPERTS, EXPERTS)]
        assert len(asked) == 2
