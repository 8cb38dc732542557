"""docs/quality.md says what docs/quality.csv says."""

from __future__ import annotations

from benchmarks.quality_page import BATCHES, CASES, MATRICES, PAGE, TABLE, Row, lookup, page, read, rules, verdict


def test_the_page_is_made_from_the_table():
    """After a new measurement: python -m benchmarks.quality page ..."""
    assert PAGE.read_text("utf-8") == page(read(TABLE))


def test_what_the_prose_says():
    """Sentences of the template that no table is made for."""
    row = lookup(read(TABLE))

    def change(case, batch, rule, similarity=""):
        return row(*case, batch, rule, similarity).change

    for case in CASES:
        for batch in BATCHES:
            least = min(change(case, batch, rule, similarity) for _, rule, similarity in rules())
            assert least < min(change(case, batch, "reroute", matrix) for matrix in MATRICES)
            guided = [change(case, batch, r, m) for r in ("reroute", "projection") for m in MATRICES]
            assert batch == "4" or change(case, batch, "opportunistic fill") < min(guided)
            reroute, projection = (change(case, batch, r, "frobenius") for r in ("reroute", "projection"))
            assert projection < reroute
            if case[0] == "upcycled":
                assert reroute < 0.5 * change(case, batch, "drop")
                assert projection > 0.85 * reroute
            else:
                assert projection < change(case, batch, "drop") * 1.01 < reroute


def test_what_the_prose_says_of_thresholds():
    row = lookup(read(TABLE))
    for rule in ("reroute", "projection"):
        for model, threshold, experts in (("qwen3", "q0.2", 0.6), ("upcycled", "0.0", 1.2)):
            one, two = (
                row(model, "1", "16", rule, "frobenius", "q0.2"),
                row(model, "2", "16", rule, "frobenius", threshold),
            )
            assert two.change < 0.5 * one.change
            assert two.active - one.active < experts


def test_verdicts_need_more_than_noise():
    same, less = Row(0.1, 0.0, 1.0, (0.1, 0.2, 0.3)), Row(0.1, 0.0, 1.0, (0.05, 0.14, 0.26))
    noisy = Row(0.1, 0.0, 1.0, (0.3, 0.0, 0.25))
    assert (verdict(less, same), verdict(same, less), verdict(same, noisy)) == ("better", "worse", "equal")
