"""What a model predicts of each token of a text, and what that says beyond perplexity.

A mean over tokens hides rare events: a few tokens that become hopeless, a continuation that goes wrong at one place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EvaluationError


@dataclass(frozen=True)
class Predictions:
    """Of every token of N sequences but the first, each from the text before it.

    Attributes:
        losses: float32 [N, L - 1], nats.
        right: bool [N, L - 1], whether the most likely token is the text's.
        counted: bool [N, L - 1], False for predictions of padding or from it, which count nowhere.
    """

    losses: Tensor
    right: Tensor
    counted: Tensor

    @classmethod
    def of(cls, log_probabilities: Tensor, tokens: Tensor, counted: Tensor) -> Predictions:
        """From log-probabilities [N, L, V] of the token behind each of `tokens` [N, L]; counted as above."""
        ahead, following = log_probabilities[:, :-1], tokens[:, 1:]
        losses = -ahead.gather(2, following[..., None])[..., 0].float()
        return cls(losses.cpu(), (ahead.argmax(-1) == following).cpu(), counted.cpu())

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """The sequences of several, one after the other."""
        columns = ([vars(part)[name] for part in parts] for name in ("losses", "right", "counted"))
        return cls(*map(torch.cat, columns))

    def rows(self, chosen: Tensor) -> Predictions:
        """Some of the sequences: numbers or bool [N]."""
        return Predictions(self.losses[chosen], self.right[chosen], self.counted[chosen])

    @property
    def loss(self) -> float:
        """The mean, in nats per token."""
        return self.losses[self.counted].double().mean().item()

    @property
    def accuracy(self) -> float:
        """How often the most likely next token is the text's, in [0, 1]."""
        return self.right[self.counted].double().mean().item()

    def worst_loss(self, share: float = 0.05) -> float:
        """The mean loss of this share of the tokens, those with the largest: its expected shortfall.

        Raises:
            EvaluationError: the share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise EvaluationError(f"share: expected a number in (0, 1], got {share}")
        losses = self.losses[self.counted].double()
        return losses.topk(max(1, round(share * len(losses)))).values.mean().item()

    def greedy_match(self, length: int = 3) -> float:
        """How often greedy decoding continues as the text does for `length` tokens, over all places of the text."""
        return self._runs(self.right.double().log(), length).exp().mean().item()

    def sampled_match(self, samples: int = 16, length: int = 3) -> float:
        """How often one of some sampled continuations begins with the text's next `length` tokens.

        The mean over all places of 1 - (1 - p)^samples, where p is the product of the probabilities of these tokens:
        the expectation of pass@n (arXiv 2107.03374) where passing means to say what the text says. No sample is drawn.
        The other sequences of the decoding batch follow their texts.

        Raises:
            EvaluationError: no sample, or no place has so many tokens behind it.
        """
        if samples < 1:
            raise EvaluationError(f"samples: expected at least 1, got {samples}")
        # Of a certain token 1 - p is 0, whose logarithm is no number to go on with.
        probability = self._runs(-self.losses.double(), length).exp().clamp(max=1 - 1e-12)
        return (-torch.expm1(samples * torch.log1p(-probability))).mean().item()

    def has_runs(self, length: int) -> bool:
        """Whether any place has `length` tokens behind it that count."""
        return 1 <= length <= self.counted.shape[1] and bool(self.counted.unfold(1, length, 1).all(-1).any())

    def _runs(self, values: Tensor, length: int) -> Tensor:
        """Sums of `length` values in a row, all of which count."""
        if not self.has_runs(length):
            raise EvaluationError(f"length: no place of the text has {length} tokens behind it that count")
        return values.unfold(1, length, 1)[self.counted.unfold(1, length, 1).all(-1)].sum(-1)


def total_overlap(first: Tensor, second: Tensor) -> float:
    """What two distributions [rows, V], as log-probabilities, share, summed over rows: 1 - total variation distance."""
    overlap = torch.minimum(first, second).exp().sum(-1).double().sum().item()
    return overlap if math.isfinite(overlap) else math.nan
