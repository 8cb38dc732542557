"""Models without experts are left alone, though they score as many labels as they have layers, heads or channels.

Some classes in every run of the lane, others drawn anew each time; `python -m tests.zoo.plain.run` takes all.
"""

import os
import random

import pytest
import torch

from ...thinned import thinned
from .conftest import FRESH
from .discover import TASKS, model_classes
from .run import TORCH_FAILS, outcome
from .topped import Verdict, build, judge

# Of each kind: what two cores run in four minutes.
FIXED, DRAWN = 60, 60
# Run with every change.
FEW = ("BertForSequenceClassification", "ResNetForImageClassification")


def fixed():
    """Classes of every task in turn, spread over its names."""
    by_task = {task: [made.name for made in model_classes().values() if made.task == task] for task in TASKS}
    for names in by_task.values():
        random.Random(0).shuffle(names)
    return [names[turn] for turn in range(len(model_classes())) for names in by_task.values() if turn < len(names)][
        :FIXED
    ]


def drawn():
    """Classes that are no fixed ones, by this run's seed."""
    others = sorted(set(model_classes()) - set(fixed()))
    return random.Random(int(os.environ.get(FRESH, "0"))).sample(others, DRAWN)


def check(name):
    word, detail = outcome(model_classes()[name])
    if word in ("not small", TORCH_FAILS):
        pytest.skip(detail)
    assert word == "untouched", detail


@pytest.mark.parametrize("name", thinned(FEW, (0,)))
def test_few(name):
    check(name)


@pytest.mark.plain
@pytest.mark.parametrize("name", fixed())
def test_fixed(name):
    """The same classes each time."""
    check(name)


@pytest.mark.plain
@pytest.mark.parametrize("name", drawn())
def test_drawn(name):
    """Classes that the last run may not have had."""
    check(name)


def test_there_are_many_of_every_task():
    classes = model_classes().values()
    assert len(classes) > 400
    assert {made.task for made in classes} == set(TASKS)


def test_what_is_touched_shows(monkeypatch):
    """A backend that takes the classifier for a gate, one that names a gate, and one that changes a result."""
    case = build(model_classes()["BertForSequenceClassification"])
    assert judge(case).untouched

    def rewriting(config):
        def compiled(module, inputs):
            def run(*arguments):
                return [tensor.flip(-1) for tensor in module.forward(*arguments)]

            return run

        return compiled

    torch._dynamo.reset()
    monkeypatch.setattr("tests.zoo.plain.topped.SereBackend", rewriting)
    verdict = judge(case)
    assert verdict.differs
    assert not verdict.untouched
    assert not Verdict(told=["a gate"]).untouched
    assert not Verdict(rewritten=["reroute"]).untouched
