"""Chains from logits to ids and weights become `sere.route` where it computes them, and only there."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import Gate, Skip, fuse_router
from sere_compile.passes.fuse_router import _agree, _draw, _logits, _widen
from sere_compile.passes.graph.nodes import kind

from .graph.written import Written
from .test_fuse_experts import E, H, K, Layer, T, trace


class Routed(Layer):
    """Experts behind a router that a subclass of this test's choice computes."""

    def __init__(self, route):
        super().__init__()
        self.route = route
        self.bias = nn.Parameter(torch.rand(E) * 0.2)

    def forward(self, hidden):
        self.hidden = hidden
        return self.dispatch(hidden, *self.route(self, F.linear(hidden, self.gate.weight)))

    def dispatch(self, hidden, weights, ids, extra):
        x = hidden.repeat_interleave(K, 0)
        act = self._activate(self._project(x, self.up, None, ids.reshape(-1)))
        out = self._project(act, self.down, None, ids.reshape(-1)) * weights.reshape(-1, 1)
        return out.view(-1, K, H).sum(1), extra


class CastFirst(Routed):
    """Part of the chain stands ahead of the projection."""

    def forward(self, hidden):
        bias = self.bias.float()
        scores = F.linear(hidden, self.gate.weight).sigmoid()
        ids = torch.topk(scores + bias, K)[1]
        return self.dispatch(hidden, scores.gather(1, ids), ids, hidden)


class TwoProjections(Routed):
    """The scores are a sum of what one weight makes of two inputs."""

    def forward(self, hidden):
        scores = F.linear(hidden, self.gate.weight) + F.linear(hidden.tanh(), self.gate.weight)
        weights, ids = torch.topk(scores.softmax(-1), K)
        return self.dispatch(hidden, weights, ids, hidden)


def softmax(layer, logits):
    weights, ids = torch.topk(F.softmax(logits, -1, dtype=torch.float32), K)
    return weights, ids, logits


def renormalised(layer, logits):
    weights, ids = torch.topk(F.softmax(logits, -1, dtype=torch.float32), K)
    weights /= weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids, logits


def softmax_after(layer, logits):
    weights, ids = torch.topk(logits, K)
    return F.softmax(weights, -1), ids, logits


def biased(layer, logits):
    scores = logits.sigmoid()
    ids = torch.topk(scores + layer.bias, K, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids, logits


def grouped(layer, logits, groups=4, chosen=2):
    scores = logits.softmax(-1)
    best = scores.view(-1, groups, E // groups).max(-1).values
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, chosen)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, E // groups).reshape(-1, E)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), K)
    return weights, ids, logits


def grouped_biased(layer, logits, groups=4, chosen=2):
    """DeepSeek-V3's."""
    scores = logits.sigmoid()
    choice = scores + layer.bias
    best = choice.view(-1, groups, E // groups).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, chosen, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, E // groups).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), K, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids, logits


def worst_groups(layer, logits, groups=4, chosen=2):
    """Groups ranked by what no operator of ours ranks them by."""
    scores = logits.softmax(-1)
    best = scores.view(-1, groups, E // groups).max(-1).values * -1
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, chosen)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, E // groups).reshape(-1, E)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), K)
    return weights, ids, logits


def clipped(layer, logits):
    weights, ids = torch.topk(logits.clamp(max=1).softmax(-1), K)
    return weights, ids, logits


def one_group(layer, logits):
    best = logits.view(-1, 1, E).topk(2)[0].sum(-1)
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, 1)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 1, E).reshape(-1, E)
    weights, ids = torch.topk(logits.masked_fill(~mask.bool(), float("-inf")), K)
    return F.softmax(weights, -1), ids, logits


def grouped_logits(layer, logits, groups=4, chosen=2):
    """Raw logits, of which those outside the groups become -inf: a 0 there would win over negative ones."""
    best = logits.view(-1, groups, E // groups).max(-1).values
    mask = torch.zeros_like(best).scatter_(1, torch.topk(best, chosen)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, E // groups).reshape(-1, E)
    weights, ids = torch.topk(logits.masked_fill(~mask.bool(), float("-inf")), K)
    return F.softmax(weights, -1), ids, logits


def barely_scaled(layer, logits):
    """By less than what bfloat16 rounds."""
    weights, ids = torch.topk(F.softmax(logits, -1, dtype=torch.float32), K)
    return (weights / weights.sum(-1, keepdim=True) * 1.003).to(torch.bfloat16), ids, logits


def cast_like_hidden(layer, logits):
    """GraniteMoe's: the type of the weights is that of the hidden states, which are no part of the chain."""
    weights, ids = torch.topk(logits.float(), K)
    return F.softmax(weights, -1).type_as(layer.hidden), ids, logits


def divided(layer, logits):
    weights, ids = torch.topk(logits, K)
    return F.softmax(weights, -1) / K, ids, logits


def barely_tempered(layer, logits):
    """A temperature is none of the operator's arguments, however near to 1."""
    weights, ids = torch.topk(F.softmax(logits * 1.003, -1, dtype=torch.float32), K)
    return (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16), ids, logits


def scores_read(layer, logits):
    scores = F.softmax(logits, -1)
    weights, ids = torch.topk(scores, K)
    return weights, ids, scores.mean(0)


def bias_written(layer, logits):
    """Load balancing without an auxiliary loss, in the forward itself."""
    scores = logits.sigmoid()
    layer.bias.add_(0.1)
    ids = torch.topk(scores + layer.bias, K)[1]
    return scores.gather(1, ids), ids, logits


def squared(layer, logits):
    weights, ids = torch.topk(F.softmax(logits, -1), K)
    return weights * weights, ids, logits


def logits_written(layer, logits):
    weights, ids = torch.topk(F.softmax(logits, -1), K)
    logits.mul_(2)
    return weights / weights.sum(-1, keepdim=True), ids, logits


@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize(
    ("route", "options"),
    [
        (softmax, ("softmax", False, 0.0, 1.0)),
        (renormalised, ("softmax", True, 0.0, 1.0)),
        (softmax_after, ("softmax_after", False, 0.0, 1.0)),
        (biased, ("sigmoid", True, 1e-20, 2.5)),
        (one_group, ("softmax_after", False, 0.0, 1.0)),
        (grouped, ("softmax", False, 0.0, 1.0)),
        (grouped_biased, ("sigmoid", True, 1e-20, 2.5)),
        (grouped_logits, ("softmax_after", False, 0.0, 1.0)),
        (barely_scaled, ("softmax", True, 0.0, 1.003)),
        (cast_like_hidden, ("softmax_after", False, 0.0, 1.0)),
        (divided, ("softmax_after", False, 0.0, 1 / K)),
    ],
)
def test_one_operator_routes(route, options, tokens):
    """The operator has the chain's arguments, the outputs (returned logits too) stay, nothing of the chain is left."""
    hidden = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)) * 3
    graph, _, gate = trace(Routed(route), hidden)
    with torch.no_grad():
        layer = Routed(route)
        expected = layer(hidden)
        fused = fuse_router(gate, {}, torch.device("cpu"))
        assert isinstance(fused, Gate), fused
        graph.graph.lint()
        graph.recompile()
        (call,) = [node for node in graph.graph.nodes if kind(node) == "sere.route"]
        assert tuple(map(call.kwargs.get, ("scoring", "renormalize", "epsilon", "scale"))) == options
        assert (call.kwargs["bias"] is not None) == (route in (biased, grouped_biased))
        groups = {
            grouped: (4, 2, "max", True),
            grouped_biased: (4, 2, "top2", False),
            grouped_logits: (4, 2, "max", False),
        }
        names = ("num_groups", "top_groups", "group_score", "outside_zero")
        assert tuple(map(call.kwargs.get, names)) == groups.get(route, (1, 1, "max", True))
        assert not {"topk", "softmax", "sigmoid", "gather"} & {kind(node) for node in graph.graph.nodes}
        again = torch.compile(layer, backend=_fusing, dynamic=False)
        torch._dynamo.reset()
        actual = again(hidden)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1], expected[1])
    assert fused.is_sorted
    assert not any(use.consumer._erased or use.read._erased for use in fused.uses)


def _fusing(graph, _):
    from sere_compile.passes import find_gates

    fused = fuse_router(find_gates(graph).gates[0], {}, torch.device("cpu"))
    assert isinstance(fused, Gate)
    graph.recompile()
    return graph


def test_the_operator_follows_the_logits():
    """Also where part of the chain stands ahead of them."""
    hidden = torch.randn(T, H)
    graph, run, gate = trace(CastFirst(None), hidden)
    expected = run()
    assert isinstance(fuse_router(gate, {}, torch.device("cpu")), Gate)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(run(), expected)


def test_epsilon():
    """Sums of sigmoids near the epsilon, where 0 for 1e-20 would be some percents off, and NaN further down."""
    layer = Routed(biased)
    hidden = torch.ones(T, H)
    with torch.no_grad():
        layer.gate.weight.copy_(-(46 + torch.rand(E, 1)).expand(E, H) / H)
    graph, run, gate = trace(layer, hidden)
    expected = run()
    fuse_router(gate, {}, torch.device("cpu"))
    graph.recompile()
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        (clipped, "operations of its own (clamp)"),
        (worst_groups, "no routing of ours"),
        (scores_read, "reads its scores as well"),
        (squared, "no routing of ours"),
        (logits_written, "changes its logits"),
        (bias_written, "changes its logits or bias"),
        (barely_tempered, "no routing of ours"),
        (TwoProjections(None), "its router weight projects twice"),
        (Routed(renormalised).double(), "its logits are torch.float64"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_it_does_not_compute_stays(route, reason):
    """Each refusal has its reason, and leaves the graph alone."""
    layer = route if isinstance(route, nn.Module) else Routed(route)
    graph, _, gate = trace(layer, torch.randn(T, H, dtype=layer.gate.weight.dtype))
    before = [node.name for node in graph.graph.nodes]
    found = fuse_router(gate, {}, torch.device("cpu"))
    assert isinstance(found, Skip)
    assert reason in str(found)
    assert [node.name for node in graph.graph.nodes] == before


class TestWhatIsCompared:
    def test_made_up_logits(self):
        """In an order of their own, an eighth apart, distinct in bfloat16 as far as a selection can reach."""
        for shape in ((50, 9), (2, 25, 9)):
            logits = _logits(shape, torch.Generator().manual_seed(0))
            assert logits.shape == shape
            assert [sorted(row, reverse=True) for row in logits.view(-1, 9).tolist()] == [
                [4 - n / 8 for n in range(9)]
            ] * 50
            assert len({tuple(row) for row in logits.view(-1, 9).tolist()}) > 40
            assert torch.equal(logits, _logits(shape, torch.Generator().manual_seed(0)))
        assert _logits((3, 100), torch.Generator().manual_seed(0)).min() == 4 - 64 / 8

    def test_agreement(self):
        """Of the experts and of each one's weight, in whatever order."""
        weights, ids = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[3, 1], [0, 2]])
        theirs, order = (weights, ids), ids.sort(-1).indices
        assert _agree(theirs, order, (weights, ids), exact=True)
        assert _agree(theirs, order, (weights.flip(-1), ids.flip(-1)), exact=True)
        assert not _agree(theirs, order, (weights.flip(-1), ids), exact=False)
        assert not _agree(theirs, order, (weights, ids.roll(1, 0)), exact=False)
        assert not _agree(theirs, order, (weights[:, :1], ids[:, :1]), exact=False)
        assert not _agree(theirs, order, (weights[:, :1], ids), exact=False)
        assert _agree(theirs, order, (weights * (1 + 5e-5), ids), exact=False)
        assert not _agree(theirs, order, (weights * (1 + 5e-5), ids), exact=True)
        assert not _agree(theirs, order, (weights * 1.001, ids), exact=False)

    def test_agreement_of_batches(self):
        """Experts are along the last of more dimensions."""
        generator = torch.Generator().manual_seed(0)
        weights, ids = torch.rand(2, 4, 9, generator=generator).topk(3)
        theirs, order = (weights, ids), ids.sort(-1).indices
        assert _agree(theirs, order, (weights.flip(-1), ids.flip(-1)), exact=True)
        assert not _agree(theirs, order, (weights.flip(1), ids), exact=False)

    @pytest.mark.parametrize(("scoring", "has_bias"), [("softmax", False), ("sigmoid", True), ("none", True)])
    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("exact", [False, True])
    def test_draws(self, scoring, has_bias, groups, exact):
        """Now and then below 0 where groups are closed, by the bias if the scores cannot be; some tiny."""
        w = Written()
        logits, bias = w.input(torch.zeros(5, 8).bfloat16()), w.input(torch.zeros(8).half())
        chain = types.SimpleNamespace(logits=logits, inputs=(bias,))
        candidate = types.SimpleNamespace(
            bias=bias if has_bias else None, scoring=types.SimpleNamespace(scoring=scoring, num_groups=groups)
        )
        by_bias = has_bias and scoring == "sigmoid"
        for draw in range(5):
            generator = torch.Generator().manual_seed(draw)
            made, values = _draw(chain, candidate, draw, {}, generator, exact=exact)
            assert made.dtype == (torch.float32 if exact else torch.bfloat16)
            assert values[bias].dtype == (torch.float32 if exact else torch.half)
            negative = groups > 1 and draw % 2 == 1
            top = 4 - 4.25 * (negative and not by_bias) - 48 * (exact and draw % 4 == 2)
            assert made.max().item() == pytest.approx(top, abs=0.2)
            low = -2.0 * (negative and by_bias)
            assert ((values[bias] >= low) & (values[bias] <= low + 0.1251)).all()
            assert len(values[bias].unique()) > 1

    def test_sizes_among_the_inputs(self):
        w = Written()
        logits, size = w.input(torch.zeros(5, 8)), w.input(5)
        chain = types.SimpleNamespace(logits=logits, inputs=(size,))
        candidate = types.SimpleNamespace(bias=None, scoring=types.SimpleNamespace(scoring="softmax", num_groups=1))
        assert _draw(chain, candidate, 0, {size: 7}, torch.Generator(), exact=False)[1] == {size: 7}

    def test_casts_to_16_bits_are_widened(self):
        w = Written()
        x = w.given(2, 3)
        softmax = w.call(torch.ops.aten._softmax.default, x, -1, False)
        softmax.args = (x, -1, True)
        casts = [w.call("to", x, torch.bfloat16), w.call("to", x, dtype=torch.float16), w.call("half", x)]
        casts += [w.call("bfloat16", x), w.call("to", x, torch.float64), w.call("double", x)]
        for node in (softmax, *casts):
            _widen(node)
        assert softmax.args[2] is False
        assert [node.target for node in casts] == ["to", "to", "float", "float", "to", "double"]
        assert [casts[0].args[1], casts[1].kwargs["dtype"], casts[4].args[1]] == [torch.float32] * 2 + [torch.float64]
