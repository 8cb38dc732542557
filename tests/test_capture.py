"""`sere_compile.compile`: dynamic-shape capture where it brings a gate into a graph, the default elsewhere."""

import logging

import pytest
import torch

import sere_compile
from sere_compile import ConfigError, SereConfig

from .zoo.outside.loops import CountLoop, MaskLoop, SortedLoop, prepared

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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
    assert len(caplog.records) == 1
    assert "it raises GuardOnDataDependentSymNode" in caplog.text


def test_model_without_a_gate_under_capture_goes_back(caplog):
    """Capture that loses the gate is no better than none."""
    model, matrix, x = prepared(SortedLoop)
    compiled = sere_compile.compile(model, select_top_k=1, inner="eager")
    with caplog.at_level(logging.INFO, logger="sere_compile.capture"):
        for _ in range(2):
            close(compiled(x), model.expected(x, matrix, 1))
    assert "it puts no gate into a graph" in caplog.text


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
