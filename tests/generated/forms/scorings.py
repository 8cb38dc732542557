"""From logits to `scores`, of which weights come, and `choice`, of which K are selected."""

from __future__ import annotations

from dataclasses import dataclass

from .text import Part, part


@dataclass(frozen=True)
class Scoring:
    """A scoring.

    Attributes:
        part: makes `scores`.
        choice: what is selected from; weights are looked up in `scores` where it differs.
        after: lines that make `weights` of the selected scores.
    """

    part: Part
    choice: str = "scores"
    after: tuple[str, ...] = ()


_GROUPS = """
best = scores.view(*scores.shape[:-1], 2, E // 2).topk(2, dim=-1)[0].sum(-1)
kept = torch.zeros_like(best).scatter(-1, best.topk(1, dim=-1)[1], 1.0)
kept = kept.unsqueeze(-1).expand(*kept.shape, E // 2).reshape(scores.shape)
choice = scores.masked_fill(kept == 0, {fill})
"""
_BIAS = "self.selection_bias = nn.Parameter(torch.randn(E) / 4)"

SCORINGS = {
    "softmax": Scoring(part("scores = logits.softmax(-1)")),
    "sigmoid": Scoring(part("scores = torch.sigmoid(logits)")),
    "softmax over the selected": Scoring(part("scores = logits"), after=("weights = weights.softmax(-1)",)),
    "softmax in float32": Scoring(part("scores = F.softmax(logits, -1, dtype=torch.float32)")),
    "softplus": Scoring(part("scores = F.softplus(logits)")),
    "square root of softplus": Scoring(part("scores = F.softplus(logits).sqrt()")),
    "none": Scoring(part("scores = logits")),
    "temperature": Scoring(part("scores = (logits / 0.7).softmax(-1)")),
    "soft cap": Scoring(part("scores = (torch.tanh(logits / 5) * 5).softmax(-1)")),
    "exponential of log-softmax": Scoring(part("scores = F.log_softmax(logits, -1).exp()")),
    "sigmoid, biased choice": Scoring(
        part("scores = torch.sigmoid(logits)\nchoice = scores + self.selection_bias", _BIAS), "choice"
    ),
    "softmax, biased choice": Scoring(
        part("scores = logits.softmax(-1)\nchoice = scores + self.selection_bias", _BIAS), "choice"
    ),
    "softmax, groups": Scoring(part("scores = logits.softmax(-1)" + _GROUPS.format(fill="0.0")), "choice"),
    "sigmoid, groups": Scoring(part("scores = torch.sigmoid(logits)" + _GROUPS.format(fill='float("-inf")')), "choice"),
    "softmax over scattered logits": Scoring(
        part("scores = logits"),
        after=(
            'hidden = torch.full_like(logits, float("-inf")).scatter(-1, ids, weights)',
            "scores = hidden.softmax(-1)",
            "weights = scores.gather(-1, ids)",
        ),
    ),
}
# Without these the weights can be below 0.
SIGNED = ("none",)
