"""From rows x [T, H], `ids` [T, K] and `weights` [T, K] to `y`, by experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .experts import EXPERTS, applied


@dataclass(frozen=True)
class Dispatch:
    """One form of dispatch.

    Attributes:
        lines: the source, from kind of experts, where weights are applied, whether experts are modules, and the text
            of the number of experts.
        modules: whether experts may be modules.
        traced: whether tracers that ask for no data can follow: export, make_fx, symbolic_trace.
        compares: whether ids outside [0, E) are dropped, as padding wants.
        ordered: whether the rank of a slot matters.
    """

    lines: Callable[[str, str, bool, str], list[str]]
    modules: bool = False
    traced: bool = True
    compares: bool = False
    ordered: bool = False


def _one(kind: str, where: str, modules: bool, x: str, e: str, w: str) -> str:
    if not modules:
        return applied(EXPERTS[kind].one, where, x, w, e=e)
    if where == "inside the activation":
        return f"self.experts[{e}]({x}, {w})"
    return applied("self.experts[{e}]({x})", where, x, w, e=e)


def _every(kind: str, where: str, modules: bool, n: str, w: str) -> str:
    if not modules:
        return applied(EXPERTS[kind].every, where, f"x.unsqueeze(1).expand(-1, {n}, -1)", w)
    stacked = "torch.stack([expert(x) for expert in self.experts], 1)"
    return {"outputs": f"{stacked} * {w}", "uniform": f"{stacked} / K"}.get(where, stacked)


def gathered(kind: str, where: str, modules: bool, n: str) -> list[str]:
    x = "x.unsqueeze(1).expand(-1, ids.shape[1], -1)"
    return [f"y = ({applied(EXPERTS[kind].slots, where, x, 'weights.unsqueeze(-1)', i='ids')}).sum(1)"]


def gathered_maximum(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [gathered(kind, where, modules, n)[0].replace(".sum(1)", ".amax(1)")]


def flat_slots(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [
        "slot = ids.reshape(-1)",
        "row = x.repeat_interleave(ids.shape[1], dim=0)",
        f"out = {applied(EXPERTS[kind].fetched, where, 'row', 'weights.reshape(-1, 1)', i='slot')}",
        "y = out.view(ids.shape[0], ids.shape[1], out.shape[-1]).sum(1)",
    ]


def flat_index_add(kind: str, where: str, modules: bool, n: str) -> list[str]:
    width = "1" if kind == "one output" else "H"
    return [
        "slot = ids.reshape(-1)",
        "token = torch.arange(ids.shape[0]).repeat_interleave(ids.shape[1])",
        f"out = {applied(EXPERTS[kind].fetched, where, 'x[token]', 'weights.reshape(-1, 1)', i='slot')}",
        f"y = out.new_zeros(x.shape[0], {width}).index_add(0, token, out)",
    ]


def by_rank(kind: str, where: str, modules: bool, n: str) -> list[str]:
    text = applied(EXPERTS[kind].fetched, where, "x", "weights[:, k : k + 1]", i="ids[:, k]")
    return ["y = 0.0", "for k in range(K):", f"    y = y + {text}"]


def chained(kind: str, where: str, modules: bool, n: str) -> list[str]:
    text = applied(EXPERTS[kind].fetched, where, "y", "weights[:, k : k + 1]", i="ids[:, k]")
    return ["y = x", "for k in range(K):", f"    y = y + {text}"]


def concatenated(kind: str, where: str, modules: bool, n: str) -> list[str]:
    text = applied(EXPERTS[kind].fetched, where, "x", "weights[:, k : k + 1]", i="ids[:, k]")
    return [f"parts = [{text} for k in range(K)]", "y = torch.cat(parts, -1)"]


def grouped(kind: str, where: str, modules: bool, n: str) -> list[str]:
    """Rows in the order of their experts; torch traces the product in bfloat16 alone."""
    inside = " * share" if where == "inside the activation" else ""
    rows = "x[order // K] * share" if where == "inputs" else "x[order // K]"
    after = {"outputs": "out = out * share", "uniform": "out = out / K"}.get(where)
    return [
        "order = ids.reshape(-1).argsort(stable=True)",
        f"counts = torch.histc(ids.reshape(-1).float(), bins={n}, min=0, max={n} - 1)",
        "offsets = counts.cumsum(0).to(torch.int32)",
        "share = weights.reshape(-1)[order].unsqueeze(-1)",
        f"out = F.grouped_mm(({rows}).bfloat16(), self.w_up.bfloat16(), offs=offsets)",
        f"out = F.silu(out{inside}).bfloat16()",
        "out = F.grouped_mm(out, self.w_down.bfloat16(), offs=offsets).to(x.dtype)",
        *([after] if after else []),
        "y = torch.zeros_like(x).index_add(0, order // K, out)",
    ]


def sorted_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [
        "order = ids.reshape(-1).argsort(stable=True)",
        f"sizes = torch.bincount(ids.reshape(-1), minlength={n}).tolist()",
        "share, start, parts = weights.reshape(-1)[order].unsqueeze(-1), 0, []",
        "for e, size in enumerate(sizes):",
        "    part, portion = x[order[start : start + size] // K], share[start : start + size]",
        f"    parts.append({_one(kind, where, modules, 'part', 'e', 'portion')})",
        "    start += size",
        "out = torch.cat(parts)",
        "y = out.new_zeros(x.shape[0], out.shape[-1]).index_add(0, order // K, out)",
    ]


def mask_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    text = _one(kind, where, modules, "x", "e", "share")
    # A share of 0 hides an expert that was not chosen only where it scales the result.
    hidden = text if where == "outputs" else f"({text}) * (ids == e).any(-1, keepdim=True)"
    return [
        "y = 0.0",
        f"for e in range({n}):",
        "    share = (weights * (ids == e)).sum(-1, keepdim=True)",
        f"    y = y + {hidden}",
    ]


def one_hot_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [f"hot = F.one_hot(ids, {n})", *_with_hot(mask_loop(kind, where, modules, n))]


def _with_hot(lines: list[str]) -> list[str]:
    return [line.replace("(ids == e)", "hot[..., e].bool()") for line in lines]


def where_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    width = "1" if kind == "one output" else "H"
    text = _one(kind, where, modules, "x[token]", "e", "weights[token, slot].unsqueeze(-1)")
    return [
        f"y = x.new_zeros(x.shape[0], {width})",
        f"for e in range({n}):",
        "    token, slot = torch.where(ids == e)",
        f"    y.index_add_(0, token, ({text}).to(y.dtype))",
    ]


def add_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    lines = where_loop(kind, where, modules, n)
    return [*lines[:-1], lines[-1].replace("y.index_add_(0, token, ", "y[token] += ")[:-1]]


def row_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    """Rows of an expert by a mask over tokens; the weight is the sum over the token's slots."""
    width = "1" if kind == "one output" else "H"
    text = _one(kind, where, modules, "x[row]", "e", "share[row]")
    return [
        f"y = x.new_zeros(x.shape[0], {width})",
        f"for e in range({n}):",
        "    share = (weights * (ids == e)).sum(-1, keepdim=True)",
        "    row = (ids == e).any(-1).nonzero().squeeze(-1)",
        f"    y[row] += ({text}).to(y.dtype)",
    ]


def token_loop(kind: str, where: str, modules: bool, n: str) -> list[str]:
    text = _one(kind, where, modules, "x[t : t + 1]", "ids[t, k].item()", "weights[t, k]")
    return [
        "rows = []",
        "for t in range(x.shape[0]):",
        f"    rows.append(sum({text} for k in range(K)))",
        "y = torch.cat(rows)",
    ]


def _table(n: str) -> str:
    return f"table = weights.new_zeros(ids.shape[0], {n}).scatter(1, ids, weights)"


def dense_sum(kind: str, where: str, modules: bool, n: str) -> list[str]:
    if where == "outputs":
        return [_table(n), f"y = ({_every(kind, where, modules, n, 'table.unsqueeze(-1)')}).sum(1)"]
    chosen = "chosen = torch.zeros_like(table).scatter(1, ids, 1.0).unsqueeze(-1)"
    return [_table(n), chosen, f"y = (({_every(kind, where, modules, n, 'table.unsqueeze(-1)')}) * chosen).sum(1)"]


def dense_einsum(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [
        _table(n),
        f"out = {_every(kind, 'nowhere', modules, n, '')}",
        'y = torch.einsum("te,teh->th", table, out)',
    ]


def dense_bmm(kind: str, where: str, modules: bool, n: str) -> list[str]:
    return [
        _table(n),
        f"out = {_every(kind, 'nowhere', modules, n, '')}",
        "y = torch.bmm(table.unsqueeze(1), out).squeeze(1)",
    ]


def dense_rows(kind: str, where: str, modules: bool, n: str) -> list[str]:
    weighted = "out / K" if where == "uniform" else "out * weights.unsqueeze(-1)"
    return [
        f"out = {_every(kind, 'nowhere', modules, n, '')}",
        "out = out[torch.arange(ids.shape[0]).unsqueeze(1), ids]",
        f"y = ({weighted}).sum(1)",
    ]


def dense_gather(kind: str, where: str, modules: bool, n: str) -> list[str]:
    weighted = "out / K" if where == "uniform" else "out * weights.unsqueeze(-1)"
    return [
        f"out = {_every(kind, 'nowhere', modules, n, '')}",
        "out = out.gather(1, ids.unsqueeze(-1).expand(-1, -1, out.shape[-1]))",
        f"y = ({weighted}).sum(1)",
    ]


def score_mask(kind: str, where: str, modules: bool, n: str) -> list[str]:
    """Scores again, where a table says that they were chosen."""
    return [
        f"chosen = scores.new_zeros(ids.shape[0], {n}).scatter(1, ids, 1.0)",
        f"out = {_every(kind, 'nowhere', modules, n, '')}",
        "y = (out * (scores * chosen).unsqueeze(-1)).sum(1)",
    ]


def capacity(kind: str, where: str, modules: bool, n: str) -> list[str]:
    """Each expert takes its first rows only, counted over the batch."""
    return [
        f"hot = F.one_hot(ids, {n})",
        "place = (hot.sum(1).cumsum(0) - hot.sum(1)).gather(1, ids)",
        "weights = weights * (place < 3)",
        *dense_einsum(kind, where, modules, n),
    ]


DISPATCHES = {
    "gathered": Dispatch(gathered),
    "flat slots": Dispatch(flat_slots),
    "flat, index_add": Dispatch(flat_index_add),
    "grouped": Dispatch(grouped),
    "mask loop": Dispatch(mask_loop, modules=True, compares=True),
    "one-hot loop": Dispatch(one_hot_loop, modules=True),
    "dense sum": Dispatch(dense_sum, modules=True),
    "dense einsum": Dispatch(dense_einsum, modules=True),
    "dense bmm": Dispatch(dense_bmm, modules=True),
    "dense rows": Dispatch(dense_rows, modules=True),
    "dense gather": Dispatch(dense_gather, modules=True),
    "score mask": Dispatch(score_mask, modules=True),
    "by rank": Dispatch(by_rank),
    "where loop": Dispatch(where_loop, modules=True, traced=False, compares=True),
    "add loop": Dispatch(add_loop, modules=True, traced=False, compares=True),
    "row loop": Dispatch(row_loop, modules=True, traced=False, compares=True),
    "sorted loop": Dispatch(sorted_loop, modules=True, traced=False),
    "token loop": Dispatch(token_loop, modules=True, traced=False),
    "capacity": Dispatch(capacity, modules=True),
    "gathered, maximum": Dispatch(gathered_maximum),
    "chained": Dispatch(chained, ordered=True),
    "concatenated": Dispatch(concatenated, ordered=True),
}
# In these the routing weights scale a table or gathered outputs, and nothing else.
OUTPUTS_ONLY = ("dense einsum", "dense bmm", "score mask", "capacity")
OUTPUTS_OR_UNIFORM = ("dense rows", "dense gather")
