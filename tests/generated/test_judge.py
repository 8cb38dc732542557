"""The judge itself: products that are wrong on purpose, one for each verdict."""

from dataclasses import replace

import pytest
import torch

from sere_compile import GateNotFoundError, ProbeError

from . import verdicts
from .cases import Case
from .draws import chosen
from .judge import judge, matrices
from .oracle import Oracle, Rerouting, flat
from .product import Outcome
from .program import GATE, LOOK_ALIKE, build, make_program
from .rerouting import expert_map

SIMPLE = chosen(GATE, 3, {})
TWO_LAYERS = chosen(GATE, 3, {"around": "two layers"})
LABELS = chosen(LOOK_ALIKE, 3, {})


def perfect(program, layers=None, reasons=()):
    """A product that computes what the oracle does, for some layers."""

    def enter(tracer, model, inputs, config):
        oracle = Oracle(program)
        rerouting = Rerouting(matrices(program, oracle.layers), config.select_top_k, config.threshold)
        of = frozenset(oracle.layers if layers is None else layers)
        return Outcome(lambda *given: oracle.run(given, rerouting, of)[0], reasons=list(reasons))

    return enter


def naive(program):
    """A product that gives new ids to every reader, as replacing all uses of them would."""

    def enter(tracer, model, inputs, config):
        [matrix] = matrices(program, ("",)).values()

        def report(layer, ids):
            mapping = expert_map(ids.tolist(), matrix.tolist(), config.select_top_k, config.threshold)
            ids.copy_(torch.tensor(mapping)[ids])

        return Outcome(build(program, report).model)

    return enter


def spoiled(change, **outcome):
    """A product that changes the results of the program."""

    def enter(tracer, model, inputs, config):
        return Outcome(lambda *given: change(flat(model(*given))), **outcome)

    return enter


def raising(error):
    def enter(tracer, model, inputs, config):
        raise error

    return enter


def same(results):
    return results


class TestGates:
    def test_right(self):
        assert judge(SIMPLE, enter=perfect(SIMPLE)).word == verdicts.REROUTED

    def test_wrong_by_a_little(self):
        """One thousandth of the largest value is ten times the tolerance."""

        def off(tracer, model, inputs, config):
            done = perfect(SIMPLE)(tracer, model, inputs, config).call
            return Outcome(lambda *given: [y + y.abs().max() / 1000 for y in done(*given)])

        found = judge(SIMPLE, enter=off)
        assert found.word == verdicts.OUTPUT
        assert found.error == pytest.approx(1e-3, rel=0.1)
        assert "1 of 1 gates re-routed" in found.detail

    def test_wrong_in_one_call_of_two(self):
        factors = iter([1.0, 1.1])

        def enter(tracer, model, inputs, config):
            done = perfect(SIMPLE)(tracer, model, inputs, config).call
            return Outcome(lambda *given: [y * factor for y, factor in zip(done(*given), factors, strict=False)])

        assert judge(SIMPLE, enter=enter).word == verdicts.OUTPUT

    def test_refused(self):
        found = judge(SIMPLE, enter=spoiled(same, reasons=["it rains"]))
        assert (found.word, found.detail) == (verdicts.REFUSED, "it rains")

    def test_refused_in_the_report_only(self):
        found = judge(SIMPLE, enter=spoiled(same, explained=lambda: (["it rains"], 0)))
        assert (found.word, found.detail) == (verdicts.REFUSED, "it rains")

    def test_silent(self):
        assert judge(SIMPLE, enter=spoiled(same)).word == verdicts.SILENT

    def test_a_claim_that_is_not_kept(self):
        """The report says re-routed, the results are the original ones."""
        found = judge(SIMPLE, enter=spoiled(same, explained=lambda: (["a row with a reason"], 1)))
        assert found.word == verdicts.SILENT
        assert "claims 1" in found.detail

    def test_one_layer_of_two(self):
        found = judge(TWO_LAYERS, enter=perfect(TWO_LAYERS, ["layers.1"], ["it rains"]))
        assert (found.word, found.rerouted) == (verdicts.PARTLY, (1, 2))

    def test_one_layer_of_two_without_a_word(self):
        assert judge(TWO_LAYERS, enter=perfect(TWO_LAYERS, ["layers.0"])).word == verdicts.SILENT

    def test_the_other_layers_matrix(self):
        """Each layer has its own: with them exchanged the output is wrong."""

        def enter(tracer, model, inputs, config):
            oracle = Oracle(TWO_LAYERS)
            first, second = matrices(TWO_LAYERS, oracle.layers).values()
            swapped = Rerouting({"layers.0": second, "layers.1": first}, config.select_top_k, config.threshold)
            return Outcome(lambda *given: oracle.run(given, swapped, frozenset(oracle.layers))[0])

        assert judge(TWO_LAYERS, enter=enter).word == verdicts.OUTPUT

    def test_refused_by_an_error(self):
        found = judge(SIMPLE, enter=raising(GateNotFoundError("it rains")))
        assert (found.word, found.detail) == (verdicts.RAISED, "GateNotFoundError: it rains")

    def test_crash(self):
        assert judge(SIMPLE, enter=raising(ZeroDivisionError("by zero"))).word == verdicts.CRASH

    def test_what_torch_cannot_trace_is_no_crash(self):
        """A loop that data decide, for a tracer that has no data; the grammar forbids it."""
        choices = {**SIMPLE.choices, "tracer": "symbolic_trace", "dispatch": "token loop"}
        assert judge(make_program(GATE, choices, 3)).word == verdicts.TORCH

    def test_vacuous(self):
        """Where the experts count for nothing, no re-routing shows."""
        idle = replace(SIMPLE, source=SIMPLE.source.replace("return y", "return y * 0.0"))
        assert judge(idle, enter=perfect(idle)).word == verdicts.VACUOUS

    def test_every_bit_at_s_k(self):
        assert judge(SIMPLE, identity=True, enter=spoiled(same)).word == verdicts.UNTOUCHED
        one_bit = spoiled(lambda results: [torch.nextafter(y, torch.tensor(torch.inf)) for y in results])
        assert judge(SIMPLE, identity=True, enter=one_bit).word == verdicts.IDENTITY


class TestNewIdsForEveryReader:
    """A known bug, in forms where it is one and where it is none: the oracle tells them apart."""

    @pytest.mark.parametrize(
        "choices",
        [
            {"dispatch": "gathered"},
            {"dispatch": "flat slots"},
            {"dispatch": "by rank"},
            {"dispatch": "chained"},
            {"dispatch": "dense rows"},
            {"shared expert": "joined by cat"},
            # Read before the ids are final.
            {"early reader": "scale [E]"},
        ],
        ids=str,
    )
    def test_right_where_each_slot_goes_its_own_way(self, choices):
        program = chosen(GATE, 3, choices)
        assert judge(program, enter=naive(program)).word == verdicts.REROUTED

    @pytest.mark.parametrize("returned", ["ids", "counts", "load of experts", "tokens by one-hot"])
    def test_wrong_in_what_is_returned(self, returned):
        program = chosen(GATE, 3, {"returned": returned})
        assert judge(program, enter=naive(program)).word == verdicts.SIDE

    @pytest.mark.parametrize(
        "choices",
        [
            {"dispatch": "dense sum"},
            {"dispatch": "mask loop", "weights applied to": "uniform"},
            {"dispatch": "mask loop", "weights applied to": "inputs"},
            {"late reader": "equal ids counted"},
            {"dispatch": "capacity"},
        ],
        ids=str,
    )
    def test_wrong_in_the_output(self, choices):
        """Duplicates in a table or mask, and readers after the ids are final."""
        program = chosen(GATE, 4, choices)
        assert judge(program, enter=naive(program)).word == verdicts.OUTPUT


class TestLookAlikes:
    def test_untouched(self):
        assert judge(LABELS, enter=spoiled(same)).word == verdicts.UNTOUCHED

    def test_touched_by_a_bit(self):
        found = judge(LABELS, enter=spoiled(lambda results: [results[0], results[1].flip(-1)]))
        assert found.word == verdicts.TOUCHED

    def test_touched_without_effect(self):
        """An operator in its graph, though the results agree."""
        assert judge(LABELS, enter=spoiled(same, operators=1)).word == verdicts.TOUCHED

    @pytest.mark.parametrize("strict", ["no", "yes"])
    def test_stopped(self, strict):
        program = chosen(LOOK_ALIKE, 3, {"strict": strict})
        assert judge(program, enter=raising(ProbeError("no experts"))).word == verdicts.STOPPED

    def test_that_there_is_no_gate_is_an_error_only_where_one_is_asked_for(self):
        error = GateNotFoundError("no gate")
        assert judge(LABELS, enter=raising(error)).word == verdicts.STOPPED
        strict = chosen(LOOK_ALIKE, 3, {"strict": "yes"})
        assert judge(strict, enter=raising(error)).word == verdicts.RAISED


def test_calls_are_two(monkeypatch):
    """What is missed is told when the second call begins; one call would hear nothing."""
    calls = []
    run = Case.run

    def counted(case):
        calls.append(len(case.inputs))
        return run(case)

    monkeypatch.setattr(Case, "run", counted)
    judge(SIMPLE, enter=perfect(SIMPLE))
    assert calls == [2]
