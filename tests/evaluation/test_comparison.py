"""Which rules a comparison has, with which options, and under which name."""

import math

import pytest
import torch

from sere_compile import EvaluationError, SimilarityProfile
from sere_compile.evaluation import comparison
from sere_compile.evaluation.comparison import (
    RANDOM,
    Setting,
    calibrated_profiles,
    comparison_rules,
    named_rule,
    random_profile,
)
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.filling import FillKept
from sere_compile.evaluation.recombine import Recombine, gram_matrices
from sere_compile.evaluation.rules import Drop, Fill, TopS

from .decisions import E, matrices


def profile(seed=1):
    scale = torch.rand(E, E, generator=torch.Generator().manual_seed(seed + 50)) + 0.5
    return SimilarityProfile(matrices(seed), {"method": "frobenius"}, {"gate": (scale + scale.T) / 2})


PROFILES = {"frobenius": profile(1), "cosine": profile(2)}


class TestRules:
    def test_all_of_them(self):
        """One of each for every S, and of what a similarity guides one for each threshold, profile and draw."""
        rules = comparison_rules(PROFILES)
        assert {setting.select_top_k for setting in rules} == {1, 2}
        for s in (1, 2):
            names = [(x.rule, x.similarity_name, x.threshold) for x in rules if x.select_top_k == s]
            recombined = [f"{name}, fill 0.75, restore 0.5" for name in comparison.RECOMBINED]
            assert names == [
                *((name, "", 0.0) for name in ("naive top-S", "drop", "drop, renormalised", "opportunistic fill")),
                ("fill", "", 0.0),
                *((name, "inner products" if "substitute" in name else "", 0.0) for name in recombined),
                *(
                    (substitution, similarity, rho)
                    for rho in (0.0, "q0.2")
                    for substitution in ("reroute", "projection")
                    for similarity in ("frobenius", "cosine", "random 0", "random 1", "random 2")
                ),
            ]

    def test_what_each_is(self):
        rules = comparison_rules(PROFILES, select_top_k=(3,), thresholds=(0.25,), random_draws=1)

        def rule(name, similarity="", rho=0.0):
            return rules[Setting(name, similarity, 3, rho)]

        assert rule("naive top-S") == TopS(3)
        assert (rule("drop"), rule("drop, renormalised")) == (Drop(3), Drop(3, renormalise=True))
        assert (rule("opportunistic fill"), rule("fill")) == (Fill(3), FillKept(3))
        for substitution in ("reroute", "projection"):
            for name, made in PROFILES.items():
                found = rule(substitution, name, 0.25)
                assert isinstance(found, ConfiguredRule)
                config = found.config
                assert (config.select_top_k, config.threshold, config.substitution) == (3, 0.25, substitution)
                assert torch.equal(found.similarity["gate"], made["gate"])
                assert torch.equal(found.projections["gate"], made.projections["gate"])
            chance = rule(substitution, RANDOM, 0.25)
            assert chance.config.substitution == substitution
            wanted = random_profile(PROFILES["frobenius"], 0)
            assert torch.equal(chance.similarity["gate"], wanted["gate"])

    @pytest.mark.parametrize(
        ("name", "substitutes", "heaviest"),
        [
            ("recombine", "none", True),
            ("recombine, one substitute", "one", True),
            ("recombine, all substitutes", "all", True),
            ("recombine, primary", "none", False),
            ("recombine, primary, one substitute", "one", False),
            ("recombine, primary, all substitutes", "all", False),
        ],
    )
    def test_those_that_recombine(self, name, substitutes, heaviest):
        """Each with each fill and restore; inner products where there are substitutes, of the reference."""
        options = {"select_top_k": [1], "thresholds": [], "random_draws": 0, "fills": (0, 1), "restores": (0.25,)}
        rules = comparison_rules(PROFILES, reference="cosine", **options)
        similarity = "" if substitutes == "none" else "inner products"
        for fill in (0, 1):
            rule = rules[Setting(f"{name}, fill {fill}, restore 0.25", similarity, 1)]
            assert isinstance(rule, Recombine)
            assert (rule.substitutes, rule.heaviest, rule.select_top_k) == (substitutes, heaviest, 1)
            assert (rule.fill, rule.restore) == (fill, 0.25)
            if substitutes == "none":
                assert rule.gram is None
            else:
                assert torch.equal(rule.gram["gate"], gram_matrices(PROFILES["cosine"])["gate"])

    def test_thresholds_may_be_told_once(self):
        """An iterator serves every S."""
        rules = comparison_rules(PROFILES, thresholds=iter((0.1, 0.2)), random_draws=0)
        assert {(x.select_top_k, x.threshold) for x in rules if x.rule == "reroute"} == {
            (1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)
        }  # fmt: skip

    def test_rules_of_the_users_own(self):
        """Made of the reference profile and S."""
        made = []
        rules = comparison_rules(
            PROFILES, reference="cosine", select_top_k=(2,), thresholds=(), others={"mine": lambda *of: made.append(of)}
        )
        assert made == [(PROFILES["cosine"], 2)]
        assert rules[Setting("mine", "cosine", 2)] is None

    def test_a_reference_without_projections(self):
        with pytest.raises(EvaluationError):
            comparison_rules({"frobenius": SimilarityProfile(matrices())})


def test_draws_alone_have_numbers():
    assert Setting("reroute", "cka", 1, draw=2).similarity_name == "cka"
    assert Setting("reroute", RANDOM, 1).similarity_name == "random 0"
    assert Setting("reroute", RANDOM, 1, draw=2).similarity_name == "random 2"


class TestRandomProfiles:
    def test_are_symmetric_with_ones(self):
        made = random_profile(PROFILES["cosine"], 3)
        matrix = made["gate"]
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix.diagonal(), torch.ones(E))
        half = torch.rand(E, E, generator=torch.Generator().manual_seed(3))
        off = ~torch.eye(E, dtype=torch.bool)
        assert torch.equal(matrix[off], ((half + half.T) / 2)[off])
        assert dict(made.metadata) == {"method": RANDOM, "seed": "3"}
        assert torch.equal(made.projections["gate"], PROFILES["cosine"].projections["gate"])

    def test_each_draw_and_gate_has_its_own(self):
        both = SimilarityProfile({"a": matrices()["gate"], "b": matrices()["gate"]})
        made = random_profile(both, 0)
        assert list(made) == ["a", "b"]
        assert not torch.equal(made["a"], made["b"])
        assert not torch.equal(made["a"], random_profile(both, 1)["a"])


class TestCalibration:
    @pytest.mark.parametrize(("rows", "batches"), [({}, [8, 3]), ({"rows": 4}, [4, 4, 3])])
    def test_each_metric_and_none(self, rows, batches, monkeypatch):
        """Of the same batches, and a profile without data."""
        asked = []
        monkeypatch.setattr(comparison, "calibrate", lambda *of, **options: asked.append((of, options)) or len(asked))
        tokens = torch.arange(11 * 2).view(11, 2)
        made = calibrated_profiles("model", tokens, **rows)
        assert made == {"frobenius": 1, "cosine": 2, "cka": 3, "data-free": 4}
        assert [options for _, options in asked] == [{"method": m} for m in ("frobenius", "cosine", "cka")] + [{}]
        assert asked[3][0] == ("model", None)
        for (model, given), _ in asked[:3]:
            assert model == "model"
            assert [list(batch) for batch in given] == [["input_ids"]] * len(batches)
            assert [len(batch["input_ids"]) for batch in given] == batches
            assert torch.equal(torch.cat([batch["input_ids"] for batch in given]), tokens)


class TestRulesByName:
    def test_what_a_name_stands_for(self):
        assert named_rule("math:hypot") is math.hypot

    @pytest.mark.parametrize("spec", ["nowhere:rule", "math:nothing", "math", ":hypot", "", "math.hypot"])
    def test_what_stands_for_nothing(self, spec):
        with pytest.raises(EvaluationError, match="is not MODULE:FUNCTION of something that can be imported") as told:
            named_rule(spec)
        assert repr(spec) in str(told.value)
