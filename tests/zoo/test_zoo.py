"""Every architecture through its tracers, against the oracle. What a table would show is asserted here."""

import pytest
import torch
import transformers

from benchmarks.support_page import (
    DYNAMO,
    EXPORT,
    FURTHER,
    GRAPHS,
    UNMEASURED,
    accept,
    cell,
    further_cell,
    is_right,
    read,
    survey_further,
)
from benchmarks.survey import AHEAD, survey_ahead, survey_dynamo
from sere_compile.passes import SkipReason
from sere_compile.passes.verify_rewrite import SHOWN

from .discover import has_experts_interface, moe_architectures
from .registry import ENTRIES, implementations

# What is shown of an experts' loop outside the graph: what leaves it, and the experts run for themselves.
PROVEN = (
    SHOWN,
    f"{SHOWN}; the code outside the graph was run",
)

# What is not right yet, by architecture: an entry goes when it is, and the test insists on it.
KNOWN: dict[str, str] = {}


def cases(names, marks=()):
    return [pytest.param(name, marks=[*marks, *known(name)], id=name) for name in names]


def known(name):
    return [pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else []


# In every run; the others in the lane of the zoo.
QUICK = ("deepseek_v3", "gpt_oss", "llama4")
OTHERS = sorted(set(ENTRIES) - set(QUICK))
EVERYONE = cases(QUICK) + cases(OTHERS, [pytest.mark.zoo])
# Experts that the installed transformers runs in several ways; `test_dynamo` runs the first.
INTERFACE = sorted(filter(has_experts_interface, ENTRIES))
# Data-dependent loops or sizes, or a cache in the result that torch.export knows no type of.
NOT_EXPORTED = {"dbrx", "diffusion_gemma", "kolibri1_1", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
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
        assert survey.effect > 1e-3, "the case re-routes nothing"
        assert is_right(survey, dtype), survey


def checked_in(name, experts, column, survey):
    """docs/support.md says the same, where it was written with the installed versions."""
    _compare((name, experts), column, cell(survey), survey.graphs if column == DYNAMO else None)


def checked_in_further(name, tracer, survey):
    """So does its second table."""
    _compare((name, default(name), "further"), FURTHER[tracer], further_cell(tracer, survey))


def _compare(key, column, text, graphs=None):
    if accept(key, column, text, graphs):
        return
    header, rows = read()
    if transformers.__version__ in header and torch.__version__.partition("+")[0] in header:
        assert rows[key][column] in (text, UNMEASURED), f"stale: python -m benchmarks.support_page {key[0]}"
        # What Dynamo has met of the code before makes a difference of one.
        near = graphs is None or abs(int(rows[key][GRAPHS]) - graphs) <= 1
        assert near, f"stale: python -m benchmarks.support_page {key[0]}"


def default(name):
    """The first experts implementation: grouped_mm, where experts have several."""
    if name not in moe_architectures():
        pytest.skip("not in the installed transformers")
    return implementations(name)[0]


@pytest.mark.parametrize("name", EVERYONE)
def test_dynamo(name):
    """The whole model through Dynamo, whatever the number of graphs; strict=True proves each rewrite."""
    survey = survey_dynamo(name, default(name))
    checked_in(name, default(name), DYNAMO, survey)
    check(name, survey)
    if name != "jetmoe":  # its experts outside the graph take sorted slots, not ids: they are not run
        assert all(row.proof in PROVEN for row in survey.gates if row.status == "rewritten"), survey.rows


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(INTERFACE))
def test_dynamo_with_indexed_weights(name):
    """The other implementation that makes one graph."""
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
    survey = survey_ahead(name, default(name))
    checked_in(name, default(name), EXPORT, survey)
    check(name, survey)


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(SUBSET))
def test_bfloat16(name):
    """Other casts around the router; ids are equal still."""
    survey = survey_further(name, default(name), "bfloat16")
    checked_in_further(name, "bfloat16", survey)
    check(name, survey, torch.bfloat16)


@pytest.mark.zoo
@pytest.mark.parametrize("tracer", ["strict", "decomposed", "make_fx"])
@pytest.mark.parametrize("name", cases(SUBSET))
def test_further_tracers(name, tracer):
    """The same models written otherwise; the table has the others, which a lane of minutes has no time for."""
    survey = survey_further(name, default(name), tracer)
    checked_in_further(name, tracer, survey)
    check(name, survey)


@pytest.mark.zoo
def test_counts_that_make_fx_writes_down():
    """JetMoE's sizes are those of the traced call in its graph: re-routing would give each expert other rows."""
    survey = survey_further("jetmoe", "own", "make_fx")
    checked_in_further("jetmoe", "make_fx", survey)
    assert not survey.gates
    assert {row.reason.partition(" (")[0] for row in survey.rows} == {SkipReason.FIXED_SIZES.value}


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
    assert set(AHEAD) - set(FURTHER) == {"torch.export"}
    assert NOT_EXPORTED | set(SUBSET) | set(KNOWN) <= set(ENTRIES)
