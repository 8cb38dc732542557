"""`sere::expert_mlp`: reference and kernels against an oracle in fp64, and the torch.compile stack around it.

Without CUDA the kernels run under Triton's interpreter, so the shapes are small: none of them is a multiple of a block.
"""

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl

from sere_compile.ops import expert_mlp
from sere_compile.ops.expert_mlp import ACTIVATIONS, expert_mlp_into, gate_width, supports
from sere_compile.ops.expert_mlp.kernel import cut
from sere_compile.ops.expert_mlp.reference import (
    Call,
    activate,
    activation_number,
    expert_mlp_reference,
    round_to_fp8,
    scale_sizes,
)

from ..thinned import thinned
from .cases import poisoned_memory

OP = torch.ops.sere.expert_mlp.default
# Rounding of inputs is in the case; these bound what the operator adds: one rounding of the activation, one of the
# result, and for fp32 the order of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call's shape and options; `draw` makes its tensors."""

    tokens: int = 5
    slots: int = 2
    experts: int = 6
    hidden: int = 40
    inner: int = 24
    activation: str = "silu_glu"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64

    def draw(self, seed=0, device="cpu", ids=None):
        """The operator's arguments, random; ids may name no expert."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype).to(device)

        columns = gate_width(self.activation) * self.inner
        gate_up = normal(self.experts, columns, self.hidden, scale=1.5 / math.sqrt(self.hidden))
        down = normal(self.experts, self.hidden, self.inner, scale=1 / math.sqrt(self.inner))
        if self.transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        if ids is None:
            ids = torch.randint(-1, self.experts + 1, (self.tokens, self.slots), generator=generator)
        weights = torch.rand(ids.shape, generator=generator).to(self.dtype)
        return (
            normal(len(ids), self.hidden),
            ids.to(self.ids_dtype).to(device),
            weights.to(device),
            gate_up,
            down,
            normal(self.experts, columns) if self.bias else None,
            normal(self.experts, self.hidden) if self.bias else None,
            self.activation,
            self.interleaved,
            self.transposed,
        )


def activation_fp64(x, name, interleaved):
    if gate_width(name) == 1:
        gate, up = x, torch.ones_like(x)
    elif interleaved:
        gate, up = x[0::2], x[1::2]
    else:
        gate, up = x[: len(x) // 2], x[len(x) // 2 :]
    if name == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return gate / (1 + torch.exp(-1.702 * gate)) * up
    values = {
        "silu": lambda: gate / (1 + torch.exp(-gate)),
        "gelu": lambda: gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))),
        "gelu_tanh": lambda: gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))),
        "relu": lambda: gate.clamp(min=0),
        "relu2": lambda: gate.clamp(min=0) ** 2,
    }
    return values[name.removesuffix("_glu")]() * up


def oracle(
    hidden, ids, weights, gate_up, down, gate_up_bias, down_bias, activation, interleaved, transposed, rounded=None
):
    """One token and slot at a time, in fp64; `rounded` changes what each weight is multiplied with."""
    rounded = rounded or (lambda x: x)
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, row in enumerate(ids.tolist()):
        for k, expert in enumerate(row):
            if not 0 <= expert < len(gate_up):
                continue
            first, second = gate_up[expert].cpu().double(), down[expert].cpu().double()
            if transposed:
                first, second = first.T, second.T
            x = first @ rounded(hidden[t].cpu().double())
            if gate_up_bias is not None:
                x = x + gate_up_bias[expert].cpu().double()
            x = second @ rounded(activation_fp64(x, activation, interleaved))
            if down_bias is not None:
                x = x + down_bias[expert].cpu().double()
            total[t] += weights[t, k].cpu().double() * x
    return total


def assert_close_to_oracle(result, arguments):
    hidden = arguments[0]
    want = oracle(*arguments)
    assert (result.dtype, result.shape, result.device) == (hidden.dtype, hidden.shape, hidden.device)
    assert result.is_contiguous()
    error = (result.cpu().double() - want).norm() / want.norm().clamp(min=1e-30)
    budget = TOLERANCE[hidden.dtype]
    assert error <= budget, f"relative error {error:.2e}, budget {budget:.0e}"


LAYERS = [
    Layer(),
    Layer(tokens=1, slots=4, ids_dtype=torch.int32),
    Layer(tokens=19, slots=3, experts=5, bias=True, dtype=torch.bfloat16),
    Layer(transposed=True, dtype=torch.float16),
    Layer(activation="gpt_oss", interleaved=True, transposed=True, bias=True, dtype=torch.bfloat16),
    Layer(interleaved=True, bias=True),
    Layer(experts=1, slots=1, hidden=17, inner=9),
    *(Layer(activation=name, bias=True) for name in ACTIVATIONS),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_operator_equals_oracle(layer, device):
    """On CPU what is compiled for it, on a GPU the kernels: what the docstring says, within the dtype's rounding."""
    arguments = layer.draw(device=device)
    assert_close_to_oracle(expert_mlp(*arguments), arguments)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_reference_equals_oracle(layer):
    """By itself: where a kernel takes the call, the operator shows nothing of what defines it."""
    arguments = layer.draw()
    assert_close_to_oracle(expert_mlp_reference(*arguments), arguments)


class TestReference:
    def test_slots_of_no_expert(self):
        arguments = list(Layer(experts=3).draw(ids=torch.tensor([[1, -1], [3, 2], [-5, 9], [1, 2], [2, 1]])))
        clean = expert_mlp_reference(*arguments)
        arguments[3] = arguments[3].clone()
        arguments[3][0] = math.nan
        torch.testing.assert_close(expert_mlp_reference(*arguments), clean, rtol=0, atol=0)
        assert clean[2].abs().max() == 0

    def test_clamps_of_gpt_oss(self):
        arguments = far_out("cpu")
        assert_close_to_oracle(expert_mlp_reference(*arguments), arguments)

    def test_options_that_are_left_out(self):
        """A gated SiLU of two halves, weights as they are stored."""
        arguments = Layer().draw()
        torch.testing.assert_close(
            expert_mlp_reference(*arguments[:5]), expert_mlp_reference(*arguments), rtol=0, atol=0
        )

    @pytest.mark.parametrize("rows", [(64, 40), (300, 130)])
    def test_scales_of_blocks(self, rows):
        """What 8-bit weights times their scales give: of the last blocks only a part may be there."""
        inner, hidden = rows
        generator = torch.Generator().manual_seed(0)
        stored = [torch.randn(3, *sizes, generator=generator) * 4 for sizes in ((inner, hidden), (hidden, inner))]
        stored = [weight.to(torch.float8_e4m3fn) for weight in stored]
        scales = [torch.rand(3, -(-w.shape[1] // 128), -(-w.shape[2] // 128), generator=generator) for w in stored]
        wide = [scale.repeat_interleave(128, 1).repeat_interleave(128, 2) for scale in scales]
        plain = [w.float() * s[:, : w.shape[1], : w.shape[2]] for w, s in zip(stored, wide, strict=True)]
        x = torch.randn(4, hidden, generator=generator)
        ids, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [-1, 1]]), torch.rand(4, 2, generator=generator)
        got = expert_mlp_reference(x, ids, weights, *stored, None, None, "relu", False, False, *scales)
        torch.testing.assert_close(got, expert_mlp_reference(x, ids, weights, *plain, None, None, "relu"))
        assert Call(x, ids, weights, *stored, None, None, *scales).fp8
        assert not Call(x, ids, weights, *plain, None, None).fp8

    def test_rounding_to_8_bits(self):
        """Each 128 numbers of a row by their own largest one, which becomes 448; zeros and NaN stay."""
        x = torch.zeros(2, 130)
        x[0, :4] = torch.tensor([448.0, -17.0, 19.0, 1.0])  # between 16 and 32 every second number is one of e4m3
        x[0, 128:] = torch.tensor([-0.448, 0.0195])
        x[1, 129] = math.nan
        got = round_to_fp8(x.double())
        assert (got.shape, got.dtype) == ((2, 130), torch.float32)
        torch.testing.assert_close(got[0, :4], torch.tensor([448.0, -16.0, 20.0, 1.0]))
        torch.testing.assert_close(got[0, 128:], torch.tensor([-0.448, 0.020]))
        assert not got[:, 4:128].any()
        assert not got[1, :128].any()
        assert got[1, 129].isnan()

    def test_activations_of_8_bits(self):
        """What both projections read is rounded: 17 of the second one's numbers is 16, and 19 of the first's is 20."""
        gate_up, down = torch.eye(4)[None].clone(), torch.ones(1, 4, 4)
        gate_up[0, 1, 2] = 1.0  # the second column of the first projection: x[1] + x[2]
        stored, scales = [w.to(torch.float8_e4m3fn) for w in (gate_up, down)], [torch.ones(1, 1, 1)] * 2
        x, one = torch.tensor([[448.0, 1.0, 16.0, 0.0], [448.0, 19.0, 0.0, 0.0]]), torch.tensor([[0], [0]])
        arguments = (x, one, one.float() + 0.5, *stored, None, None, "relu", False, False, *scales)
        sums = 0.5 * torch.tensor([448.0 + 16 + 16, 448.0 + 20])
        torch.testing.assert_close(expert_mlp_reference(*arguments, fp8_activations=True), sums[:, None].expand(2, 4))
        exact = 0.5 * torch.tensor([448.0 + 17 + 16, 448.0 + 19])
        torch.testing.assert_close(expert_mlp_reference(*arguments), exact[:, None].expand(2, 4))

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_an_activation_is_along_the_last_dimension(self, interleaved):
        x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
        want = torch.stack([activate(row, "silu_glu", interleaved) for row in x])
        torch.testing.assert_close(activate(x, "silu_glu", interleaved), want)
        assert want.shape == (2, 6, 4)

    def test_sizes_of_scales(self):
        """One for each 128 rows and columns, also of the last ones, where they are fewer."""
        assert scale_sizes((3, 128, 129)) == (3, 1, 2)
        assert scale_sizes([5, 1, 256]) == (5, 1, 2)

    def test_numbers_of_activations(self):
        """Those that C++ has, with a gate or without."""
        names = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
        assert [activation_number(name) for name in (*names, "gpt_oss")] == list(range(6))
        assert [activation_number(f"{name}_glu") for name in names] == list(range(5))

    def test_tensors_on_another_device(self):
        arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in Layer(bias=True).draw()]
        assert expert_mlp_reference(*arguments).device.type == "meta"


def test_slots_of_no_expert_contribute_nothing_even_where_weights_are_nan(device):
    """Expert 0 stands in for a sentinel while computing; its NaN must not get out."""
    layer = Layer(experts=3)
    arguments = list(layer.draw(device=device, ids=torch.tensor([[1, -1], [3, 2], [-5, 9], [1, 2], [2, 1]])))
    clean = expert_mlp(*arguments)
    arguments[3] = arguments[3].clone()
    arguments[3][0] = math.nan
    poisoned = expert_mlp(*arguments)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    assert poisoned[2].abs().max() == 0


FAR_OUT = Layer(activation="gpt_oss", interleaved=True, bias=True)


def far_out(device):
    """Arguments of a gpt-oss layer whose gates exceed 7, and whose ups lie beyond both clamps."""
    arguments = list(FAR_OUT.draw(device=device, ids=torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0], [3, 2]])))
    arguments[0] = arguments[0] * 8
    between = torch.einsum("th,enh->ten", arguments[0], arguments[3])
    assert between[..., 0::2].max() > 8
    assert between[..., 1::2].max() > 8
    assert between[..., 1::2].min() < -8
    return arguments


def test_clamps_of_gpt_oss(device):
    """All three of them."""
    arguments = far_out(device)
    assert_close_to_oracle(expert_mlp(*arguments), arguments)


def test_no_tokens(device):
    arguments = Layer(tokens=0).draw(device=device)
    assert expert_mlp(*arguments).shape == (0, 40)


def test_strided_arguments(device):
    """Column slices of wider tensors, as a router's fused outputs are."""
    hidden, ids, weights, *rest = Layer().draw(device=device)
    strided = [torch.cat([x, x], dim=1)[:, ::2] for x in (hidden, ids, weights)]
    contiguous = [x.contiguous() for x in strided]
    torch.testing.assert_close(expert_mlp(*strided, *rest), expert_mlp(*contiguous, *rest), rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [Layer(), Layer(activation="gpt_oss", interleaved=True, transposed=True, bias=True, dtype=torch.bfloat16)],
    ids=str,
)
def test_opcheck(layer, device):
    torch.library.opcheck(OP, layer.draw(device=device))


def test_no_graph_break():
    """torch.compile sees through the operator."""
    arguments = Layer().draw()
    compiled = torch.compile(lambda *a: expert_mlp(*a) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), expert_mlp(*arguments) + 1)


def arguments_with(**changes):
    names = [argument.name for argument in OP._schema.arguments]
    return dict(zip(names, (*Layer(bias=True).draw(), None, None, False), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation: expected one of .*silu_glu.*got 'swish'"),
        ({"hidden": torch.zeros(5, 40, dtype=torch.float64)}, TypeError, "hidden: expected dtype .*got torch.float64"),
        ({"topk_ids": torch.zeros(5, 2)}, TypeError, "topk_ids: expected dtype torch.int32 or torch.int64"),
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"topk_ids: expected shape \[5, 2\]"),
        ({"topk_weights": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "topk_weights: expected a floating"),
        ({"topk_weights": torch.zeros(5, 3)}, ValueError, r"topk_weights: expected shape \[5, 2\], got \[5, 3\]"),
        ({"hidden": torch.zeros(1, 5, 40)}, ValueError, r"hidden: expected shape \[T, H\]"),
        ({"down": torch.zeros(40, 24)}, ValueError, r"down: expected shape \[E, H, I\]"),
        ({"gate_up": torch.zeros(6, 24, 40)}, ValueError, r"gate_up: expected shape \[6, 48, 40\], got \[6, 24, 40\]"),
        ({"transposed": True}, ValueError, "gate_up: expected shape"),
        ({"down": torch.zeros(6, 40, 24, dtype=torch.bfloat16)}, TypeError, "down: expected dtype torch.float32"),
        ({"gate_up_bias": torch.zeros(6, 47)}, ValueError, r"gate_up_bias: expected shape \[6, 48\]"),
        ({"down_bias": torch.zeros(6, 40, device="meta")}, ValueError, "down_bias: expected device cpu"),
    ],
)
def test_wrong_arguments(changes, error, message):
    """Every check names argument, expected and actual."""
    with pytest.raises(error, match=message):
        expert_mlp(**arguments_with(**changes))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256, 8, torch.bfloat16, "silu_glu"), True),
        ((257, 8, torch.bfloat16, "silu_glu"), False),
        ((256, 17, torch.bfloat16, "silu_glu"), False),
        ((8, 8, torch.float64, "silu_glu"), False),
        ((8, 8, torch.float16, "swish"), False),
    ],
)
def test_supports(arguments, expected):
    assert supports(*arguments) is expected


# The kernels, on poisoned memory


def launch(arguments, config=None):
    from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

    with poisoned_memory():
        return launch_expert_mlp(*arguments, config)


def drawn_for_kernel(layer, device, ids=None):
    """As drawn, but fp16 for bf16 under the interpreter, whose tl.dot multiplies the bits of bf16 as integers."""
    if device == "cpu" and layer.dtype == torch.bfloat16:
        layer = dataclasses.replace(layer, dtype=torch.float16)
    return layer.draw(device=device, ids=ids)


def small_tiles(**changes):
    """Blocks smaller than every dimension, so that all loops and masks are walked through."""
    from sere_compile.ops.expert_mlp.tiles import LaunchConfig, TileConfig

    tile = TileConfig(
        **{"block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2, "per_sm": 1, "block_m": 16} | changes
    )
    return LaunchConfig(tile, tile, chunk=16)


@pytest.mark.parametrize(
    "tile",
    thinned([{}, {"swap": True}, {"swap": True, "align": 4}], (2,)),
    ids=["rows", "swapped", "swapped-narrow"],
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_kernels_equal_oracle(layer, tile, kernel_device):
    arguments = drawn_for_kernel(layer, kernel_device)
    assert_close_to_oracle(launch(arguments, small_tiles(**tile)), arguments)


@pytest.mark.parametrize("tile", [{}, {"swap": True}], ids=["rows", "swapped"])
def test_clamps_of_gpt_oss_in_kernels(tile, kernel_device):
    arguments = far_out(kernel_device)
    assert_close_to_oracle(launch(arguments, small_tiles(**tile)), arguments)


@pytest.mark.parametrize("layer", [Layer(), Layer(slots=5, hidden=300, dtype=torch.bfloat16), Layer(tokens=0)], ids=str)
def test_kernels_write_where_they_are_told_to(layer, kernel_device):
    """With the sum in a kernel of its own; not next to it."""
    from sere_compile.ops.expert_mlp.kernel import launch_expert_mlp

    arguments = drawn_for_kernel(layer, kernel_device)
    wide = torch.full((layer.tokens + 2, layer.hidden), -77.0, dtype=arguments[0].dtype, device=kernel_device)
    into = wide[1:-1]
    with poisoned_memory():
        result = launch_expert_mlp(*arguments, None if kernel_device == "cuda" else small_tiles(), into=into)
    assert result.data_ptr() == into.data_ptr()
    assert_close_to_oracle(result, arguments)
    assert (wide[[0, -1]] == -77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_a_tensor_that_is_there(dtype, device):
    """As an engine calls it: int32 ids, weights in fp32."""
    layer = Layer(
        hidden=64, inner=64, dtype=dtype, ids_dtype=torch.int32, activation="gpt_oss", interleaved=True, bias=True
    )
    arguments = layer.draw(device=device)
    out = torch.full_like(arguments[0], -77)
    expert_mlp_into(out, *arguments[:2], arguments[2].float(), *arguments[3:9])
    assert_close_to_oracle(out, arguments)


@pytest.mark.parametrize(("change", "message"), [
    (lambda hidden: torch.empty(3, 3), r"out: expected contiguous torch.float32 \[5, 40\], got torch.float32 \[3, 3\]"),
    (lambda hidden: hidden.half(), r"out: expected contiguous torch.float32 \[5, 40\], got torch.float16"),
    (lambda hidden: torch.empty(40, 5).T, r"out: expected contiguous"),
    (lambda hidden: hidden, r"out: expected memory of its own, got that of hidden"),
])  # fmt: skip
def test_into_refuses_what_it_cannot_write_to(change, message):
    arguments = Layer().draw()
    with pytest.raises(ValueError, match=message):
        expert_mlp_into(change(arguments[0]), *arguments[:9])


def test_narrower_tiles_change_no_bit(kernel_device):
    """How columns are cut decides which program has them, not how they are summed."""
    arguments = drawn_for_kernel(Layer(tokens=7), kernel_device)
    assert torch.equal(launch(arguments, small_tiles(align=4)), launch(arguments, small_tiles()))


@pytest.mark.parametrize(("experts", "tokens"), [(6, 1), (6, 9), (32, 5), (33, 5)])
def test_a_plan_ahead_changes_no_bit(experts, tokens, kernel_device):
    """Slots of no expert among them, and experts of none."""
    arguments = drawn_for_kernel(Layer(tokens=tokens, slots=3, experts=experts, bias=True), kernel_device)
    plain = small_tiles(align=4)
    assert torch.equal(launch(arguments, dataclasses.replace(plain, planned=True)), launch(arguments, plain))


@triton.jit
def cut_kernel(out_ptr, active, programs, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr):
    """Store (tiles, width) of `cut`."""
    tiles, width = cut(active, programs, COLUMNS, BLOCK_N, ALIGN)
    tl.store(out_ptr, tiles)
    tl.store(out_ptr + 1, width)


@pytest.mark.parametrize(
    ("active", "programs", "columns", "expected"),
    [
        # 28 experts of 12 whole tiles would be 1.3 rounds; of 18 tiles they are 1.9.
        (28, 264, 768, (18, 44)),
        # One expert: as many programs as there are multiples of 4 columns.
        (1, 264, 768, (192, 4)),
        # A round that is full already.
        (22, 265, 768, (12, 64)),
        (128, 264, 768, (12, 64)),
        (0, 264, 768, (192, 4)),
        # Columns that are no multiple of anything, fewer than a tile.
        (3, 264, 50, (13, 4)),
    ],
)
def test_cut_fills_the_last_round(active, programs, columns, expected, kernel_device):
    out = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    cut_kernel[(1,)](out, active, programs, COLUMNS=columns, BLOCK_N=64, ALIGN=4)
    tiles, width = out.tolist()
    assert (tiles, width) == expected
    assert (tiles - 1) * width < columns <= tiles * width


@pytest.mark.parametrize("swap", [False, True], ids=["rows", "swapped"])
@pytest.mark.parametrize("tokens", [15, 16, 17, 40])
def test_kernels_with_one_expert_of_all_tokens_and_experts_of_none(tokens, swap, kernel_device):
    """More rows than a tile holds; expert 2 has all tokens, expert 0 one, the others none."""
    ids = torch.full((tokens, 2), 2)
    ids[3, 1] = 0
    arguments = drawn_for_kernel(Layer(tokens=tokens, bias=True), kernel_device, ids)
    assert_close_to_oracle(launch(arguments, small_tiles(swap=swap, block_m=32)), arguments)


def test_kernels_with_their_own_tiles(kernel_device):
    """What launch_config returns is a launch that works."""
    layer = Layer(hidden=128, inner=64, dtype=torch.bfloat16)
    arguments = drawn_for_kernel(layer, kernel_device)
    assert_close_to_oracle(launch(arguments), arguments)


@pytest.mark.parametrize("tokens", [25, 40])
def test_kernels_with_their_tiles_for_many_slots(tokens, kernel_device):
    """Just beyond the average from which tiles are larger, and more rows than one of those has."""
    layer = Layer(tokens=tokens, slots=2, experts=2, hidden=128, inner=64, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, 2, dtype=torch.int64)
    ids[0, 0] = 1
    arguments = drawn_for_kernel(layer, kernel_device, ids)
    assert_close_to_oracle(launch(arguments), arguments)


@pytest.mark.parametrize(("tokens", "expected"), [(127, ["gate_up_kernel", "down_kernel"]),
                                                  (128, ["plan_kernel", "gate_up_kernel", "down_kernel"])])  # fmt: skip
def test_many_slots_are_looked_at_once(tokens, expected, monkeypatch, kernel_device):
    """From 1024 on, by a launch of its own."""
    from sere_compile.ops.expert_mlp import kernel

    launched, launchable = [], kernel.launchable
    monkeypatch.setattr(kernel, "launchable", lambda fn: launched.append(fn.fn.__name__) or launchable(fn))
    layer = Layer(tokens=tokens, slots=8, experts=3, hidden=32, inner=16, dtype=torch.bfloat16)
    arguments = drawn_for_kernel(layer, kernel_device)
    assert_close_to_oracle(launch(arguments), arguments)
    assert launched == expected


def plan_of(ids, experts, chunk):
    """(order, active, first) that the first projection leaves for the second."""
    from sere_compile.ops.expert_mlp.kernel import launch_gate_up

    hidden = torch.zeros(len(ids), 16, device=ids.device)
    weight = torch.zeros(experts, 16, 16, device=ids.device)
    config = dataclasses.replace(small_tiles(), chunk=chunk)
    with poisoned_memory():
        return launch_gate_up(hidden, ids, weight, None, "silu", False, False, config)[1:]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan_groups_slots_by_expert_in_order(dtype, kernel_device):
    """A stable sort by expert, slots of no expert last."""
    ids = torch.randint(-2, 9, (37, 3), generator=torch.Generator().manual_seed(0)).to(dtype).to(kernel_device)
    order, active, first = plan_of(ids[:, :2], 7, chunk=16)
    groups = torch.where((ids >= 0) & (ids < 7), ids, 7)[:, :2].flatten()
    assert order.tolist() == groups.argsort(stable=True).tolist()
    experts = sorted(set(groups.tolist()) - {7})
    assert active[7] == len(experts)
    assert active[: len(experts)].tolist() == experts
    assert first[: len(experts) + 1].tolist() == [(groups < e).sum().item() for e in [*experts, 7]]


@pytest.mark.parametrize("experts", [1, 31, 32, 70])
@pytest.mark.parametrize("tokens", [1, 70])
def test_plan_lists_active_experts(experts, tokens, kernel_device):
    """Any number of bit words, one or several chunks of slots, experts without slots in between."""
    # The interpreter reduces one element at a time.
    chunk = 4096 if kernel_device == "cuda" else 32
    ids = torch.randint(-1, experts + 1, (tokens, 1), generator=torch.Generator().manual_seed(tokens))
    ids = torch.where(ids % 3 == 1, ids - 1, ids).to(kernel_device)
    _, active, first = plan_of(ids, experts, chunk)
    named = sorted({e for e in ids.flatten().tolist() if 0 <= e < experts})
    assert active[experts] == len(named)
    assert active[: len(named)].tolist() == named
    counts = [(ids == e).sum().item() for e in named]
    assert first[: len(named) + 1].diff().tolist() == counts


def test_no_slot_of_an_expert(kernel_device):
    """Nothing is active: zeros, and no weight is read."""
    arguments = drawn_for_kernel(Layer(), kernel_device, ids=torch.full((5, 2), -1))
    assert launch(arguments, small_tiles()).abs().max() == 0
