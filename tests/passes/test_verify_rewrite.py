"""`verify_rewrite`: right rewrites pass for every dispatch and tracer, seeded wrong ones are caught."""

import dataclasses

import pytest
import torch

from sere_compile.passes import SkipReason, UseKind, verify_rewrite

from .moe_modules import (
    DUPLICATE_UNSAFE,
    SUMS_DUPLICATES,
    TRACERS,
    BiasCorrected,
    Indexed,
    ScatterCombine,
    one_gate,
    rows,
)
from .test_selections import FORMS, RoutedIndexed, RoutedScatter, SkipSlots


def weights_of(graph):
    """What the graph's inputs and attributes hold."""
    captured = getattr(graph, "captured_inputs", ())
    placeholders = dict(zip(graph.graph.find_nodes(op="placeholder"), captured, strict=False))
    return lambda node: placeholders.get(node) if node.op == "placeholder" else getattr(graph, str(node.target), None)


def verified(graph, gate=None):
    return verify_rewrite(gate or one_gate(graph), weights_of(graph))


class NormalisedInPlace(Indexed):
    """`values /= values.sum()`, as the routers of transformers do: the chosen values must not change between runs."""

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k)
        values /= values.sum(-1, keepdim=True)
        return ids, values


@pytest.mark.parametrize("tracer", TRACERS)
class TestRight:
    @pytest.mark.parametrize(
        "module",
        [m for m in SUMS_DUPLICATES + DUPLICATE_UNSAFE if m.__name__ != "IndexPut"]
        + [BiasCorrected, SkipSlots, NormalisedInPlace],
        ids=lambda m: m.__name__,
    )
    def test_dispatches(self, module, tracer):
        """Every dispatch of the tests is proven, and the graph is left as it was."""
        graph = TRACERS[tracer](module(), rows())
        before = str(graph.graph)
        assert verified(graph) is None
        assert str(graph.graph) == before

    @pytest.mark.parametrize("module", [RoutedIndexed, RoutedScatter])
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form, module, tracer):
        """So is every form of selection."""
        assert verified(TRACERS[tracer](module(FORMS[form]), rows())) is None


def with_kinds(gate, change):
    return dataclasses.replace(gate, uses=tuple(change(use) for use in gate.uses))


@pytest.mark.parametrize("tracer", TRACERS)
class TestWrong:
    @pytest.mark.parametrize(
        "module", [m for m in DUPLICATE_UNSAFE if m.__name__ != "IndexPut"], ids=lambda m: m.__name__
    )
    def test_duplicates_that_are_not_summed(self, module, tracer):
        """A wrong rule that takes every dispatch for one that sums: the lost slot is missed."""
        graph = TRACERS[tracer](module(), rows())
        wrong = with_kinds(one_gate(graph), lambda use: dataclasses.replace(use, kind=UseKind.GROUPED))
        refusal = verified(graph, wrong)
        assert refusal.reason is SkipReason.UNVERIFIED
        assert "from the sum over slots" in refusal.detail

    def test_look_up_with_new_ids(self, tracer):
        """A wrong rule that lets the weights follow the new ids."""
        graph = TRACERS[tracer](BiasCorrected(), rows())
        wrong = with_kinds(one_gate(graph), lambda use: dataclasses.replace(use, kind=UseKind.EXPERT_INDEX))
        assert verified(graph, wrong).reason is SkipReason.UNVERIFIED

    def test_dispatch_with_old_ids(self, tracer):
        """A wrong rule that takes one of two dispatches for a statistic."""

        class Twice(Indexed):
            def dispatch(self, x, ids, weights):
                return super().dispatch(x, ids, weights) + super().dispatch(2 * x, ids.clone(), weights)

        graph = TRACERS[tracer](Twice(), rows())
        gate = one_gate(graph)
        assert len(gate.dispatch_uses) == 2
        last = gate.dispatch_uses[-1]
        wrong = with_kinds(gate, lambda use: dataclasses.replace(use, kind=UseKind.STATISTIC) if use == last else use)
        assert verified(graph, wrong).reason is SkipReason.UNVERIFIED

    def test_what_cannot_be_run(self, tracer):
        """An operation that does not take made-up values is no proof: the detail has its message."""
        graph = TRACERS[tracer](ScatterCombine(), rows())
        refusal = verify_rewrite(one_gate(graph), lambda node: torch.zeros(1, 2, 3))
        assert refusal.reason is SkipReason.UNVERIFIED
        assert "could not be run" in refusal.detail
