"""More weights than a file of protobuf can hold, 2 GB: they go beside the graph, one tensor of them larger than that.

The large layer is left as it is, S = K: showing that a dispatch may be re-routed runs it with other weights, and copies
them. The small layer before it is re-routed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sere_compile import SereConfig, SimilarityProfile
from sere_compile.errors import LoweringError
from sere_compile.lowering import tensorrt
from sere_compile.ops.reroute.reference import reroute_reference

ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
onnx = pytest.importorskip("sere_compile.lowering.onnx")

WIDTH, TOP_K, LIMIT = 64, 2, 2**31
# Experts of 64 x 18,432: 2.4 GB.
EXPERTS, COLUMNS = 512, 288 * WIDTH
CONFIG = SereConfig(select_top_k=1, min_active=0, per_gate={"1.gate.weight": {"select_top_k": TOP_K}})


class Layer(nn.Module):
    """Experts whose columns repeat, so that numbers for them are drawn quickly."""

    def __init__(self, experts, repeats):
        super().__init__()
        generator = torch.Generator().manual_seed(experts)
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.gate.weight.data.normal_(generator=generator)
        self.experts = nn.Parameter((torch.randn(experts, WIDTH, WIDTH, generator=generator) / 8).repeat(1, 1, repeats))

    def route(self, hidden):
        weights, ids = self.gate(hidden).softmax(-1).topk(TOP_K, dim=-1)
        return ids, weights

    def dispatch(self, hidden, ids, weights):
        each = torch.einsum("th,tkhw->tkw", hidden, self.experts[ids])
        return (each * weights[..., None]).sum(1)

    def forward(self, hidden):  # [T, WIDTH]
        return self.dispatch(hidden, *self.route(hidden))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The model, its similarity and its file, which is gone when the tests are."""
    folder = tmp_path_factory.mktemp("large")
    half = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    similarity = (half + half.T) / 2
    model = nn.Sequential(Layer(8, 1), Layer(EXPERTS, COLUMNS // WIDTH)).eval()
    profile = SimilarityProfile({"0.gate.weight": similarity, "1.gate.weight": torch.eye(EXPERTS)})
    done = onnx.export(
        model, (hidden_states(3),), folder / "m.onnx", profile=profile, config=CONFIG, dynamic_shapes="auto",
        input_names=["hidden"],
    )  # fmt: skip
    yield model, similarity, done
    for file in folder.iterdir():
        file.unlink()


def hidden_states(tokens):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def weights_of(done):
    return done.path.with_name(f"{done.path.name}.data")


@pytest.mark.slow
def test_in_onnxruntime(large):
    """The graph is small, the tensor beside it whole, and the numbers are the model's with the oracle's ids."""
    model, similarity, done = large
    assert done.gates == 1
    assert {file.name for file in done.path.parent.iterdir()} == {done.path.name, weights_of(done).name}
    assert done.path.stat().st_size < 2**20
    assert model[1].experts.nbytes > LIMIT
    assert weights_of(done).stat().st_size > LIMIT
    hidden = hidden_states(5)
    with torch.no_grad():
        ids, weights = model[0].route(hidden)
        new = reroute_reference(ids, similarity, 1, 0.0, 0)
        want = model[1](model[0].dispatch(hidden, new, weights))
    assert not torch.equal(ids, new)
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"hidden": hidden.numpy()})[0])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.tensorrt
def test_in_tensorrts_parser(large):
    """It takes the file with the weights beside it, and not without them."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    done = large[2]
    assert "TensorRT" in tensorrt.check(done.path)
    moved = weights_of(done).rename(done.path.with_name("moved"))
    try:
        with pytest.raises(LoweringError, match=r"cannot take .*m\.onnx"):
            tensorrt.check(done.path)
    finally:
        moved.rename(weights_of(done))
