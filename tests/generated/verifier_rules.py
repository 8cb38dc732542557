"""The rules of the proofs, each with a way to break it and with what shows that it is broken.

    SERE_BROKEN_RULE="inside vmap there is no batch" pytest -p tests.generated.verifier_rules tests/passes/proof

runs tests without that rule.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from sere_compile.compiler import prove_outside
from sere_compile.passes.proof import ends, expert_parameters, prover

from .program import GATE, LOOK_ALIKE

BROKEN = "SERE_BROKEN_RULE"
VERIFY = sys.modules["sere_compile.passes.verify_rewrite"]  # the package has a function of its name


def always(value):
    """A rule that says the same of everything."""
    return lambda *args, **kwargs: value


def exactly_or_not_at_all(self, expected, got, exact):
    """`_differs` that compares with S = K alone."""
    return _differs(self, expected, got, exact) if exact else None


_differs = prover.Prover._differs


def first_end(self, expected, got, exact):
    """`_differs` that compares the exit alone."""
    apart = prover.distance(expected[self._region.ends[0]], got.ends[0], exact)
    return None if apart is None else f"off by {apart}"


def other_merging(self, way, experts):
    """A verdict that says the contrary of what was shown."""
    return dataclasses.replace(_verdict(self, way, experts), merged=not way.merged)


_verdict = prover.Prover._verdict


def never_compared(self, experts, inputs):
    """A comparison outside that is never made."""
    return prove_outside.Verdict(self._gate.needs_merge)


def by_few_sizes(region, module):
    """A key that most regions have in common."""
    return str((len(region.ends), region.gate.top_k, region.gate.needs_merge))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function of the verifier that is replaced, and what then goes wrong: drawn programs, or tests of the module."""

    place: Any
    name: str
    broken: Callable[..., Any]
    programs: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    @property
    def patch(self) -> tuple[Any, str, Any]:
        """Arguments of `setattr`."""
        return self.place, self.name, self.broken


PROVER = "tests/passes/proof/test_prover.py"
OUTSIDE = "tests/compiler/test_prove_outside.py"
TRIAL = prove_outside._Trial
RULES = {
    "experts are contracted with hidden states": Rule(prover, "experts_meet_hidden", always(True), (LOOK_ALIKE,)),
    "S < K is as with exchanged experts": Rule(prover.Prover, "_differs", exactly_or_not_at_all, (GATE,)),
    "slots are merged as shown": Rule(prover.Prover, "_verdict", other_merging, (GATE,)),
    "equal regions alone share a proof": Rule(VERIFY, "region_key", by_few_sizes, (GATE,)),
    "the exit has all experts' outputs": Rule(ends._Search, "_is_joined_later", always(False), (GATE,)),
    "outside: as with exchanged experts": Rule(TRIAL, "_compare", never_compared, (GATE,)),
    "outside: tokens stay with their experts": Rule(TRIAL, "_sends_elsewhere", always(False), (GATE,)),
    # Of 200 programs of each kind none needs these.
    "exchanged parts change their own tokens alone": Rule(
        expert_parameters.Told, "_changes_only", always(True), tests=("tests/passes/proof/test_expert_parameters.py",)),
    "scores weigh what experts give": Rule(
        prover.Prover, "_weighs_nothing", always(False), tests=(f"{PROVER}::test_attended_prompts_are_no_experts",)),
    "what else reads ids and weights stays": Rule(prover.Prover, "_differs", first_end, tests=(PROVER,)),
    "inside vmap there is no batch": Rule(VERIFY, "_inside_vmap", always(False), tests=(PROVER,)),
    "outside: parameters act on one expert's tokens": Rule(
        TRIAL, "_belongs_to_experts", always(True), tests=(OUTSIDE,)),
    "outside: experts act on hidden states": Rule(
        TRIAL, "_acts_on_hidden", always(True), tests=(f"{OUTSIDE}::test_a_table_of_values_is_no_gate",)),
    "outside: scores weigh what experts give": Rule(
        TRIAL, "_weighs_nothing", always(False),
        tests=(f"{OUTSIDE}::test_prompts_that_are_attended_to_are_no_experts",)),
    "outside: a number per expert may be the router's": Rule(
        TRIAL, "_scales_weights", always(False),
        tests=(f"{OUTSIDE}::test_a_scale_that_a_loss_of_the_weights_reads_is_no_experts_either",)),
}  # fmt: skip


def pytest_configure(config):
    """As a plug-in: break the rule that the environment names."""
    if name := os.environ.get(BROKEN):
        setattr(*RULES[name].patch)
