"""The backend's options as a rule: each option reaches it."""

from __future__ import annotations

import pytest
import torch

from sere_compile import EvaluationError, SereConfig, SimilarityProfile
from sere_compile.evaluation import Reroute
from sere_compile.evaluation.configured import ConfiguredRule
from sere_compile.evaluation.filling import FillKept
from sere_compile.similarity.threshold import resolve_threshold

from .decisions import B, E, K, decisions, matrices

SCALE = {"gate": torch.rand(E, E, generator=torch.Generator().manual_seed(8))}


def is_same(config, rule, projections=None):
    """A configuration does what a rule does, and that is not nothing."""
    batch = decisions()
    got, wanted = ConfiguredRule(config, matrices(), projections)(batch), rule(batch)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(got[0], batch.ids)


def test_options_are_the_rules():
    is_same(SereConfig(select_top_k=1), Reroute(matrices(), 1))
    is_same(SereConfig(select_top_k=2, min_active=0), Reroute(matrices(), 2, 0.0, 0))
    is_same(SereConfig(select_top_k=1, min_active=9, threshold=0.6), Reroute(matrices(), 1, 0.6, 9))
    is_same(SereConfig(select_top_k="auto", max_active=7, min_active=0), Reroute(matrices(), 1, 0.0, 0, 7))
    is_same(SereConfig(select_top_k=1, max_tokens=B), Reroute(matrices(), 1))
    is_same(SereConfig(select_top_k=1, substitution="fill", threshold=0.1), FillKept(1, 0.1))
    is_same(SereConfig(select_top_k="auto", max_active=7, substitution="fill"), FillKept(1, 0.0, None, 7))


def test_a_share_is_the_gates_own_threshold():
    rho = resolve_threshold("q0.4", matrices()["gate"])
    is_same(SereConfig(select_top_k=1, threshold="q0.4", min_active=0), Reroute(matrices(), 1, rho, 0))


def test_projections_scale_where_they_are_asked_for():
    projected = Reroute(matrices(), 1, scale=SCALE)
    is_same(SereConfig(select_top_k=1, substitution="projection"), projected, SCALE)
    is_same(SereConfig(select_top_k=1), Reroute(matrices(), 1), SCALE)
    profile = SimilarityProfile(matrices(), projections=SCALE)
    rule = ConfiguredRule.of(SereConfig(select_top_k=1, substitution="projection"), profile)
    batch = decisions()
    for a, b in zip(rule(batch), projected(batch), strict=True):
        changed = batch.ids != projected(batch)[0]
        torch.testing.assert_close(a[changed], b[changed])
    assert ConfiguredRule.of(SereConfig(), matrices()).projections is None


@pytest.mark.parametrize("config", [SereConfig(select_top_k=K), SereConfig(select_top_k=1, max_tokens=B - 1)])
def test_options_that_leave_a_batch_alone(config):
    batch = decisions()
    ids, weights = ConfiguredRule(config, matrices())(batch)
    assert torch.equal(ids, batch.ids)
    assert torch.equal(weights, batch.weights)


def test_options_of_a_gate():
    config = SereConfig(select_top_k=K, per_gate={"gate": {"select_top_k": 1}})
    is_same(config, Reroute(matrices(), 1))


def test_what_a_profile_lacks_is_named():
    with pytest.raises(EvaluationError, match="the profile has no matrix for the gate gate"):
        ConfiguredRule(SereConfig(select_top_k=1), {"other": torch.eye(E)})(decisions())
    for projections in (None, {"other": torch.eye(E)}):
        rule = ConfiguredRule(SereConfig(select_top_k=1, substitution="projection"), matrices(), projections)
        with pytest.raises(EvaluationError, match="no projection coefficients for gate; profiles of"):
            rule(decisions())
