"""`sere::expert_mlp` on CPUs: C++ and calls of torch against an oracle in fp64, and what is done without a compiler."""

import logging
import math
import random

import pytest
import torch

from sere_compile.ops import expert_mlp
from sere_compile.ops.expert_mlp import ACTIVATIONS, cpu
from sere_compile.ops.expert_mlp.reference import Call, expert_mlp_reference

from .test_expert_mlp import LAYERS, Layer, assert_close_to_oracle, far_out

OP = torch.ops.sere.expert_mlp_cpu.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_library(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)


@pytest.fixture(params=["C++", "torch"])
def form(request, monkeypatch):
    """Both forms; a machine of developers has a compiler."""
    if request.param == "torch":
        without_library(monkeypatch)
    else:
        assert cpu.library() is not None
    return request.param


def drawn_layer(draw):
    """Sizes around those of vectors, tiles and tasks, and rows of more than one pass."""
    tokens = draw.choice([1, 2, 3, 4, 5, 9, 70, 131])
    return Layer(
        tokens=tokens,
        slots=draw.choice([1, 2, 5]),
        experts=draw.choice([1, 2, 7]) if tokens > 9 else draw.choice([1, 3, 40]),
        hidden=draw.choice([1, 3, 15, 16, 33, 64, 67, 130]),
        inner=draw.choice([1, 4, 17, 63, 64, 65, 150]),
        activation=draw.choice(ACTIVATIONS),
        interleaved=draw.random() < 0.5,
        transposed=draw.random() < 0.5,
        bias=draw.random() < 0.5,
        dtype=draw.choice(DTYPES),
        ids_dtype=draw.choice([torch.int32, torch.int64]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_drawn_layers_equal_oracle(seed, form):
    draw = random.Random(seed)
    for _ in range(4):
        layer = drawn_layer(draw)
        arguments = layer.draw(seed)
        if layer.tokens * layer.slots > 200:  # the oracle takes them one by one
            arguments = (*(x[::3] for x in arguments[:3]), *arguments[3:])
        assert_close_to_oracle(expert_mlp(*arguments), arguments)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_torch_calls_and_reference_equal_oracle(layer, monkeypatch):
    """The two that `test_expert_mlp.py` does not run here."""
    without_library(monkeypatch)
    arguments = layer.draw()
    assert_close_to_oracle(expert_mlp(*arguments), arguments)
    assert_close_to_oracle(expert_mlp_reference(*arguments), arguments)


def test_clamps_of_gpt_oss(form):
    arguments = far_out("cpu")
    assert_close_to_oracle(expert_mlp(*arguments), arguments)


def test_only_active_experts_are_read(form):
    """Weights of the others may be anything."""
    arguments = list(Layer().draw(ids=torch.tensor([[1, -1], [3, 6], [-5, 9], [1, 3], [3, 1]])))
    clean = expert_mlp(*arguments)
    for index in (3, 4):
        arguments[index] = arguments[index].clone()
        arguments[index][[0, 2, 4, 5]] = math.nan
    assert torch.equal(expert_mlp(*arguments), clean)
    assert clean[2].abs().max() == 0


def test_a_token_that_names_an_expert_more_than_once(form):
    """Also with another one in between, and beside a token that does so too."""
    ids = torch.tensor([[2, 1, 2], [2, 2, 2], [0, 2, 0], [-1, 0, -1]])
    arguments = Layer(tokens=4, slots=3).draw(ids=ids)
    assert_close_to_oracle(expert_mlp(*arguments), arguments)


def test_a_token_does_not_depend_on_the_others_nor_on_threads():
    """Bit for bit, whatever tile and task its row is in."""
    layer = Layer(tokens=70, slots=3, experts=4, hidden=200, inner=100, bias=True)
    arguments = layer.draw()
    whole = expert_mlp(*arguments)
    for few in (slice(0, 1), slice(5, 12), slice(3, 70)):
        assert torch.equal(expert_mlp(*(x[few] for x in arguments[:3]), *arguments[3:]), whole[few])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(expert_mlp(*arguments), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_ends_of_a_dtype(dtype, form):
    """Subnormal, infinite, none: as torch converts them, also of weights that are no whole vectors."""
    info = torch.finfo(dtype)
    ends = torch.tensor([0.0, info.smallest_normal / 4, info.tiny, info.max, math.inf, -math.inf, math.nan, 1.0])
    for width in (16, 8, 5):
        down = torch.zeros(1, len(ends), width).to(dtype)
        down[0, :, 0] = ends.to(dtype)
        up = torch.zeros(1, width, len(ends)).to(dtype)
        up[0, 0, 0] = 1
        hidden = torch.zeros(1, len(ends)).to(dtype)
        hidden[0, 0] = 1
        out = expert_mlp(hidden, torch.zeros(1, 1).long(), torch.ones(1, 1), up, down, activation="relu")
        torch.testing.assert_close(out[0], ends.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_round_to_nearest_even(dtype):
    """As torch rounds: of halves between two numbers, and of those too large for any."""
    count = 4096
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.linspace(-30, 30, count)
    one = torch.ones(1, 1, dtype=dtype)
    hidden = torch.zeros(count, 1, dtype=dtype) + one
    ids = torch.zeros(count, 1, dtype=torch.long)
    out = expert_mlp(hidden, ids, values[:, None], one[None], one[None], activation="relu")
    assert torch.equal(out[:, 0], values.to(dtype))
    assert out.isinf().any() == (dtype == torch.float16)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_read_where_they_are(transposed, form):
    """Slices of wider tensors, and views in the other layout."""
    arguments = list(Layer(transposed=transposed, hidden=70, inner=70, bias=True).draw())
    want = expert_mlp(*arguments)
    sliced = list(arguments)
    for index in (3, 4):
        sliced[index] = torch.cat([arguments[index], arguments[index]], 2)[..., : arguments[index].shape[2]]
    # A matmul of torch may add up strided weights in another order.
    torch.testing.assert_close(expert_mlp(*sliced), want, rtol=0, atol=0 if form == "C++" else 1e-5)
    for index in (3, 4):
        sliced[index] = arguments[index].transpose(1, 2).contiguous().transpose(1, 2)
        assert not sliced[index].is_contiguous()
    assert_close_to_oracle(expert_mlp(*sliced), arguments)


def test_what_cpp_cannot_read_is_computed_all_the_same():
    """Weights without a step of 1, biases of another dtype."""
    arguments = list(Layer(bias=True).draw())
    arguments[3] = torch.cat([arguments[3], arguments[3]], 2)[..., ::2].contiguous()
    spread = list(arguments)
    spread[3] = torch.stack([arguments[3], arguments[3]], 3).flatten(2)[..., ::2]
    assert 1 not in spread[3].stride()
    assert_close_to_oracle(expert_mlp(*spread), arguments)
    spread[5] = arguments[5].double()
    assert_close_to_oracle(expert_mlp(*spread), arguments)


def test_no_tokens_and_no_slots(form):
    assert expert_mlp(*Layer(tokens=0).draw()).shape == (0, 40)
    assert not expert_mlp(*Layer(slots=0).draw()).any()


@pytest.mark.parametrize("layer", [Layer(), Layer(transposed=True, bias=True, dtype=torch.bfloat16)], ids=str)
def test_opcheck(layer):
    arguments = layer.draw()
    torch.library.opcheck(OP, (*arguments[:7], None, None, *arguments[7:]))


def test_inductor_calls_it():
    """As one operator, with what is around it compiled."""
    arguments = Layer(bias=True).draw()
    compiled = torch.compile(lambda *a: expert_mlp(*a).relu(), fullgraph=True)
    result, (code,) = torch._inductor.utils.run_and_get_code(compiled, *arguments)
    assert "sere.expert_mlp_cpu" in code
    torch.testing.assert_close(result, expert_mlp(*arguments).relu(), rtol=0, atol=0)


def test_ahead_of_time_and_with_weights_of_8_bits_it_is_the_reference():
    """Packages run without Python; FP8 has no kernel."""
    from torch._inductor.virtualized import V

    def call(scale=None, dtype=torch.float32, device="cpu"):
        weight = torch.zeros(1, 1, 1, dtype=dtype)
        return Call(torch.zeros(1, 1, device=device), None, None, weight, weight, None, None, scale, scale)

    assert cpu.takes(call())
    assert not cpu.takes(call(torch.ones(1, 1, 1), torch.float8_e4m3fn))
    assert cpu.takes(call(torch.ones(1, 1, 1, dtype=torch.uint8), torch.uint8))
    assert not cpu.takes(call(device="meta"))
    with V.set_aot_compilation(True):
        assert not cpu.takes(call())


def test_without_a_compiler_it_says_so_once(monkeypatch, caplog):
    """And computes in calls of torch."""
    from torch._inductor import exc
    from torch._inductor.codecache import CppCodeCache

    def fail(*_, **__):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(CppCodeCache, "load", fail)
    cpu.library.cache_clear()
    arguments = Layer().draw()
    try:
        with caplog.at_level(logging.WARNING, logger=cpu.__name__):
            for _ in range(2):
                assert_close_to_oracle(expert_mlp(*arguments), arguments)
    finally:
        cpu.library.cache_clear()
    (said,) = caplog.messages
    assert "cpu.cpp cannot be used" in said
    assert "No working C++ compiler found" in said
