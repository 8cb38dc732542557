"""Each rule of the proofs is needed: broken, it lets a drawn program come out wrong, or a look-alike be touched.

Programs are drawn until one fails. Rules that only particular programs need are shown by the tests of their
modules: `test_prover.py` shows that scores have to weigh what experts give inside a graph, `test_prover.py` and
`test_prove_outside.py` that buffers have to be compared.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from sere_compile.compiler import prove_outside
from sere_compile.passes.proof import ends, expert_parameters, prover

from .draws import drawn, judged
from .program import GATE, LOOK_ALIKE
from .test_generated import economical  # noqa: F401  (a fixture)

MOST = 200
VERIFY = sys.modules["sere_compile.passes.verify_rewrite"]  # the package has a function of its name


def always(value):
    """A rule that says the same of everything."""
    return lambda *args, **kwargs: value


def only(compared):
    """`_differs` that looks at some of what it is given."""
    differs = prover.Prover._differs

    def partly(self, expected, got, exact):
        return differs(self, expected, got, exact) if compared(self, exact) else None

    return partly


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


# What is broken: (where, name, what takes its place, which programs).
RULES = {
    "exchanged parts change their own tokens alone": (
        expert_parameters.Told, "_changes_only", always(True), (LOOK_ALIKE, GATE)),
    "experts are contracted with hidden states": (prover, "experts_meet_hidden", always(True), (LOOK_ALIKE,)),
    "S < K is as with exchanged experts": (prover.Prover, "_differs", only(lambda _, exact: exact), (GATE, LOOK_ALIKE)),
    "what else reads ids and weights stays": (prover.Prover, "_differs", first_end, (GATE,)),
    "slots are merged as shown": (prover.Prover, "_verdict", other_merging, (GATE,)),
    "equal regions alone share a proof": (VERIFY, "region_key", by_few_sizes, (GATE,)),
    "inside vmap there is no batch": (VERIFY, "_inside_vmap", always(False), (GATE,)),
    "the exit has all experts' outputs": (ends._Search, "_is_joined_later", always(False), (GATE,)),
    "outside: the block gives what exchanged experts give": (
        prove_outside._Trial, "_compare", never_compared, (GATE,)),
    "outside: parameters act on one expert's tokens": (
        prove_outside._Trial, "_belongs_to_experts", always(True), (LOOK_ALIKE, GATE)),
    "outside: experts act on hidden states": (prove_outside._Trial, "_acts_on_hidden", always(True), (LOOK_ALIKE,)),
    "outside: scores weigh what experts give": (prove_outside._Trial, "_weighs_nothing", always(False), (LOOK_ALIKE,)),
    "outside: tokens stay with their experts": (prove_outside._Trial, "_sends_elsewhere", always(False), (GATE,)),
    "outside: a number per expert may be the router's": (
        prove_outside._Trial, "_scales_weights", always(False), (GATE,)),
}  # fmt: skip


@pytest.fixture
def forget():
    """A function that forgets all proofs: those of before, and those of a broken rule."""

    def clear():
        for remembered in (VERIFY._verdicts, prove_outside._verdicts):
            remembered.clear()
        torch._dynamo.reset()

    clear()
    yield clear
    clear()


def first_failure(kinds):
    """(program, verdict) of the first drawn program that fails, or None."""
    for seed in range(MOST):
        for kind in kinds:
            program = drawn(kind, seed)
            verdict = judged(program)
            if verdict.failed:
                return program, verdict
    return None


@pytest.mark.generated
@pytest.mark.parametrize("rule", RULES)
def test_without_it_a_program_fails(rule, monkeypatch, forget):
    place, name, broken, kinds = RULES[rule]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, broken)
        found = first_failure(kinds)
    assert found is not None, f"{MOST} programs of each kind pass without the rule"
    program, verdict = found
    print(f"{rule}: {program.kind} {program.seed}, {verdict.word}")
    forget()
    assert not judged(program).failed, f"{program.kind} {program.seed} fails with the rule as well"
