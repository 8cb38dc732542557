"""What a sweep recommends, what it leaves open, and which rule it says to lose least."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, nan

import pytest

from sere_compile.evaluation.recommendation import least_losing, recommend, say_least_losing, undecided
from sere_compile.evaluation.sweep import SLACK

from .rows import row


def test_the_recommendation_is_the_fewest_experts_within_the_budget():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.008), row(4, 7.0, 0.001), row(8, 5.0, 0.5)]
    assert recommend(rows, 0.01) == {4: rows[1], 8: None}
    assert recommend(rows[:1], 0.02) == {4: rows[0]}
    assert recommend([rows[1], replace(rows[0], active_after=6.0)], 1.0) == {4: rows[1]}


def test_the_recommendation_counts_its_error():
    """A mean within the budget is no evidence, if its error is larger than what is left of the budget."""
    lucky, safe = row(16, 3.0, 0.0074, error=0.0217, batches=4), row(16, 5.0, -0.0103, error=0.004, batches=4)
    assert recommend([lucky, safe], 0.01) == {16: safe}
    assert safe.upper_bound == pytest.approx(-0.0103 + 2.353 * 0.004)
    # 1.645 times the spread over the root of the number of batches is to be what the budget leaves.
    assert undecided([lucky, safe], 0.01) == {16: (lucky, 16 * ceil((1.6449 * 0.0434 / 0.0026) ** 2))}


def test_one_batch_has_no_error_and_recommends_nothing():
    alone = row(64, 3.0, 0.001, error=nan, batches=1)
    assert recommend([alone], 0.01) == {64: None}
    assert undecided([alone], 0.01) == {64: (alone, 8 * 64)}


def test_of_about_as_few_experts_the_rule_that_loses_least():
    """A hundredth of an expert is chance: it neither chooses the rule nor leaves a question open."""
    rows = [row(4, 5.0, 0.009), row(4, 5.01, 0.002, rule="fill"), row(4, 6.0, 0.001, rule="fill", select_top_k="2")]
    assert recommend(rows, 0.01) == {4: rows[1]}
    assert undecided(rows, 0.01) == {}
    noisy = row(4, 5.0, 0.001, error=0.02, rule="projection")
    assert undecided([*rows, noisy], 0.01) == {}, "no fewer experts: no question"


def rule_row(rule, *losses, active=5.0, **others):
    return row(16, active, sum(losses) / len(losses), rule=rule, losses=losses, **others)


def test_which_rule_loses_least_is_decided_on_the_same_batches():
    """Batches differ by far more than rules do."""
    fill, reroute = rule_row("fill", 1.0, 2.0, 3.0), rule_row("reroute", 1.1, 2.1, 3.11)
    projection = rule_row("projection", 1.0, 2.2, 2.9)
    assert least_losing([reroute, fill, projection]) == {16: [("S = 1", [fill, projection])]}
    assert say_least_losing([("S = 1", [fill, projection])]) == "S = 1: fill (projection: within two standard errors)"


def test_rules_are_compared_at_equal_settings_and_experts_only():
    """One that leaves more experts active, another S, and one batch without spread tell nothing."""
    fill, reroute = rule_row("fill", 1.0, 2.0), rule_row("reroute", 1.2, 2.2)
    many = rule_row("projection", 0.5, 1.5, active=5.2)
    two = [rule_row(r.rule, *r.losses, select_top_k="2") for r in (fill, reroute)]
    found = least_losing([reroute, many, fill, *two, rule_row("fill", 0.1, 0.2, threshold="q0.2")])
    assert found == {16: [("S = 1", [fill]), ("S = 2", [two[0]])]}
    assert say_least_losing(found[16]) == "S = 1 and S = 2: fill"
    limit = replace(fill, active_after=5.0 * (1 + SLACK))
    assert least_losing([reroute, limit]) == {16: [("S = 1", [limit])]}
    assert least_losing([rule_row("fill", 1.0), rule_row("reroute", 2.0)]) == {16: []}


@pytest.mark.parametrize(("spread", "worse"), [(0.30, True), (0.42, True), (0.44, False), (0.9, False)])
def test_worse_by_more_than_two_standard_errors(spread, worse):
    """Of differences 0.5 - spread, 0.5, 0.5 + spread, whose standard error is spread / sqrt(3)."""
    fill = rule_row("fill", 1.0, 1.0, 1.0)
    reroute = rule_row("reroute", 1.5 - spread, 1.5, 1.5 + spread)
    [(_, group)] = least_losing([fill, reroute])[16]
    assert (reroute not in group) is worse
