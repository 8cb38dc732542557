"""The result of an evaluation, and how it is summed over forwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from .predictions import Predictions, total_overlap

# One-sided 95 % quantiles of Student's t distribution with 1, 2, .. degrees of freedom.
_STUDENT = (6.314, 2.920, 2.353, 2.132)
NORMAL = 1.6449


def student(degrees: int) -> float:
    """The one-sided 95 % quantile of Student's t distribution."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    # Cornish and Fisher's expansion: off by less than 0.01 from 5 degrees on.
    z = NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def upper_bound(change: float, standard_error: float, batches: int) -> float:
    """What a change that was measured on so many decoding batches is below, with 95 % confidence."""
    if batches < 2:
        return math.nan
    return change + student(batches - 1) * standard_error


@dataclass(frozen=True)
class Evaluation:
    """How well a model with changed routing predicts held-out tokens.

    Attributes:
        perplexity: of the re-routed model.
        original_perplexity: of the unchanged model, on the same tokens.
        kl: mean Kullback-Leibler divergence of its predictions from the original's, in nats per token.
        top1_agreement: how often the most likely next token is the original's, in [0, 1].
        active_before: mean number of experts per gate that a decoding batch activates with its original routing.
        active_after: the same under the rule; the hidden states are those of the re-routed model.
        tokens: number of predictions compared.
        decode_batch: B.
        losses: mean loss of the re-routed model on each decoding batch, in nats per token.
        original_losses: the same for the unchanged model.
        sampled_agreement: how often a token that the two sample is the same, at best: one minus the total variation
            distance of their predictions, in [0, 1].
        predictions: of every token, by the re-routed model.
        original_predictions: the same by the unchanged model.
    """

    perplexity: float
    original_perplexity: float
    kl: float
    top1_agreement: float
    active_before: Mapping[str, float]
    active_after: Mapping[str, float]
    tokens: int
    decode_batch: int
    losses: tuple[float, ...] = ()
    original_losses: tuple[float, ...] = ()
    sampled_agreement: float = math.nan
    predictions: Predictions | None = field(default=None, compare=False, repr=False)
    original_predictions: Predictions | None = field(default=None, compare=False, repr=False)

    @property
    def standard_error(self) -> float:
        """Standard error of `perplexity_change` over decoding batches; NaN with fewer than two."""
        growth = torch.tensor(self.losses, dtype=torch.float64) - torch.tensor(self.original_losses).double()
        if len(growth) < 2:
            return math.nan
        return (1 + self.perplexity_change) * (growth.std() / len(growth) ** 0.5).item()

    @property
    def upper_bound(self) -> float:
        """Of `perplexity_change`, with 95 % confidence; NaN with fewer than two decoding batches."""
        return upper_bound(self.perplexity_change, self.standard_error, len(self.losses))

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is one percent worse."""
        return self.perplexity / self.original_perplexity - 1

    @property
    def mean_active_before(self) -> float:
        """Over gates."""
        return sum(self.active_before.values()) / len(self.active_before)

    @property
    def mean_active_after(self) -> float:
        """Over gates."""
        return sum(self.active_after.values()) / len(self.active_after)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} ({self.perplexity_change:+.1%} of {self.original_perplexity:.3f}), "
            f"KL {self.kl:.4f}, top-1 agreement {self.top1_agreement:.1%}, active experts "
            f"{self.mean_active_before:.1f} -> {self.mean_active_after:.1f} at decode batch {self.decode_batch}"
        )

    def beyond_perplexity(self, samples: int = 16, length: int = 3) -> list[str]:
        """Lines on single tokens and short continuations, see `Predictions`; none where predictions were not kept."""
        before, after = self.original_predictions, self.predictions
        if before is None or after is None:
            return []
        lines = [
            f"next-token accuracy {before.accuracy:.1%} -> {after.accuracy:.1%}; sampled tokens that stay the same: "
            f"{self.sampled_agreement:.1%}",
            f"loss of the worst 5 % of tokens {before.worst_loss():.2f} -> {after.worst_loss():.2f} nats",
        ]
        if before.has_runs(length):
            lines.append(
                f"the text's next {length} tokens: greedily {before.greedy_match(length):.1%} -> "
                f"{after.greedy_match(length):.1%}, in one of {samples} samples "
                f"{before.sampled_match(samples, length):.1%} -> {after.sampled_match(samples, length):.1%}"
            )
        return lines


@dataclass
class Totals:
    """Sums over batches."""

    tokens: int = 0
    steps: int = 0
    losses: list[tuple[float, float, int]] = field(default_factory=list)
    kl: float = 0.0
    agree: float = 0.0
    overlap: float = 0.0
    predictions: list[Predictions] = field(default_factory=list)
    original_predictions: list[Predictions] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        original: torch.Tensor,
        changed: torch.Tensor,
        tokens: torch.Tensor,
        real: torch.Tensor,
        before: Mapping[str, float],
        after: Mapping[str, float],
        decode_batch: int,
    ) -> None:
        """One forward: log-probabilities [rows, length, V] of both models, and summed active experts by gate."""
        counted = real[:, :-1] & real[:, 1:]
        p, q = original[:, :-1][counted], changed[:, :-1][counted]
        self.tokens += len(p)
        self.kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        self.agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        self.overlap += total_overlap(p, q)
        kept = [Predictions.of(values, tokens, counted) for values in (changed, original)]
        self.predictions.append(kept[0])
        self.original_predictions.append(kept[1])
        numbers = counted.view(-1, decode_batch * counted.shape[1]).sum(1)
        losses = (torch.where(part.counted, part.losses.double(), 0.0) for part in kept)
        sums = [each.view(len(numbers), -1).sum(1) for each in losses]
        self.losses += zip(*(value.tolist() for value in (*sums, numbers)), strict=True)
        self.steps += int(real.view(-1, decode_batch, real.shape[1]).any(1).sum())
        for mine, theirs in ((self.before, before), (self.after, after)):
            for name, active in theirs.items():
                mine[name] = mine.get(name, 0.0) + active

    def result(self, decode_batch: int) -> Evaluation:
        """Means over everything that was added."""
        return Evaluation(
            perplexity=math.exp(sum(loss for loss, _, _ in self.losses) / self.tokens),
            original_perplexity=math.exp(sum(loss for _, loss, _ in self.losses) / self.tokens),
            kl=self.kl / self.tokens,
            top1_agreement=self.agree / self.tokens,
            active_before={name: value / self.steps for name, value in self.before.items()},
            active_after={name: value / self.steps for name, value in self.after.items()},
            tokens=self.tokens,
            decode_batch=decode_batch,
            losses=tuple(loss / number for loss, _, number in self.losses if number),
            original_losses=tuple(loss / number for _, loss, number in self.losses if number),
            sampled_agreement=self.overlap / self.tokens,
            predictions=Predictions.joined(self.predictions),
            original_predictions=Predictions.joined(self.original_predictions),
        )
