"""Dispatches become `sere.expert_mlp` where they compute what it computes, and only there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import DispatchRegion, Gate, extract_dispatch, find_gates, fuse_experts
from sere_compile.passes.graph.nodes import kind

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
