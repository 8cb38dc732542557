"""The experts' own arithmetic, stacked by expert or as modules, and where routing weights meet it.

The texts come in three shapes: one expert e for rows [N, H]; an expert for each row, fetched by ids; every expert for
rows [T, E, H]. `w` is the text of the routing weight where it scales what goes into the activation, else empty.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """One kind of experts.

    Attributes:
        init: lines that make the stacked parameters, {n} experts.
        names: those parameters.
        one: {x} [N, H], {e}.
        fetched: {x} [N, H], {i} [N].
        slots: {x} [T, K, H], {i} [T, K].
        every: {x} [T, E, H].
        module_init: lines that make one expert as a module.
        module: {x} [N, H], within that module.
    """

    init: tuple[str, ...]
    names: tuple[str, ...]
    one: str
    fetched: str
    slots: str
    every: str
    module_init: tuple[str, ...]
    module: str


_UP = "self.w_up = nn.Parameter(torch.randn({n}, H, I) / H**0.5)"
_DOWN = "self.w_down = nn.Parameter(torch.randn({n}, I, H) / I**0.5)"
_MODULES = ("self.up = nn.Linear(H, I, bias=False)", "self.down = nn.Linear(I, H, bias=False)")

EXPERTS = {
    "mlp": Experts(
        (_UP, _DOWN),
        ("w_up", "w_down"),
        "F.silu({x} @ self.w_up[{e}]{w}) @ self.w_down[{e}]",
        "torch.bmm(F.silu(torch.bmm({x}.unsqueeze(1), self.w_up[{i}]).squeeze(1){w}).unsqueeze(1), "
        "self.w_down[{i}]).squeeze(1)",
        'torch.einsum("tki,tkih->tkh", F.silu(torch.einsum("tkh,tkhi->tki", {x}, self.w_up[{i}]){w}), '
        "self.w_down[{i}])",
        'torch.einsum("tei,eih->teh", F.silu(torch.einsum("teh,ehi->tei", {x}, self.w_up){w}), self.w_down)',
        _MODULES,
        "self.down(F.silu(self.up({x}){w}))",
    ),
    "one matrix": Experts(
        ("self.w_up = nn.Parameter(torch.randn({n}, H, H) / H**0.5)",),
        ("w_up",),
        "torch.tanh({x} @ self.w_up[{e}]{w})",
        "torch.tanh(torch.bmm({x}.unsqueeze(1), self.w_up[{i}]).squeeze(1){w})",
        'torch.tanh(torch.einsum("tkh,tkhj->tkj", {x}, self.w_up[{i}]){w})',
        'torch.tanh(torch.einsum("teh,ehj->tej", {x}, self.w_up){w})',
        ("self.up = nn.Linear(H, H, bias=False)",),
        "torch.tanh(self.up({x}){w})",
    ),
    "gated": Experts(
        (_UP, "self.w_gate = nn.Parameter(torch.randn({n}, H, I) / H**0.5)", _DOWN),
        ("w_up", "w_gate", "w_down"),
        "(F.silu({x} @ self.w_gate[{e}]{w}) * ({x} @ self.w_up[{e}])) @ self.w_down[{e}]",
        "torch.bmm((F.silu(torch.bmm({x}.unsqueeze(1), self.w_gate[{i}]).squeeze(1){w}) * "
        "torch.bmm({x}.unsqueeze(1), self.w_up[{i}]).squeeze(1)).unsqueeze(1), self.w_down[{i}]).squeeze(1)",
        'torch.einsum("tki,tkih->tkh", F.silu(torch.einsum("tkh,tkhi->tki", {x}, self.w_gate[{i}]){w}) * '
        'torch.einsum("tkh,tkhi->tki", {x}, self.w_up[{i}]), self.w_down[{i}])',
        'torch.einsum("tei,eih->teh", F.silu(torch.einsum("teh,ehi->tei", {x}, self.w_gate){w}) * '
        'torch.einsum("teh,ehi->tei", {x}, self.w_up), self.w_down)',
        (*_MODULES, "self.gate = nn.Linear(H, I, bias=False)"),
        "self.down(F.silu(self.gate({x}){w}) * self.up({x}))",
    ),
    "with biases": Experts(
        (
            _UP,
            "self.b_up = nn.Parameter(torch.randn({n}, I) / 2)",
            _DOWN,
            "self.b_down = nn.Parameter(torch.randn({n}, H) / 2)",
        ),
        ("w_up", "b_up", "w_down", "b_down"),
        "F.silu(({x} @ self.w_up[{e}] + self.b_up[{e}]){w}) @ self.w_down[{e}] + self.b_down[{e}]",
        "torch.bmm(F.silu((torch.bmm({x}.unsqueeze(1), self.w_up[{i}]).squeeze(1) + self.b_up[{i}]){w}).unsqueeze(1), "
        "self.w_down[{i}]).squeeze(1) + self.b_down[{i}]",
        'torch.einsum("tki,tkih->tkh", F.silu((torch.einsum("tkh,tkhi->tki", {x}, self.w_up[{i}]) + '
        "self.b_up[{i}]){w}), self.w_down[{i}]) + self.b_down[{i}]",
        'torch.einsum("tei,eih->teh", F.silu((torch.einsum("teh,ehi->tei", {x}, self.w_up) + self.b_up){w}), '
        "self.w_down) + self.b_down",
        ("self.up = nn.Linear(H, I)", "self.down = nn.Linear(I, H)"),
        "self.down(F.silu(self.up({x}){w}))",
    ),
    "on a common base": Experts(
        (
            "self.base = nn.Parameter(torch.randn(H, H) / H**0.5)",
            "self.w_up = nn.Parameter(torch.randn({n}, H, H) / 4)",
        ),
        ("w_up",),
        "torch.tanh({x} @ (self.base + self.w_up[{e}]){w})",
        "torch.tanh(torch.bmm({x}.unsqueeze(1), (self.base + self.w_up)[{i}]).squeeze(1){w})",
        'torch.tanh(torch.einsum("tkh,tkhj->tkj", {x}, (self.base + self.w_up)[{i}]){w})',
        'torch.tanh(torch.einsum("teh,ehj->tej", {x}, self.base + self.w_up){w})',
        ("self.up = nn.Linear(H, H, bias=False)",),
        "torch.tanh(self.up({x}){w})",
    ),
    "one output": Experts(
        (
            "self.w_up = nn.Parameter(torch.randn({n}, H) / H**0.5)",
            "self.b_up = nn.Parameter(torch.randn({n}))",
        ),
        ("w_up", "b_up"),
        "(({x} @ self.w_up[{e}]).unsqueeze(-1) + self.b_up[{e}]){w}",
        "(({x} * self.w_up[{i}]).sum(-1) + self.b_up[{i}]).unsqueeze(-1){w}",
        "(({x} * self.w_up[{i}]).sum(-1) + self.b_up[{i}]).unsqueeze(-1){w}",
        "(({x} * self.w_up).sum(-1) + self.b_up).unsqueeze(-1){w}",
        ("self.up = nn.Linear(H, 1)",),
        "self.up({x}){w}",
    ),
}

APPLIED = ("outputs", "inputs", "inside the activation", "uniform")


def applied(text: str, where: str, x: str, w: str, **names: str) -> str:
    """The text of experts whose results are weighted by `w` at the given place.

    Args:
        text: of `Experts`.
        where: one of `APPLIED`, or "nowhere".
        x: the rows.
        w: routing weights that broadcast with the rows.
        **names: what else the text names.
    """
    match where:
        case "outputs":
            return f"({text.format(x=x, w='', **names)}) * {w}"
        case "inputs":
            return text.format(x=f"({x} * {w})", w="", **names)
        case "inside the activation":
            return text.format(x=x, w=f" * {w}", **names)
        case "uniform":
            return f"({text.format(x=x, w='', **names)}) / K"
        case _:
            return text.format(x=x, w="", **names)
