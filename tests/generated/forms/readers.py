"""Who else reads ids and weights: before the experts, after them, and what is returned."""

from __future__ import annotations

from .text import Part, part

# Numbers per expert that are no expert's parameters: they belong to what the router chose.
EARLY: dict[str, Part] = {
    "none": part(),
    "scale [E]": part("weights = weights * self.scale[ids]", "self.scale = nn.Parameter(torch.rand(E) + 0.5)"),
    "scale [E, 1]": part(
        "weights = weights * self.scale[ids].squeeze(-1)", "self.scale = nn.Parameter(torch.rand(E, 1) + 0.5)"
    ),
    "scale by embedding": part("weights = weights * self.scale(ids).squeeze(-1)", "self.scale = nn.Embedding(E, 1)"),
    "counts in a buffer": part(
        "self.load += F.one_hot(ids, E).reshape(-1, E).sum(0)",
        'self.register_buffer("load", torch.zeros(E, dtype=torch.int64))',
    ),
    "checked ids": part("weights = weights * (ids < E)"),
}

# The same ids under another name.
PASSED: dict[str, tuple[str, ...]] = {
    "as they are": (),
    "cast and back": ("ids = ids.to(torch.int32).long()",),
    "copied": ("ids = ids.clone()",),
    "flattened and back": ("ids = ids.flatten().view(-1, K)",),
    "detached": ("ids, weights = ids.detach(), weights.contiguous()",),
}

LATE: dict[str, Part] = {
    "none": part(),
    "residual of the first weight": part("y = y + (1 - weights[:, :1]) * x"),
    "deviation of weights": part("y = y * (1 + weights.std(-1, keepdim=True))"),
    "divided by a count": part("y = y / (weights > 0.2).sum(-1, keepdim=True).clamp(min=1)"),
    "divided by the sum": part("y = y / (weights.sum(-1, keepdim=True) + 1e-3)"),
    "scaled by the best": part("y = y * weights.amax(-1, keepdim=True)"),
    "equal ids counted": part("y = y * (ids.unsqueeze(-1) == ids.unsqueeze(-2)).sum((-1, -2)).unsqueeze(-1)"),
    "first id as a number": part("y = y + ids[:, :1].to(y.dtype) / E"),
}

# name -> (names of what is returned beside y, lines that make them)
RETURNED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "output": ((), ()),
    "ids": (("ids",), ()),
    "weights": (("weights",), ()),
    "ids and weights": (("ids", "weights"), ()),
    "logits": (("logits",), ()),
    "balance loss": (
        ("loss",),
        ("loss = (F.one_hot(ids, E).to(weights.dtype).mean((0, 1)) * scores.mean(0)).sum() * E",),
    ),
    "entropy loss": (("loss",), ("loss = -(weights * (weights.abs() + 1e-6).log()).sum(-1).mean()",)),
    "counts": (("counts",), ("counts = torch.bincount(ids.reshape(-1), minlength=E)",)),
    "load of experts": (
        ("load",),
        ("load = weights.new_zeros(E).index_add(0, ids.reshape(-1), weights.reshape(-1))",),
    ),
    "load of real tokens": (("load",), ("load = (F.one_hot(ids, E).sum(1) * mask.unsqueeze(-1)).sum(0)",)),
    "tokens by one-hot": (("hot",), ("hot = F.one_hot(ids, E).sum(1)",)),
}
