"""Every way to write the projection from hidden states x [..., H] to logits [..., E]."""

from __future__ import annotations

from dataclasses import dataclass

from .text import Part, part


@dataclass(frozen=True)
class Router:
    """A router.

    Attributes:
        part: makes `logits` of `x`.
        weight: name of the parameter [E, H] or [H, E] that a matrix can be attached to, or None.
        flat_only: whether x has to be [T, H].
    """

    part: Part
    weight: str | None = "router"
    flat_only: bool = False


_ROWS = "self.router = nn.Parameter(torch.randn(E, H))"

ROUTERS = {
    "linear": Router(part("logits = self.router(x)", "self.router = nn.Linear(H, E, bias=False)"), "router.weight"),
    "parameter": Router(part("logits = F.linear(x, self.router)", _ROWS)),
    "linear with bias": Router(part("logits = self.router(x)", "self.router = nn.Linear(H, E)"), "router.weight"),
    "parameter [H, E]": Router(part("logits = x @ self.router", "self.router = nn.Parameter(torch.randn(H, E))")),
    "matmul": Router(part("logits = torch.matmul(x, self.router.t())", _ROWS)),
    "einsum": Router(part('logits = torch.einsum("...h,eh->...e", x, self.router)', _ROWS)),
    "addmm": Router(
        part(
            "logits = torch.addmm(self.router_bias, x, self.router.t())",
            f"{_ROWS}\nself.router_bias = nn.Parameter(torch.randn(E) / 4)",
        ),
        flat_only=True,
    ),
    "transposed twice": Router(part("logits = (self.router @ x.T).T", _ROWS), flat_only=True),
    "multiply and sum": Router(part("logits = (x.unsqueeze(-2) * self.router).sum(-1)", _ROWS)),
    "type_as": Router(part("wide = x.double()\nlogits = F.linear(wide, self.router.type_as(wide)).to(x.dtype)", _ROWS)),
    ".to(x)": Router(
        part("logits = F.linear(x, self.router.to(x))", "self.router = nn.Parameter(torch.randn(E, H).double())")
    ),
    "float32 router": Router(part("logits = F.linear(x.float(), self.router.float())", _ROWS)),
    "weight norm": Router(
        part(
            "logits = self.router(x)",
            "self.router = torch.nn.utils.parametrizations.weight_norm(nn.Linear(H, E, bias=False))",
        ),
        "router.parametrizations.weight.original1",
    ),
    "LoRA on the weight": Router(
        part(
            "logits = F.linear(x, self.router + self.lora_b @ self.lora_a)",
            f"{_ROWS}\nself.lora_a = nn.Parameter(torch.randn(2, H) / 4)\n"
            "self.lora_b = nn.Parameter(torch.randn(E, 2) / 4)",
        )
    ),
    "LoRA beside": Router(
        part(
            "logits = self.router(x) + self.lora_b(self.lora_a(x))",
            "self.router = nn.Linear(H, E, bias=False)\nself.lora_a = nn.Linear(H, 2, bias=False)\n"
            "self.lora_b = nn.Linear(2, E, bias=False)",
        ),
        "router.weight",
    ),
    "cosine": Router(part("logits = F.linear(F.normalize(x, dim=-1), F.normalize(self.router, dim=-1)) * 4", _ROWS)),
    "normed input": Router(
        part(
            "logits = self.router(self.router_norm(x))",
            "self.router_norm = nn.LayerNorm(H)\nself.router = nn.Linear(H, E, bias=False)",
        ),
        "router.weight",
    ),
    "two layers": Router(
        part(
            "logits = self.router(torch.tanh(self.router_in(x)))",
            "self.router_in = nn.Linear(H, R)\nself.router = nn.Linear(R, E, bias=False)",
        ),
        "router.weight",
    ),
    "extra columns": Router(
        part("logits = self.router(x)[..., :E]", "self.router = nn.Linear(H, E + 2, bias=False)"), "router.weight"
    ),
    "flat weight": Router(
        part("logits = F.linear(x, self.router.view(E, H))", "self.router = nn.Parameter(torch.randn(E * H))"), None
    ),
    "buffer": Router(
        part("logits = F.linear(x, self.router)", 'self.register_buffer("router", torch.randn(E, H))'), None
    ),
}
