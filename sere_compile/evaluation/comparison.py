"""Every routing rule beside every other on one model: the rows of docs/quality.md."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..config import SUBSTITUTIONS, SereConfig
from ..errors import EvaluationError
from ..similarity import SimilarityProfile
from .configured import ConfiguredRule
from .recombine import SUBSTITUTES, Recombine, gram_matrices
from .rules import Drop, Fill, Rule, TopS

RANDOM = "random"


@dataclass(frozen=True)
class Setting:
    """A row.

    Attributes:
        rule: "naive top-S", "drop", "reroute", ...
        similarity: what chooses substitutes; "" where nothing does.
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
        """With the number of the draw, where there are several."""
        return f"{self.similarity} {self.draw}" if self.similarity == RANDOM else self.similarity


def comparison_rules(
    profiles: Mapping[str, SimilarityProfile],
    *,
    reference: str = "frobenius",
    select_top_k: Iterable[int] = (1, 2),
    thresholds: Iterable[float | str] = (0.0, "q0.2"),
    random_draws: int = 3,
    fills: Iterable[float] = (0.5,),
    others: Mapping[str, Callable[[SimilarityProfile, int], Rule]] = MappingProxyType({}),
) -> dict[Setting, Rule]:
    """Every rule for every S.

    Args:
        profiles: by the name of what they measure; those of `sere_compile.calibrate`.
        reference: the profile whose projection coefficients serve random matrices and `Recombine`.
        select_top_k: values of S.
        thresholds: for rules that a similarity guides.
        random_draws: how many random similarity matrices.
        fills: of `Recombine`; with a fill of 0 as well.
        others: further rules by name: what makes one from the reference profile and S.

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
        rules[Setting("fill", "", s)] = Fill(s)
        for heaviest, substitutes, fill in itertools.product((False, True), SUBSTITUTES, (0.0, *fills)):
            if substitutes == "none" and not fill and not heaviest:
                continue  # "drop"
            name = f"recombine, {substitutes}, {fill:g}" + (", heaviest" if heaviest else "")
            rules[Setting(name, "inner products", s)] = Recombine(gram, s, substitutes, fill, heaviest=heaviest)
        for name, make in others.items():
            rules[Setting(name, reference, s)] = make(profiles[reference], s)
        for rho, substitution in itertools.product(thresholds, SUBSTITUTIONS):
            config = SereConfig(select_top_k=s, threshold=rho, substitution=substitution)
            for name, profile in profiles.items():
                rules[Setting(substitution, name, s, rho)] = ConfiguredRule.of(config, profile)
            for draw in range(random_draws):
                chance = random_profile(profiles[reference], draw)
                rules[Setting(substitution, RANDOM, s, rho, draw)] = ConfiguredRule.of(config, chance)
    return rules


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
