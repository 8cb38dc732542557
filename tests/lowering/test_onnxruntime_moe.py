"""onnxruntime's own MoE operator computes what re-routed ids name, though it chooses experts itself."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.errors import LoweringError

from .test_conditional_experts import (
    FREE,
    Operator,
    Stacked,
    call_of,
    lowering,
    profile,
    reroute_reference,
    session,
    tokens,
)

MOE = "onnxruntime_moe"


@pytest.mark.parametrize("select_top_k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_layer(tmp_path, select_top_k):
    """Within rounding for any number of tokens, with S = K too: tokens name one to K experts."""
    model = Stacked().eval()
    done = lowering.export(
        model, (tokens(5),), tmp_path / "m.onnx", profile=profile(), input_names=["hidden"], dynamic_shapes="auto",
        config=SereConfig(select_top_k=select_top_k, min_active=0), experts=MOE,
    )  # fmt: skip
    assert done.operators["MoE"] == 1
    assert done.gates == (select_top_k < 3)
    run, distinct = session(done.path), set()
    for count in (1, 2, 5, 40):
        hidden = tokens(count)
        with torch.no_grad():
            ids, weights = model.route(hidden)
            ids = reroute_reference(ids, profile()["gate.weight"], select_top_k, 0.0, 0)
            want = model.experts(hidden, ids, weights)
        distinct |= {len(set(row)) for row in ids.tolist()}
        got = torch.from_numpy(run.run(None, {"hidden": hidden.numpy()})[0])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert distinct == ({1, 2, 3} if select_top_k == 1 else {3})


@pytest.mark.parametrize(
    ("activation", "biased", "layout"),
    [
        ("gpt_oss", True, {"interleaved": True, "transposed": True}),
        pytest.param("silu_glu", False, {}, marks=pytest.mark.slow),
        pytest.param("silu_glu", True, {"transposed": True}, marks=pytest.mark.slow),
    ],
)
def test_both_activations(tmp_path, activation, biased, layout):
    """Names outside the experts, and one expert twice in a token, also."""
    module = Operator(activation, biased, **layout)
    with torch.no_grad():
        program = torch.export.export(module.eval(), call_of(4), dynamic_shapes=({0: FREE},) * 3)
    names = ["hidden", "ids", "weights"]
    done = lowering.export(program, None, tmp_path / "m.onnx", input_names=names, allow_no_gates=True, experts=MOE)
    run = session(done.path)
    for count in (1, 4, 9):
        call = call_of(count)
        with torch.no_grad():
            want = module(*call)
        got = run.run(None, dict(zip(names, (tensor.numpy() for tensor in call), strict=True)))[0]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path):
    program = torch.export.export(Operator("relu", False).eval(), call_of(4))
    with pytest.raises(LoweringError, match="computes gated SiLU and gpt-oss's activation, not relu"):
        lowering.export(program, None, tmp_path / "m.onnx", allow_no_gates=True, experts=MOE)
    config = SereConfig(select_top_k=1, substitution="projection")
    with pytest.raises(LoweringError, match=r"projection may make weights negative"):
        lowering.export(Stacked().eval(), (tokens(5),), tmp_path / "m.onnx", config=config, experts=MOE)
