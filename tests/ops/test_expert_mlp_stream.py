"""`sere::expert_mlp` with FP8 weights, and its CUDA C++ kernels: against fp64, on poisoned memory, in graphs, compiled.

Without a GPU the reference is judged, and what the kernels are compiled for.
"""

import dataclasses
import itertools
import shutil
import subprocess

import pytest
import torch

from sere_compile.ops import expert_mlp
from sere_compile.ops.expert_mlp import ACTIVATIONS, expert_mlp_into, stream
from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp
from sere_compile.ops.expert_mlp.reference import Call, activation_number
from sere_compile.ops.expert_mlp.stream import Stream, StreamConfig, launch_stream, takes

from ..thinned import thinned
from . import cuda_on_cpu
from .cases import poisoned_memory
from .test_expert_mlp import Layer, arguments_with, assert_close_to_oracle, oracle, small_tiles

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
WIDE = {"hidden": 256, "inner": 128}


def quantised(weight):
    """(FP8 [E, R, C], scales, what they stand for in fp64): a scale for each block of 128 x 128."""
    experts, rows, columns = weight.shape
    padded = torch.zeros(experts, -(-rows // 128) * 128, -(-columns // 128) * 128, device=weight.device)
    padded[:, :rows, :columns] = weight.float()
    blocks = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    scale = blocks.abs().amax((2, 4)).clamp(min=1e-6) / 448
    wide = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    values = (padded / wide).to(FP8)
    exact = values.double() * wide.double()
    return values[:, :rows, :columns].contiguous(), scale, exact[:, :rows, :columns]


def with_fp8(arguments):
    """(arguments with FP8 weights and scales, the same with the weights that these stand for)."""
    (gate_up, gate_up_scale, exact_gate_up), (down, down_scale, exact_down) = map(quantised, arguments[3:5])
    scaled = (*arguments[:3], gate_up, down, *arguments[5:], gate_up_scale, down_scale)
    return scaled, (*arguments[:3], exact_gate_up, exact_down, *arguments[5:])


@pytest.mark.parametrize(
    "layer",
    [
        Layer(dtype=BF16, **WIDE),
        Layer(dtype=BF16, hidden=200, inner=72, bias=True),
        Layer(dtype=FP16, activation="relu2", **WIDE),
        Layer(dtype=BF16, activation="gpt_oss", interleaved=True, tokens=40, **WIDE),
    ],
    ids=str,
)
def test_fp8_weights_equal_oracle(layer, device):
    """Blocks that the edges cut, activations of each kind; on a GPU the kernel where there is one."""
    scaled, exact = with_fp8(layer.draw(device=device))
    assert_close_to_oracle(expert_mlp(*scaled), exact)


def rounded_to_fp8(row, dtype):
    """128 numbers of a dtype after another with one factor, so that their largest is 448, as e4m3; to fp64."""
    pieces = []
    for piece in row.to(dtype).double().split(128):
        factor = piece.abs().max().clamp(min=1e-10) / 448
        pieces.append((piece / factor).to(FP8).double() * factor)
    return torch.cat(pieces)


def assert_close_with_fp8_activations(result, exact):
    """Sums that differ in the last bit may round to another FP8 number: nearer than to what is not rounded at all."""
    want, unrounded = oracle(*exact, rounded=lambda row: rounded_to_fp8(row, result.dtype)), oracle(*exact)
    errors = [float((result.cpu().double() - x).norm() / x.norm()) for x in (want, unrounded)]
    assert errors[0] < errors[1] / 2, errors
    assert 2e-2 < errors[1] < 6e-2, errors


FP8_ROWS = [
    Layer(dtype=BF16, **WIDE),
    Layer(dtype=BF16, hidden=200, inner=72, bias=True),
    Layer(dtype=BF16, activation="relu2", tokens=40, **WIDE),
]


@pytest.mark.parametrize("layer", FP8_ROWS, ids=str)
def test_fp8_activations_equal_oracle(layer, device):
    """On a GPU CUDA C++ and, where sizes are no multiples of 128 or slots many, Triton."""
    scaled, exact = with_fp8(layer.draw(device=device))
    assert_close_with_fp8_activations(expert_mlp(*scaled, fp8_activations=True), exact)


def test_fp8_activations_of_zeros_and_nan(device):
    """A token of zeros gives zeros, one with a NaN gives NaN, and the others what they gave."""
    scaled, _ = with_fp8(Layer(dtype=BF16, **WIDE).draw(device=device, ids=torch.tensor([[0, 1], [2, 3], [1, 2]])))
    clean = expert_mlp(*scaled, fp8_activations=True)
    hidden = scaled[0].clone()
    hidden[0], hidden[1, 3] = 0, torch.nan
    out = expert_mlp(hidden, *scaled[1:], fp8_activations=True)
    assert out[0].abs().max() == 0
    assert out[1].isnan().all()
    assert torch.equal(out[2], clean[2])


def test_fp8_activations_need_scales():
    with pytest.raises(ValueError, match="fp8_activations: expected False without FP8 weights"):
        expert_mlp(*Layer().draw(), fp8_activations=True)


def test_fp8_opcheck():
    """Without the test of the schema, which computes with its arguments, as FP8 on a CPU cannot."""
    scaled, _ = with_fp8(Layer(dtype=BF16, **WIDE).draw())
    kinds = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sere.expert_mlp.default, scaled, test_utils=kinds)


SCALES = {
    "gate_up": torch.zeros(6, 48, 40, dtype=FP8),
    "down": torch.zeros(6, 40, 24, dtype=FP8),
    "gate_up_scale": torch.ones(6, 1, 1),
    "down_scale": torch.ones(6, 1, 1),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate_up": torch.zeros(6, 48, 40)}, TypeError, "gate_up: expected dtype torch.float8_e4m3fn with scales"),
        ({"down_scale": None}, ValueError, r"down_scale: expected shape \[6, 1, 1\], as the other weight has scales"),
        ({"gate_up_scale": torch.ones(6, 48, 1)}, ValueError, r"gate_up_scale: expected shape \[6, 1, 1\], got"),
        ({"down_scale": torch.ones(6, 1, 1, dtype=BF16)}, TypeError, "down_scale: expected dtype torch.float32"),
        ({"down_scale": torch.ones(6, 1, 1, device="meta")}, ValueError, "down_scale: expected device cpu"),
        ({"gate_up_scale": None, "down_scale": None}, TypeError, "gate_up: expected dtype torch.float32"),
    ],
)
def test_wrong_scales(changes, error, message):
    """Every check names argument, expected and actual."""
    with pytest.raises(error, match=message):
        expert_mlp(**arguments_with(**SCALES | changes))


def test_scales_with_transposed_weights_are_refused():
    transposed = {name: SCALES[name].transpose(1, 2) for name in ("gate_up", "down")}
    with pytest.raises(ValueError, match="transposed: expected False with scales"):
        expert_mlp(**arguments_with(**SCALES | transposed, transposed=True))


def test_no_kernel_without_a_gpu():
    """A CPU tensor, or a fake CUDA tensor where there is no CUDA, gets no CUDA C++."""
    tensors = Layer(dtype=BF16, **WIDE).draw()[:7]
    assert not takes(Call(*tensors, None, None), transposed=False)


@pytest.mark.parametrize("tile", thinned([{}, {"swap": True, "align": 4}], (1,)), ids=["rows", "swapped-narrow"])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(dtype=FP16, hidden=200, inner=72),
        Layer(dtype=FP16, hidden=144, inner=136, activation="relu2", bias=True),
        Layer(dtype=FP16, tokens=40, experts=2, hidden=144, inner=72, activation="gpt_oss", interleaved=True),
    ],
    ids=str,
)
def test_triton_kernels_equal_oracle_with_fp8_weights(layer, tile, kernel_device):
    """Where there is no CUDA C++."""
    scaled, exact = with_fp8(layer.draw(device=kernel_device))
    with poisoned_memory():
        out = launch_expert_mlp(*scaled[:10], small_tiles(**tile), *scaled[10:])
    assert_close_to_oracle(out, exact)


def test_triton_kernels_equal_oracle_with_fp8_activations(kernel_device):
    scaled, exact = with_fp8(Layer(dtype=FP16, hidden=200, inner=72).draw(device=kernel_device))
    with poisoned_memory():
        out = launch_expert_mlp(*scaled[:10], small_tiles(), *scaled[10:], fp8_activations=True)
    assert_close_with_fp8_activations(out, exact)


# What is compiled


def streams():
    """Specialisations of both kinds: weights, slots, activations."""
    shapes = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (60, 4, 2048, 1408), (32, 4, 2880, 2880), (512, 32, 64, 64)]
    kinds = ((False, False), (True, False), (True, True))
    for (experts, top_k, hidden, inner), slots, (fp8, rows) in itertools.product(shapes, (8, 16, 256, 4096), kinds):
        if fp8 and (hidden % 128 or inner % 128):
            continue
        plain = {"ids64": True, "activation": "silu_glu", "interleaved": False, "gate_up_bias": False, "half": False}
        used = stream.stream_config(slots, fp8, rows)
        wgmma = dataclasses.replace(used, rows=min(used.rows, 16), groups=1, wgmma=True, row_warps=4)
        ahead = dataclasses.replace(wgmma, rounds_ahead=True)
        for config in (used, wgmma, ahead, dataclasses.replace(wgmma, blocks=1)) if rows else (used,):
            yield Stream(
                experts, top_k, hidden, inner, max_slots=512 if slots <= 512 else 4096, down_bias=False, fp8=fp8,
                weights=1, fp8_rows=rows, config=config, **plain,
            )  # fmt: skip


@pytest.mark.parametrize("kind", [(False, False), (True, False), (True, True)], ids=["bf16", "fp8", "fp8 activations"])
def test_an_expert_has_its_rows_in_one_pass(kind):
    """Which slots are in which pass changes from run to run, and with their number the order of `mma.sync`'s sums."""
    for tokens, top_k in itertools.product(range(1, stream.MOST_TOKENS + 1), range(1, stream.MOST_TOP_K + 1)):
        if tokens * top_k <= stream.MOST_SLOTS:
            assert stream.stream_config(tokens * top_k, *kind).rows >= tokens


def test_shared_memory_fits():
    """A ring of at least three stages, within what a block may have."""
    for one in streams():
        most = stream.TWO_BLOCKS if one.config.groups == 1 and one.config.blocks == 2 else stream.ONE_BLOCK
        assert one.stages >= 3, one
        assert one.shared_bytes <= most, one
        assert one.stages % one.config.groups == 0, one


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu_glu", "gpt_oss", "relu2"])
def test_source_compiles(activation, tmp_path):
    """With nvcc where there is one, without a GPU. The source asserts that its shared memory is what is asked for."""
    source = tmp_path / "all.cu"
    source.write_text(stream.source())
    for number, one in enumerate([*list(streams())[:5], list(streams())[-1]]):
        changes = {"ACTIVATION": activation_number(activation), "GATED": int(activation != "relu2")}
        macros = [f"-D{macro}={value}" for macro, value in (dict(one.macros()) | changes).items()]
        output = str(tmp_path / str(number))
        kind = "90a" if one.config.wgmma else "90"
        target = f"-gencode=arch=compute_{kind},code=sm_{kind}"
        command = ["nvcc", target, "-std=c++17", "-cubin", *macros, "-o", output, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # What the assembler says where it makes each product wait for the one before.
        assert "serialized" not in done.stdout + done.stderr, done.stderr


# The kernels, on a CPU


def run_on_cpu(arguments, config, folder):
    """As `launch`, with the instructions of `cuda_on_cpu.h`."""
    *tensors, activation, interleaved, _ = arguments[:10]
    return cuda_on_cpu.run(Call(*tensors, *arguments[10:]), activation, interleaved, config, folder)


CPU_CASES = [
    (Layer(dtype=BF16, hidden=64, inner=64), StreamConfig(32)),
    (Layer(dtype=FP16, hidden=64, inner=128, bias=True, ids_dtype=torch.int32), StreamConfig(8)),
    (Layer(dtype=BF16, tokens=19, experts=3, activation="gpt_oss", interleaved=True, **WIDE), StreamConfig(16)),
    (Layer(dtype=BF16, tokens=30, experts=40, hidden=64, inner=64, activation="relu2"), StreamConfig(32, trigger=0)),
    (Layer(dtype=BF16, tokens=70, slots=1, experts=1, hidden=64, inner=64), StreamConfig(64)),
    (Layer(dtype=BF16, tokens=19, slots=3, experts=4, hidden=192, inner=320), StreamConfig(32, groups=2)),
    (Layer(dtype=BF16, tokens=2, hidden=64, inner=1024), StreamConfig(8, trigger=2)),
    # Each token names each expert several times.
    (Layer(dtype=BF16, tokens=9, slots=8, experts=2, hidden=64, inner=64), StreamConfig(8)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "config"), thinned(CPU_CASES, (2,)), ids=str)
def test_kernels_on_a_cpu_equal_oracle(layer, config, tmp_path):
    """Ring, plan, tiles of one and two experts, layouts: all but the instructions themselves."""
    arguments = layer.draw()
    assert_close_to_oracle(run_on_cpu(arguments, config, tmp_path), arguments)


WGMMA_8, WGMMA_32 = StreamConfig(8, wgmma=True), StreamConfig(32, wgmma=True, row_warps=4)
AHEAD = StreamConfig(16, wgmma=True, rounds_ahead=True)


@pytest.mark.parametrize(
    ("activation", "config"),
    thinned(
        itertools.product(
            ("silu_glu", "relu2"),
            (StreamConfig(16), StreamConfig(32, groups=2)),
        ),
        (0, 3),
    ),
    ids=str,
)
def test_fp8_kernels_on_a_cpu_equal_oracle(activation, config, tmp_path):
    scaled, exact = with_fp8(Layer(dtype=BF16, tokens=11, experts=3, activation=activation, **WIDE).draw())
    assert_close_to_oracle(run_on_cpu(scaled, config, tmp_path), exact)


@pytest.mark.parametrize(
    ("layer", "config"),
    thinned(
        [
            (Layer(dtype=BF16, tokens=11, experts=3, **WIDE), StreamConfig(16)),
            (Layer(dtype=BF16, tokens=30, experts=3, activation="relu2", **WIDE), StreamConfig(32, groups=2)),
            (Layer(dtype=BF16, tokens=19, slots=3, experts=9, hidden=128, inner=384), StreamConfig(8, trigger=1)),
            (Layer(dtype=BF16, tokens=19, slots=3, experts=9, hidden=128, inner=384), WGMMA_8),
            (Layer(dtype=BF16, tokens=30, experts=3, activation="relu2", **WIDE), WGMMA_32),
            (Layer(dtype=BF16, tokens=11, experts=3, bias=True, **WIDE), StreamConfig(16, wgmma=True, row_warps=4)),
            (Layer(dtype=BF16, tokens=19, slots=3, experts=9, hidden=128, inner=384), AHEAD),
        ],
        (6,),
    ),
    ids=str,
)
def test_fp8_activations_on_a_cpu_equal_oracle(layer, config, tmp_path):
    scaled, exact = with_fp8(layer.draw())
    assert_close_with_fp8_activations(run_on_cpu((*scaled, True), config, tmp_path), exact)


# The kernels, on a GPU


def launch(arguments, config=None):
    """The kernels' result on poisoned memory; arguments of the operator."""
    *tensors, activation, interleaved, _ = arguments[:10]
    with poisoned_memory():
        out = launch_stream(Call(*tensors, *arguments[10:]), activation, interleaved, config)
    assert out is not None
    return out


GPU_LAYERS = [
    Layer(dtype=BF16, **WIDE),
    Layer(dtype=FP16, tokens=19, slots=3, experts=5, bias=True, ids_dtype=torch.int32, **WIDE),
    Layer(dtype=BF16, tokens=40, experts=1, hidden=64, inner=64),
    Layer(dtype=BF16, tokens=1, slots=8, experts=128, hidden=2048, inner=768),
    Layer(dtype=BF16, tokens=33, slots=4, experts=33, hidden=192, inner=320, activation="gpt_oss", interleaved=True),
    *(Layer(dtype=BF16, activation=name, bias=True, **WIDE) for name in ACTIVATIONS),
]
WGMMA = [
    StreamConfig(8, wgmma=True),
    StreamConfig(8, wgmma=True, row_warps=4),
    StreamConfig(16, wgmma=True, trigger=8),
    StreamConfig(16, wgmma=True, row_warps=4),
    StreamConfig(32, wgmma=True, row_warps=4, trigger=0),
    StreamConfig(16, wgmma=True, row_warps=4, blocks=1),
    StreamConfig(8, wgmma=True, rounds_ahead=True),
    StreamConfig(16, wgmma=True, rounds_ahead=True, trigger=8),
    StreamConfig(32, wgmma=True, rounds_ahead=True, row_warps=4, trigger=0),
]
CONFIGS = [StreamConfig(8), StreamConfig(16), StreamConfig(32), StreamConfig(64), StreamConfig(32, groups=2)]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", GPU_LAYERS, ids=str)
def test_kernels_equal_oracle(layer):
    arguments = layer.draw(device="cuda")
    assert_close_to_oracle(launch(arguments), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8 activations"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cut_equals_oracle(config, kind):
    """More slots of an expert than a pass takes, tiles of two experts, blocks without work."""
    if kind == "fp8" and config.rows == 64:
        pytest.skip("FP8 weights that are widened have passes of 32 slots at most")
    ids = torch.randint(-1, 8, (50, 3), generator=torch.Generator().manual_seed(0))
    ids[::2, 0] = 2
    arguments = exact = Layer(dtype=BF16, experts=7, **WIDE).draw(device="cuda", ids=ids)
    if kind != "bf16":
        arguments, exact = with_fp8(arguments)
    if kind == "fp8 activations":
        assert_close_with_fp8_activations(launch((*arguments, True), config), exact)
    else:
        assert_close_to_oracle(launch(arguments, config), exact)


def needs_wgmma():
    if not stream.has_wgmma(0):
        pytest.skip("wgmma is Hopper's alone")


@pytest.mark.gpu
@pytest.mark.parametrize("config", WGMMA, ids=str)
def test_wgmma_equals_oracle(config):
    """Cuts as above; then no gate, a bias, and an odd number of stages, more than the ring has."""
    needs_wgmma()
    ids = torch.randint(-1, 8, (50, 3), generator=torch.Generator().manual_seed(0))
    ids[::2, 0] = 2
    layers = [
        (Layer(dtype=BF16, experts=7, **WIDE), ids),
        (Layer(dtype=BF16, tokens=9, slots=4, experts=6, hidden=384, inner=1152, bias=True, activation="relu2"), None),
    ]
    for layer, given in layers:
        scaled, exact = with_fp8(layer.draw(device="cuda") if given is None else layer.draw(device="cuda", ids=given))
        assert_close_with_fp8_activations(launch((*scaled, True), config), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("config", WGMMA[2:], ids=str)
def test_wgmma_gives_the_same_every_time(config):
    """What one kind of memory access writes, the other reads: never too early."""
    needs_wgmma()
    layer = Layer(dtype=BF16, tokens=32, slots=8, experts=64, hidden=1024, inner=512)
    scaled, _ = with_fp8(layer.draw(device="cuda"))
    arguments = (*scaled, True)
    first = launch(arguments, config)
    assert all(torch.equal(launch(arguments, config), first) for _ in range(20))
    want = launch(arguments, StreamConfig(16))
    assert (first.double() - want.double()).norm() < 1e-2 * want.double().norm()


@pytest.mark.gpu
def test_one_bias_alone():
    """Each projection has its own."""
    for missing in (5, 6):
        arguments = list(Layer(dtype=BF16, bias=True, **WIDE).draw(device="cuda"))
        arguments[missing] = None
        assert_close_to_oracle(launch(arguments), arguments)


@pytest.mark.gpu
def test_slots_of_no_expert_contribute_nothing():
    """Not even where their routing weight is NaN."""
    ids = torch.tensor([[1, -1], [3, 2], [-5, 9], [1, 2], [2, 1]])
    arguments = list(Layer(dtype=BF16, experts=3, **WIDE).draw(device="cuda", ids=ids))
    clean = launch(arguments)
    arguments[2] = torch.where((arguments[1] < 0) | (arguments[1] > 2), torch.nan, arguments[2])
    assert torch.equal(launch(arguments), clean)
    assert clean[2].abs().max() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_slots_of_one_expert_are_merged(tokens):
    """As S = 1 and 2 leave some."""
    ids = torch.randint(0, 20, (tokens, 8), generator=torch.Generator().manual_seed(0))
    ids[:, 2:] = ids[:, :1]
    ids[::2, 1] = ids[::2, 0]
    arguments = Layer(dtype=BF16, experts=16, bias=True, **WIDE).draw(device="cuda", ids=ids)
    assert_close_to_oracle(launch(arguments), arguments)


@pytest.mark.gpu
def test_the_result_is_the_same_every_time():
    """Which block has which rows is fixed, and how a slot is summed."""
    arguments = Layer(dtype=BF16, tokens=32, slots=8, experts=64, hidden=1024, inner=512).draw(device="cuda")
    first = launch(arguments)
    assert all(torch.equal(launch(arguments), first) for _ in range(20))


@pytest.mark.gpu
def test_operator_uses_them_eager_compiled_and_in_a_graph():
    """Few slots per expert; kernels overlap with those of the call before, in a graph as well."""
    arguments = Layer(dtype=BF16, tokens=8, slots=2, experts=16, **WIDE).draw(device="cuda")
    want = launch(arguments)
    assert takes(Call(*arguments[:7], None, None), transposed=False)
    assert torch.equal(expert_mlp(*arguments), want)
    wide = torch.full((10, want.shape[1]), -77, dtype=BF16, device="cuda")
    expert_mlp_into(wide[1:-1], *arguments[:9])
    assert torch.equal(wide[1:-1], want)
    assert (wide[[0, -1]] == -77).all()
    compiled = torch.compile(lambda x, *rest: expert_mlp(expert_mlp(x, *rest), *rest), fullgraph=True)
    twice = launch((want, *arguments[1:]))
    torch.testing.assert_close(compiled(*arguments), twice, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = expert_mlp(expert_mlp(*arguments), *arguments[1:])
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, twice)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"tokens": 32, "experts": 16}, True),
        ({"tokens": 33, "experts": 64}, False),
        ({"tokens": 16, "experts": 7}, False),
        ({"dtype": torch.float32}, False),
        ({"hidden": 96}, False),
        ({"inner": 96}, False),
    ],
)
def test_calls_that_they_take(changes, expected):
    """Up to 32 tokens and 4 slots per expert, 16-bit weights whose rows are whole stages."""
    layer = Layer(**{"dtype": BF16, "tokens": 5, "experts": 8} | WIDE | changes)
    assert takes(Call(*layer.draw(device="cuda")[:7], None, None), transposed=False) is expected


@pytest.mark.gpu
def test_odd_addresses_and_strides():
    """A view that starts between 16 bytes is copied; strided ids and weights are read right."""
    arguments = list(Layer(dtype=BF16, **WIDE).draw(device="cuda"))
    want = launch(arguments)
    hidden = arguments[0]
    shifted = torch.empty(hidden.numel() + 1, dtype=BF16, device="cuda")[1:].view_as(hidden).copy_(hidden)
    strided = [torch.stack([x, x], dim=2)[..., 0] for x in arguments[1:3]]
    assert torch.equal(launch([shifted, *strided, *arguments[3:]]), want)
