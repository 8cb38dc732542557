"""ONNX files: settings, functions, the decoding step as a user exports it, bad input.

That every model's ids and logits are the oracle's is in test_agreement.py.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.errors import (
    ConfigError,
    GateNotFoundError,
    LoweringError,
    MissingExtraError,
    OutputError,
    ProfileError,
)
from sere_compile.lowering.decode_step import DecodeStep
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.standard_operators import experts_computed_by
from sere_compile.testing import oracle_routing

from .. import tiny_models
from .models import SmallMoE, hidden_states, small_profile

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
lowering = pytest.importorskip("sere_compile.lowering.onnx")

FREE = torch.export.Dim.DYNAMIC
TOLERANCE = 1e-4


def run(path, *inputs):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


def export_small(tmp_path, model=None, **options):
    """The small layer, with a free number of tokens."""
    settings = {"profile": small_profile(), "dynamic_shapes": ({0: FREE},)} | options
    return lowering.export(model or SmallMoE().eval(), (hidden_states(5),), tmp_path / "small.onnx", **settings)


def real_model(name, layers=1):
    model = tiny_models.build(name)
    matrices = tiny_models.random_profile(model)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model, SimilarityProfile({gate: matrices[gate] for gate in tiny_models.gate_names(layers)})


@pytest.mark.slow
def test_decode_step(tmp_path):
    """Batches of any size decode token by token from an empty cache as the eager model does with the oracle's ids."""
    model, matrices = real_model("qwen3_moe")
    sere_compile.attach(model, matrices)
    step = DecodeStep(model, cache_length=6).eval()
    inputs, outputs = step.names()
    done = lowering.export(
        step,
        step.example_inputs(),
        tmp_path / "step.onnx",
        config=SereConfig(select_top_k=1),
        dynamic_shapes=step.dynamic_shapes(),
        input_names=inputs,
        output_names=outputs,
    )
    assert done.gates == 1
    assert model.config._experts_implementation == "grouped_mm"
    for batch in (1, 5):
        ids = tiny_models.tokens(batch, 4, seed=batch)
        keys, values = step.empty_cache(batch)
        caches = [*keys, *values]
        with torch.no_grad(), oracle_routing(model, matrices, 1):
            cache = None
            for position in range(ids.shape[1]):
                token = ids[:, position : position + 1]
                want = model(token, past_key_values=cache)
                cache = want.past_key_values
                logits, *caches = run(done.path, token, torch.tensor(position), *caches)
                caches = list(map(torch.from_numpy, caches))
                np.testing.assert_allclose(logits, want.logits[:, -1].numpy(), rtol=0, atol=TOLERANCE)


def test_decode_step_beyond_the_window():
    """A sliding layer would forget what the step's cache remembers."""
    model = tiny_models.mixtral()
    model.config.sliding_window = 4
    with pytest.raises(LoweringError, match=r"layer 0 of MixtralForCausalLM keeps 4 keys and values .* cache_length=6"):
        DecodeStep(model, cache_length=6)
    DecodeStep(model, cache_length=4)
    with pytest.raises(LoweringError, match="cache_length must be at least 1, got 0"):
        DecodeStep(model, cache_length=0)


# One layer, every setting


@pytest.mark.parametrize("as_function", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "leaks", [pytest.param(False, marks=pytest.mark.slow), True], ids=["reroute", "reroute_merged"]
)
def test_settings(tmp_path, as_function, leaks):
    """With threshold and min_active, both operators, plain or as a function: the same numbers as the operator."""
    model = SmallMoE(leaks).eval()
    config = SereConfig(select_top_k=1, threshold=0.4, min_active=3)
    done = export_small(tmp_path, model, config=config, as_function=as_function)
    onnx.checker.check_model(str(done.path), full_check=True)
    functions = {node.op_type for node in onnx.load(done.path).graph.node if node.domain == "sere"}
    assert functions == ({"reroute_merged" if leaks else "reroute"} if as_function else set())
    program = export_rewritten(
        model, (hidden_states(5),), profile=small_profile(), config=config, dynamic_shapes=({0: FREE},)
    )
    for tokens in (1, 2, 7, 40):
        hidden = hidden_states(tokens, seed=tokens)
        with torch.no_grad():
            want = program.module()(hidden)
        for got, expected in zip(run(done.path, hidden), want if leaks else [want], strict=True):
            exact = 0 if expected.dtype == torch.int64 else 1e-5
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=exact)


@pytest.mark.slow
def test_attached_profile_and_gates_off(tmp_path):
    """The matrix in the file is the attached one; with S = K there is none, and that is not an error."""
    model = SmallMoE().eval()
    sere_compile.attach(model, small_profile(seed=5))
    done = export_small(tmp_path, model, profile=None, as_function=True)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(done.path).graph.initializer}
    np.testing.assert_array_equal(tensors["sere_similarity_0"], small_profile(seed=5)["gate.weight"].numpy())
    assert export_small(tmp_path, model, profile=None, config=SereConfig(select_top_k=4)).gates == 0


# Bad input


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_extra(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing}.*sere-compile\[onnx\]"):
        export_small(tmp_path)


def test_opset_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match="opset must be at least 18, got 17"):
        export_small(tmp_path, opset=17)
    with pytest.raises(LoweringError, match=r"torch\.onnx wrote opset 18 where 99 was asked for"):
        export_small(tmp_path, nn.Linear(8, 8), profile=None, allow_no_gates=True, opset=99)


@pytest.mark.slow
def test_higher_opset(tmp_path):
    done = export_small(tmp_path, opset=23, as_function=True)
    assert done.opset == 23
    assert {entry.domain: entry.version for entry in onnx.load(done.path).opset_import} == {"": 23, "sere": 1}
    run(done.path, hidden_states(3))


@pytest.mark.slow
def test_a_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch, no_room):
    """On a full disk, and where onnx.checker refuses what was written."""
    path = tmp_path / "small.onnx"
    path.write_bytes(b"old")
    with no_room(), pytest.raises(OutputError, match="could not be written: File too large"):
        export_small(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"small.onnx": b"old"}

    def refuse(path):
        raise onnx.checker.ValidationError("odd node")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(LoweringError, match=r"does not pass onnx.checker: odd node"):
        export_small(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"small.onnx": b"old"}


@pytest.mark.slow
def test_weights_beside_the_file(tmp_path, monkeypatch):
    """Those of a large model, here of any: they come along, and the file finds them."""
    monkeypatch.setattr(torch.onnx._internal.exporter._onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    x = hidden_states(3)
    path = export_small(tmp_path).path
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.data"}
    assert run(path, x)[0].shape == x.shape


class CountsInABuffer(SmallMoE):
    """Its cast copies nothing: only a decomposed program says that the buffer is written."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(1))

    def forward(self, hidden):
        self.load.to(torch.float32).add_(1.0)
        return super().forward(hidden) + self.load


def test_a_buffer_that_is_written_through_a_cast(tmp_path):
    """The file would go on with the value of the export."""
    with pytest.raises(LoweringError, match="the program writes to load, and an ONNX graph keeps no state"):
        export_small(tmp_path, CountsInABuffer().eval())


def test_untraceable_model(tmp_path):
    """torch.export's own error, under one line of ours; and the experts' implementation is restored."""
    model, profile = real_model("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(LoweringError) as raised:
        lowering.export(model, (tiny_models.tokens(),), tmp_path / "m.onnx", profile=profile, experts=None)
    first, _, rest = str(raised.value).partition("\n")
    assert "MixtralForCausalLM" in first
    assert "batched_mm" in first
    assert rest
    assert raised.value.__cause__ is not None
    with pytest.raises(LoweringError, match="MixtralForCausalLM"):
        lowering.export(model, ("not tokens",), tmp_path / "m.onnx", profile=profile)
    assert model.config._experts_implementation == "eager"


def test_no_gates(tmp_path):
    model = nn.Linear(8, 8)
    with pytest.raises(GateNotFoundError, match="no MoE gate"):
        export_small(tmp_path, model, profile=None)
    assert export_small(tmp_path, model, profile=None, allow_no_gates=True).gates == 0


def test_profile_of_another_model(tmp_path):
    other = SimilarityProfile({"layers.0.router.weight": small_profile()["gate.weight"]})
    with pytest.raises(ProfileError, match=r"layers\.0\.router\.weight"):
        export_small(tmp_path, profile=other)


class Counter(SmallMoE):
    """Writes to a buffer, as a model with a cache of its own does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, hidden):
        self.calls[1].add_(1)
        hidden = hidden.to(torch.float64)
        hidden += 1
        return super().forward(hidden.float()) * self.calls[1]


@pytest.mark.parametrize("decomposed", [False, True])
def test_state(tmp_path, decomposed):
    """torch.onnx would write a file that forgets its state without a word."""
    with torch.no_grad():
        program = torch.export.export(Counter().eval(), (hidden_states(5),))
    if decomposed:
        program = program.run_decompositions({})
    with pytest.raises(LoweringError, match="writes to calls, and an ONNX graph keeps no state"):
        lowering.export(program, None, tmp_path / "m.onnx", profile=small_profile())


class InPlace(SmallMoE):
    def forward(self, hidden):
        hidden = hidden.to(torch.float64)
        hidden += 1
        return super().forward(hidden.float())


def test_writing_to_a_copy_is_no_state(tmp_path):
    assert export_small(tmp_path, InPlace().eval()).gates == 1


def test_grouped_mm(tmp_path):
    model, profile = real_model("qwen3_moe")
    with pytest.raises(LoweringError, match=r"grouped_mm.*ONNX has no operator.*batched_mm"):
        lowering.export(
            model, (tiny_models.tokens(),), tmp_path / "m.onnx", kwargs={"use_cache": False}, profile=profile,
            experts=None,
        )  # fmt: skip


def test_experts_of_every_model_inside():
    """A wrapper has no implementation of its own; the model in it is switched, once, and switched back."""
    config = types.SimpleNamespace(_experts_implementation="grouped_mm")
    calls = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

        def set_experts_implementation(self, name):
            calls.append(name)
            config._experts_implementation = name

    def fail():
        assert config._experts_implementation == "batched_mm"
        raise KeyError

    wrapper = nn.Sequential(nn.Sequential(Model()), Model())
    with pytest.raises(KeyError), experts_computed_by("batched_mm", wrapper):
        fail()
    assert calls == ["batched_mm", "grouped_mm"]
