"""Plans and refused selections as rows of a report."""

import pytest
import torch

from sere_compile import SereConfig, SimilarityProfile
from sere_compile.compiler.gate_plan import GatePlan
from sere_compile.compiler.report_rows import row_of, row_of_skip
from sere_compile.passes import Skip, SkipReason, extract_dispatch
from sere_compile.report import IDENTITY, REWRITTEN, SKIPPED
from sere_compile.similarity.binding import GateEntry
from sere_compile.similarity.threshold import resolve_threshold

from ..passes.moe_modules import EXPERTS, TOP_K, BiasCorrected, from_dynamo, from_make_fx, one_gate, rows, similarity


@pytest.fixture(scope="module")
def gate():
    return one_gate(from_make_fx(BiasCorrected(), rows()))


def plan(gate, status=REWRITTEN, config=None, **known):
    config = config or SereConfig(select_top_k=1)
    return GatePlan(gate, "router", config, config, extract_dispatch(gate), None, status=status, **known)


ENTRY = GateEntry("layers.0.router", similarity(), "profile (cka)")


def test_a_gate_that_is_rewritten(gate):
    config = SereConfig(select_top_k=1, threshold=0.25, substitution="projection")
    row = row_of(plan(gate, config=config, merged=True, kernels="experts", proof="shown"), ENTRY)
    assert (row.name, row.num_experts, row.top_k, row.select_top_k) == ("layers.0.router", EXPERTS, TOP_K, 1)
    assert (row.scoring, row.is_sorted) == (gate.scoring, False)
    assert row.dispatch == "indexed weights, merged"
    assert (row.status, row.reason, row.similarity) == (REWRITTEN, "", "profile (cka)")
    assert (row.threshold, row.substitution, row.kernels, row.proof) == (0.25, "projection", "experts", "shown")
    assert row_of(plan(gate), ENTRY).dispatch == "indexed weights"


@pytest.mark.parametrize("status", [IDENTITY, SKIPPED])
def test_a_gate_that_is_not(gate, status):
    """Says why, and nothing of what would have been."""
    config = SereConfig(select_top_k=1, threshold=0.25, substitution="projection")
    row = row_of(plan(gate, status, config, reason="so", merged=True, proof="shown"), ENTRY)
    assert (row.select_top_k, row.dispatch, row.status, row.reason) == (TOP_K, "indexed weights", status, "so")
    assert (row.similarity, row.threshold, row.substitution, row.proof) == ("", 0.0, "reroute", "")


def test_a_share_becomes_a_number_once_the_matrix_is_known(gate):
    made = plan(gate, config=SereConfig(select_top_k=1, threshold="q0.5"))
    assert row_of(made, ENTRY).threshold == resolve_threshold("q0.5", similarity())
    unknown = row_of(made, GateEntry("layers.0.router"))
    assert unknown.threshold == "q0.5"
    assert unknown.similarity == "none attached: probed at compile time"


def test_a_gate_that_is_filled_has_no_matrix(gate):
    """Where that was not possible it is re-routed, and the row says why."""
    config = SereConfig(select_top_k=1, substitution="fill", threshold=0.1)
    filled = row_of(plan(gate, config=config, is_filled=True), ENTRY)
    assert (filled.similarity, filled.threshold, filled.substitution) == ("", 0.1, "fill")
    fallen = row_of(plan(gate, config=config, fallback="re-routed, not filled: so"), ENTRY)
    assert (fallen.reason, fallen.substitution) == ("re-routed, not filled: so", "reroute")
    assert (fallen.threshold, fallen.similarity) == (0.0, "profile (cka)")


def test_a_refused_selection_is_named_after_its_place():
    graph = from_dynamo(BiasCorrected(), rows())
    node = one_gate(graph).selection
    row = row_of_skip(Skip(SkipReason.NO_IDS, node, "none"))
    assert row.name.startswith(f"{node.name} (")
    assert "moe_modules.py" in row.name
    assert (row.num_experts, row.top_k, row.select_top_k, row.is_sorted) == (None, None, None, None)
    assert (row.scoring, row.dispatch, row.status) == ("", "", SKIPPED)
    assert row.reason == "its indices are not used (none)"
    node.meta.clear()
    assert row_of_skip(Skip(SkipReason.NO_IDS, node)).name == node.name


def test_profiles_are_named_as_they_are():
    """The source of a profile is what an entry of it shows."""
    assert SimilarityProfile({"gate": torch.eye(2) + 0.1}, {"method": "cka"}).source == "profile (cka)"
