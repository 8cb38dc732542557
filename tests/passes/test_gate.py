"""What a gate says of itself, and a refusal."""

import ast
import dataclasses
from pathlib import Path

import pytest

import sere_compile.passes
from sere_compile.passes import Skip, SkipReason, UseKind
from sere_compile.passes.gate import Evidence, Use

from .moe_modules import ExpertLoop, Indexed, from_make_fx, one_gate, rows


@pytest.fixture(scope="module")
def gate():
    return one_gate(from_make_fx(Indexed(), rows()))


def with_kinds(gate, *kinds):
    uses = tuple(Use(gate.uses[0].consumer, gate.ids, kind) for kind in kinds)
    return dataclasses.replace(gate, uses=uses)


def test_what_has_to_see_new_ids(gate):
    """Everything but what reads scores, counts, or ranks."""
    kept = {UseKind.LOOK_UP, UseKind.STATISTIC, UseKind.RANKING}
    uses = with_kinds(gate, *UseKind).dispatch_uses
    assert [use.kind for use in uses] == [kind for kind in UseKind if kind not in kept]


@pytest.mark.parametrize(
    ("kinds", "merge"),
    [
        ((UseKind.EXPERT_INDEX,), False),
        ((UseKind.GROUPED, UseKind.LOOK_UP), False),
        ((UseKind.GROUPED, UseKind.UNKNOWN), True),
        ((UseKind.LEAVES,), True),
        ((UseKind.STATISTIC,), False),
    ],
)
def test_duplicates_have_to_be_merged_where_one_dispatch_may_not_sum_them(kinds, merge, gate):
    assert with_kinds(gate, *kinds).needs_merge is merge


def test_kinds_of_dispatch_in_words(gate):
    """Each once, in order, without what keeps the ids."""
    kinds = (UseKind.UNKNOWN, UseKind.LOOK_UP, UseKind.GROUPED, UseKind.UNKNOWN)
    assert with_kinds(gate, *kinds).dispatch == "grouped by expert, unknown dispatch"
    assert with_kinds(gate, UseKind.LOOK_UP).dispatch == ""


def test_found_gates(gate):
    loop = one_gate(from_make_fx(ExpertLoop(), rows()))
    assert (gate.needs_merge, loop.needs_merge) == (False, True)
    assert gate == dataclasses.replace(gate, weights_skip=Skip(SkipReason.NO_IDS, gate.ids))


def test_a_refusal_in_words(gate):
    """Its reason, and what was found."""
    assert str(Skip(SkipReason.NO_IDS, gate.ids)) == "its indices are not used"
    assert str(Skip(SkipReason.NO_IDS, gate.ids, "at all")) == "its indices are not used (at all)"


@pytest.mark.parametrize(
    ("evidence", "reason", "is_gate"),
    [
        (Evidence.DISPATCH, SkipReason.NO_DISPATCH, False),
        (Evidence.EXPERTS, SkipReason.UNVERIFIED, True),
        (Evidence.REWRITING, SkipReason.MUTATED, True),
        (Evidence.REWRITING, SkipReason.REWRITTEN, False),
    ],
)
def test_what_a_user_would_call_a_gate(evidence, reason, is_gate, gate):
    """A router feeds it and experts follow it, and it is not re-routed yet."""
    assert Skip(reason, gate.ids, evidence=evidence).is_refused_gate is is_gate


def files_that_refuse():
    roots = [Path(sere_compile.__file__).parent, Path(sere_compile.passes.__file__).parent]
    return sorted({file for root in roots for file in root.rglob("*.py") if "Skip(" in file.read_text()})


@pytest.mark.parametrize("file", files_that_refuse(), ids=lambda file: file.stem)
def test_every_refusal_has_a_detail(file):
    """A reason alone says what kind of gate it is, and not which, nor what was found of it."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    refusals = [call for call in calls if getattr(call.func, "id", "") == "Skip"]
    without = [
        ast.unparse(call)
        for call in refusals
        if len(call.args) < 3 and not any(keyword.arg == "detail" for keyword in call.keywords)
    ]
    assert not without
