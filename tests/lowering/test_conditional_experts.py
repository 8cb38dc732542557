"""One `If` an expert: the numbers of the operator it stands for, in onnxruntime, and that other experts do not run."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile import SereConfig, SimilarityProfile
from sere_compile.errors import LoweringError
from sere_compile.lowering import aot, tensorrt
from sere_compile.lowering.export import export_rewritten
from sere_compile.ops.expert_mlp.reference import gate_width
from sere_compile.ops.reroute.reference import reroute_reference

from .models import SmallMoE, hidden_states, small_profile, with_ids_as_outputs

pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
lowering = pytest.importorskip("sere_compile.lowering.onnx")

EXPERTS, TOP_K, WIDTH, INNER = 8, 3, 16, 12
FREE = torch.export.Dim.DYNAMIC


class Stacked(nn.Module):
    """Experts as in transformers' `batched_mm`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate.weight.data.normal_(generator=generator)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER, generator=generator) / 4)

    def route(self, hidden):
        weights, ids = self.gate(hidden).softmax(-1).topk(TOP_K, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)

    def forward(self, hidden):  # [T, WIDTH]
        return self.experts(hidden, *self.route(hidden))

    def experts(self, hidden, ids, weights):
        rows, flat = hidden.repeat_interleave(TOP_K, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[flat], rows[..., None]).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[flat], (F.silu(gate) * up)[..., None]).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(-1, TOP_K, WIDTH).sum(1)


def profile() -> SimilarityProfile:
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
    return SimilarityProfile({"gate.weight": (half + half.T) / 2})


def tokens(count):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def session(path, **options):
    settings = ort.SessionOptions()
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("select_top_k", [1, pytest.param(TOP_K, marks=pytest.mark.slow)])
def test_a_layer(tmp_path, select_top_k):
    """ids exactly and sums within rounding for any number of tokens, with S = K, where nothing is re-routed, too."""
    model, config = Stacked().eval(), SereConfig(select_top_k=select_top_k, min_active=0)
    program = export_rewritten(
        model, (tokens(5),), profile=profile(), config=config, dynamic_shapes="auto", experts="conditional"
    )
    assert not [n for n in program.graph.nodes if "bmm" in str(n.target)]
    if select_top_k < TOP_K:
        program = with_ids_as_outputs(program)
    done = lowering.export(program, None, tmp_path / "m.onnx", input_names=["hidden"], allow_no_gates=True)
    assert done.operators["If"] == EXPERTS
    run = session(done.path)
    for count in (1, 2, 5, 40):
        hidden = tokens(count)
        out, *rest = map(torch.from_numpy, run.run(None, {"hidden": hidden.numpy()}))
        with torch.no_grad():
            ids, weights = model.route(hidden)
            new_ids = reroute_reference(ids, profile()["gate.weight"], select_top_k, 0.0, 0)
            torch.testing.assert_close(out, model.experts(hidden, new_ids, weights), rtol=0, atol=1e-5)
        assert all(torch.equal(found, new_ids) for found in rest)
        assert len(rest) == (select_top_k < TOP_K)


def test_only_active_experts_run(tmp_path):
    """Two products for each expert that an id names, none for others; each expert has weights of its own."""
    import onnx

    model = Stacked().eval()
    done = lowering.export(
        model, (tokens(5),), tmp_path / "m.onnx", profile=profile(), input_names=["hidden"], dynamic_shapes="auto",
        config=SereConfig(select_top_k=1, min_active=0), experts="conditional",
    )  # fmt: skip
    stacked = {t.name: tuple(t.dims) for t in onnx.load(done.path).graph.initializer if len(t.dims) == 3}
    assert not stacked
    run = session(done.path, enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    counts = []
    for count in (1, 2, 40):
        hidden = tokens(count)
        run.run(None, {"hidden": hidden.numpy()})
        counts.append(len(model.route(hidden)[0][:, 0].unique()))
    events = json.loads(Path(run.end_profiling()).read_text(encoding="utf-8"))
    ran = collections.Counter(
        event["args"]["op_name"]
        for event in events
        if event["name"].endswith("_kernel_time") and "expert_" in event["name"]
    )
    assert counts[0] == 1
    assert counts[-1] > counts[0]
    assert ran["Gemm"] == 2 * sum(counts)
    assert ran["Identity"] == 3 * EXPERTS - sum(counts)


class Operator(nn.Module):
    """`sere::expert_mlp` as it may stand in a program."""

    def __init__(self, activation, biased, dtype=torch.float32, **layout) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        columns = gate_width(activation) * INNER
        up, down = (EXPERTS, columns, WIDTH), (EXPERTS, WIDTH, INNER)
        if layout.get("transposed"):
            up, down = (EXPERTS, WIDTH, columns), (EXPERTS, INNER, WIDTH)
        shapes = [up, down, *([(EXPERTS, columns), (EXPERTS, WIDTH)] if biased else [])]
        made = [nn.Parameter((torch.randn(shape, generator=generator) / 4).to(dtype)) for shape in shapes]
        self.tensors = nn.ParameterList(made)
        self.options = {"activation": activation} | layout

    def forward(self, hidden, ids, weights):
        return torch.ops.sere.expert_mlp.default(hidden, ids, weights, *self.tensors, **self.options)


def exported(module, path, call):
    free = {0: FREE}
    with torch.no_grad():
        program = torch.export.export(module.eval(), call, dynamic_shapes=(free, free, free))
    names = ["hidden", "ids", "weights"]
    return session(lowering.export(program, None, path, input_names=names, allow_no_gates=True).path)


def call_of(count, dtype=torch.float32, ids_dtype=torch.int64):
    generator = torch.Generator().manual_seed(count)
    # Names outside the experts too, and one expert twice in a token.
    ids = torch.randint(-1, EXPERTS + 1, (count, TOP_K), generator=generator).to(ids_dtype)
    hidden = torch.randn(count, WIDTH, generator=generator) * 3
    return hidden.to(dtype), ids, torch.rand(count, TOP_K, generator=generator)


@pytest.mark.parametrize(
    ("activation", "biased", "layout"),
    [
        ("gpt_oss", True, {"interleaved": True, "transposed": True}),
        pytest.param("silu_glu", False, {}, marks=pytest.mark.slow),
        pytest.param("gelu_tanh", True, {}, marks=pytest.mark.slow),
        pytest.param("gelu_glu", False, {"interleaved": True}, marks=pytest.mark.slow),
        pytest.param("relu2", False, {"transposed": True}, marks=pytest.mark.slow),
        pytest.param("relu_glu", True, {"transposed": True}, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_expert(tmp_path, activation, biased, layout):
    module = Operator(activation, biased, **layout)
    run = exported(module, tmp_path / "m.onnx", call_of(4))
    for count in (1, 4, 9):
        call = call_of(count)
        with torch.no_grad():
            want = module(*call)
        feeds = dict(zip(("hidden", "ids", "weights"), (tensor.numpy() for tensor in call), strict=True))
        torch.testing.assert_close(torch.from_numpy(run.run(None, feeds)[0]), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_half_precision_and_numbers_beyond_it(tmp_path):
    """int32 ids; what a token computes in an expert that it does not name is infinite there, and does not count."""
    module = Operator("silu_glu", False, torch.float16)
    hidden, ids, weights = call_of(4, torch.float16, torch.int32)
    with torch.no_grad():
        module.tensors[1].data[EXPERTS - 1] = 60000.0
    hidden[0], ids[:] = 40.0, torch.arange(TOP_K)
    ids[1, 0], weights[1, 0], hidden[1] = EXPERTS - 1, 0.5, 0.0
    run = exported(module, tmp_path / "m.onnx", (hidden, ids, weights))
    with torch.no_grad():
        want = module(hidden, ids, weights)
    got = run.run(None, {"hidden": hidden.numpy(), "ids": ids.numpy(), "weights": weights.numpy()})[0]
    assert want.isfinite().all()
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_program_that_was_saved(tmp_path):
    """Its free sizes have the numbers of the traced call still."""
    program = torch.export.export(Stacked().eval(), (tokens(5),), dynamic_shapes=({0: FREE},))
    torch.export.save(program, tmp_path / "p.pt2")
    done = lowering.export(
        torch.export.load(tmp_path / "p.pt2"), None, tmp_path / "m.onnx", profile=profile(), experts="conditional"
    )
    assert done.operators["If"] == EXPERTS


def test_experts_that_are_no_stacked_layers(tmp_path):
    """One matrix an expert: the gate and the reason are named."""
    told = (
        r"the experts of gate\.weight are not known to be stacked layers: its experts do not run as batched or grouped"
    )
    with pytest.raises(LoweringError, match=told):
        lowering.export(
            SmallMoE().eval(), (hidden_states(5),), tmp_path / "m.onnx", profile=small_profile(), experts="conditional"
        )


def test_weights_that_are_inputs(tmp_path):
    class Given(nn.Module):
        def forward(self, hidden, ids, weights, gate_up, down):
            return torch.ops.sere.expert_mlp.default(hidden, ids, weights, gate_up, down)

    call = *call_of(4), torch.randn(EXPERTS, 2 * INNER, WIDTH), torch.randn(EXPERTS, WIDTH, INNER)
    with pytest.raises(LoweringError, match=r"gate_up, which .* takes as weights of experts, is no constant"):
        lowering.export(torch.export.export(Given(), call), None, tmp_path / "m.onnx", allow_no_gates=True)


def test_other_targets(tmp_path):
    for lower in (
        lambda: aot.package(Stacked(), tmp_path / "m.pt2", (tokens(5),), experts="conditional"),
        lambda: tensorrt.compile(Stacked(), (tokens(5),), experts="conditional"),
    ):
        with pytest.raises(LoweringError, match=r'experts="conditional" is for ONNX files'):
            lower()
