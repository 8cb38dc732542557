"""MXFP4 weights in `sere::expert_mlp`; what the bytes stand for is judged by transformers, which reads gpt-oss's.

Under the interpreter in fp32, since its tl.dot takes no bf16.
"""

import dataclasses

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sere_compile.ops import expert_mlp
from sere_compile.ops.expert_mlp import expert_mlp_into
from sere_compile.ops.expert_mlp.mxfp4 import mxfp4_sizes, pack_mxfp4, unpack_mxfp4
from sere_compile.ops.expert_mlp.reference import Call, expert_mlp_reference
from sere_compile.ops.expert_mlp.tiles import LaunchConfig, TileConfig

from .cases import poisoned_memory
from .test_expert_mlp import Layer, assert_close_to_oracle

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def dequantised(packed, scale, dtype=torch.bfloat16):
    """The weights [E, M, N] as transformers makes them of a checkpoint, where M and N are exchanged."""
    blocks = packed.unflatten(-1, (-1, 16))
    return convert_moe_packed_tensors(blocks, scale, dtype=dtype).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class PackedLayer(Layer):
    """A layer with MXFP4 weights, and the same with those that they stand for."""

    tokens: int = 4
    experts: int = 3
    hidden: int = 64
    inner: int = 32

    def draw_both(self, device="cpu"):
        """(arguments of the operator, those without packed weights)."""
        arguments = self.draw(device=device)
        generator = torch.Generator().manual_seed(3)
        packed, scales, plain = [], [], []
        for weight in arguments[3:5]:
            sizes, of_scales = mxfp4_sizes(weight.shape)
            packed.append(torch.randint(256, sizes, generator=generator, dtype=torch.uint8))
            scales.append(torch.randint(118, 127, of_scales, generator=generator, dtype=torch.uint8))
            plain.append(dequantised(packed[-1], scales[-1], torch.float32).to(arguments[0].dtype).to(device))
        packed, scales = ([tensor.to(device) for tensor in tensors] for tensors in (packed, scales))
        return (*arguments[:3], *packed, *arguments[5:], *scales), (*arguments[:3], *plain, *arguments[5:])


LAYERS = [
    PackedLayer(),
    PackedLayer(activation="gpt_oss", interleaved=True, bias=True, slots=4, ids_dtype=torch.int32),
    PackedLayer(tokens=19, slots=3, experts=2, hidden=32, interleaved=True),
    PackedLayer(activation="relu2", bias=True, hidden=32, inner=96),
    PackedLayer(tokens=1, experts=1, slots=1),
]


class TestFormat:
    def test_every_byte_and_scale_is_what_transformers_reads(self):
        """But for the scale that stands for NaN, which transformers takes for 2 ** 128."""
        packed = ALL_BYTES.repeat(255, 1)[None]
        scale = ALL_BYTES[:255, None].repeat(1, 16)[None]
        want = dequantised(packed, scale, torch.float64).float()
        assert torch.equal(unpack_mxfp4(packed, scale), want)
        assert unpack_mxfp4(packed[:, :1, :16], torch.tensor([[[255]]], dtype=torch.uint8)).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_what_was_dequantised_is_packed_again(self, dtype):
        generator = torch.Generator().manual_seed(0)
        packed = torch.randint(256, (3, 40, 16), generator=generator, dtype=torch.uint8)
        packed[:, :16] &= 0x99  # codes 0 and 1 alone: another scale stands for the same
        packed[:, :4] = 0
        packed[0, 0, 0] = 8  # -0
        scale = torch.randint(1, 250, (3, 40, 1), generator=generator, dtype=torch.uint8)
        weights = unpack_mxfp4(packed, scale).to(dtype)
        again = unpack_mxfp4(*pack_mxfp4(weights))
        assert torch.equal(again, weights.float())
        assert torch.equal(again.signbit(), weights.signbit())

    def test_shapes_and_types(self):
        packed, scale = pack_mxfp4(torch.ones(2, 3, 64))
        assert ((*packed.shape,), (*scale.shape,)) == mxfp4_sizes((2, 3, 64)) == ((2, 3, 32), (2, 3, 2))
        assert (packed.dtype, scale.dtype) == (torch.uint8, torch.uint8)

    @pytest.mark.parametrize("number", [1.25, 5.0, float("nan"), float("inf"), 2.0**-20])
    def test_other_numbers_are_refused(self, number):
        """5 is between two codes, and 2 ** -20 has none beside 6."""
        weights = torch.full((1, 2, 64), 6.0)
        weights[0, 1, 40] = number
        with pytest.raises(ValueError, match="expected numbers of MXFP4, got others in 1 of 4 blocks of 32"):
            pack_mxfp4(weights)

    def test_rows_of_other_sizes_are_refused(self):
        with pytest.raises(ValueError, match=r"multiple of 32, got \[2, 40\]"):
            pack_mxfp4(torch.zeros(2, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_operator_equals_oracle(layer, dtype, device):
    arguments, plain = dataclasses.replace(layer, dtype=dtype).draw_both(device)
    assert_close_to_oracle(expert_mlp(*arguments), plain)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_reference_equals_oracle(layer):
    arguments, plain = layer.draw_both()
    assert_close_to_oracle(expert_mlp_reference(*arguments), plain)


def small_tiles(**changes):
    """Less than each dimension: two groups of 32 numbers at a time, or one."""
    tile = TileConfig(
        **{"block_n": 16, "block_k": 64, "num_warps": 4, "num_stages": 2, "per_sm": 1, "block_m": 16} | changes
    )
    return LaunchConfig(tile, tile, chunk=16)


@pytest.mark.parametrize("tile", [{}, {"swap": True}, {"block_k": 64, "align": 4}], ids=["rows", "swapped", "narrow"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_kernels_equal_oracle(layer, tile, kernel_device):
    from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

    arguments, plain = layer.draw_both(kernel_device)
    with poisoned_memory():
        got = launch_expert_mlp(*arguments[:10], small_tiles(**tile), *arguments[10:])
    assert_close_to_oracle(got, plain)


@pytest.mark.parametrize("tokens", [3, 40])
def test_kernels_with_their_own_tiles(tokens, kernel_device):
    from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

    layer = PackedLayer(tokens=tokens, activation="gpt_oss", interleaved=True, bias=True)
    arguments, plain = layer.draw_both(kernel_device)
    with poisoned_memory():
        got = launch_expert_mlp(*arguments[:10], None, *arguments[10:])
    assert_close_to_oracle(got, plain)


def run_ptx(text, words, scales):
    """What the statements write to $0 for int64 words and scales of 32 bits: those that `_fp4_to_bf16` is made of."""
    registers = {"$1": words, "$2": scales}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    def halves(bits):
        return torch.stack([bits & 0xFFFF, bits >> 16]).to(torch.int32).to(torch.int16).view(torch.bfloat16)

    def multiply_add(a, b, c):
        low, high = (halves(a).double() * halves(b).double() + halves(c).double()).bfloat16().view(torch.int16).long()
        return low & 0xFFFF | (high & 0xFFFF) << 16

    known = {
        "mov.b32": lambda a: torch.full_like(words, a), "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
        "shr.b32": lambda a, n: a >> n, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b,
        "fma.rn.bf16x2": multiply_add,
    }  # fmt: skip
    statements = [s.split(None, 1) for s in text.strip("{ }").split(";") if s.strip()]
    assert statements.pop(0)[0] == ".reg"
    for name, operands in statements:
        to, *given = operands.split(", ")
        registers[to] = known[name](*map(value, given))
    return halves(registers["$0"])


@pytest.mark.parametrize("quarter", range(4))
def test_what_a_gpu_makes_of_every_word(quarter):
    """Run statement by statement, since the interpreter runs no PTX; each half of a register on its own."""
    from sere_compile.ops.expert_mlp.projection import _fp4_to_bf16

    words = torch.arange(1 << 16)
    for scale in (0, 1, 2, 100, 127, 200, 253, 254, 255):
        other = (scale + 7) % 256
        bits = [{0: 0x40, 255: 0x7FC0}.get(s, s << 7) for s in (scale, other)]
        got = run_ptx(
            _fp4_to_bf16(quarter).value, words | words.flip(0) << 16, torch.full_like(words, bits[0] | bits[1] << 16)
        )
        for half, number, shared in ((got[0], words, scale), (got[1], words.flip(0), other)):
            packed = (number >> 4 * quarter & 15).to(torch.uint8).unflatten(0, (-1, 16))
            want = unpack_mxfp4(packed, torch.full((len(packed), 1), shared, dtype=torch.uint8))[:, ::2].bfloat16()
            assert torch.equal(half.view(torch.int16), want.flatten().view(torch.int16)) or half.isnan().all()
            assert half.isnan().all() == want.isnan().all() == (shared == 255)


def test_a_scale_of_nan_is_nan(kernel_device):
    """In the rows of its expert alone."""
    from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

    layer = PackedLayer(tokens=4, slots=1)
    arguments, _ = layer.draw_both(kernel_device)
    ids = torch.tensor([[0], [1], [2], [1]], device=kernel_device)
    arguments[-1][1] = 255
    for run in (expert_mlp_reference, lambda *a: launch_expert_mlp(*a[:10], small_tiles(), *a[10:])):
        got = run(arguments[0], ids, *arguments[2:])
        assert got.isnan().all(-1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_tensor_that_is_there(dtype, device):
    """As an engine calls it."""
    layer = PackedLayer(tokens=4, activation="gpt_oss", interleaved=True, bias=True, dtype=dtype)
    arguments, plain = layer.draw_both(device)
    out = torch.full_like(arguments[0], -77)
    expert_mlp_into(out, *arguments[:9], *arguments[10:12])
    assert_close_to_oracle(out, plain)


def test_what_kind_of_call_it_is():
    arguments, plain = PackedLayer().draw_both()
    call = Call(*arguments[:7], *arguments[10:])
    assert (call.mxfp4, call.fp8) == (True, False)
    assert not Call(*plain[:7]).mxfp4


def test_torch_compile_sees_through_it():
    arguments, _ = PackedLayer().draw_both()
    compiled = torch.compile(lambda *a: expert_mlp(*a) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expert_mlp(*arguments) + 1)
    torch.library.opcheck(torch.ops.sere.expert_mlp.default, arguments)


BYTES, SCALES = torch.zeros(3, 64, 16, dtype=torch.uint8), torch.zeros(3, 64, 1, dtype=torch.uint8)
WIDE = SCALES.reshape(3, 32, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 64).half()}, TypeError, "hidden: expected dtype torch.bfloat16 or torch.float32"),
        ({"transposed": True}, ValueError, "gate_up: expected shape"),
        ({"fp8_activations": True}, ValueError, "fp8_activations: expected False without FP8 weights"),
        ({"down_scale": None}, ValueError, r"down: expected shape|gate_up: expected shape"),
        ({"gate_up_scale": None}, ValueError, r"gate_up_scale: expected shape \[3, 64, 2\], as the other weight"),
        ({"down_scale": SCALES.float()}, TypeError, "down_scale: expected dtype torch.uint8, got torch.float32"),
        ({"down_scale": SCALES[:, :2]}, ValueError, r"down_scale: expected shape \[3, 64, 1\], got \[3, 2, 1\]"),
        ({"down_scale": SCALES.to("meta")}, ValueError, r"down_scale: expected device cpu \(of down\), got meta"),
        ({"gate_up": torch.zeros(3, 64, 32)}, TypeError, "gate_up: expected dtype torch.uint8 with scales"),
        ({"down": BYTES[:, :, :8], "gate_up": torch.zeros(3, 32, 32, dtype=torch.uint8), "gate_up_scale": SCALES},
         ValueError, r"gate_up_scale: expected shape \[3, 32, 2\]"),
        ({"down": BYTES[:, :, :8], "gate_up": torch.zeros(3, 32, 32, dtype=torch.uint8), "gate_up_scale": WIDE},
         ValueError, "down: expected rows of a multiple of 32 MXFP4 numbers, got 16"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, error, message):
    names = [argument.name for argument in torch.ops.sere.expert_mlp.default._schema.arguments]
    arguments = dict(zip(names, PackedLayer().draw_both()[0], strict=False)) | changes
    with pytest.raises(error, match=message):
        expert_mlp(**arguments)
