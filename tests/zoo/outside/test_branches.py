"""Loops over experts that branch on data: what is ahead of the loop is a graph, and the loop runs on re-routed ids."""

import logging
import re

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import sere_compile
from sere_compile import GateNotFoundError, SereConfig, SimilarityProfile

from .branches import (
    AnyLoop,
    BusyLoop,
    EmptyLoop,
    FewLoop,
    FirstLoop,
    FullSequences,
    IdleLoop,
    ItemLoop,
    ListLoop,
    LossLoop,
    MeanLoop,
    NamedLoop,
    RouterLoop,
    SequenceLoop,
    SmallLoop,
    TokenLoop,
    TruthLoop,
)
from .loops import HIDDEN, prepared

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

REROUTED = (AnyLoop, NamedLoop, EmptyLoop, ItemLoop, ListLoop, TokenLoop, SequenceLoop, RouterLoop, TruthLoop)
REFUSED = (IdleLoop, MeanLoop, FewLoop, BusyLoop, LossLoop, FirstLoop, SmallLoop, FullSequences)
SLOW = (
    AnyLoop,
    EmptyLoop,
    MeanLoop,
    LossLoop,
    RouterLoop,
    TruthLoop,
    IdleLoop,
    BusyLoop,
    ItemLoop,
    ListLoop,
    TokenLoop,
    NamedLoop,
    MeanLoop,
    FewLoop,
    FirstLoop,
)


def cases(kinds):
    return [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in kinds]


@pytest.mark.parametrize("kind", cases(REROUTED))
def test_right_with_fewer_experts(kind):
    """As the sum over slots says, for other sizes too; bit for bit the original where no expert may go to another."""
    model, matrix, x = prepared(kind)
    expected = model.expected(x, matrix, 1)
    assert not torch.allclose(expected, model(x), atol=1e-2), "the case re-routes nothing"
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for rows in (x, torch.randn(3, 5, HIDDEN)):
        torch.testing.assert_close(compiled(rows), model.expected(rows, matrix, 1), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    apart = sere_compile.compile(model, select_top_k=1, threshold=1.0, inner="eager")
    before = sere_compile.capture.runs.rewritten
    assert torch.equal(apart(x), model(x))
    assert sere_compile.capture.runs.rewritten > before


@pytest.mark.parametrize("kind", cases(REFUSED))
def test_a_branch_that_does_more_than_skip_is_refused(kind, caplog):
    """Nothing is changed, and whoever asks is told what trying it has shown; not that no graph holds the gate."""
    model, _, x = prepared(kind)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("sere_compile")]
    told = f"gate.weight is not re-routed: .*{kind.__name__} is off by"
    assert_told(record.message, told)
    report = sere_compile.explain(model, x, config=SereConfig(select_top_k=1, capture="auto"))
    [row] = report
    assert not report.rewritten
    assert_told(f"{row.name} is not re-routed: {row.reason}", told)


def assert_told(text, pattern):
    assert re.search(pattern, text), text


def test_strict_raises_with_what_trying_it_has_shown():
    model, _, x = prepared(BusyLoop)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager", strict=True)
    for _ in range(2):
        with pytest.raises(
            BackendCompilerFailed, match=r"gate\.weight cannot be re-routed.*BusyLoop is off by"
        ) as told:
            compiled(x)
        assert isinstance(told.value.inner_exception, GateNotFoundError)


class Layers(nn.Module):
    """A loop over layers, in whose code the graph breaks; what is ahead of it is no gate."""

    def __init__(self, kind):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        with torch.no_grad():
            for parameter in self.layers[1].parameters():
                parameter.copy_(parameter.flip(-1))

    def forward(self, x):
        x = self.norm(x)
        for layer in self.layers:
            x = x + layer(x)
        return x

    def expected(self, x, matrix):
        x = self.norm(x)
        for layer in self.layers:
            x = x + layer.expected(x, matrix, 1)
        return x


@pytest.mark.slow
def test_layers_in_a_loop():
    """Each layer has a graph of its own, and one proof."""
    _, matrix, x = prepared(AnyLoop)
    model = Layers(AnyLoop).eval().requires_grad_(False)
    sere_compile.attach(model, SimilarityProfile({f"layers.{n}.gate.weight": matrix for n in range(2)}))
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager", strict=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model.expected(x, matrix), rtol=1e-5, atol=1e-5)
    report = sere_compile.explain(model, x, config=SereConfig(select_top_k=1, capture="auto"))
    assert len(report.rewritten) == 2


def test_without_capture_the_frame_is_skipped(caplog):
    """Plain torch.compile is as it was: undo the option and nothing is re-routed."""
    model, _, x = prepared(AnyLoop)
    assert torch.equal(sere_compile.compile(model, capture="default", select_top_k=1, inner="eager")(x), model(x))
    assert "if mask.any():" in caplog.text


def test_calibration_asks_for_another_loop():
    """Modules of a list may not be all that an expert is: an activation may stand in the loop, and nothing shows it."""
    model, _, x = prepared(AnyLoop)
    with pytest.raises(
        sere_compile.CalibrationError, match="cannot be run apart from its graph: its dispatch is outside"
    ):
        sere_compile.calibrate(model, [x, x + 1])
