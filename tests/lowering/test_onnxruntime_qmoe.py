"""onnxruntime's QMoE computes what re-routed ids name, with the codes and scales that we give it."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.errors import LoweringError
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.onnxruntime_qmoe import quantise

from .models import with_ids_as_outputs
from .test_conditional_experts import (
    EXPERTS,
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

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
# Of the outputs, for weights of a normal distribution: measured 0.010 and 0.175.
ERROR = {8: 0.02, 4: 0.25}
ONE = SereConfig(select_top_k=1, min_active=0)
BITS = pytest.mark.parametrize("bits", [8, 4])


def decoded(weights, bits, block=None):
    """What codes and scales stand for, computed from them alone."""
    codes, scales = quantise(weights, bits, block)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    scales = scales.reshape(*weights.shape[:2], -1)
    return (codes.float() - 2 ** (bits - 1)) * scales.float().repeat_interleave(block or weights.shape[-1], -1)


def decoded_model(bits):
    model = Stacked().eval()
    with torch.no_grad():
        for weights in (model.gate_up, model.down):
            weights.copy_(decoded(weights, bits))
    return model


def rerouted(model, hidden):
    """The oracle's ids, and what the model's experts make of them."""
    with torch.no_grad():
        ids, weights = model.route(hidden)
        ids = reroute_reference(ids, profile()["gate.weight"], 1, 0.0, 0)
        return ids, model.experts(hidden, ids, weights)


@BITS
def test_a_layer(tmp_path, bits):
    """ids exactly, outputs those of the decoded weights; and by how much these differ from the weights' own."""
    program = export_rewritten(
        Stacked().eval(), (tokens(5),), profile=profile(), dynamic_shapes="auto", config=ONE,
        experts=f"onnxruntime_qmoe{bits}",
    )  # fmt: skip
    done = lowering.export(
        with_ids_as_outputs(program),
        None,
        tmp_path / "m.onnx",
        input_names=["hidden"],
        experts=f"onnxruntime_qmoe{bits}",
    )
    assert (done.gates, done.operators["QMoE"]) == (1, 1)
    run, repeated = session(done.path), False
    for count in (1, 2, 5, 40):
        hidden = tokens(count)
        out, ids = map(torch.from_numpy, run.run(None, {"hidden": hidden.numpy()}))
        wanted, exact = rerouted(decoded_model(bits), hidden)
        assert torch.equal(ids, wanted)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)
        whole = rerouted(Stacked().eval(), hidden)[1]
        assert (out - whole).norm() <= ERROR[bits] * whole.norm()
        repeated |= any(len(set(row)) < len(row) for row in ids.tolist())
    assert repeated


@BITS
def test_the_file_has_codes_alone(tmp_path, bits):
    """No weight of an expert in float besides; a quarter or an eighth of their size."""
    model = Stacked().eval()
    done = lowering.export(
        model, (tokens(5),), tmp_path / "m.onnx", profile=profile(), config=ONE, experts=f"onnxruntime_qmoe{bits}"
    )
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(done.path).graph.initializer}
    codes = [array for name, array in kept.items() if name.endswith(".codes")]
    count = model.gate_up.numel() + model.down.numel()
    assert sum(array.nbytes for array in codes) == count * bits // 8
    assert max(array.size for name, array in kept.items() if not name.endswith(".codes")) <= EXPERTS * 2 * 12 * 2


@BITS
@pytest.mark.parametrize(
    ("activation", "biased", "layout"),
    [
        ("gpt_oss", True, {"interleaved": True, "transposed": True}),
        pytest.param("silu_glu", True, {}, marks=pytest.mark.slow),
    ],
)
def test_activations_and_layouts(tmp_path, bits, activation, biased, layout):
    """Names outside the experts, and one expert twice in a token, also."""
    module = Operator(activation, biased, **layout).eval()
    with torch.no_grad():
        program = torch.export.export(module, call_of(4), dynamic_shapes=({0: FREE},) * 3)
    names = ["hidden", "ids", "weights"]
    done = lowering.export(
        program, None, tmp_path / "m.onnx", input_names=names, allow_no_gates=True, experts=f"onnxruntime_qmoe{bits}"
    )
    run = session(done.path)
    with torch.no_grad():
        for weights in module.tensors[:2]:
            rows = weights.transpose(1, 2) if layout.get("transposed") else weights
            rows.copy_(decoded(rows.contiguous(), bits))
    for count in (1, 4, 9):
        call = call_of(count)
        with torch.no_grad():
            want = module(*call)
        got = run.run(None, dict(zip(names, (tensor.numpy() for tensor in call), strict=True)))[0]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)


class Wide(Stacked):
    """Sizes that blocks divide."""

    def __init__(self, width, inner):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = torch.nn.Linear(width, EXPERTS, bias=False)
        self.gate_up = torch.nn.Parameter(torch.randn(EXPERTS, 2 * inner, width, generator=generator) / 8)
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, width, inner, generator=generator) / 8)

    def experts(self, hidden, ids, weights):
        rows, flat = hidden.repeat_interleave(ids.shape[1], 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[flat], rows[..., None]).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[flat], (torch.nn.functional.silu(gate) * up)[..., None]).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(len(hidden), ids.shape[1], -1).sum(1)


@pytest.mark.parametrize(("width", "inner", "block"), [(64, 96, 32), (64, 48, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_blocks_of_four_bits(tmp_path, width, inner, block, dtype):
    """Weights of a block share a scale, in the type of the weights."""
    model = Wide(width, inner).eval().to(dtype)
    hidden = torch.randn(7, width, generator=torch.Generator().manual_seed(7)).to(dtype)
    done = lowering.export(
        model, (hidden,), tmp_path / "m.onnx", input_names=["hidden"], experts="onnxruntime_qmoe4",
        config=SereConfig(select_top_k=3),
    )  # fmt: skip
    [node] = [node for node in onnx.load(done.path).graph.node if node.op_type == "QMoE"]
    assert {a.name: a.i for a in node.attribute}["block_size"] == block
    got = torch.from_numpy(session(done.path).run(None, {"hidden": hidden.numpy()})[0])
    with torch.no_grad():
        for weights in (model.gate_up, model.down):
            weights.copy_(decoded(weights, 4, block))
        want = model(hidden)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_codes():
    """To the nearest of 15 or 255 values; a row of zeros stays zero; two codes in a byte."""
    weights = torch.tensor([[[7.0, -7.0, 3.4, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    codes, scales = quantise(weights, 4, None)
    assert codes.tolist() == [[[15 | 1 << 4, 11 | 8 << 4], [8 | 8 << 4, 8 | 8 << 4]]]
    assert scales.tolist() == [[1.0, 1.0]]
    assert decoded(weights, 4).tolist() == [[[7.0, -7.0, 3.0, 0.0], [0.0] * 4]]
    assert quantise(weights, 4, 2)[1].shape == (1, 2, 2)
    random = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for bits, block in ((8, None), (4, None), (4, 16)):
        step = quantise(random, bits, block)[1].reshape(3, 4, -1).repeat_interleave(block or 32, -1)
        assert ((decoded(random, bits, block) - random).abs() <= step / 2 * (1 + 1e-4)).all()


def test_refusals(tmp_path):
    config = SereConfig(select_top_k=1, substitution="projection")
    with pytest.raises(LoweringError, match=r'weights negative, which experts="onnxruntime_qmoe4" cannot say'):
        lowering.export(Stacked().eval(), (tokens(5),), tmp_path / "m.onnx", config=config, experts="onnxruntime_qmoe4")
    program = torch.export.export(Operator("relu", False).eval(), call_of(4))
    with pytest.raises(LoweringError, match="QMoE on a CPU computes gated SiLU and gpt-oss's activation, not relu"):
        lowering.export(program, None, tmp_path / "m.onnx", allow_no_gates=True, experts="onnxruntime_qmoe8")
    with pytest.raises(LoweringError, match="a weight of an expert is not finite"):
        quantise(torch.full((1, 2, 4), torch.inf), 8, None)
    with pytest.raises(LoweringError, match="rows of 5 weights of 4 bits do not fill whole bytes"):
        quantise(torch.ones(1, 2, 5), 4, None)
