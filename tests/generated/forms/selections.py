"""From what is chosen from [..., E] to `ids` [..., K], best first, and `weights` [..., K]."""

from __future__ import annotations

# name -> lines with {choice}; those that leave `weights` undefined are in NO_VALUES.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "topk": ("weights, ids = torch.topk({choice}, K, dim=-1)",),
    "topk, unsorted": ("weights, ids = torch.topk({choice}, K, dim=-1, sorted=False)",),
    "topk into given tensors": (
        "weights = {choice}.new_empty(*{choice}.shape[:-1], K)",
        "ids = torch.empty(*{choice}.shape[:-1], K, dtype=torch.int64)",
        "torch.topk({choice}, K, dim=-1, out=(weights, ids))",
    ),
    "sort": (
        "ordered, order = torch.sort({choice}, dim=-1, descending=True)",
        "weights, ids = ordered[..., :K], order[..., :K]",
    ),
    "topk without gradients": ("with torch.no_grad():", "    ids = torch.topk({choice}, K, dim=-1)[1]"),
    "argsort": ("ids = torch.argsort({choice}, dim=-1, descending=True)[..., :K]",),
    "negated argsort": ("ids = (-{choice}).argsort(dim=-1)[..., :K]",),
    "one more than needed": (
        "weights, ids = torch.topk({choice}, K + 1, dim=-1)",
        "weights, ids = weights[..., :K], ids[..., :K]",
    ),
    "two rounds of argmax": (
        "first = {choice}.argmax(-1, keepdim=True)",
        'second = {choice}.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)',
        "ids = torch.cat([first, second], -1)",
    ),
    "two rounds of max and mask": (
        "best, first = {choice}.max(-1)",
        'rest = {choice}.masked_fill(F.one_hot(first, E).bool(), float("-inf"))',
        "next_best, second = rest.max(-1)",
        "weights, ids = torch.stack([best, next_best], -1), torch.stack([first, second], -1)",
    ),
}
NO_VALUES = ("topk without gradients", "argsort", "negated argsort", "two rounds of argmax")
TWO_ONLY = ("two rounds of argmax", "two rounds of max and mask")

LOOK_UPS = {
    "values": (),
    "gather": ("weights = scores.gather(-1, ids)",),
    "take_along_dim": ("weights = torch.take_along_dim(scores, ids, -1)",),
    "rows": ("weights = scores[torch.arange(scores.shape[0])[:, None], ids]",),
}
