"""Every choice is drawn, every program runs, and the oracle's version computes the same."""

import pytest
import torch

from .choices import draw
from .draws import DIMENSIONS, chosen, drawn, plain
from .failures import sort_failures
from .judge import matrices
from .oracle import Oracle, Rerouting, flat
from .program import GATE, LOOK_ALIKE, build
from .rules import fits
from .shrink import peculiar, shrink
from .table import Judged, summary
from .verdicts import OUTPUT, REROUTED, Verdict


@pytest.mark.parametrize("kind", [GATE, LOOK_ALIKE])
def test_every_choice_is_drawn(kind):
    """Within 1,000 programs, so that a lane of 2,000 leaves no form out."""
    seen = {pair for seed in range(1000) for pair in drawn(kind, seed).choices.items()}
    missing = {(name, value) for name, values in DIMENSIONS[kind].items() for value in values} - seen
    assert not missing


@pytest.mark.parametrize("kind", [GATE, LOOK_ALIKE])
def test_a_seed_is_a_program(kind):
    """The same source, parameters and inputs each time, and another for another seed."""
    first, again = build(drawn(kind, 5)), build(drawn(kind, 5))
    assert drawn(kind, 5).text == drawn(kind, 5).text != drawn(kind, 6).text
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.inputs(0)[0], again.inputs(0)[0])


def assert_reports_the_same(program, seed):
    """The oracle's version of a program computes what the program does, for inputs of a seed."""
    built, oracle = build(program), Oracle(program)
    inputs = built.inputs(seed)
    with torch.no_grad():
        results = flat(built.model(*inputs))
    reported, _ = oracle.run(inputs, Rerouting(matrices(program, oracle.layers), 1), frozenset())
    assert len(results) == len(program.labels), program.text
    for label, one, other in zip(program.labels, results, reported, strict=True):
        where = f"{program.seed}: {label}\n{program.text}"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True, msg=where)


@pytest.mark.parametrize("chunk", range(4))
def test_programs_run(chunk):
    """And report their ids without changing what they compute."""
    for seed in range(chunk * 50, chunk * 50 + 50):
        program = drawn(GATE, seed)
        assert_reports_the_same(program, 0)
        look_alike = build(drawn(LOOK_ALIKE, seed))
        with torch.no_grad():
            assert flat(look_alike.model(*look_alike.inputs(0)))


def test_no_program_shows_the_order_of_an_unsorted_selection():
    """The oracle's version sorts, and computes the same."""
    for seed, program in enumerate(plain(GATE, 0, {"selection": "topk, unsorted", "sizes": "E 10, K 4, T 7, H 8"})):
        assert_reports_the_same(program, seed)


def test_the_text_has_no_trace_of_the_oracle():
    program = drawn(GATE, 0)
    assert "report(" in program.source
    assert "report(" not in program.text


class TestShrink:
    """On a verdict that is known: wrong where a chain meets a sum."""

    @staticmethod
    def judge(program):
        wrong = program.choices["dispatch"] == "chained" and program.choices["normalising"] == "sum"
        return Verdict(OUTPUT if wrong else REROUTED)

    def found(self):
        wild = {"dispatch": "chained", "normalising": "sum", "router": "einsum", "structure": "methods", "rho": "0.6"}
        return chosen(GATE, 0, wild)

    def test_only_what_matters_is_left(self):
        program, verdict = shrink(self.found(), Verdict(OUTPUT), DIMENSIONS[GATE], self.judge)
        assert verdict.word == OUTPUT
        assert peculiar(program.choices, DIMENSIONS[GATE]) == {"normalising": "sum", "dispatch": "chained"}

    def test_failures_of_one_form_are_shrunk_once(self):
        other = chosen(GATE, 1, {"dispatch": "chained", "normalising": "sum", "padding": "ids of 0"})
        results = [Judged(self.found(), Verdict(OUTPUT)), Judged(other, Verdict(OUTPUT))]
        told: list[str] = []
        forms, left = sort_failures(results, self.judge, most=5, tell=told.append)
        assert [form.seen for form in forms] == [2]
        assert (len(told), left) == (1, 0)
        assert "--choose normalising=sum --choose dispatch=chained" in told[0]


def test_choices_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match="dispatch=none"):
        chosen(GATE, 0, {"dispatch": "none"})
    with pytest.raises(ValueError, match="do not go together"):
        chosen(GATE, 0, {"dispatch": "token loop", "tracer": "symbolic_trace"})


def test_draws_keep_the_rules():
    import random

    assert all(fits(draw(random.Random(seed))) for seed in range(200))


def test_the_summary_counts_by_form():
    text = summary([Judged(drawn(GATE, 0), Verdict(REROUTED)), Judged(drawn(GATE, 1), Verdict(OUTPUT))])
    assert "1  ok, re-routed" in text
    assert "1  WRONG output" in text
    assert "rho: 0 " in text
