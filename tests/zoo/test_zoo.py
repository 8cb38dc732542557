"""Every architecture through its tracers, against the oracle. What a table would show is asserted here."""

import pytest
import torch
import transformers

from .discover import moe_architectures
from .registry import ENTRIES, implementations
from .survey import survey_dynamo, survey_export
from .table import DYNAMO, EXPORT, GRAPHS, accept, cell, read
from .test_registry import REPRESENTATIVES

# What is not right yet, by architecture: an entry goes when it is, and the test insists on it.
KNOWN: dict[str, str] = {}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def cases(names, marks=()):
    return [pytest.param(name, marks=[*marks, *known(name)], id=name) for name in names]


def known(name):
    return [pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else []


# Representatives in every run, the others in the lane of the zoo.
OTHERS = sorted(set(ENTRIES) - set(REPRESENTATIVES))
EVERYONE = cases(REPRESENTATIVES) + cases(OTHERS, [pytest.mark.zoo])
# Experts that transformers runs in several ways; `test_dynamo` runs the first.
INTERFACE = sorted(name for name, entry in ENTRIES.items() if entry.interface)
# Data-dependent loops, or a cache in the result that torch.export knows no type of.
NOT_EXPORTED = {"dbrx", "diffusion_gemma", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
# One of each kind of router: softmax, biased groups, top-k before softmax, sigmoid, hash beside selected.
SUBSET = ("deepseek_v3", "deepseek_v4", "gpt_oss", "minimax_m2", "olmoe", "qwen2_moe")


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


def checked_in(name, experts, column, survey):
    """docs/support.md says the same, where it was written with the installed versions."""
    if accept(name, experts, column, survey):
        return
    header, rows = read()
    if transformers.__version__ in header and torch.__version__.partition("+")[0] in header:
        row = rows[name, experts]
        assert row[column] == cell(survey), f"stale: python -m tests.zoo.table {name}"
        assert column != DYNAMO or row[GRAPHS] == str(survey.graphs), f"stale: python -m tests.zoo.table {name}"


def default(name):
    """The first experts implementation: grouped_mm, where experts have several."""
    if name not in moe_architectures():
        pytest.skip("not in the installed transformers")
    return implementations(name)[0]


@pytest.mark.parametrize("name", EVERYONE)
def test_dynamo(name):
    """The whole model through Dynamo, whatever the number of graphs."""
    survey = survey_dynamo(name, default(name))
    checked_in(name, default(name), DYNAMO, survey)
    check(name, survey)


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(INTERFACE))
def test_dynamo_with_indexed_weights(name):
    """The other implementation that makes one graph."""
    default(name)
    survey = survey_dynamo(name, "batched_mm")
    checked_in(name, "batched_mm", DYNAMO, survey)
    check(name, survey)


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(SUBSET))
def test_dynamo_with_a_loop(name):
    """Experts in a Python loop: ids leave the graph, and one graph serves several layers."""
    survey = survey_dynamo(name, "eager")
    checked_in(name, "eager", DYNAMO, survey)
    check(name, survey)
    assert survey.graphs > 1


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(sorted(set(ENTRIES) - set(NOT_EXPORTED))))
def test_export(name):
    """torch.export, then `rewrite`."""
    survey = survey_export(name, default(name))
    checked_in(name, default(name), EXPORT, survey)
    check(name, survey)


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(SUBSET))
def test_bfloat16(name):
    """Other casts around the router; ids are equal still."""
    check(name, survey_dynamo(name, "grouped_mm", torch.bfloat16), torch.bfloat16)


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(SUBSET))
def test_dynamic_shapes(name):
    """Batch and length are symbols."""
    check(name, survey_dynamo(name, "grouped_mm", dynamic=True))


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(SUBSET))
def test_layer_by_layer(name):
    """Each layer is compiled for itself, as serving engines do."""
    check(name, survey_dynamo(name, "grouped_mm", by_layer=True))


def test_lists_are_of_the_registry():
    assert NOT_EXPORTED | set(SUBSET) | set(KNOWN) <= set(ENTRIES)
