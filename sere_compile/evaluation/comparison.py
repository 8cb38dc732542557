"""All routing rules on one model: the rows of docs/quality.md."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import calibrate
from ..config import SereConfig
from ..errors import EvaluationError
from ..similarity.profile import SimilarityProfile
from .configured import ConfiguredRule
from .filling import FillKept
from .recombine import Recombine, gram_matrices
from .rules import Drop, Fill, Rule, TopS

RANDOM = "random"
# Variants of `Recombine` by name.
RECOMBINED: dict[str, dict[str, Any]] = {
    "recombine": {},
    "recombine, one substitute": {"substitutes": "one"},
    "recombine, all substitutes": {"substitutes": "all"},
    "recombine, primary": {"heaviest": False},
    "recombine, primary, one substitute": {"heaviest": False, "substitutes": "one"},
    "recombine, primary, all substitutes": {"heaviest": False, "substitutes": "all"},
}


@dataclass(frozen=True)
class Setting:
    """A row.

    Attributes:
        rule: "naive top-S", "drop", "reroute", ...
        similarity: what chooses substitutes; "" for rules without substitutes.
        select_top_k: S.
        threshold: as in `SereConfig`.
        draw: which of several random matrices.
    """

    rule: str
    similarity: str
    select_top_k: int
    threshold: float | str = 0.0
    draw: int = 0

    @property
    def similarity_name(self) -> str:
        """With the number of the draw if there are several."""
        return f"{self.similarity} {self.draw}" if self.similarity == RANDOM else self.similarity


def comparison_rules(
    profiles: Mapping[str, SimilarityProfile],
    *,
    reference: str = "frobenius",
    select_top_k: Iterable[int] = (1, 2),
    thresholds: Iterable[float | str] = (0.0, "q0.2"),
    random_draws: int = 3,
    fills: Iterable[float] = (0.75,),
    restores: Iterable[float] = (0.5,),
    others: Mapping[str, Callable[[SimilarityProfile, int], Rule]] = MappingProxyType({}),
) -> dict[Setting, Rule]:
    """Every rule for every S.

    Args:
        profiles: by the name of what they measure; those of `sere_compile.calibrate`.
        reference: the profile whose projection coefficients serve random matrices and `Recombine`.
        select_top_k: values of S.
        thresholds: for rules that a similarity guides.
        random_draws: number of random similarity matrices.
        fills: of `Recombine`.
        restores: of `Recombine`.
        others: further rules by name: functions that make one from the reference profile and S.

    Raises:
        EvaluationError: the reference has no projections.
    """
    gram = gram_matrices(profiles[reference])
    thresholds = tuple(thresholds)
    rules: dict[Setting, Rule] = {}
    for s in select_top_k:
        rules[Setting("naive top-S", "", s)] = TopS(s)
        rules[Setting("drop", "", s)] = Drop(s)
        rules[Setting("drop, renormalised", "", s)] = Drop(s, renormalise=True)
        rules[Setting("opportunistic fill", "", s)] = Fill(s)
        rules[Setting("fill", "", s)] = FillKept(s)
        for (name, options), fill, restore in itertools.product(RECOMBINED.items(), fills, restores):
            title = f"{name}, fill {fill:g}, restore {restore:g}"
            rules[Setting(title, "inner products" if "substitutes" in options else "", s)] = Recombine(
                gram if "substitutes" in options else None, s, fill=fill, restore=restore, **options
            )
        for name, make in others.items():
            rules[Setting(name, reference, s)] = make(profiles[reference], s)
        for rho, substitution in itertools.product(thresholds, ("reroute", "projection")):
            config = SereConfig(select_top_k=s, threshold=rho, substitution=substitution)
            for name, profile in profiles.items():
                rules[Setting(substitution, name, s, rho)] = ConfiguredRule.of(config, profile)
            for draw in range(random_draws):
                chance = random_profile(profiles[reference], draw)
                rules[Setting(substitution, RANDOM, s, rho, draw)] = ConfiguredRule.of(config, chance)
    return rules


def calibrated_profiles(model: nn.Module, tokens: torch.Tensor, rows: int = 8) -> dict[str, SimilarityProfile]:
    """A profile of each metric on tokens [N, length], `rows` sequences per forward, and one without data."""
    batches = [{"input_ids": part} for part in tokens.split(rows)]
    profiles = {method: calibrate(model, batches, method=method) for method in ("frobenius", "cosine", "cka")}
    return {**profiles, "data-free": calibrate(model, None)}


def named_rule(spec: str) -> Callable[[SimilarityProfile, int], Rule]:
    """The function that `MODULE:FUNCTION` names.

    Raises:
        EvaluationError: there is none.
    """
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{spec!r} is not MODULE:FUNCTION of something that can be imported: {error}") from error


def random_profile(profile: SimilarityProfile, seed: int) -> SimilarityProfile:
    """A random symmetric similarity for each gate, with the projections of `profile`."""
    generator = torch.Generator().manual_seed(seed)
    matrices = {}
    for name, matrix in profile.items():
        half = torch.rand(matrix.shape, generator=generator)
        matrices[name] = ((half + half.T) / 2).fill_diagonal_(1.0)
    return SimilarityProfile(matrices, {"method": RANDOM, "seed": str(seed)}, profile.projections)
