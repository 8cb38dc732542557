"""Every architecture through its tracers, against the oracle. What a table would show is asserted here."""

import pytest
import torch

from .discover import moe_architectures
from .registry import ENTRIES, implementations
from .survey import survey_dynamo
from .test_registry import REPRESENTATIVES

# Gates the matcher does not know yet, by architecture: an entry goes when it does, and the test insists on it.
KNOWN = {
    "inkling": "a router with more columns than there are experts to select from",
    "nllb_moe": "selects with argmax",
    "phimoe": "selects with max, twice",
    "switch_transformers": "selects with argmax",
    "zaya": "an id of its own for no expert",
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def cases(names, marks=()):
    for name in names:
        known = [pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else []
        yield pytest.param(name, marks=[*marks, *known], id=name)


def everyone():
    """Representatives in every run, the others in the lane of the zoo."""
    yield from cases(REPRESENTATIVES)
    yield from cases(sorted(set(ENTRIES) - set(REPRESENTATIVES)), [pytest.mark.zoo])


def check(name, survey, dtype=torch.float32):
    """Found = run, each with the expected fate; S = K bit for bit; S < K equal to the oracle."""
    entry = ENTRIES[name]
    assert not survey.failed
    assert not survey.identity_differs
    assert survey.run >= 2
    if entry.skipped:
        assert not survey.count("rewritten")
        assert any(entry.skipped in row.reason for row in survey.rows), [row.reason for row in survey.rows]
        return
    assert len(survey.gates) == survey.run, [f"{row.name}: {row.status} {row.reason}" for row in survey.rows]
    assert survey.count("identity" if entry.identity else "rewritten") == survey.run
    if not entry.identity:
        assert not survey.ids_differ
        assert not survey.notes
        assert survey.effect > 1e-3, "the case re-routes nothing"
        assert survey.error <= TOLERANCE[dtype]


def default(name):
    """The first experts implementation: grouped_mm, where experts have several."""
    if name not in moe_architectures():
        pytest.skip("not in the installed transformers")
    return implementations(name)[0]


@pytest.mark.parametrize("name", everyone())
def test_dynamo(name):
    """The whole model through Dynamo, whatever the number of graphs."""
    check(name, survey_dynamo(name, default(name)))
