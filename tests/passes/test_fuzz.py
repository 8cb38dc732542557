"""Random gates: what the passes make of them equals an oracle that shares no code with them.

Each seed is one block put together from parts (scoring, bias, groups, selection, look-up, weights, dispatch, aliases,
dead branches, dtype, sizes), one tracer and one S. A failure prints its parts; run one seed with `-k "chunk and [7]"`
or call `check(seed)`.
"""

import math
import random
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sere_compile.passes import RoutingSettings, Skip, SkipReason, find_gates, reroute_dispatch, verify_rewrite
from sere_compile.testing import reroute_oracle

from ..thinned import thinned
from . import moe_modules as blocks
from .evidence.test_selections import argmax_steps
from .moe_modules import (
    Block,
    add_matrix,
    from_dynamo,
    from_export,
    from_make_fx,
    from_symbolic_trace,
    run,
    weighted_sum,
)

SEEDS, CHUNK = 200, 20

SCORING = {
    "raw": lambda s: s,
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt softplus": lambda s: F.softplus(s).sqrt(),
    "soft cap": lambda s: torch.tanh(s / 5) * 5,
    "log softmax": lambda s: F.log_softmax(s, -1).exp(),
}
LOOK_UP = {
    "gather": lambda s, ids: s.gather(-1, ids),
    "take_along_dim": lambda s, ids: s.take_along_dim(ids, -1),
    "rows": lambda s, ids: s[torch.arange(len(ids))[:, None], ids],
}


def divided_in_place(b, w, ids):
    w = w.clone() if b.parts.selection == "top-k" else w + 0.0
    w /= w.sum(-1, keepdim=True)
    return w


WEIGHTS = {
    "plain": lambda b, w, ids: w,
    "normalised": lambda b, w, ids: w / (w.sum(-1, keepdim=True) + 1e-6),
    "normalised in place": divided_in_place,
    "scaled": lambda b, w, ids: w / w.sum(-1, keepdim=True) * 2.5,
    "softmax over K": lambda b, w, ids: w.softmax(-1),
    "scale of its expert": lambda b, w, ids: w * b.scale[ids],
    "cast": lambda b, w, ids: (w.double() * 1.5).to(w.dtype),
}
ALIASES = {
    "none": lambda ids: ids,
    "view": lambda ids: ids.view(-1, ids.shape[-1]),
    "copy": lambda ids: ids.clone(),
    "cast": lambda ids: ids.to(torch.int32).long(),
    "contiguous": lambda ids: ids.contiguous().detach(),
}
DISPATCH = {
    kind.__name__: kind.dispatch
    for kind in (
        blocks.Indexed,
        blocks.Grouped,
        blocks.ScatterCombine,
        blocks.OneHotMask,
        blocks.ExpertLoop,
        blocks.ColumnLoop,
        blocks.SlotTable,
    )
}


def titan(b, x, ids, weights):
    """torchtitan: counts by histc, order by a stable argsort, rows added back by token."""
    counts = torch.histc(ids.reshape(-1).float(), bins=b.num_experts, min=0, max=b.num_experts - 1)
    order = torch.argsort(ids.reshape(-1), stable=True)
    token = order // b.top_k
    owner = (torch.arange(order.shape[0])[:, None] >= counts.cumsum(0)[None]).sum(1)
    y = torch.tanh(x[token][:, None] @ b.experts[owner]).squeeze(1) * weights.reshape(-1)[order][:, None]
    return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, x.shape[1]), y)


DISPATCH["titan"] = titan
# What symbolic_trace can follow: no number is asked of a tensor.
SYMBOLIC = ("Indexed", "ScatterCombine", "OneHotMask", "ExpertLoop")
EXTRAS = ("none", "dead branch", "load statistic", "logits returned", "ids compared")


@dataclass(frozen=True)
class Parts:
    """One choice for each part of a block, its sizes, and how it is traced."""

    experts: int
    top_k: int
    tokens: int
    select_top_k: int
    router_dtype: torch.dtype
    scoring: str
    biased: bool
    groups: int
    group_fill: float
    selection: str
    look_up: str
    weights: str
    alias: str
    dispatch: str
    extra: str
    tracer: str


def draw(seed: int) -> Parts:
    """The parts of a seed; what cannot go together is drawn again."""
    rng = random.Random(seed)
    top_k = rng.randint(2, 4)
    parts = Parts(
        experts=rng.choice([8, 12, 16]),
        top_k=top_k,
        tokens=rng.choice([1, 2, 5, 12]),
        select_top_k=rng.randint(1, top_k - 1),
        router_dtype=rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        scoring=rng.choice(list(SCORING)),
        biased=rng.random() < 0.4,
        groups=rng.choice([0, 0, 0, 1, 2, 4]),
        group_fill=rng.choice([-math.inf, 0.0]),
        selection=rng.choice(["top-k", "top-k", "unsorted", "sort", "argsort", "one more", "steps"]),
        look_up=rng.choice(list(LOOK_UP)),
        weights=rng.choice(list(WEIGHTS)),
        alias=rng.choice(list(ALIASES)),
        dispatch=rng.choice(list(DISPATCH)),
        extra=rng.choice(EXTRAS),
        tracer=rng.choices(["make_fx", "symbolic", "export", "dynamo"], [70, 22, 4, 4])[0],
    )
    # A fill of 0 hides nothing from scores below 0.
    positive = parts.scoring not in ("raw", "soft cap") and not parts.biased
    if parts.tracer == "symbolic" and (parts.dispatch not in SYMBOLIC or parts.look_up == "rows"):
        return draw(seed + 100_003)
    # Equal scores, which bfloat16 has, may come in any order.
    if parts.router_dtype is torch.bfloat16 and parts.selection == "unsorted":
        return draw(seed + 100_003)
    return parts if positive or parts.group_fill else draw(seed + 100_003)


class Generated(Block):
    """A block made of `Parts`."""

    def __init__(self, parts: Parts, seed: int):
        super().__init__(parts.experts, parts.top_k)
        self.parts, self.ranked = parts, False
        generator = torch.Generator().manual_seed(seed)
        self.bias = nn.Parameter(torch.randn(parts.experts, generator=generator) / 4, False)
        self.scale = nn.Parameter(torch.rand(parts.experts, generator=generator) + 0.5, False)

    def route(self, x):
        parts = self.parts
        scores = SCORING[parts.scoring](F.linear(x.to(parts.router_dtype), self.router.to(parts.router_dtype)))
        ids, values = self.select(self.masked(scores + self.bias.to(scores.dtype) if parts.biased else scores))
        # Scores that a mask or bias changed are no weights.
        if parts.biased or parts.groups or values is None:
            values = LOOK_UP[parts.look_up](scores, ids)
        # Some dispatches take only weights above 0, as gates give them.
        if parts.scoring in ("raw", "soft cap"):
            values = values.exp()
        return ids, WEIGHTS[parts.weights](self, values, ids).to(x.dtype)

    def masked(self, scores):
        """DeepSeek's limit to the best groups; with one group everything stays."""
        groups = self.parts.groups
        if not groups:
            return scores
        each = scores.view(-1, groups, self.num_experts // groups)
        best = each.topk(2, dim=-1)[0].sum(-1)
        chosen = best.topk(max(1, groups // 2 + groups % 2), dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter_(1, chosen, 1)
        mask = mask.unsqueeze(-1).expand(-1, groups, self.num_experts // groups).reshape(-1, self.num_experts)
        return scores.masked_fill(~mask.bool(), self.parts.group_fill)

    def select(self, scores):
        k = self.top_k
        match self.parts.selection:
            case "top-k":
                values, ids = torch.topk(scores, k, dim=-1)
                return ids, values
            case "unsorted":
                values, ids = torch.topk(scores, k, dim=-1, sorted=self.ranked)
                return ids, values
            case "sort":
                values, ids = torch.sort(scores, dim=-1, descending=True)
                return ids[:, :k], values[:, :k]
            case "argsort":
                return torch.argsort(scores, dim=-1, descending=True)[:, :k], None
            case "one more":
                values, ids = torch.topk(scores, k + 1, dim=-1)
                return ids[..., :k], values[..., :k]
            case _:
                best = [scores.argmax(-1, keepdim=True)]
                for _ in range(k - 1):
                    scores = scores.scatter(-1, best[-1], -math.inf)
                    best.append(scores.argmax(-1, keepdim=True))
                return torch.cat(best, -1), None

    def forward(self, x):
        parts = self.parts
        ids, weights = self.route(x)
        if parts.extra == "dead branch":
            (ids * 2 + 1).sum()
        y = DISPATCH[parts.dispatch](self, x, ALIASES[parts.alias](ids), weights)
        if parts.extra == "load statistic":
            return y, torch.bincount(ids.flatten(), minlength=self.num_experts)
        if parts.extra == "logits returned":
            return y, F.linear(x, self.router)
        if parts.extra == "ids compared":
            return y, (ids >= self.num_experts).any()
        return y


TRACERS = {"make_fx": from_make_fx, "symbolic": from_symbolic_trace, "export": from_export, "dynamo": from_dynamo}


def check(seed: int) -> str:
    """Rewrite the block of a seed and compare with the oracle; what became of it."""
    parts = draw(seed)
    text = f"seed {seed}: " + ", ".join(f"{f.name}={getattr(parts, f.name)}" for f in fields(parts))
    module = Generated(parts, seed)
    x = blocks.rows(parts.tokens, seed)
    graph = TRACERS[parts.tracer](module, x)
    found = find_gates(graph)
    assert len(found.gates) == 1, f"{text}\n{[(s.node.name, str(s)) for s in found.skips]}"
    [gate] = found.gates
    assert (gate.num_experts, gate.top_k) == (parts.experts, parts.top_k), text
    captured = dict(zip(graph.graph.find_nodes(op="placeholder"), getattr(graph, "captured_inputs", ()), strict=False))
    shown = verify_rewrite(gate, lambda n: captured.get(n) if n.op == "placeholder" else attribute(graph, n))
    if isinstance(shown, Skip):
        assert shown.reason in (SkipReason.WEIGHTS_LATE,), f"{text}\n{shown}"
        return shown.reason.name
    matrix = blocks.similarity(parts.experts, seed)
    settings = RoutingSettings(parts.select_top_k)
    done = reroute_dispatch(shown.gate, add_matrix(graph, matrix), settings, merged=shown.merged, readers=shown.readers)
    if isinstance(done, Skip):
        assert done.reason in (SkipReason.WEIGHTS_LATE,), f"{text}\n{done}"
        return done.reason.name
    graph.graph.lint()
    graph.recompile()
    module.ranked = True
    with torch.no_grad():
        ids, weights = module.route(x)
        want = weighted_sum(module, x, reroute_oracle(ids, matrix, parts.select_top_k), weights)
    got = run(graph, x)
    got = got[0] if isinstance(got, tuple) else got
    scale = max(1.0, float(want.abs().max()))
    error = float((got - want).abs().max()) / scale
    assert error <= 1e-5, f"{text}\nerror {error}"
    return "merged" if done.merged else "summed"


def attribute(graph, node):
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


@pytest.mark.parametrize("chunk", thinned(range(SEEDS // CHUNK), range(1)))
def test_chunk(chunk):
    """Twenty random gates each: found, rewritten, and equal to the oracle."""
    made = [check(seed) for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    assert {"merged", "summed"} <= set(made), made
    assert made.count("merged") + made.count("summed") >= CHUNK - 2, made


def test_steps_of_the_generator_are_those_of_the_forms():
    """The oracle's own selection by steps chooses what a top-k does."""
    scores = torch.rand(7, 9)

    class Scores:
        top_k, num_experts = 3, 9

        def scores(self, x):
            return x

    assert torch.equal(argmax_steps(Scores(), scores)[0], scores.topk(3)[1])
