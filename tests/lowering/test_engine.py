"""TensorRT's own parser and builder (TensorRT for RTX, without a GPU) on what is exported, in the lane `tensorrt`.

Thinned so that the lane ends within minutes: one layer a model (layers share their code), both graphs of every model
with free sizes and with those of 4 rows, decoding steps of one row, every option on two small layers with a free number
of tokens, S = K and other types on one model. Each engine is built for two compute capabilities.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.errors import LoweringError
from sere_compile.lowering import onnx, standard_operators, tensorrt
from sere_compile.lowering.export import export_rewritten
from sere_compile.ops.reroute.reference import reroute_reference
from sere_compile.ops.reroute_merged.reference import reroute_merged_reference

from .engine_cases import (
    CONFIG,
    GRAPHS,
    MODELS,
    check_engine,
    fed_by_constants,
    module_of,
    network,
    run_engine,
    shape_ranges,
    write,
)
from .models import TOP_K, WIDTH, SmallMoE, hidden_states, small_profile, with_ids_as_outputs
from .test_options import FREE, OPTIONS, Two, calibrated

pytestmark = pytest.mark.tensorrt
CAPABILITIES = ("8.9", "12.0")
TOKENS = {"hidden": ((1, 8), (8, 8), (64, 8))}


def export_small(tmp_path, model=None, tokens=24, free=True, **options):
    settings = {"profile": small_profile(), "config": CONFIG, "input_names": ["hidden"]} | options
    return onnx.export(
        model or SmallMoE().eval(), (hidden_states(tokens),), tmp_path / "small.onnx",
        dynamic_shapes=FREE if free else None, **settings,
    )  # fmt: skip


def built(done, shapes):
    """Its engine for both capabilities; the file is not empty."""
    build = tensorrt.build_onnx(done.path, shapes=shapes, capabilities=CAPABILITIES)
    assert build.path.stat().st_size > 0
    return build


# Models


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("model", MODELS)
def test_free_sizes(model, graph, tmp_path, caplog):
    """Parsed, built, our layers in it; no warning of a size that would stop the engine while it runs."""
    module = module_of(network(model), graph)
    done = write(module, tmp_path / "m.onnx", free=True)
    assert done.gates == 1
    check_engine(built(done, shape_ranges(module)), done.path, 1)
    assert not [record for record in caplog.records if "scatters" in record.getMessage()]


@pytest.mark.parametrize(("graph", "rows"), [("prefill", 4), ("decode step", 4), ("decode step", 1)])
@pytest.mark.parametrize("model", MODELS)
def test_fixed_sizes(model, graph, rows, tmp_path):
    done = write(module_of(network(model), graph), tmp_path / "m.onnx", free=False, rows=rows)
    assert done.gates == 1
    check_engine(built(done, None), done.path, 1)


def test_nothing_to_reroute(tmp_path):
    """S = K: the engine of the model itself."""
    done = write(module_of(network("mixtral"), "prefill"), tmp_path / "m.onnx", True, SereConfig(select_top_k=2))
    assert done.gates == 0
    build = built(done, shape_ranges(module_of(network("mixtral"), "prefill")))
    assert build.layers
    assert not any(layer.added for layer in build.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    module = module_of(network("qwen3_moe").to(dtype), "prefill")
    done = write(module, tmp_path / "m.onnx", free=False)
    check_engine(built(done, None), done.path, 1)


# Options


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tmp_path):
    done = export_small(tmp_path, Two(), profile=calibrated(), config=SereConfig(**OPTIONS[name]))
    assert done.gates == 2
    check_engine(built(done, TOKENS), done.path, 2)


@pytest.mark.parametrize("free", [False, True])
def test_merged_dispatch(free, tmp_path):
    """Where ids leave the graph: two choices a gate, of an expert and of a group's first slot."""
    done = export_small(
        tmp_path, SmallMoE(leaks=True).eval(), free=free, config=SereConfig(select_top_k=2, threshold=0.3)
    )
    check_engine(built(done, TOKENS if free else None), done.path, 2)


def test_functions(tmp_path):
    """TensorRT inlines them; its names for what is inside are its own."""
    done = export_small(tmp_path, as_function=True)
    assert done.operators_in_functions > 0
    assert built(done, TOKENS).layers


def test_weights_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx._internal.exporter._onnx_program, "_LARGE_MODEL_THRESHOLD", 0)
    done = export_small(tmp_path)
    assert (tmp_path / "small.onnx.data").exists()
    check_engine(built(done, TOKENS), done.path, 1)


def test_what_the_engine_pays(tmp_path):
    """The experts' layers have the same sizes with and without re-routing: a copy of the weights for each of T x K."""
    sizes = []
    for config in (CONFIG, SereConfig(select_top_k=TOP_K)):
        build = built(export_small(tmp_path, free=False, config=config), None)
        [product] = [layer for layer in build.layers if any("einsum" in node for node in layer.nodes)]
        sizes.append([value.sizes for value in product.inputs])
    assert sizes[0] == sizes[1]
    assert max(math.prod(size) for size in sizes[0]) == 24 * TOP_K * WIDTH * WIDTH


@pytest.mark.parametrize(
    ("model", "graph", "free"),
    [
        ("mixtral", "prefill", True),
        ("qwen3_moe", "decode step", True),
        ("gpt_oss", "decode step", False),
        ("deepseek_v3", "prefill", False),
    ],
)
def test_conditional_experts(model, graph, free, tmp_path):
    """A jump for every expert on what depends on the inputs, and both products of the expert behind it."""
    module = module_of(network(model), graph)
    [weights] = [part for name, part in module.named_modules() if name.endswith(".experts")]
    done = write(module, tmp_path / "m.onnx", free=free, experts="conditional")
    build = built(done, shape_ranges(module) if free else None)
    check_engine(build, done.path, 1)
    experts = done.operators["If"]
    jumps = [layer for layer in build.layers if layer.kind == "cjmp"]
    assert experts == sum(f"experts/expert_{e}" in layer.nodes[0] for e, layer in enumerate(jumps)) == len(jumps)
    constant = fed_by_constants(build.layers)
    assert not [layer.name for layer in jumps if layer in constant]
    matrices = {weights.gate_up_proj[0].numel(), weights.down_proj[0].numel()}
    for e in range(experts):
        behind = [layer for layer in build.layers if any(f"/expert_{e}/" in node for node in layer.nodes)]
        assert {math.prod(value.sizes) for layer in behind for value in layer.constants} >= matrices
    # Nothing as large as all experts, or as a copy of weights for every slot.
    values = [value for layer in build.layers for value in (*layer.inputs, *layer.constants, *layer.outputs)]
    assert not [v for v in values if v.name.endswith("_proj") and math.prod(v.sizes) >= min(matrices) * experts]


# What the tests above would not take


@pytest.fixture
def scatter(monkeypatch):
    """Lower by the references as they are: with a scatter of T x S indices into E + 1 places."""
    monkeypatch.setitem(standard_operators.REFERENCES, torch.ops.sere.reroute.default, reroute_reference)
    monkeypatch.setitem(standard_operators.REFERENCES, torch.ops.sere.reroute_merged.default, reroute_merged_reference)


def test_a_scatter_is_refused(tmp_path, scatter):
    """By the parser, and told as a fault of ours with the router's line."""
    done = export_small(tmp_path, free=False)
    told = (
        r"TensorRT for RTX \S+ cannot take .*small\.onnx: node sere/node_scatter \(ScatterElements\), from .*models\.py"
        r':\d+ "weights, ids = .*topk.*": .*Indices dimensions must be less.* a fault of sere_compile'
    )
    with pytest.raises(LoweringError, match=told):
        tensorrt.check(done.path)
    with pytest.raises(LoweringError, match=told):
        tensorrt.build_onnx(done.path, capabilities=CAPABILITIES)


def test_a_scatter_of_free_size_is_told(tmp_path, scatter, caplog):
    """The parser takes it; the engine would stop at a batch of more tokens than places."""
    done = export_small(tmp_path)
    with caplog.at_level(logging.WARNING):
        tensorrt.check(done.path)
    assert "node sere/node_scatter" in caplog.text
    assert "scatters a free number of indices into 13 places" in caplog.text
    with pytest.raises(AssertionError):
        check_engine(built(done, TOKENS), done.path, 1)


def test_a_folded_mask_is_seen(tmp_path):
    """Where ids are constant the builder computes re-routing beforehand, and `check_engine` does not take that."""
    import onnx as files

    done = export_small(tmp_path, free=False)
    model = files.load(done.path)
    [given], [result] = model.graph.input, model.graph.output
    model.graph.initializer.append(files.numpy_helper.from_array(hidden_states(24).numpy(), "constant"))
    for node in model.graph.node:
        node.input[:] = ["constant" if name == given.name else name for name in node.input]
        node.output[:] = ["routed" if name == result.name else name for name in node.output]
    model.graph.node.append(files.helper.make_node("Add", ["routed", given.name], [result.name]))
    files.save(model, done.path)
    with pytest.raises(AssertionError, match=r"do not depend on the inputs"):
        check_engine(built(done, None), done.path, 1)


class Determinant(SmallMoE):
    def forward(self, hidden):
        return super().forward(hidden) * torch.linalg.det(hidden.T @ hidden)


def test_refusal_of_the_models_own_node(tmp_path):
    done = export_small(tmp_path, Determinant().eval())
    told = (
        r'\(Det\), from .*test_engine\.py:\d+ "return super.*det.*": there is no such operator \(it is the model\'s own'
    )
    with pytest.raises(LoweringError, match=told):
        tensorrt.check(done.path)


def test_bad_arguments(tmp_path):
    done = export_small(tmp_path)
    for options, told in (
        ({}, r"shapes lacks hidden \[-1, 8\]"),
        ({"shapes": TOKENS | {"other": TOKENS["hidden"]}}, "shapes names other, and the inputs of the file are hidden"),
        ({"shapes": TOKENS, "capabilities": ("9.0",)}, r"builds for .*8\.9.*, not for '9\.0'"),
        ({"shapes": {"hidden": ((8, 8), (4, 8), (2, 8))}}, r"cannot build .*small\.onnx: \S"),
    ):
        with pytest.raises(LoweringError, match=told):
            tensorrt.build_onnx(done.path, **options)
    with pytest.raises(LoweringError, match="there is no file"):
        tensorrt.check(tmp_path / "none.onnx")


# With a GPU


@pytest.mark.gpu
def test_engine_runs(tmp_path):
    """ids equal to onnxruntime's exactly, outputs to 1e-3, for several numbers of tokens."""
    import onnxruntime

    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    program = export_rewritten(
        SmallMoE().eval(), (hidden_states(5),), profile=small_profile(), config=CONFIG, dynamic_shapes="auto"
    )
    done = onnx.export(
        with_ids_as_outputs(program), None, tmp_path / "m.onnx", input_names=["hidden"], output_names=["out", "ids"]
    )
    listed = {f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__}
    # On a GPU that is not listed the library's own choice is tried.
    build = tensorrt.build_onnx(done.path, shapes=TOKENS, capabilities=(capability,) if capability in listed else ())
    loaded = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(build.path.read_bytes())
    if loaded is None and capability not in listed:
        pytest.skip(f"{build.library} knows {', '.join(sorted(listed))}, and its engine does not load on {capability}")
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    for tokens in (1, 7, 64):
        hidden = hidden_states(tokens, seed=tokens)
        out, ids = map(torch.from_numpy, session.run(None, {"hidden": hidden.numpy()}))
        got = run_engine(trt, loaded, {"hidden": hidden})
        assert ids.shape == (tokens, TOP_K)
        assert torch.equal(got["ids"].long(), ids)
        torch.testing.assert_close(got["out"], out, rtol=0, atol=1e-3)
