"""Every option that says what re-routing is, on every target: the oracle's numbers, or an error that names it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from sere_compile import ConfigError, GateNotFoundError, ProfileError, SereConfig, SimilarityProfile, rewrite
from sere_compile.lowering import aot, tensorrt
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.standard_operators import rerouted_gates
from sere_compile.testing import projection_oracle, reroute_oracle

from ..thinned import thinned
from .models import EXPERTS, TOP_K, SmallMoE, hidden_states, small_profile

FREE = ({0: torch.export.Dim("tokens", min=1, max=64)},)
SIZES = (1, 2, 7, 40)
GATES = ("0.gate.weight", "1.gate.weight")
OPTIONS = {
    "numbers": {"select_top_k": 1, "threshold": 0.4, "min_active": 3},
    "quantile": {"select_top_k": 1, "threshold": "q0.25"},
    "projection": {"select_top_k": 1, "min_active": 0, "substitution": "projection"},
    "budget": {"select_top_k": "auto", "max_active": 5, "min_active": 0},
    "per gate": {
        "select_top_k": 1,
        "min_active": 0,
        "per_gate": {"1.*": {"select_top_k": 2, "threshold": "q0.5", "substitution": "projection"}},
    },
    "all": {
        "select_top_k": "auto",
        "max_active": 6,
        "min_active": 2,
        "threshold": "q0.25",
        "substitution": "projection",
        "per_gate": {"0.*": {"threshold": 0.3, "select_top_k": 2}},
    },
    "max_tokens": {"select_top_k": 1, "min_active": 0, "max_tokens": 64},
}
every_option = pytest.mark.parametrize("config", [SereConfig(**own) for own in OPTIONS.values()], ids=OPTIONS)


class Two(nn.Sequential):
    """Two layers, so that options can differ from gate to gate."""

    def __init__(self):
        super().__init__(SmallMoE(), SmallMoE())
        self[1].gate.weight.data = self[1].gate.weight.data.flip(0)
        self.eval()


def calibrated():
    """Similarities and projection coefficients of both gates."""
    generator = torch.Generator().manual_seed(1)
    matrices = {name: small_profile(seed)["gate.weight"] for seed, name in enumerate(GATES)}
    projections = {name: torch.rand(EXPERTS, EXPERTS, generator=generator) for name in GATES}
    return SimilarityProfile(matrices, None, projections)


@torch.no_grad()
def oracle(model, hidden, profile, config):
    """The layers in plain PyTorch, routed by the oracles of sere_compile.testing."""
    for name, layer in zip(GATES, model, strict=True):
        own = config.for_gate(name)
        weights, ids = layer.gate(hidden).softmax(-1).topk(TOP_K, dim=-1)
        least = TOP_K if own.min_active is None else own.min_active
        slots = widest_within(ids, own.max_active) if own.select_top_k == "auto" else own.select_top_k
        new = reroute_oracle(ids, profile[name], slots, own.threshold, least)
        if own.substitution == "projection":
            weights = projection_oracle(weights, ids, new, profile.projection(name))
        each = torch.einsum("th,tkhw->tkw", hidden, layer.experts[new])
        hidden = (each * weights[..., None]).sum(1)
    return hidden


def widest_within(ids, budget):
    """The largest S whose primary experts are at most `budget`, at least 1."""
    return max([1, *(s for s in range(1, TOP_K + 1) if len(ids[:, :s].unique()) <= budget)])


def check(run, config):
    """`run` agrees with the oracle for every size, and the options matter for one of them at least."""
    model, profile, changed = Two(), calibrated(), False
    for size in SIZES:
        hidden = hidden_states(size, seed=size)
        expected = oracle(model, hidden, profile, config)
        torch.testing.assert_close(run(hidden), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            changed |= not torch.allclose(model(hidden), expected, rtol=1e-2, atol=1e-2)
    assert changed, "these options re-route nothing"


def program(config):
    return export_rewritten(Two(), (hidden_states(5),), profile=calibrated(), config=config, dynamic_shapes=FREE)


@every_option
def test_exported_program(config, tmp_path):
    """The program of `rewrite`, saved and loaded: what AOTInductor compiles."""
    torch.export.save(program(config), tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert rerouted_gates(loaded) == 2
    check(loaded.module(), config)


@pytest.mark.parametrize(
    ("name", "as_function"),
    thinned(
        [("all", True), ("all", False), ("budget", True), *((name, False) for name in OPTIONS if name != "all")], (1,)
    ),
)
def test_onnx_file(name, as_function, tmp_path):
    """onnxruntime on standard operators, or on functions, all of them on TensorRT's list."""
    ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from sere_compile.lowering import onnx

    config = SereConfig(**OPTIONS[name])
    done = onnx.export(
        Two(), (hidden_states(5),), tmp_path / "m.onnx", profile=calibrated(), config=config, dynamic_shapes=FREE,
        as_function=as_function, input_names=["hidden"],
    )  # fmt: skip
    assert done.gates == 2
    assert (done.operators_in_functions > 0) == as_function
    assert tensorrt.operators_not_in_list(done.path) == set()
    session = ort.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    check(lambda hidden: torch.from_numpy(session.run(None, {"hidden": hidden.numpy()})[0]), config)


@pytest.mark.parametrize("name", thinned(OPTIONS, (5,)))
def test_tensorrt_program(name):
    """What torch_tensorrt would be given: only operators that it converts with free sizes."""
    config = SereConfig(**OPTIONS[name])
    handed_over = tensorrt.convertible(program(config))
    assert tensorrt.operators_without_converter(handed_over) == set()
    check(handed_over.module(), config)


@pytest.mark.wide
def test_aot_package(tmp_path):
    """All options at once in one package."""
    config = SereConfig(**OPTIONS["all"])
    check(torch._inductor.aoti_load_package(aot.package(program(config), tmp_path / "m.pt2")), config)


@pytest.mark.slow
def test_merged_dispatch_with_projection(tmp_path):
    """Two operators stand behind one gate there, and both the ids and the weights that leave are the program's."""
    ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from sere_compile.lowering import onnx

    model, (matrix, *_) = SmallMoE(leaks=True).eval(), calibrated().values()
    profile = SimilarityProfile({"gate.weight": matrix}, None, {"gate.weight": calibrated().projection(GATES[0])})
    config = SereConfig(select_top_k=1, min_active=0, substitution="projection", threshold="q0.25")
    done = rewrite(torch.export.export(model, (hidden_states(5),), dynamic_shapes=FREE), profile=profile, config=config)
    assert rerouted_gates(done) == 1
    written = onnx.export(done, None, tmp_path / "m.onnx", as_function=True)
    assert written.gates == 1
    session = ort.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    handed_over = tensorrt.convertible(done)
    assert tensorrt.operators_without_converter(handed_over) == set()
    for size in SIZES:
        hidden = hidden_states(size, seed=size)
        with torch.no_grad():
            wanted = done.module()(hidden)
        in_onnx = map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: hidden.numpy()}))
        for ours in (in_onnx, handed_over.module()(hidden)):
            for got, expected in zip(ours, wanted, strict=True):
                exact = 0 if expected.dtype == torch.int64 else 1e-5
                torch.testing.assert_close(got.detach(), expected, rtol=0, atol=exact)


# Refused


def refused(target, config, profile, model, folder):
    """The error of a target."""
    arguments = {"profile": profile, "config": config, "dynamic_shapes": FREE}
    if target == "rewrite":
        traced = torch.export.export(model, (hidden_states(5),), dynamic_shapes=FREE)
        return rewrite(traced, profile=profile, config=config)
    if target == "aot":
        return aot.package(model, folder / "m.pt2", (hidden_states(5),), **arguments)
    if target == "onnx":
        from sere_compile.lowering import onnx

        return onnx.export(model, (hidden_states(5),), folder / "m.onnx", **arguments)
    return tensorrt.compile(model, (hidden_states(5),), **arguments)


@pytest.fixture
def torch_tensorrt(monkeypatch):
    """A stand-in: the errors come before it is called."""
    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", types.ModuleType("torch_tensorrt.dynamo"))


@pytest.mark.parametrize("target", ["rewrite", "aot", "onnx", "tensorrt"])
class TestRefused:
    def test_projection_without_coefficients(self, target, tmp_path, torch_tensorrt):
        config = SereConfig(select_top_k=1, substitution="projection")
        with pytest.raises(ProfileError, match="needs projection coefficients, and this profile has none"):
            refused(target, config, small_profile(), SmallMoE().eval(), tmp_path)

    def test_budget_where_ids_leave(self, target, tmp_path, torch_tensorrt):
        config = SereConfig(select_top_k="auto", max_active=5)
        with pytest.raises(GateNotFoundError, match=r"1 of 1 gates were refused: .*max_active"):
            refused(target, config, small_profile(), SmallMoE(leaks=True).eval(), tmp_path)

    def test_counting(self, target, tmp_path, torch_tensorrt):
        with pytest.raises(ConfigError, match="collect_stats counts in models"):
            refused(target, SereConfig(collect_stats=True), small_profile(), SmallMoE().eval(), tmp_path)

    def test_limit_inside_the_range(self, target, tmp_path, torch_tensorrt):
        with pytest.raises(ConfigError, match="max_tokens=8 lies inside the range of batch sizes"):
            refused(target, SereConfig(max_tokens=8), small_profile(), SmallMoE().eval(), tmp_path)

    def test_pattern_without_a_gate(self, target, tmp_path, torch_tensorrt):
        config = SereConfig(strict=True, per_gate={"layers.9.*": {"select_top_k": 1}})
        with pytest.raises(ConfigError, match=r"no gate of the program matches 'layers\.9\.\*'"):
            refused(target, config, small_profile(), SmallMoE().eval(), tmp_path)
