"""A program of `rewrite` is not re-routed a second time by a lowering that is told nothing, S = K included."""

from __future__ import annotations

import logging

import pytest
import torch

from sere_compile import SereConfig, rewrite
from sere_compile.errors import LoweringError
from sere_compile.lowering import tensorrt
from sere_compile.lowering.export import export_rewritten, is_rewritten
from sere_compile.lowering.standard_operators import rerouted_gates

from .lowering.models import TOP_K, SmallMoE, hidden_states, small_profile

FREE = ({0: torch.export.Dim("tokens", min=1, max=64)},)
ALL, ONE = SereConfig(select_top_k=TOP_K), SereConfig(select_top_k=1, min_active=0)


def traced(module=None):
    return torch.export.export(module or SmallMoE().eval(), (hidden_states(5),), dynamic_shapes=FREE)


def rewritten(config):
    return rewrite(traced(), profile=small_profile(), config=config)


def saved(program, folder):
    torch.export.save(program, folder / "m.pt2")
    return torch.export.load(folder / "m.pt2")


@pytest.mark.parametrize("form", ["as it is", "decomposed", "loaded"])
@pytest.mark.parametrize("config", [ALL, ONE], ids=["S = K", "S = 1"])
def test_stays_as_it_is(config, form, tmp_path, caplog):
    """Also decomposed, where the operators of ours are gone, and from a file."""
    program = rewritten(config)
    if form == "decomposed":
        program = tensorrt.convertible(program)
    elif form == "loaded":
        program = saved(program, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert export_rewritten(program) is program
    assert ("from sere_compile.rewrite and stays as it is" in caplog.text) == (not rerouted_gates(program))


def test_in_onnx(tmp_path):
    """S = K by hand: the file computes the model."""
    ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from sere_compile.lowering import onnx

    done = onnx.export(rewritten(ALL), None, tmp_path / "m.onnx", input_names=["hidden"])
    assert done.gates == 0
    hidden = hidden_states(9)
    [got] = ort.InferenceSession(str(done.path)).run(None, {"hidden": hidden.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), SmallMoE().eval()(hidden), rtol=0, atol=1e-5)


def test_a_config_still_acts_where_nothing_was_rerouted():
    program = rewritten(ALL)
    again = export_rewritten(program, profile=small_profile(), config=ONE)
    assert rerouted_gates(again) == 1
    for changed in (again, tensorrt.convertible(again)):
        with pytest.raises(LoweringError, match="re-routed already"):
            export_rewritten(changed, config=ONE)


def test_experts_that_come_too_late():
    """They are fused while a program is re-routed: without a word the file would have none of them."""
    for config in (ALL, ONE):
        with pytest.raises(LoweringError, match='experts="conditional" is decided while the program is re-routed'):
            export_rewritten(rewritten(config), experts="conditional")


def test_others_are_not_marked():
    assert not is_rewritten(traced())
    assert not is_rewritten(traced(torch.nn.Linear(8, 8)))
