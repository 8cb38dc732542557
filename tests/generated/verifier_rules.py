"""The rules of the proofs, each with a way to break it and with what shows that it is broken.

    SERE_BROKEN_RULE="inside vmap there is no batch" pytest -p tests.generated.verifier_rules tests/passes/proof

runs tests without that rule.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from sere_compile.compiler.outside import try_block, which_experts
from sere_compile.compiler.outside.compare_versions import Verdict
from sere_compile.passes.proof import ends, expert_parameters, masks, prover

from .program import GATE, LOOK_ALIKE

BROKEN = "SERE_BROKEN_RULE"
VERIFY = sys.modules["sere_compile.passes.verify_rewrite"]  # the package has a function of its name


def always(value):
    """A rule that says the same of everything."""
    return lambda *args, **kwargs: value


def edited(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
    """A function in whose source one text stands in place of another, which has to be there once."""
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(before)
    if found != 1:
        raise ValueError(
            f"{function.__qualname__} has {before!r} {found} times, not once: break its rule in another way"
        )
    names: dict[str, Any] = {}
    exec(compile(source.replace(before, after), inspect.getfile(function), "exec"), function.__globals__, names)
    return names[function.__name__]


def exactly_or_not_at_all(self, expected, got, exact):
    """`_differs` that compares with S = K alone."""
    return _differs(self, expected, got, exact) if exact else None


_differs = prover.Prover._differs


def never_exactly(self, expected, got, exact):
    """`_differs` that does not compare with S = K."""
    return None if exact else _differs(self, expected, got, exact)


def first_end(self, expected, got, exact):
    """`_differs` that compares the exit alone."""
    apart = prover.distance(expected[self._region.ends[0]], got.ends[0], exact)
    return None if apart is None else f"off by {apart}"


def all_real(self, mask, like, sizes, variant, generator):
    """`_mixed` that marks nothing, as the traced call may not."""
    return self._uniform(mask, like, sizes, all_real=True, generator=generator)


def other_merging(self, way, experts):
    """A verdict that says the contrary of what was shown."""
    return dataclasses.replace(_verdict(self, way, experts), merged=not way.merged)


_verdict = prover.Prover._verdict


def never_compared(trial, experts, inputs, kept):
    """A comparison outside that is never made."""
    return Verdict(trial.gate.needs_merge)


def by_few_sizes(region, module):
    """A key that most regions have in common."""
    return str((len(region.ends), region.gate.top_k, region.gate.needs_merge))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function or number of the verifier that is replaced, and what then goes wrong.

    Attributes:
        place: what holds it.
        name: its name there.
        broken: what takes its place; a pair of texts where one takes the other's place in its source.
        programs: kinds of drawn programs of which one comes out wrong,
        tests: else tests of the module, of which one fails.
    """

    place: Any
    name: str
    broken: Any
    programs: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def patch(self) -> tuple[Any, str, Any]:
        """Arguments of `setattr`."""
        is_edit = isinstance(self.broken, tuple) and all(isinstance(text, str) for text in self.broken)
        broken = edited(getattr(self.place, self.name), *self.broken) if is_edit else self.broken
        return self.place, self.name, broken


PROVER = "tests/passes/proof/test_prover.py"
DRAWS = "tests/passes/proof/test_draws.py"
MASKS = f"{PROVER}::TestMaskInput"
BORDERS = f"{DRAWS}::test_an_expert_that_a_mask_sends_tokens_to"
NUMBERS = "tests/passes/proof/test_other_numbers.py"
OUTSIDE = "tests/compiler/outside/test_which_experts.py"
RULES = {
    "experts are contracted with hidden states": Rule(prover, "experts_meet_hidden", always(True), (LOOK_ALIKE,)),
    "S < K is as with exchanged experts": Rule(prover.Prover, "_differs", exactly_or_not_at_all, (GATE,)),
    "slots are merged as shown": Rule(prover.Prover, "_verdict", other_merging, (GATE,)),
    "equal regions alone share a proof": Rule(VERIFY, "region_key", by_few_sizes, (GATE,)),
    "the exit has all experts' outputs": Rule(ends._Search, "_is_joined_later", always(False), (GATE,)),
    "outside: as with exchanged experts": Rule(try_block, "compare_versions", never_compared, (GATE,)),
    # Of 200 programs of each kind none needs these.
    "exchanged parts change their own tokens alone": Rule(
        expert_parameters.Told, "_changes_only", always(True), tests=("tests/passes/proof/test_expert_parameters.py",)),
    "scores weigh what experts give": Rule(
        prover.Prover, "_weighs_nothing", always(False), tests=(f"{PROVER}::test_attended_prompts_are_no_experts",)),
    "what else reads ids and weights stays": Rule(prover.Prover, "_differs", first_end, tests=(PROVER,)),
    "S = K changes no bit": Rule(
        prover.Prover, "_differs", never_exactly, tests=(f"{PROVER}::TestCounts",)),
    "each expert is re-routed once": Rule(
        prover.Prover, "_check_draws", (" and not (may_tell_apart and stays)", ""),
        tests=(f"{DRAWS}::test_one_of_many_experts_that_is_told_by_its_number",)),
    "a rewrite that changes nothing is none": Rule(
        prover.Prover, "_check_draws", ("told = told or distance(", "told = True or distance("),
        tests=(f"{DRAWS}::test_a_rewrite_that_would_change_nothing_is_none",)),
    "state is that of later calls, too": Rule(
        prover, "later_state", always({}), tests=(f"{DRAWS}::test_a_scale_that_is_one_at_first",)),
    "more tokens than one call has": Rule(
        prover, "more_tokens", always({}),
        tests=(f"{DRAWS}::test_tokens_that_are_dropped_only_where_there_are_many",)),
    "other calls mask some tokens": Rule(masks.Masks, "_mixed", all_real, tests=(MASKS,)),
    "each expert is re-routed under masks": Rule(
        prover.Prover, "_wrong_in_other_calls", always(None), tests=(BORDERS,)),
    "other calls bring other numbers": Rule(prover, "other_numbers", always([]), tests=(NUMBERS,)),
    "what no draw re-routes acts on its own tokens": Rule(
        prover.Prover, "_acts_unnamed", always(False),
        tests=(f"{DRAWS}::test_an_expert_that_no_draw_re_routes_under_a_mask",)),
    "experts read the ids that re-routing saw": Rule(prover, "changed_id", always(None), tests=(MASKS,)),
    "inside vmap there is no batch": Rule(VERIFY, "_inside_vmap", always(False), tests=(PROVER,)),
    "outside: tokens stay with their experts": Rule(
        try_block, "sends_elsewhere", always(False),
        tests=("tests/compiler/outside/test_where_tokens_go.py::test_padding_that_is_marked_outside_is_refused",)),
    "outside: parameters act on one expert's tokens": Rule(
        which_experts, "_belongs_to_experts", always(True), tests=(OUTSIDE,)),
    "outside: experts act on hidden states": Rule(
        which_experts, "_acts_on_hidden", always(True), tests=(f"{OUTSIDE}::test_a_table_of_values_is_no_gate",)),
    "outside: scores weigh what experts give": Rule(
        try_block, "weighs_nothing", always(False),
        tests=(f"{OUTSIDE}::test_prompts_that_are_attended_to_are_no_experts",)),
    "outside: a number per expert may be the router's": Rule(
        which_experts, "_scales_weights", always(False),
        tests=(f"{OUTSIDE}::test_a_scale_that_a_loss_of_the_weights_reads_is_no_experts_either",)),
}  # fmt: skip


def pytest_configure(config):
    """As a plug-in: break the rule that the environment names."""
    if name := os.environ.get(BROKEN):
        setattr(*RULES[name].patch)
