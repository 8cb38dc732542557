"""Rules that approximate a token's lost experts within the primary set, from inner products of expert outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EvaluationError
from ..similarity.profile import SimilarityProfile
from .rules import Matrices, RoutingBatch, expert_maps, primary_experts

SUBSTITUTES = ("none", "one", "all")


@dataclass(frozen=True)
class Recombine:
    """Kept experts take over, at the weights that work best on text: the rule that loses least in docs/quality.md.

    Experts that are kept keep their weights. Added to them are

    - for each kept expert that the token did not choose, the weight that its own score is worth, times `fill`;
    - for each slot of an expert u that is not kept, its weight times the coefficients of u on kept experts: with "one"
      <A_u, A_v> / <A_v, A_v> on the v that explains most of u, the largest <A_u, A_v> / (|A_u| |A_v|); with "all"
      those of least squares, (G_PP + r diag G_PP)^-1 G_Pu.

    The K experts with the largest contribution |w_v| |A_v| remain. The sum of their weights differs from the token's
    original sum; they are multiplied by the quotient of the two to the power of `restore`.

    Attributes:
        gram: G, [E, E] for each gate: inner products of expert outputs over calibration tokens, at any scale. None:
            no substitutes, and the K experts with the largest weight remain.
        select_top_k: S.
        substitutes: "none", "one" or "all".
        fill: a score is worth this times (sum of the token's weights / sum of its chosen experts' scores).
        restore: from 0 (sums may change) to 1 (they do not).
        heaviest: instead of the primary experts keep as many with the largest sum of squared weights in the batch.
        ridge: r.
        min_active: as in `SereConfig`.

    Raises:
        EvaluationError: `substitutes` is none of these, or needs a `gram`.
    """

    gram: Matrices | None
    select_top_k: int
    substitutes: str = "none"
    fill: float = 0.75
    restore: float = 0.5
    heaviest: bool = True
    ridge: float = 0.5
    min_active: int | None = None

    def __post_init__(self) -> None:
        if self.substitutes not in SUBSTITUTES:
            raise EvaluationError(f"substitutes must be one of {', '.join(SUBSTITUTES)}, got {self.substitutes!r}")

        if self.gram is None and self.substitutes != "none":
            raise EvaluationError(f"substitutes={self.substitutes!r} needs inner products of expert outputs")

    def __call__(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        weights = batch.weights.float()
        total = weights.sum(-1, keepdim=True)
        spread = torch.zeros_like(batch.scores).scatter_(2, batch.ids.long(), weights)
        kept = primary_experts(batch, self.select_top_k, self.min_active)
        if self.heaviest:
            kept = heaviest_experts(spread.square() * batch.real[:, :, None], kept)
        if self.fill:
            worth = total / batch.scores.gather(2, batch.ids.long()).sum(-1, keepdim=True)
            unchosen = kept[:, None, :] & (spread == 0)
            spread = spread + torch.where(unchosen, batch.scores * worth * self.fill, 0.0)
        gram = None if self.gram is None else self.gram[batch.name].to(batch.scores)
        mixed = torch.where(kept[:, None, :], spread, 0.0) if gram is None else spread @ self._coefficients(gram, kept)
        size = 1.0 if gram is None else gram.diagonal().clamp_min(0).sqrt()
        ids = (mixed.abs() * size).topk(batch.ids.shape[-1], dim=-1).indices
        new = mixed.gather(2, ids)
        sums = new.sum(-1, keepdim=True)
        new = new * torch.where(sums > 0, total / sums, 1.0) ** self.restore
        same = kept.all(-1)[:, None, None]  # the identity, bit for bit
        return torch.where(same, batch.ids, ids.to(batch.ids.dtype)), torch.where(same, weights, new)

    def _coefficients(self, gram: Tensor, kept: Tensor) -> Tensor:
        """What each expert contributes to each kept one: [P, E, E]."""
        if self.substitutes == "all":
            return least_squares(gram, kept, self.ridge)
        identity = torch.diag_embed(kept.to(gram))
        if self.substitutes == "none":
            return identity
        target = expert_maps(explained(gram), kept, 0.0)[:, :, None]
        one = torch.zeros_like(identity).scatter_(2, target, 1.0) * coefficient(gram)
        return torch.where(kept[:, :, None], identity, one)


def heaviest_experts(spread: Tensor, primary: Tensor) -> Tensor:
    """As many experts as are primary, the heaviest of each routing batch: bool [P, E].

    Args:
        spread: the weight of each token for each expert, [P, B, E].
        primary: bool [P, E].
    """
    rank = spread.sum(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < primary.sum(1, keepdim=True)


def least_squares(gram: Tensor, primary: Tensor, ridge: float) -> Tensor:
    """Row u holds the coefficients of expert u on the primary experts: [P, E, E], the identity for primary ones."""
    kept = primary[:, :, None] & primary[:, None, :]
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    scale = gram.diagonal().mean()
    system = torch.where(kept, gram / scale, 0.0) + identity * (ridge * gram.diagonal() / scale + 1e-6)
    # Outside the primary set the system is diagonal and the right side zero.
    system = torch.where(primary[:, :, None] | primary[:, None, :], system, identity)
    solved = torch.linalg.solve(system, torch.where(primary[:, :, None], gram / scale, 0.0)).transpose(1, 2)
    return torch.where(primary[:, :, None], identity, solved)


def coefficient(gram: Tensor) -> Tensor:
    """a[u, v] = <A_u, A_v> / <A_v, A_v>; 0 where the output of v is zero."""
    squares = gram.diagonal()
    return torch.where(squares > 0, gram / squares, 0.0)


def explained(gram: Tensor) -> Tensor:
    """The cosine of two experts' outputs over all tokens together; its square is the share of u that v explains."""
    roots = gram.diagonal().clamp_min(0).sqrt()
    product = roots[:, None] * roots
    return torch.where(product > 0, gram / product, 0.0)


def gram_matrices(profile: SimilarityProfile) -> dict[str, Tensor]:
    """The inner products of expert outputs behind a profile's projections, each gate's at its own scale.

    a[u, v] / a[v, u] is |A_u|^2 / |A_v|^2, so the mean of its logarithm over v gives |A_u|^2 up to a common factor.

    Raises:
        EvaluationError: the profile has no projections.
    """
    if profile.projections is None:
        raise EvaluationError(
            "the profile has no projection coefficients; profiles of sere_compile.calibrate have them"
        )
    return {name: _gram(matrix.double()) for name, matrix in profile.projections.items()}


def _gram(projection: Tensor) -> Tensor:
    alive = projection.diagonal() > 0
    known = alive[:, None] & alive & (projection != 0) & (projection.T != 0)
    ratio = torch.where(known, projection / torch.where(known, projection.T, 1.0), 1.0).log()
    # Where two experts are orthogonal their ratio is not known: solve for the logarithms over the known pairs.
    laplacian = torch.diag(known.sum(1).double()) - known.double()
    logarithm = torch.linalg.lstsq(laplacian, ratio.sum(1)[:, None], driver="gelsd").solution[:, 0]
    gram = projection * torch.where(alive, (logarithm - logarithm[alive].mean()).exp(), 0.0)
    return ((gram + gram.T) / 2).float()
