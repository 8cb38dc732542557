"""What is done to `weights` [..., K] between the look-up and the experts."""

from __future__ import annotations

NORMALISINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "sum": ("weights = weights / weights.sum(-1, keepdim=True)",),
    "sum and epsilon": ("weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)",),
    "sum in place": ("weights = weights + 0.0", "weights /= weights.sum(-1, keepdim=True)"),
    "sum, scaled": ("weights = weights / weights.sum(-1, keepdim=True) * 2.5",),
    "L2 norm": ("weights = F.normalize(weights, dim=-1)",),
    "maximum": ("weights = weights / weights.amax(-1, keepdim=True)",),
    "clamp": ("weights = weights.clamp(0.1, 0.4)",),
    "threshold by where": ("weights = torch.where(weights > 0.2, weights, torch.zeros_like(weights))",),
    "threshold by masked_fill": ("weights = weights.masked_fill(weights < 0.2, 0.0)",),
    "threshold, then sum": (
        "weights = weights * (weights > 0.1)",
        "weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)",
    ),
    "square": ("weights = weights**2",),
    "relu": ("weights = torch.relu(weights - 0.15)",),
    "ceil": ("weights = torch.ceil(weights * 4) / 4",),
    "softmax": ("weights = torch.softmax(weights, -1)",),
    "viewed, square root": ("weights = weights.reshape(-1).view(-1, K)", "weights = weights.abs().sqrt()"),
    "dropped last": ("weights = torch.cat([weights[..., :-1], weights[..., -1:] * 0.5], -1)",),
}
