"""What can be known about TensorRT without it: every operator that re-routing adds has a converter and is listed.

What its own parser and builder say is in test_engine.py.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from expecttest import assert_expected_inline

from sere_compile import SereConfig
from sere_compile.errors import GateNotFoundError, MissingExtraError
from sere_compile.lowering import tensorrt
from sere_compile.lowering.export import export_rewritten

from ..thinned import thinned
from .models import EXPERTS, TOP_K, SmallMoE, hidden_states, small_profile

FREE = {0: torch.export.Dim.DYNAMIC}
SETTINGS = [(1, 0.0, 0), (2, 0.3, 0), (1, 0.0, 5), (2, 0.3, 5)]
BUDGET = (1, 0.3, 5, None, 6)


def runtime_is_missing():
    if not torch.cuda.is_available():
        return True
    try:
        import torch_tensorrt  # noqa: F401
    except (ImportError, OSError):
        return True
    return False


end_to_end = pytest.mark.skipif(runtime_is_missing(), reason="needs torch_tensorrt and a CUDA device")


class Reroute(torch.nn.Module):
    """Nothing but the operator, so that all of the program is what re-routing adds."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = numbers
        self.register_buffer("similarity", small_profile()["gate.weight"])

    def forward(self, ids):
        return torch.ops.sere.reroute(ids, self.similarity, *self.numbers)


class RerouteMerged(Reroute):
    def forward(self, ids, weights):
        return torch.ops.sere.reroute_merged(ids, weights, self.similarity, *self.numbers)


def routing(operator, tokens=5):
    """Inputs of a module above: distinct ids in every row."""
    generator = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return (ids,) if operator is Reroute else (ids, weights)


def traced(operator, numbers):
    inputs = routing(operator)
    return torch.export.export(operator(*numbers), inputs, dynamic_shapes=tuple(FREE for _ in inputs))


# The tables


CASES = [(operator, numbers) for operator in (Reroute, RerouteMerged) for numbers in SETTINGS] + [(Reroute, BUDGET)]


@pytest.mark.parametrize(("operator", "numbers"), thinned(CASES, (3, 8)), ids=str)
def test_every_added_operator_has_a_converter(operator, numbers):
    """With dynamic shapes, in any setting; and the program handed over still computes the same."""
    program = tensorrt.convertible(traced(operator, numbers))
    assert tensorrt.operators_without_converter(program) == set()
    for tokens in (2, 9):
        inputs = routing(operator, tokens)
        torch.testing.assert_close(program.module()(*inputs), operator(*numbers)(*inputs), rtol=0, atol=0)


def test_reroute_in_aten():
    """What re-routing is in the program handed over: no operator of ours, no shape that depends on data."""
    assert_expected_inline(
        aten_region(tensorrt.convertible(traced(Reroute, (1, 0.3, 0)))),
        """\
%0 = view(ids, [-1, 4]) -> int64[T, 4]
%1 = permute(%0, [1, 0]) -> int64[4, T]
%2 = slice.Tensor(%1, 0, 0, 1) -> int64[1, T]
%3 = arange(12,) -> int64[12]
%4 = unsqueeze(%2, 1) -> int64[1, 1, T]
%5 = slice.Tensor(%4, 2, 0, 9223372036854775807) -> int64[1, 1, T]
%6 = unsqueeze(%3, 1) -> int64[12, 1]
%7 = eq.Tensor(%5, %6) -> bool[1, 12, T]
%8 = _to_copy(%7,) -> int32[1, 12, T]
%9 = amax(%8, [2]) -> int32[1, 12]
%10 = amax(%9, [0]) -> int32[12]
%11 = gt.Scalar(%10, 0) -> bool[12]
%12 = arange(12,) -> int64[12]
%13 = gt.Scalar(similarity, -inf) -> bool[12, 12]
%14 = __and__.Tensor(%11, %13) -> bool[12, 12]
%15 = where.ScalarOther(%14, similarity, -inf) -> float32[12, 12]
%16 = amax(%15, [1]) -> float32[12]
%17 = argmax(%15, 1) -> int64[12]
%18 = eq.Scalar(%16, -inf) -> bool[12]
%19 = __or__.Tensor(%11, %18) -> bool[12]
%20 = lt.Scalar(%16, 0.3) -> bool[12]
%21 = __or__.Tensor(%19, %20) -> bool[12]
%22 = where.self(%21, %12, %17) -> int64[12]
%23 = ge.Scalar(%0, 0) -> bool[T, 4]
%24 = lt.Scalar(%0, 12) -> bool[T, 4]
%25 = __and__.Tensor(%23, %24) -> bool[T, 4]
%26 = where.ScalarOther(%25, %0, 0) -> int64[T, 4]
%27 = index.Tensor(%22, [%26]) -> int64[T, 4]
%28 = where.self(%25, %27, %0) -> int64[T, 4]
%29 = view(%28, [T, 4]) -> int64[T, 4]
""",
    )


def aten_region(program):
    """The operations of a program, values numbered anew, with types."""
    names, lines = {}, []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = "similarity" if "similarity" in node.name else node.name
        elif node.op == "call_function" and "_assert" not in str(node.target) and "sym_" not in str(node.target):
            names[node] = f"%{len(lines)}"
            arguments = torch.fx.node.map_arg(node.args, lambda n: Name(names.get(n, "T")))
            value = node.meta["val"]
            sizes = ", ".join(str(size) if isinstance(size, int) else "T" for size in value.shape)
            kind = str(node.target).removeprefix("aten.").removesuffix(".default")
            lines.append(f"{names[node]} = {kind}{arguments} -> {str(value.dtype).removeprefix('torch.')}[{sizes}]")
    return "\n".join(lines) + "\n"


class Name(str):
    def __repr__(self):
        return str(self)


def test_what_needs_a_decomposition_of_ours():
    """The reason for it: torch_tensorrt converts these for static shapes only."""
    converters = tensorrt.operator_tables()["torch_tensorrt"]["converters"]
    assert converters["aten.gather.default"] is False
    assert converters["aten.index_copy.default"] is False
    assert converters["aten.index.Tensor"] is True


class Cached(SmallMoE):
    """A layer behind a write into a cache, as a decoding step has it."""

    def forward(self, hidden, cache, position):
        return super().forward(hidden), cache.index_copy(1, position, hidden[:, None])


@pytest.mark.parametrize("rerouted", [False, True])
def test_writing_to_a_cache_of_any_batch_size(rerouted):
    """Past torch_tensorrt's static index_copy; and the program handed over still writes the same."""
    inputs = (hidden_states(5), torch.zeros(5, 6, 8), torch.tensor([2]))
    program = torch.export.export(Cached().eval(), inputs, dynamic_shapes=(FREE, FREE, None))
    program = tensorrt.convertible(export_rewritten(program, profile=small_profile()) if rerouted else program)
    assert tensorrt.operators_without_converter(program) == set()
    hidden, cache = hidden_states(9), torch.rand(9, 6, 8)
    written = cache.index_copy(1, torch.tensor([3]), hidden[:, None])
    torch.testing.assert_close(program.module()(hidden, cache, torch.tensor([3]))[1], written, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_by_index(dim):
    table = torch.rand(6, 5, 4)
    index = torch.randint(0, 3, (6, 3, 2) if dim == 1 else (4, 5, 3))
    index = index[:, :, :2]
    assert torch.equal(tensorrt._gather_by_index(table, dim, index), table.gather(dim, index))


def decomposed(function, *inputs, free=True):
    """A function as the program that torch_tensorrt is given, and the operators that it calls."""

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    sizes = (tuple(FREE for _ in inputs),) if free else None
    program = tensorrt.convertible(torch.export.export(Module(), inputs, dynamic_shapes=sizes))
    return program.module(), {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("value", [1.0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_scatter_of_one_value_is_a_comparison(dtype, value):
    """A mask of groups; the converter makes of it what TensorRT refuses."""
    table, index = torch.zeros(3, 5, dtype=dtype), torch.tensor([[0, 4], [1, 1], [3, 2]])
    run, called = decomposed(lambda table, index: table.scatter(1, index, value), table, index)
    assert "aten.scatter.value" not in called
    for rows in (3, 1):
        torch.testing.assert_close(run(table[:rows], index[:rows]), table[:rows].scatter(1, index[:rows], value))
    run, _ = decomposed(
        lambda table, index: table.scatter(-2, index, value), table.T.contiguous(), index.T.contiguous()
    )
    assert torch.equal(run(table.T, index.T), table.T.scatter(0, index.T, value))


def test_a_scatter_into_some_rows_stays():
    table, index = torch.zeros(3, 5), torch.tensor([[0, 4], [1, 1]])
    run, called = decomposed(lambda table, index: table.scatter(1, index, 1.0), table, index, free=False)
    assert "aten.scatter.value" in called
    assert torch.equal(run(table, index), table.scatter(1, index, 1.0))


@pytest.mark.parametrize(
    ("start", "end", "step"), [(None, 3, 1), (2, None, 1), (1, 4, 1), (-2, None, 1), (0, 6, 1), (0, 6, 2)]
)
def test_writing_to_a_slice(start, end, step):
    """Keys in two parts; what is written has another type."""

    def write(hidden):
        keys = hidden.new_empty(hidden.shape[0], 6).fill_(7)
        keys[:, start:end:step] = hidden[:, : len(range(6)[start:end:step])].double()
        return keys

    run, called = decomposed(write, torch.rand(4, 8))
    assert ("aten.slice_scatter.default" in called) == (step == 2)
    assert "aten.new_empty.default" not in called
    hidden = torch.rand(9, 8)
    torch.testing.assert_close(run(hidden), write(hidden), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "asked"), [(8, None), (4, True)])
def test_attention_with_values_of_another_width(recorder, width, asked):
    """Only then it is to be decomposed, unless the user says otherwise."""

    class Attention(SmallMoE):
        def forward(self, hidden):
            mixed = torch.nn.functional.scaled_dot_product_attention(
                *[hidden[None, None]] * 2, hidden[None, None, :, :width]
            )
            return super().forward(hidden), mixed

    for options, wanted in (({}, asked), ({"decompose_attention": False}, False)):
        tensorrt.compile(Attention().eval(), (hidden_states(5),), profile=small_profile(), **options)
        assert recorder.pop()[1].get("decompose_attention") is wanted


def test_unknown_operators_are_named():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    program = torch.export.export(Odd(), (torch.rand(3),), dynamic_shapes=(FREE,))
    assert tensorrt.operators_without_converter(program) == {"aten.special_bessel_j0.default"}


@pytest.mark.parametrize(("operator", "numbers"), thinned([CASES[i] for i in (0, 3, 4, 7, 8)], (1, 4)), ids=str)
def test_every_onnx_operator_is_listed(tmp_path, operator, numbers):
    """By name, and by the type of its first input."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    lowering = pytest.importorskip("sere_compile.lowering.onnx")
    done = lowering.export(traced(operator, numbers), None, tmp_path / "m.onnx")
    assert tensorrt.operators_not_in_list(done.path) == set()
    first, last = tensorrt.operator_tables()["onnx"]["opsets"]
    assert first <= done.opset <= last
    listed = tensorrt.operator_tables()["onnx"]["operators"]
    assert {(name, kind) for name, kind in first_inputs(onnx, done.path) if kind not in listed[name]} == set()
    assert set(free_axes(onnx.load(done.path).graph)) == set()


def first_inputs(onnx, path):
    """(operator, TensorRT's word for the type of its first input) of every node that has one."""
    words = {1: "FP32", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 16: "BF16"}
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.input:
            # Where chooses between its second and third.
            yield node.op_type, words[types[node.input[1 if node.op_type == "Where" else 0]]]


def free_axes(graph):
    """Operators whose axes are computed, where TensorRT's list says that they have to be known."""
    known = {tensor.name for tensor in graph.initializer}
    known |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    axes = {"ReduceMax": 1, "ReduceMin": 1, "ReduceSum": 1, "Slice": 3, "Squeeze": 1, "TopK": 1, "Unsqueeze": 1}
    for node in graph.node:
        position = axes.get(node.op_type, len(node.input))
        if position < len(node.input) and node.input[position] not in known:
            yield node.op_type


def test_onnx_operators_outside_the_list_are_named(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    text = '<ir_version: 8, opset_import: ["" : 18, "own" : 1]> g (float[4] x) => (float[4] y)'
    model = onnx.parser.parse_model(text + " { a = Det(x) b = own.Thing(a) y = Relu(b) }")
    onnx.save(model, tmp_path / "m.onnx")
    assert tensorrt.operators_not_in_list(tmp_path / "m.onnx") == {"Det", "own::Thing"}


# What is handed to torch_tensorrt and tensorrt


def compile_small(**options):
    settings = {"profile": small_profile(), "dynamic_shapes": ({0: torch.export.Dim("tokens", min=1, max=64)},)}
    return tensorrt.compile(SmallMoE().eval(), (hidden_states(5),), **settings | options)


def test_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"torch_tensorrt.*sere-compile\[tensorrt\]"):
        compile_small()
    for library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, library, None)
    for call in (tensorrt.build_onnx, tensorrt.check):
        with pytest.raises(MissingExtraError, match=r"neither can be imported: .*sere-compile\[tensorrt-rtx\]"):
            call(tmp_path / "m.onnx")


@pytest.fixture
def recorder(monkeypatch):
    """In the place of torch_tensorrt: keeps what it is called with, and returns the program to run in PyTorch."""
    calls = []

    def record(program, **options):
        calls.append((program, options))
        return program.module()

    package, dynamo = types.ModuleType("torch_tensorrt"), types.ModuleType("torch_tensorrt.dynamo")
    package.dynamo, dynamo.compile = dynamo, record
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", dynamo)
    return calls


def test_compile_hands_over_a_decomposed_program(recorder):
    config = SereConfig(select_top_k=1)
    run = compile_small(config=config, min_block_size=1)
    ((program, options),) = recorder
    assert "sere" not in str(program.graph).replace("sere_similarity", "")
    assert tensorrt.operators_without_converter(program) == set()
    assert options["min_block_size"] == 1
    assert options["kwarg_inputs"] == {}
    torch.testing.assert_close(options["arg_inputs"], [hidden_states(5)])
    wanted = export_rewritten(
        SmallMoE().eval(), (hidden_states(5),), profile=small_profile(), config=config, dynamic_shapes=(FREE,)
    )
    torch.testing.assert_close(run(hidden_states(11)), wanted.module()(hidden_states(11)))


def test_compile_takes_a_program(recorder):
    program = torch.export.export(SmallMoE().eval(), (hidden_states(5),))
    tensorrt.compile(program, None, profile=small_profile())
    ((_, options),) = recorder
    torch.testing.assert_close(options["arg_inputs"], [hidden_states(5)])


def test_compile_without_gates(recorder):
    model = torch.nn.Linear(8, 8)
    with pytest.raises(GateNotFoundError):
        tensorrt.compile(model, (hidden_states(5),))
    tensorrt.compile(model, (hidden_states(5),), allow_no_gates=True)
    assert len(recorder) == 1


def test_trtexec_command():
    shapes = {"input_ids": ((1, 1), (8, 1), (64, 1)), "keys_0": ((1, 2, 6, 8), (8, 2, 6, 8), (64, 2, 6, 8))}
    assert tensorrt.trtexec_command("m.onnx", shapes=shapes) == [
        "trtexec",
        "--onnx=m.onnx",
        "--saveEngine=m.engine",
        "--minShapes=input_ids:1x1,keys_0:1x2x6x8",
        "--optShapes=input_ids:8x1,keys_0:8x2x6x8",
        "--maxShapes=input_ids:64x1,keys_0:64x2x6x8",
    ]
    assert tensorrt.trtexec_command("m.onnx", "e.plan") == ["trtexec", "--onnx=m.onnx", "--saveEngine=e.plan"]


# With TensorRT


@end_to_end
def test_engine():
    """The engine's output is that of the re-routed program in PyTorch, for several numbers of tokens."""
    model, config = SmallMoE().eval().cuda(), SereConfig(select_top_k=1, threshold=0.3)
    tokens = {0: torch.export.Dim("tokens", min=1, max=64)}
    example = hidden_states(5).cuda()
    engine = tensorrt.compile(
        model, (example,), profile=small_profile(), config=config, dynamic_shapes=(tokens,), min_block_size=1
    )
    program = export_rewritten(model, (example,), profile=small_profile(), config=config, dynamic_shapes=(tokens,))
    for count in (1, 7, 64):
        hidden = hidden_states(count, seed=count).cuda()
        torch.testing.assert_close(engine(hidden), program.module()(hidden), rtol=0, atol=1e-3)
