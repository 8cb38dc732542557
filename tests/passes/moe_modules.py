"""Small hand-written MoE blocks, one for each way to dispatch, and what re-routing them has to give.

Every block splits into `route(x) -> (ids, weights)` and `dispatch(x, ids, weights)`, and has `expert(e, x)`, so
that the expected output, the sum over slots of w_k * expert_{new id_k}(x), never runs the dispatch under test.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from sere_compile.passes import RoutingSettings, Skip, find_gates, reroute_dispatch
from sere_compile.passes.graph.leaf_modules import open_linears
from sere_compile.testing import projection_oracle, reroute_oracle

TOKENS, HIDDEN, EXPERTS, TOP_K = 10, 6, 8, 3


class Block(nn.Module):
    """Softmax router, normalised weights, experts stacked [E, H, H] with an activation in front."""

    def __init__(self, experts: int = EXPERTS, top_k: int = TOP_K):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts, self.top_k = experts, top_k
        self.router = nn.Parameter(torch.randn(experts, HIDDEN, generator=generator))
        self.experts = nn.Parameter(torch.randn(experts, HIDDEN, HIDDEN, generator=generator))

    def scores(self, x):
        return F.softmax(F.linear(x, self.router), dim=-1)

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k, dim=-1)
        return ids, values / values.sum(-1, keepdim=True)

    def expert(self, number, x):
        return torch.tanh(x @ self.experts[number])

    def all_experts(self, x):
        """Expert outputs for its own rows [E, rows, H]."""
        return torch.tanh(torch.bmm(x, self.experts))

    def dispatch(self, x, ids, weights):
        raise NotImplementedError

    def forward(self, x):
        return self.dispatch(x, *self.route(x))


class Indexed(Block):
    """Gathers expert weights per slot: duplicates are summed."""

    def dispatch(self, x, ids, weights):
        y = torch.tanh(x[:, None, None, :] @ self.experts[ids])
        return (y.squeeze(2) * weights[..., None]).sum(1)


class Used(Indexed):
    """`Indexed` whose ids also go through a function of (block, x, ids, scores); its result is returned as well."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.rand(EXPERTS))
        self.other = nn.Parameter(torch.rand(EXPERTS))
        self.expert_bias = nn.Parameter(torch.rand(EXPERTS, HIDDEN))
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.int64))
        self.register_buffer("packed", torch.randint(-9, 9, (EXPERTS, HIDDEN, 4), dtype=torch.int8))
        self.register_buffer("zero", torch.randint(-9, 9, (EXPERTS,), dtype=torch.int8))

    def forward(self, x):
        scores = self.scores(x)
        values, ids = torch.topk(scores, self.top_k, dim=-1)
        return self.dispatch(x, ids, values), self.function(self, x, ids, scores)


class Grouped(Block):
    """Sorts slots by expert, counts them, writes the rows back: duplicates are summed."""

    def dispatch(self, x, ids, weights):
        flat, order = torch.sort(ids.reshape(-1))
        rows = x[order // self.top_k]
        counts = torch.histc(flat.float(), self.num_experts, min=0, max=self.num_experts - 1)
        ends = counts.cumsum(0)[None]
        owner = (torch.arange(flat.shape[0])[:, None] >= ends).sum(1)
        y = torch.tanh(rows[:, None] @ self.experts[owner]).squeeze(1) * weights.reshape(-1)[order][:, None]
        return torch.zeros_like(x).index_add(0, order // self.top_k, y)


class ScatterCombine(Block):
    """Scatters the weights into [T, E] without accumulating: of two equal slots only one survives."""

    def dispatch(self, x, ids, weights):
        combine = x.new_zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        return torch.einsum("te,eth->th", combine, self.all_experts((combine.T > 0)[..., None] * x))


class OneHotMask(Block):
    """GShard style: a summed one-hot mask selects the experts' inputs, so that a duplicate doubles its input."""

    def dispatch(self, x, ids, weights):
        chosen = F.one_hot(ids, self.num_experts).to(x.dtype)
        inputs = chosen.sum(1).T[..., None] * x
        combine = (chosen * weights[..., None]).sum(1)
        return torch.einsum("te,eth->th", combine, self.all_experts(inputs))


class ExpertLoop(Block):
    """`ids == e` over separate expert modules, taking the weight of the first slot that matches."""

    def __init__(self, experts: int = EXPERTS, top_k: int = TOP_K):
        super().__init__(experts, top_k)
        stacked = self.experts.detach().clone()
        del self.experts
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(experts))
        for layer, weight in zip(self.layers, stacked, strict=True):
            layer.weight.data = weight.T.contiguous()

    def expert(self, number, x):
        return torch.tanh(self.layers[number](x))

    def dispatch(self, x, ids, weights):
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            mine = ids == number
            weight = weights.gather(1, mine.int().argmax(-1, keepdim=True))
            y = y + torch.where(mine.any(-1, keepdim=True), weight * self.expert(number, x), 0.0)
        return y


class ColumnLoop(ExpertLoop):
    """Columns of a [T, E] table that was scattered in place, over separate expert modules."""

    def dispatch(self, x, ids, weights):
        table = torch.zeros(x.shape[0], self.num_experts)
        table.scatter_(1, ids, weights)
        y = torch.zeros_like(x)
        for number in range(self.num_experts):
            y = y + table[:, number : number + 1] * self.expert(number, x)
        return y


class IndexPut(ExpertLoop):
    """`out[tokens] += y` for each expert's tokens: a token that is there twice is added once."""

    def dispatch(self, x, ids, weights):
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(ids == number)
            out[token] += weights[token, slot, None] * self.expert(number, x[token])
        return out


class SlotTable(Block):
    """zeros.scatter(1, ids, ..) as a mask and as a table of slot numbers: the last of two equal slots wins."""

    def dispatch(self, x, ids, weights):
        empty = torch.zeros(x.shape[0], self.num_experts)
        mask = empty.scatter(1, ids, 1.0)
        slot = empty.long().scatter(1, ids, torch.arange(self.top_k).expand(x.shape[0], -1))
        combine = mask * weights.gather(1, slot)
        return torch.einsum("te,eth->th", combine, self.all_experts(mask.T[..., None] * x))


class MaskPicks(Block):
    """A mask of the ids sends tokens, and picks their weights out of the table of all scores."""

    def forward(self, x):
        scores = self.scores(x)
        _, ids = torch.topk(scores, self.top_k, dim=-1)
        mask = torch.zeros_like(scores).scatter(1, ids, 1.0)
        picked = scores * mask
        picked = picked / picked.sum(-1, keepdim=True)
        return torch.einsum("te,eth->th", picked, self.all_experts(mask.T[..., None] * x))


SUMS_DUPLICATES = (Indexed, Grouped)
DUPLICATE_UNSAFE = (ScatterCombine, OneHotMask, ExpertLoop, ColumnLoop, IndexPut, SlotTable)


class BiasCorrected(Indexed):
    """DeepSeek-V3 style: selects by biased scores, weighs by the unbiased ones."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)), False)
        self.ranked = False

    def scores(self, x):
        return F.linear(x, self.router).sigmoid()

    def look_up(self, scores, ids):
        return scores.gather(1, ids)

    def route(self, x):
        scores = self.scores(x)
        ids = torch.topk(scores + self.bias, self.top_k, dim=-1, sorted=self.ranked)[1]
        weights = self.look_up(scores, ids)
        return ids, weights / weights.sum(-1, keepdim=True)


def rows(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def similarity(experts: int = EXPERTS, seed: int = 0) -> torch.Tensor:
    return torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed))


def weighted_sum(block, x, ids, weights):
    """The sum over slots of w_k * expert_{id_k}(x), one expert at a time."""
    y = torch.zeros_like(x)
    for number in range(block.num_experts):
        y = y + (weights * (ids == number)).sum(-1, keepdim=True) * block.expert(number, x)
    return y


def expected(block, x, matrix, select_top_k, coefficients=None):
    """What SERE defines: new ids, the old weights. A block that asks for no order is asked for one.

    With projection coefficients the weights of slots that moved are scaled by them.
    """
    block.ranked, before = True, getattr(block, "ranked", None)
    ids, weights = block.route(x)
    block.ranked = before
    new_ids = reroute_oracle(ids, matrix, select_top_k)
    if coefficients is not None:
        weights = projection_oracle(weights, ids, new_ids, coefficients)
    return weighted_sum(block, x, new_ids, weights)


def from_dynamo(module, *inputs, **options):
    """The one graph that Dynamo makes; its inputs as they come are kept as `captured_inputs`."""
    graphs = []

    def capture(graph, example_inputs):
        graph.captured_inputs = example_inputs
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=capture, fullgraph=True, **options)(*inputs)
    torch._dynamo.reset()
    return graphs[0]


def from_export(module, *inputs, **options):
    """The graph of torch.export, unlifted, so that it can be called."""
    with torch.no_grad():
        return torch.export.export(module, inputs, **options).module()


def from_make_fx(module, *inputs):
    with torch.no_grad():
        return make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def from_symbolic_trace(module, *inputs):
    """The graph of symbolic_trace, as `rewrite` prepares it: ShapeProp records shapes and types, but no tensors."""
    graph = symbolic_trace(module)
    with torch.no_grad():
        ShapeProp(graph).propagate(*inputs)
    open_linears(graph)
    return graph


TRACERS = {"dynamo": from_dynamo, "export": from_export, "make_fx": from_make_fx}


def one_gate(graph):
    """The only gate of a graph; a failure prints why there is none."""
    found = find_gates(graph)
    assert len(found.gates) == 1, [f"{skip.node}: {skip}" for skip in found.skips]
    return found.gates[0]


def add_matrix(graph, matrix, name="similarity"):
    """The matrix as an attribute ahead of everything."""
    graph.register_buffer(name, matrix)
    first = next(node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.graph.inserting_before(first):
        return graph.graph.get_attr(name)


def projection(experts: int = EXPERTS, seed: int = 3) -> torch.Tensor:
    """Random coefficients [E, E] with ones on the diagonal."""
    return similarity(experts, seed).fill_diagonal_(1.0)


def reroute(graph, matrix=None, select_top_k=1, gate=None, coefficients=None):
    """Rewrite the only gate; the graph is checked and ready to run."""
    gate = gate or one_gate(graph)
    matrix = similarity(gate.num_experts) if matrix is None else matrix
    scale = None if coefficients is None else add_matrix(graph, coefficients, "projection")
    done = reroute_dispatch(gate, add_matrix(graph, matrix), RoutingSettings(select_top_k), scale)
    assert not isinstance(done, Skip), f"{done.node}: {done}"
    graph.graph.lint()
    graph.recompile()
    return done


def run(graph, *inputs):
    """The output on the inputs it was traced with (Dynamo's graph) or on these."""
    with torch.no_grad():
        result = graph(*getattr(graph, "captured_inputs", inputs))
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result
