"""Dispatches become `sere.expert_mlp` where they compute what it computes, and only there."""

from __future__ import annotations

import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.ops.expert_mlp.reference import expert_mlp_reference
from sere_compile.passes import (
    DispatchRegion,
    Gate,
    SkipReason,
    Use,
    UseKind,
    extract_dispatch,
    find_gates,
    fuse_experts,
)
from sere_compile.passes.fuse_experts import (
    ExpertLayer,
    _activations,
    _candidates,
    _confirmed,
    _exposed,
    _fp8_candidates,
    _hidden,
    _outside,
    _random_experts,
    _result,
    _routes,
    _why_no_candidate,
)
from sere_compile.passes.graph.nodes import kind, shape

from .graph.written import Written

E, K, H, INNER, T = 8, 2, 24, 16, 12


class Layer(nn.Module):
    """`W[ids]` + bmm experts with everything that can differ: activation, layouts, biases."""

    def __init__(self, activation="silu_glu", *, interleaved=False, transposed=False, bias=False, extra=None):
        super().__init__()
        torch.manual_seed(0)
        columns = INNER * (2 if activation.endswith("_glu") or activation == "gpt_oss" else 1)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn((E, H, columns) if transposed else (E, columns, H)) * 0.2)
        self.down = nn.Parameter(torch.randn((E, INNER, H) if transposed else (E, H, INNER)) * 0.2)
        self.up_bias = nn.Parameter(torch.randn(E, columns)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(E, H)) if bias else None
        self.activation, self.interleaved, self.transposed, self.extra = activation, interleaved, transposed, extra

    def _project(self, x, weight, bias, ids):
        weight = weight[ids] if self.transposed else weight[ids].transpose(1, 2)
        out = torch.bmm(x.unsqueeze(1), weight).squeeze(1)
        return out if bias is None else out.add_(bias[ids])

    def _activate(self, x):
        name = self.activation.removesuffix("_glu")
        plain = {
            "silu": F.silu,
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "relu": F.relu,
            "relu2": lambda x: torch.square(F.relu(x)),
            "elu": F.elu,
        }
        if name == self.activation and name != "gpt_oss":
            return plain[name](x)
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        if name == "gpt_oss":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
        return plain[name](gate) * up

    def forward(self, hidden):
        weights, ids = torch.topk(F.softmax(self.gate(hidden), -1), K)
        x = hidden.repeat_interleave(K, 0)
        flat = ids.reshape(-1)
        act = self._activate(self._project(x, self.up, self.up_bias, flat))
        if self.extra == "scale":
            act = act * 0.5
        out = self._project(act, self.down, self.down_bias, flat) * weights.reshape(-1, 1)
        return out.view(-1, K, H).sum(1)


def trace(layer: nn.Module, hidden: torch.Tensor):
    """Dynamo's graph of the layer, a function that runs the graph, and the graph's one gate."""
    graphs, inputs = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        inputs.append(example_inputs)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, backend=backend, dynamic=False)(hidden)
    (gate,) = find_gates(graphs[0]).gates
    return graphs[0], lambda: graphs[0](*inputs[0])[0], gate


def lower(gate: Gate):
    region = extract_dispatch(gate)
    assert isinstance(region, DispatchRegion), region
    return fuse_experts(gate, region, {}, torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": name + suffix}
        for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
        for suffix in ("_glu", "")
    ]
    + [
        {"activation": "gpt_oss", "interleaved": True, "transposed": True, "bias": True},
        {"activation": "silu_glu", "interleaved": True},
        {"activation": "silu_glu", "transposed": True},
        {"activation": "gelu", "bias": True},
    ],
    ids=lambda options: "-".join(str(v if k == "activation" else k) for k, v in options.items()),
)
def test_one_operator_computes_the_layer(options):
    """The operator has the layer's activation and layouts, and nothing of the old dispatch is left."""
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(1)) * 3
    graph, run, gate = trace(Layer(**options), hidden)
    with torch.no_grad():
        expected = run()
        lowered = lower(gate)
        assert isinstance(lowered, Gate), lowered
        graph.graph.lint()
        graph.recompile()
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    (call,) = [node for node in graph.graph.nodes if kind(node) == "sere.expert_mlp"]
    chosen = {name: call.kwargs[name] for name in ("activation", "interleaved", "transposed")}
    asked = {"interleaved": False, "transposed": False, **options}
    assert chosen == {name: asked[name] for name in chosen}
    assert (call.kwargs["gate_up_bias"] is not None) == options.get("bias", False)
    assert shape(call) == (T, H), "what is known of the result is known of the operator"
    assert [use.consumer for use in lowered.dispatch_uses] == [call]
    assert not {"bmm", "index", "repeat_interleave"} & {kind(node) for node in graph.graph.nodes}


class Sentinels(Layer):
    """Ids of no expert are clamped and their rows masked, before and after each projection (transformers 5.17)."""

    def _project(self, x, weight, bias, ids):
        nowhere = (ids >= E).unsqueeze(-1)
        x = x.clone().masked_fill_(nowhere, 0.0)
        return super()._project(x, weight, bias, ids.clone().clamp_(max=E - 1)).masked_fill(nowhere, 0.0)


class Casts(Layer):
    """The hidden states are cast before router and experts read them."""

    def forward(self, hidden):
        return super().forward(hidden.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("layer", "tolerance"),
    [
        (Sentinels(), 1e-4),
        (Sentinels("gpt_oss", interleaved=True, transposed=True, bias=True), 1e-4),
        (Casts().bfloat16(), 0.1),
    ],
    ids=["sentinels", "sentinels-gpt_oss", "cast"],
)
def test_what_is_no_part_of_the_activation(layer, tolerance):
    """Masks of ids, and a cast of the hidden states that the region takes in."""
    graph, run, gate = trace(layer, torch.randn(T, H, generator=torch.Generator().manual_seed(1)) * 3)
    with torch.no_grad():
        expected = run()
        assert isinstance(lower(gate), Gate)
        graph.graph.lint()
        graph.recompile()
        torch.testing.assert_close(run(), expected, rtol=tolerance, atol=tolerance)
    assert not {"bmm", "index", "masked_fill"} & {kind(node) for node in graph.graph.nodes}


def test_numbers_decide():
    """A factor between the projections is made of permitted operations, but no operator has it."""
    _, _, gate = trace(Layer(extra="scale"), torch.randn(T, H))
    assert "gives its numbers" in str(lower(gate))


class Padded(Layer):
    """Slots of padding name no expert. Their rows are masked, or go to the last expert, which Python takes for -1."""

    def __init__(self, mark, *, masked):
        super().__init__()
        self.mark, self.masked = mark, masked

    def forward(self, hidden):
        weights, ids = torch.topk(F.softmax(self.gate(hidden), -1), K)
        flat = self.mark(hidden[:, :1] > 0, ids).reshape(-1)
        experts = flat.clamp(min=0) if self.masked else flat
        act = self._activate(self._project(hidden.repeat_interleave(K, 0), self.up, None, experts))
        out = self._project(act, self.down, None, experts) * weights.reshape(-1, 1)
        out = out.masked_fill((flat < 0).unsqueeze(-1), 0.0) if self.masked else out
        return out.view(-1, K, H).sum(1)


class Identities(Layer):
    """Two more columns than experts; their slots give the hidden states back."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E + 2, bias=False)

    def forward(self, hidden):
        weights, ids = torch.topk(F.softmax(self.gate(hidden), -1), K)
        x, flat = hidden.repeat_interleave(K, 0), ids.clamp(max=E - 1).reshape(-1)
        nothing = (ids >= E).reshape(-1, 1)
        out = self._project(self._activate(self._project(x, self.up, None, flat)), self.down, None, flat)
        out = (out.masked_fill(nothing, 0.0) + x.masked_fill(~nothing, 0.0)) * weights.reshape(-1, 1)
        return out.view(-1, K, H).sum(1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Padded(lambda real, ids: torch.where(real, ids, -1), masked=True), None),
        (Padded(lambda real, ids: ids.masked_fill(~real, -2), masked=True), None),
        (Padded(lambda real, ids: torch.where(real, ids, -1), masked=False), "gives its numbers"),
        (Identities(), "gives its numbers"),
    ],
    ids=["where", "masked_fill", "last expert", "identities"],
)
def test_ids_of_no_expert(layer, reason):
    """The operator gives 0 for them. Where the model gives something else, they are among the ids that are tried."""
    graph, run, gate = trace(layer, torch.randn(T, H, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        expected, lowered = run(), lower(gate)
        if reason is not None:
            assert reason in str(lowered)
            return
        assert isinstance(lowered, Gate), lowered
        graph.recompile()
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_activation_stays():
    """An operation that no candidate has is named."""
    graph, _, gate = trace(Layer("elu_glu"), torch.randn(T, H))
    before = [node.name for node in graph.graph.nodes]
    assert "operations (elu)" in str(lower(gate))
    assert [node.name for node in graph.graph.nodes] == before


def test_a_write_to_the_hidden_states_stays():
    """Hidden states that change before the output must have been read before that: no operator is put behind it."""

    class Writes(Layer):
        def forward(self, hidden):
            hidden = hidden + 1
            weights, ids = torch.topk(F.softmax(self.gate(hidden), -1), K)
            x = hidden.repeat_interleave(K, 0)
            flat = ids.reshape(-1)
            out = self._activate(self._project(x, self.up, None, flat))
            hidden.mul_(2)
            out = self._project(out, self.down, None, flat) * weights.reshape(-1, 1)
            return out.view(-1, K, H).sum(1) + hidden

    _, _, gate = trace(Writes(), torch.randn(T, H))
    assert "shared with the rest of the graph (at mul_" in str(lower(gate))


class Region(Written):
    """A dispatch region, written by hand: [T, K] ids and weights, matrices of E experts, what is computed."""

    def __init__(self, *tensors):
        super().__init__()
        self.hidden = self.given(T, H)
        self.ids, self.weights = self.input(torch.zeros(T, K, dtype=torch.int64)), self.given(T, K)
        self.activations, self.inputs = (self.hidden,), tuple(self.weight(*sizes) for sizes in tensors)
        self.inside, self.output = [], None

    def does(self, *operations, result=(T, H), dtype=torch.float32):
        """Operations on floating-point numbers, a product of matrices among them, and the result."""
        rows = self.given(2, 3, 4)
        self.inside = [self.call(torch.bmm, rows, self.given(2, 4, 3))]
        self.inside += [self.call(operation, rows, **options) for operation, options in operations]
        self.output = self.call("to", self.given(*result), dtype)
        self.inside.append(self.output)
        return self


UP, DOWN, GATED = (E, INNER, H), (E, H, INNER), (E, 2 * INNER, H)
RELU = (torch.relu, {})


class TestCandidates:
    """What a region's tensors and operations leave."""

    @pytest.mark.parametrize(
        ("tensors", "layers"),
        [
            ([UP, DOWN], [("relu", False, False, 0, 1, None, None)]),
            ([DOWN, UP], [("relu", False, False, 1, 0, None, None)]),
            ([GATED, DOWN], [("relu_glu", turns, False, 0, 1, None, None) for turns in (False, True)]),
            ([(E, H, INNER), (E, INNER, H)], None),
            ([UP, DOWN, (E, INNER)], [("relu", False, False, 0, 1, 2, None)]),
            ([UP, DOWN, (E, H)], [("relu", False, False, 0, 1, None, 2)]),
            ([UP, DOWN, (E, H), (E, INNER)], [("relu", False, False, 0, 1, 3, 2)]),
            ([UP, DOWN, (E, 5)], []),
            ([UP, DOWN, (E,)], []),
            ([UP, DOWN, (E, H), (E, H), (E, INNER)], []),
            ([UP], []),
            ([UP, DOWN, DOWN], []),
            ([UP, (E + 1, H, INNER)], []),
            ([UP, (E, H, INNER + 1)], []),
            ([(E, INNER, H + 1), DOWN], []),
        ],
    )  # fmt: skip
    def test_by_sizes(self, tensors, layers):
        region = Region(*tensors).does(RELU)
        place = {node: number for number, node in enumerate(region.inputs)}
        found = [
            (
                c.activation,
                c.interleaved,
                c.transposed,
                *map(place.get, (c.gate_up, c.down, c.gate_up_bias, c.down_bias)),
            )
            for c in _candidates(region, region.hidden)
        ]
        if layers is None:  # turned as well as exchanged
            layers = [("relu", False, True, 0, 1, None, None), ("relu", False, False, 1, 0, None, None)]
        else:
            found = [layer for layer in found if not layer[2]]
        assert sorted(found, key=str) == sorted(layers, key=str)

    @pytest.mark.parametrize(
        ("change", "activations"),
        [
            ({}, ["relu_glu"]),
            ({"up": (E, INNER, H)}, ["relu"]),
            ({"up": (E, INNER + 1, H)}, []),
            ({"up_scale": (E, 2, 1)}, []),
            ({"down_scale": (E + 1, 1, 1)}, []),
            ({"more": [(E, H)]}, []),
            ({"products": 1}, []),
            ({"dtype": torch.float32}, []),
        ],
        ids=str,
    )
    def test_of_fp8(self, change, activations):
        """Weights in blocks, each with its scales, and nothing else; rows are rounded too."""
        sizes = {"up": GATED, "up_scale": (E, 1, 1), "down": DOWN, "down_scale": (E, 1, 1), **change}
        up, up_scale, down, down_scale = names = ("up", "up_scale", "down", "down_scale")
        with torch.library._scoped_library("_finegrained_fp8_c0ffee4", "DEF") as library:
            library.define("w8a8_block_dynamic_fp8_matmul_batched(Tensor A, Tensor B, Tensor Bs) -> Tensor")
            library.impl("w8a8_block_dynamic_fp8_matmul_batched", lambda a, *_: a.clone(), "CompositeExplicitAutograd")
            region = Region(*(sizes[name] for name in names), *change.get("more", ())).does(RELU)
            of = dict(zip(names, region.inputs, strict=False))
            product = torch.ops._finegrained_fp8_c0ffee4.w8a8_block_dynamic_fp8_matmul_batched.default
            pairs = [(up, up_scale), (down, down_scale)][: change.get("products", 2)]
            region.inside += [region.call(product, region.hidden, of[a], of[b]) for a, b in pairs]
            hidden = region.input(torch.zeros(T, H, dtype=change.get("dtype", torch.bfloat16)))
            found = list(_fp8_candidates(region, hidden))
        assert [layer.activation for layer in found] == activations
        for layer in found:
            assert (layer.gate_up, layer.gate_up_scale, layer.down, layer.down_scale) == tuple(region.inputs)
            assert (layer.gate_up_bias, layer.down_bias) == (None, None)
            assert (layer.interleaved, layer.transposed, layer.fp8_activations) == (False, False, True)

    def test_of_another_type(self):
        region = Region(UP, DOWN).does(RELU)
        assert list(_candidates(region, region.input(torch.zeros(T, H).half()))) == []

    @pytest.mark.parametrize(
        ("operations", "names"),
        [
            ([RELU], ["relu_glu", "relu"]),
            ([RELU, (torch.square, {})], ["relu2_glu", "relu2"]),
            ([(F.silu, {})], ["silu_glu", "silu"]),
            ([(torch.sigmoid, {})], ["silu_glu", "silu"]),
            ([(F.gelu, {})], ["gelu_glu", "gelu"]),
            ([(F.gelu, {"approximate": "none"})], ["gelu_glu", "gelu"]),
            ([(F.gelu, {"approximate": "tanh"})], ["gelu_tanh_glu", "gelu_tanh"]),
            ([(torch.tanh, {})], ["gelu_tanh_glu", "gelu_tanh"]),
            ([(torch.sigmoid, {}), (torch.clamp, {"max": 7.0}), (torch.mul, {"other": 1.702})], ["gpt_oss"]),
            ([(torch.sigmoid, {}), (torch.clamp, {"max": 7.0}), (torch.mul, {"other": 1.5})], []),
            ([(torch.sigmoid, {}), (torch.clamp, {"max": 6.0}), (torch.mul, {"other": 1.702})], []),
            ([RELU, (torch.erf, {})], []),
            ([], []),
        ],
    )
    def test_by_operations(self, operations, names):
        region = Region(UP, DOWN).does(*operations)
        region.inside = region.inside[:-1]
        assert _activations(region) == names
        region.inside = region.inside[1:]
        assert _activations(region) == [], "without a product of matrices"

    def test_ids_are_no_part_of_an_activation(self):
        region = Region(UP, DOWN).does(RELU)
        region.inside = [*region.inside[:-1], region.call(torch.clamp, region.ids, 0), region.hidden]
        assert _activations(region) == ["relu_glu", "relu"]

    def test_why_there_is_none(self):
        region = Region(UP, DOWN).does((torch.erf, {}), (torch.cos, {}))
        skip = _why_no_candidate(region)
        assert (skip.reason, skip.node) == (SkipReason.NO_EXPERT_LAYER, region.output)
        assert skip.detail == f"tensors {[list(UP), list(DOWN)]}, operations (cos, erf)"
        region.inside = region.inside[1:]
        assert _why_no_candidate(region).reason is SkipReason.NOT_BATCHED

    def test_what_is_ours_already(self):
        region = Region(GATED, DOWN)
        region.inside += [region.call(torch.ops.sere.expert_mlp.default, region.hidden, region.ids, region.weights,
                                      *region.inputs)]  # fmt: skip
        assert str(_why_no_candidate(region)) == f"its experts are sere.expert_mlp already ({region.inside[-1].name})"


class TestHidden:
    """The node that the operator reads for the hidden states [T, H]."""

    def test_it_is_what_the_region_reads(self):
        region = Region(UP, DOWN).does(RELU)
        assert _hidden(region) is region.hidden

    def test_several_or_none(self):
        region = Region(UP, DOWN).does(RELU)
        for activations in ((), (region.hidden, region.weights)):
            region.activations = activations
            skip = _hidden(region)
            assert skip.reason is SkipReason.READS_OTHERS
            assert skip.detail == f"{len(activations)} besides ids and weights, expected one"

    @pytest.mark.parametrize("name", ["ids", "weights", "output"])
    def test_more_dimensions(self, name):
        region = Region(UP, DOWN).does(RELU)
        setattr(region, name, region.given(2, T // 2, K))
        skip = _hidden(region)
        assert (skip.reason, skip.detail) == (SkipReason.SHAPES, "its dispatch is not over [T, K]")

    def test_other_weights_than_ids(self):
        region = Region(UP, DOWN).does(RELU)
        region.weights = region.given(T, K + 1)
        assert _hidden(region).detail == "its dispatch is not over [T, K]"

    def test_views_and_casts_of_it(self):
        """That stand in front of the result, and of what reads the hidden states alone."""
        region = Region(UP, DOWN)
        region.activations = (region.input(torch.zeros(2, T // 2, H).half()),)
        region.call("view", region.activations[0], -1)
        cast = region.call("float", region.call("view", region.activations[0], T, H))
        region.does(RELU)
        assert _hidden(region) is cast
        region = Region(UP, DOWN).does(RELU)
        region.activations = (region.input(torch.zeros(2, T // 2, H)),)
        region.call("view", region.activations[0], T, H)
        skip = _hidden(region)
        assert (skip.reason, skip.node) == (SkipReason.SHAPES, region.activations[0])
        assert skip.detail == "its hidden states are not [T, H] in the dtype of its result"

    def test_what_is_computed_of_it_is_another_tensor(self):
        """The operator would read what is not the hidden states: the region computes that itself."""
        region = Region(UP, DOWN)
        region.activations = (region.input(torch.zeros(2, T // 2, H)),)
        region.call("view", region.call(torch.exp, region.activations[0]), T, H)
        assert _hidden(region.does(RELU)).reason is SkipReason.SHAPES
        region = Region(UP, DOWN)
        region.activations = (region.input(torch.zeros(T, H).half()),)
        region.call(torch.mul, region.call("to", region.activations[0], torch.float64), 2.0)
        region.call(torch.mul, region.activations[0], torch.ones(T, H))
        assert _hidden(region.does(RELU)).reason is SkipReason.SHAPES

    def test_the_cast_of_the_result(self):
        """It is part of what is replaced where it alone reads it."""
        region = Region(UP, DOWN).does(RELU)
        assert _result(region) is region.output
        cast = region.call("half", region.output)
        assert _result(region) is cast
        region.call(torch.exp, region.output)
        assert _result(region) is region.output
        region = Region(UP, DOWN).does(RELU)
        region.call("view", region.output, -1)
        assert _result(region) is region.output
        region = Region(UP, DOWN).does(RELU)
        region.call(torch.exp, region.output)
        assert _result(region) is region.output

    def test_a_type_that_no_operator_has(self):
        region = Region(UP, DOWN)
        region.activations = (region.input(torch.zeros(T, H).double()),)
        region.does(RELU, dtype=torch.float64)
        skip = _hidden(region)
        assert (skip.reason, skip.detail) == (SkipReason.DTYPE, "torch.float64")


class TestWhatIsMadeUp:
    def test_ids_of_experts_then_every_value_outside(self):
        generator = torch.Generator().manual_seed(0)
        found = list(_routes(4, (-1, 4, 5, 6, 7), (2, 2), generator))
        assert [ids.shape for ids in found] == [(2, 2)] * 3
        assert ((found[0] >= 0) & (found[0] < 4)).all()
        assert found[1].flatten().tolist() == [-1, 4, 5, 6]
        assert found[2].flatten().tolist() == [7] * 4
        assert len(list(_routes(4, (), (2, 2), generator))) == 1
        assert list(_routes(4, (8, 9), (3, 1), generator))[1].flatten().tolist() == [8, 9, 8]

    def test_overlapping_experts(self):
        """Each begins 64 numbers behind the one before, and keeps the scale of what it multiplies."""
        weights = _random_experts((5, 40, 90), torch.bfloat16, torch.Generator().manual_seed(0))
        assert (weights.shape, weights.dtype) == ((5, 40, 90), torch.bfloat16)
        assert torch.equal(weights[1].flatten()[:-64], weights[0].flatten()[64:])
        assert weights.untyped_storage().nbytes() == 2 * (40 * 90 + 4 * 64)
        assert weights.float().std().item() == pytest.approx(40**-0.5, rel=0.1)

    @pytest.mark.parametrize(
        ("write", "outside"),
        [
            (lambda w, ids: ids, ()),
            (lambda w, ids: w.call(torch.where, w.input(torch.ones(T, 1) > 0), ids, -1), (-1,)),
            (lambda w, ids: w.call("masked_fill", ids, w.input(torch.ones(T, 1) > 0), -3), (-3,)),
            (lambda w, ids: w.call("masked_fill", ids, w.input(torch.ones(T, 1) > 0), w.input(torch.tensor(1))), ()),
        ],
        ids=["none", "where", "masked", "unknown"],
    )
    def test_ids_of_no_expert(self, write, outside):
        for columns in (E, E + 2):
            w = Written()
            best = w.call(torch.topk, w.given(T, columns), K)
            gate = types.SimpleNamespace(selection=best, ids=write(w, w.pick(best, 1)), num_experts=E)
            assert _outside(gate) == (*outside, *range(E, columns))


class TestExposed:
    """Writes that cross the border of a region, which one operator would not make, or would read too late."""

    @staticmethod
    def with_write(write, before="output"):
        region = Region(UP, DOWN).does(RELU)
        places = {"output": region.output, "region": region.inside[0], "all": region.output.next}
        with region.graph.inserting_before(places[before]):
            return region, write(region)

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.call("mul_", w.hidden, 2),
            lambda w: w.call("mul_", w.call("view", w.hidden, -1), 2),
            lambda w: w.call("mul_", w.weights, 2),
            lambda w: w.call("add_", w.ids, 1),
            lambda w: w.call("mul_", w.inputs[1], 2),
        ],
        ids=["hidden states", "a view of them", "weights", "ids", "a matrix"],
    )
    def test_what_the_operator_reads(self, write):
        """While the region runs; what is done before or behind it, every tensor sees."""
        region, written = self.with_write(write)
        assert _exposed(region, region.hidden) is written
        for place in ("region", "all"):
            region, _ = self.with_write(write, place)
            assert _exposed(region, region.hidden) is None

    def test_weights_that_are_normed_in_place_first(self):
        """The operator reads them when they are dispatched."""
        region = Region(UP, DOWN)
        before = region.call(torch.exp, region.hidden)
        region.call("mul_", region.weights, 2)
        region.ids = region.call("clamp", region.ids, 0)
        region.does(RELU)
        region.inside.insert(0, before)
        assert _exposed(region, region.hidden) is None

    def test_what_others_read(self):
        """Written from within; a tensor of the region's own is nobody else's, nor is others' own memory its concern."""
        region, written = self.with_write(lambda w: w.call("add_", w.call(torch.zeros, 3), 1))
        assert _exposed(region, region.hidden) is None
        region.inside.append(written)
        assert _exposed(region, region.hidden) is written
        region.inside.append(written.args[0])
        assert _exposed(region, region.hidden) is None


def layer_of(region, activation="relu", **options):
    """A layer of the region's two matrices."""
    return ExpertLayer(*region.inputs[:2], None, None, activation, False, False, **options)


class TestConfirmed:
    """Which candidate gives the region's numbers on made-up ones."""

    CPU = torch.device("cpu")

    @staticmethod
    def region(compute=None, hidden=None, inputs=()):
        """A region that computes relu experts, unless something else is said; what it was run with is kept."""
        region = Region(UP, DOWN)
        if hidden is not None:
            region.hidden = region.input(hidden)
            region.activations = (region.hidden,)
        region.does(RELU)
        region.inputs += tuple(region.input(value) for value in inputs)
        region.runs = []

        def module(ids, weights, up, down, *more):
            region.runs.append((ids, weights, up, down, *more))
            y = expert_mlp_reference(more[-1], ids, weights, **layer_of(region).arguments(
                {region.inputs[0]: up, region.inputs[1]: down}.__getitem__
            ))  # fmt: skip
            return y if compute is None else compute(y, ids)

        region.module = module
        return region

    def test_the_first_that_is_right(self):
        region = self.region()
        right = [layer_of(region), layer_of(region)]
        candidates = [layer_of(region, "silu"), *right]
        assert _confirmed(region, candidates, (), {}, self.CPU) is right[0]
        [(ids, weights, up, down, hidden)] = region.runs
        assert (ids.shape, ids.dtype, weights.shape) == ((T, K), torch.int64, (T, K))
        assert 0 <= ids.min() < 2 < E - 3 < ids.max() < E
        assert 0 <= weights.min() < 0.2 < 0.8 < weights.max() <= 1
        assert (up.shape, down.shape, hidden.shape) == (UP, DOWN, (T, H))
        assert hidden.std().item() == pytest.approx(4, rel=0.2)

    def test_none_is_right(self):
        """The nearest is told."""
        region = self.region()
        skip = _confirmed(region, [layer_of(region, "silu"), layer_of(region, "gelu")], (), {}, self.CPU)
        assert (skip.reason, skip.node) == (SkipReason.OTHER_EXPERTS, region.output)
        told = re.fullmatch(r"nearest: (\S+) off, allowed (\S+)", skip.detail)
        assert float(told[1]) > float(told[2]) > 0

    @pytest.mark.parametrize(("factor", "right"), [(1.0015, True), (1.003, False)])
    def test_how_far_numbers_may_be_apart(self, factor, right):
        region = self.region(lambda y, ids: y * factor)
        assert (_confirmed(region, [layer := layer_of(region)], (), {}, self.CPU) is layer) is right

    def test_ids_of_no_expert_are_tried(self):
        """Where the region gives something for them, and the operator 0."""
        region = self.region(lambda y, ids: y + (ids == E).any(-1, keepdim=True))
        layer = layer_of(region)
        assert _confirmed(region, [layer], (), {}, self.CPU) is layer
        assert _confirmed(region, [layer], (E,), {}, self.CPU).reason is SkipReason.OTHER_EXPERTS
        region = self.region()
        layer = layer_of(region)
        assert _confirmed(region, [layer], (-1, E), {}, self.CPU) is layer
        assert len(region.runs) == 2

    def test_further_inputs(self):
        """Numbers are what the call has, biases are made up."""
        region = self.region(inputs=(None, torch.zeros(E, H)))
        layer = layer_of(region)
        assert _confirmed(region, [layer], (), {region.inputs[2]: 7}, self.CPU) is layer
        [(*_, number, bias, _)] = region.runs
        assert number == 7
        assert 0.8 < bias.std() < 1.2

    @pytest.mark.parametrize(
        ("message", "told"), [("no memory" * 20 + "\nmore", ("no memory" * 20)[:120]), ("", "none is left")]
    )
    def test_no_memory(self, message, told):
        def fail(y, ids):
            raise torch.OutOfMemoryError(message)

        region = self.region(fail)
        skip = _confirmed(region, [layer_of(region)], (), {}, self.CPU)
        assert (skip.reason, skip.node, skip.detail) == (SkipReason.NO_MEMORY, region.output, told)

    def test_arguments(self):
        """Of FP8 weights there are more, and more is allowed."""
        region = Region(UP, DOWN)
        up, down = region.inputs
        names = {"gate_up", "down", "gate_up_bias", "down_bias", "activation", "interleaved", "transposed"}
        layer = layer_of(region)
        assert set(layer.arguments()) == names
        assert layer.arguments(lambda node: node.name)["gate_up"] == up.name
        assert layer.arguments()["down"] is down
        assert layer.arguments()["activation"] == "relu"
        assert layer.tolerance == 2e-3
        layer = layer_of(region, gate_up_scale=up, down_scale=down, fp8_activations=True)
        assert set(layer.arguments()) == names | {"gate_up_scale", "down_scale", "fp8_activations"}
        assert layer.tolerance == 2e-2


class TestAsAWhole:
    """`fuse_experts` of a region by hand."""

    @staticmethod
    def gated(region):
        """A gate whose ids the region and something else read, and the graph's output."""
        selection = region.call(torch.topk, region.given(T, E), K)
        beside = region.call(torch.abs, region.ids)
        with region.graph.inserting_before(region.inside[0]):
            inside = region.call(torch.neg, region.ids)
        region.inside.insert(0, inside)
        region.give(region.call(torch.exp, region.output), beside)
        uses = Use(inside, region.ids, UseKind.GROUPED), Use(beside, region.ids, UseKind.STATISTIC)
        return Gate(
            selection, region.ids, None, region.weights, region.hidden, E, K, "softmax", True, uses, region.weights
        )

    def test_one_operator_instead(self):
        region = TestConfirmed.region()
        gate = self.gated(region)
        region.output.meta["note"] = "kept"
        done = fuse_experts(gate, region, {}, torch.device("cpu"))
        [call] = [node for node in region.graph.nodes if kind(node) == "sere.expert_mlp"]
        assert call.args == (region.hidden, region.ids, region.weights)
        assert call.kwargs == layer_of(region).arguments()
        assert call.meta["note"] == "kept"
        assert shape(call) == (T, H)
        assert [use.kind for use in done.uses] == [UseKind.STATISTIC, UseKind.EXPERT_INDEX]
        assert (done.uses[1].consumer, done.uses[1].read) == (call, region.ids)
        assert [kind(user) for user in call.users] == ["exp"]
        assert not {"bmm", "relu", "neg", "to"} & {kind(node) for node in region.graph.nodes}
        region.graph.lint()

    def test_what_is_read_elsewhere_stays(self):
        region = TestConfirmed.region()
        region.call(torch.cos, region.inside[0])
        gate = self.gated(region)
        fuse_experts(gate, region, {}, torch.device("cpu"))
        kinds = [kind(node) for node in region.graph.nodes]
        assert "bmm" in kinds
        assert "relu" not in kinds

    def test_refusals(self):
        """Each leaves the graph as it is."""

        def changed(change, **how):
            region = TestConfirmed.region(**how)
            change(region)
            gate = self.gated(region)
            before = str(region.graph)
            skip = fuse_experts(gate, region, {}, torch.device("cpu"))
            assert str(region.graph) == before
            return skip, region

        skip, region = changed(lambda region: setattr(region, "activations", ()))
        assert skip.reason is SkipReason.READS_OTHERS
        skip, region = changed(lambda region: region.inside.append(region.call(torch.erf, region.hidden)))
        assert (skip.reason, skip.node) == (SkipReason.NO_EXPERT_LAYER, region.output)
        skip, region = changed(lambda region: None, compute=lambda y, ids: y * 2)
        assert skip.reason is SkipReason.OTHER_EXPERTS

        def write(region):
            with region.graph.inserting_before(region.output):
                region.call("mul_", region.hidden, 2)

        skip, region = changed(write)
        assert (skip.reason, skip.node.name, skip.detail) == (SkipReason.SHARED_MEMORY, "mul_", "at mul_")

    def test_fp8_weights_are_taken_where_that_is_asked_for(self):
        """No kernel of ours was compared with stock ones: else the graph stays, whatever its tensors are."""
        with torch.library._scoped_library("_finegrained_fp8_c0ffee5", "DEF") as library:
            library.define("w8a8_block_dynamic_fp8_matmul_batched(Tensor A, Tensor B, Tensor Bs) -> Tensor")
            library.impl("w8a8_block_dynamic_fp8_matmul_batched", lambda a, *_: a.clone(), "CompositeExplicitAutograd")
            product = torch.ops._finegrained_fp8_c0ffee5.w8a8_block_dynamic_fp8_matmul_batched.default
            reasons = []
            for fp8 in (False, True):
                region = TestConfirmed.region()
                with region.graph.inserting_before(region.output):
                    region.inside.insert(1, region.call(product, region.hidden, *region.inputs))
                gate = self.gated(region)
                skip = fuse_experts(gate, region, {}, torch.device("cpu"), fp8=fp8)
                reasons.append(skip.reason if not isinstance(skip, Gate) else None)
        assert reasons[0] is SkipReason.NOT_MEASURED
        assert reasons[1] is not SkipReason.NOT_MEASURED
