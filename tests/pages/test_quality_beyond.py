"""docs/quality_beyond.md says what its table says; batches of three companies hold the same sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality_beyond import BATCH, COMPANIES, ERRORS, GROUPS, PAGE, batches, error, page, read, statistic
from sere_compile.evaluation.predictions import Predictions

COUNT, OUTLIERS = 64, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Numbers in order: every window is told from every other by its first token, code from prose by their parity."""
    folder = tmp_path_factory.mktemp("corpus")
    for parity, domain in enumerate(("code", "prose")):
        np.save(folder / f"held_out_{domain}.npy", (2 * np.arange(128 * 300) + parity).astype(np.int64))
    return folder


def test_the_page_is_made_from_the_table():
    """After a new measurement: python -m benchmarks.quality_beyond page."""
    assert PAGE.read_text("utf-8") == page(read())


@pytest.mark.parametrize("company", COMPANIES)
def test_domains_of_sequences(corpus, company):
    made = batches(corpus, company, COUNT, OUTLIERS)
    measured = made.domains >= 0
    assert len(made.tokens) % BATCH == 0
    assert torch.equal(made.tokens[measured, 0] % 2, made.domains[measured])
    of_a_batch = (made.tokens[:, 0] % 2).view(-1, BATCH).sum(1).tolist()
    assert set(of_a_batch) == {"alike": {0, BATCH}, "mixed": {BATCH // 2}, "outlier": {1, BATCH - 1}}[company]


def test_every_company_has_the_same_sequences(corpus):
    found = []
    for company in COMPANIES:
        made = batches(corpus, company, COUNT, OUTLIERS)
        chosen = (made.domains >= 0) & made.in_all
        assert chosen.sum() == 2 * OUTLIERS
        found.append(sorted(made.tokens[chosen, 0].tolist()))
    assert found[0] == found[1] == found[2]


def predictions(seed, sequences=64, tokens=20):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(sequences, tokens, generator=generator) * 4
    return Predictions(losses, losses < 1, torch.ones_like(losses, dtype=torch.bool))


def test_errors_of_means():
    """Of means over groups of one size the jackknife is the usual standard error of the groups' changes."""
    before, after = predictions(0), predictions(1)
    changes = (after.right.double() - before.right.double()).mean(1).view(-1, GROUPS).mean(0)
    want = changes.std() / GROUPS**0.5
    assert error(before, after, "accuracy") == pytest.approx(want.item())


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_change_has_no_error(name):
    assert error(predictions(0), predictions(0), name) == 0
    assert error(predictions(0), predictions(1), name) > 0


def test_statistics_by_name():
    found = predictions(2)
    numbers = {name: statistic(found, name) for name in ERRORS}
    assert numbers["loss"] == found.loss
    assert numbers["worst_loss"] == found.worst_loss()
    assert numbers["sampled_match_1"] == found.sampled_match(1)
    assert numbers["sampled_match_16"] == found.sampled_match(16) > numbers["sampled_match_1"]


def test_nobody_is_beside_itself(corpus):
    made = batches(corpus, "outlier", COUNT, OUTLIERS)
    for batch in made.tokens[:, 0].view(-1, BATCH):
        assert len(batch.unique()) == BATCH


def test_what_the_prose_says():
    """Sentences of the template that no table is made for."""
    lines = {(x["model"], x["company"], x["domain"], x["rule"], x["select_top_k"]): x for x in read()}

    def number(name, *key):
        return float(lines[key][name])

    def lost(name, rule):
        before = number(name, "qwen3", "mixed", "code", "original", "0")
        return round(100 * (1 - number(name, "qwen3", "mixed", "code", rule, "1") / before))

    names = ("accuracy", "greedy_match", "sampled_match_1", "sampled_match_16")
    assert [lost(name, "SERE, frobenius") for name in names] == [19, 46, 52, 39]
    assert [lost(name, "fill") for name in names] == [7, 18, 24, 18]
    for model, company, domain, rule, s in lines:
        original = (model, company, domain, "original", "0")
        if company == "mixed":
            moved = number("worst_loss", model, company, domain, rule, s) - number("worst_loss", *original)
            assert abs(moved) < 0.5
        if company == "mixed" and rule == "fill":
            for name in ("accuracy", "sampled_match_1", "sampled_match_16"):
                sere = number(name, model, company, domain, "SERE, frobenius", s)
                assert number(name, model, company, domain, rule, s) > sere
        if company == "outlier" and model != "upcycled" and rule != "original":
            grown = [
                number("loss", model, where, domain, rule, s) - number("loss", model, where, domain, "original", "0")
                for where in ("alike", "outlier")
            ]
            assert 1.5 <= grown[1] / grown[0] < 3.55
