"""`find_norm_scale`: the gain and bias in front of a gate, however the norm is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import NormScale, find_norm_scale

from ..graph.written import Written
from ..moe_modules import HIDDEN, TRACERS, Indexed, from_export, one_gate, rows


class Normed(Indexed):
    """A block behind a norm, with a residual that is not normalised."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.gain = nn.Parameter(torch.rand(HIDDEN, generator=generator) * 3)
        self.bias = nn.Parameter(torch.randn(HIDDEN, generator=generator))

    def norm(self, x):
        raise NotImplementedError

    def forward(self, x):
        hidden = self.norm(x * 7 + 1)
        return x + super().forward(hidden)


class LayerNorm(Normed):
    def norm(self, x):
        return F.layer_norm(x, (HIDDEN,), self.gain, self.bias)


class LayerNormWithoutBias(Normed):
    def norm(self, x):
        return F.layer_norm(x, (HIDDEN,), self.gain)


class RmsNorm(Normed):
    def norm(self, x):
        return F.rms_norm(x, (HIDDEN,), self.gain)


class WrittenOut(Normed):
    """As Llama has it, in float32."""

    def norm(self, x):
        x = x.double()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.gain * x.float()


class OnePlus(Normed):
    """As Gemma has it."""

    def norm(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.gain.float())


class Division(Normed):
    """By the square root, with a bias."""

    def norm(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain + self.bias


class Bare(Normed):
    """Without a gain."""

    def norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


BLOCKS = {
    LayerNorm: ("gain", 0.0, "bias"),
    LayerNormWithoutBias: ("gain", 0.0, None),
    RmsNorm: ("gain", 0.0, None),
    WrittenOut: ("gain", 0.0, None),
    OnePlus: ("gain", 1.0, None),
    Division: ("gain", 0.0, "bias"),
    Bare: (None, 0.0, None),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_finds_gain_and_bias(block, tracer):
    """In every tracer's spelling; what is drawn at this scale looks like what the norm gives."""
    module = block()
    graph = TRACERS[tracer](module, rows())
    found = find_norm_scale(one_gate(graph).router_input)
    assert isinstance(found, NormScale), found
    gain, offset, bias = BLOCKS[block]

    def value(node):
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            return getattr(graph.get_submodule(owner), name)
        return graph.captured_inputs[list(graph.graph.find_nodes(op="placeholder")).index(node)]

    assert (found.gain is None, found.offset, found.bias is None) == (gain is None, offset, bias is None)
    with torch.no_grad():
        if gain is not None:
            assert torch.equal(value(found.gain), module.gain)
        if bias is not None:
            assert torch.equal(value(found.bias), module.bias)
        normal = torch.randn(20_000, HIDDEN, generator=torch.Generator().manual_seed(0))
        drawn = found.apply(normal, value)
        real = module.norm(normal)
        torch.testing.assert_close(drawn.mean(0), real.mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(drawn.std(0), real.std(0), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda self, x: x, "add"),
        (lambda self, x: torch.tanh(x), "tanh"),
        (lambda self, x: F.linear(x, self.experts[0]), "linear"),
        (lambda self, x: x * self.gain, "mul"),
        (lambda self, x: x * x.sum(-1, keepdim=True), "mul"),
    ],
)
def test_says_what_stands_there_instead(function, named):
    """What is no norm is not taken for one: a product with a vector, or with a number a row that no root made."""
    block = type("Other", (Normed,), {"norm": function})()
    found = find_norm_scale(one_gate(from_export(block, rows())).router_input)
    assert isinstance(found, str)
    assert found.startswith(named)
    assert found.endswith("is no normalisation")


@pytest.mark.parametrize(("norm", "names"), [(LayerNorm, ["gain", "bias"]), (LayerNormWithoutBias, ["gain"])])
def test_parameters_are_those_that_there_are(norm, names):
    gate = one_gate(from_export(norm(), rows()))
    found = find_norm_scale(gate.router_input).parameters
    assert [node.target if node.op == "get_attr" else node.name.removeprefix("p_") for node in found] == names


class ByHand(Written):
    """Hidden states, by hand: x over the root of its mean square."""

    def __init__(self):
        super().__init__()
        self.x, self.gain, self.bias = self.given(4, 6), self.weight(6), self.weight(6)
        root = self.call(torch.rsqrt, self.call(torch.mean, self.call(torch.square, self.x), -1, True))
        self.normed = self.mul(self.x, root)


class TestByHand:
    @pytest.mark.parametrize(
        ("write", "gain", "offset", "bias"),
        [
            (lambda w: w.normed, False, 0.0, False),
            (lambda w: w.mul(w.normed, w.gain), True, 0.0, False),
            (lambda w: w.mul(w.gain, w.call("float", w.call("double", w.normed))), True, 0.0, False),
            (lambda w: w.mul(w.normed, w.call(torch.add, w.gain, 1)), True, 1.0, False),
            (lambda w: w.mul(w.normed, w.call(torch.add, 0.5, w.call("float", w.gain))), True, 0.5, False),
            (lambda w: w.call(torch.add, w.mul(w.normed, w.gain), w.bias), True, 0.0, True),
            (lambda w: w.call(torch.add, w.bias, w.normed), False, 0.0, True),
            (lambda w: w.call("view", w.mul(w.normed, w.gain), 2, 2, 6), True, 0.0, False),
            (lambda w: w.call(torch.div, w.x, w.call(torch.sqrt, w.call(torch.sum, w.x, -1, True))), False, 0.0, False),
            (lambda w: w.call(F.layer_norm, w.x, (6,), w.gain, w.bias), True, 0.0, True),
            (lambda w: w.call(F.layer_norm, w.x, (6,), weight=w.gain), True, 0.0, False),
            (lambda w: w.call(F.layer_norm, w.x, (6,)), False, 0.0, False),
            (lambda w: w.call(F.rms_norm, w.x, (6,), w.gain), True, 0.0, False),
        ],
    )
    def test_norms(self, write, gain, offset, bias):
        w = ByHand()
        found = find_norm_scale(write(w))
        assert isinstance(found, NormScale), found
        assert (found.gain, found.offset, found.bias) == (w.gain if gain else None, offset, w.bias if bias else None)
        assert found.parameters == tuple(node for node, has in ((w.gain, gain), (w.bias, bias)) if has)

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.x,
            lambda w: w.call(torch.exp, w.normed),
            lambda w: w.mul(w.x, w.gain),
            lambda w: w.call(torch.add, w.normed, w.given(4, 6)),
            lambda w: w.call(torch.add, w.call(torch.add, w.normed, w.bias), w.gain),
            lambda w: w.call(torch.add, w.normed, w.call(torch.add, w.bias, 1)),
            lambda w: w.mul(w.normed, w.weight(4, 6)),
            lambda w: w.mul(w.normed, w.given(6)),
            lambda w: w.mul(w.x, w.call(torch.rsqrt, w.x)),
            lambda w: w.call(torch.div, w.normed, w.gain),
        ],
        ids=[
            "an input", "bent", "scaled", "added to", "two biases", "a bias with a number", "a matrix",
            "an input's scale", "a root of each number", "divided by a gain",
        ],
    )  # fmt: skip
    def test_anything_else(self, write):
        w = ByHand()
        node = write(w)
        found = find_norm_scale(node)
        assert isinstance(found, str)
        assert found.endswith("is no normalisation")

    def test_numbers_at_its_scale(self):
        w = ByHand()
        normal, value = torch.ones(2, 6), {w.gain: torch.full((6,), 3.0).double(), w.bias: torch.full((6,), 0.5)}
        assert NormScale().apply(normal, value.get) is normal
        assert NormScale(w.gain, 1.0).apply(normal, value.get).tolist() == [[4.0] * 6] * 2
        assert NormScale(w.gain, 0.0, w.bias).apply(normal, value.get).tolist() == [[3.5] * 6] * 2
        assert NormScale(bias=w.bias).apply(normal.half(), value.get).dtype == torch.float16
