"""docs/quality_beyond.md says what its table says; batches of three companies hold the same sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import quality_beyond
from benchmarks.quality_beyond import BATCH, COMPANIES, PAGE, batches, page, read

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


def test_nobody_is_beside_itself(corpus):
    made = batches(corpus, "outlier", COUNT, OUTLIERS)
    for batch in made.tokens[:, 0].view(-1, BATCH):
        assert len(batch.unique()) == BATCH


def test_what_the_prose_says():
    """Sentences of the template that no table is made for."""
    lines = {(x["model"], x["company"], x["domain"], x["rule"], x["select_top_k"]): x for x in read()}
    mixed = {key: x for key, x in lines.items() if key[1] == "mixed"}
    for (model, company, domain, rule, s), line in mixed.items():
        if rule in ("original", "SERE, frobenius"):
            continue
        sere = mixed[model, company, domain, "SERE, frobenius", s]
        assert float(line["accuracy"]) > float(sere["accuracy"])
        assert float(line["sampled_match_16"]) > float(sere["sampled_match_16"])
    assert quality_beyond.SAMPLES == (1, 16)
