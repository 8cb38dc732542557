"""A region as one way rewrites it."""

import dataclasses

import pytest
import torch
from torch import nn

from sere_compile.passes import RoutingSettings, Skip, UseKind
from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.run_part import run_graph
from sere_compile.passes.proof.sources import trace_sources
from sere_compile.passes.proof.ways import (
    Got,
    Way,
    leads_to,
    picked_tables,
    rewrite_region,
    settings_of,
    with_proven_kinds,
)
from sere_compile.testing import reroute_oracle

from ..moe_modules import EXPERTS, TOKENS, Indexed, MaskPicks, Used
from .regions import leaves_of, region_of, run_of, told, values_of
from .test_prover import Padded, PaddedWithE, RouterEmbedding, RouterScale


def way_of(region, merged=False):
    return Way(region.gate, merged, region.readers)


def test_a_way_is_taken_in_a_copy():
    region = region_of(Indexed())
    before = str(region.graph)
    for merged, name in ((False, "sere.reroute"), (True, "sere.reroute_merged")):
        rewritten = rewrite_region(region, way_of(region, merged))
        assert name in map(nodes.kind, rewritten.graph.nodes)
    assert str(region.graph) == before


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_tells_ends_map_and_tokens(merged):
    """With S = K nothing moves, bit for bit; else the map is that of the ids."""
    region = region_of(Indexed())
    rewritten = rewrite_region(region, way_of(region, merged))
    values = values_of(region)

    def run(graph, given):
        return run_graph(graph, None, given, single=True)

    original = run_of(region)(values)
    same = rewritten.run(values, run, RoutingSettings(3), 1)
    assert torch.equal(same.ends[0], original[region.ends[0]])
    assert same.mapping.tolist() == list(range(EXPERTS))
    assert same.tokens == TOKENS
    for settings in (RoutingSettings(1), RoutingSettings(2), RoutingSettings(1, 0.5)):
        got = rewritten.run(values, run, settings, 1)
        matrix = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
        ids = original[region.gate.ids]
        expected = torch.arange(EXPERTS)
        expected[ids] = reroute_oracle(ids, matrix, settings.select_top_k, settings.threshold)
        assert torch.equal(got.mapping, expected)
        experts, _ = told(region)
        swapped = run_of(region)(experts.swapped(values, expected))[region.ends[0]]
        torch.testing.assert_close(got.ends[0], swapped)
        assert not torch.equal(got.ends[0], original[region.ends[0]])
    assert not torch.equal(rewritten.run(values, run, RoutingSettings(1), 2).ends[0], got.ends[0])


def test_moves_that_must_not_happen():
    """Experts of a rank's part: one that is similar to none of those it may go to stays, the others go elsewhere."""
    region = region_of(Indexed())
    rewritten, values = rewrite_region(region, way_of(region)), values_of(region)

    def run(graph, given):
        return run_graph(graph, None, given, single=True)

    free = rewritten.run(values, run, RoutingSettings(1), 1)
    unknown = torch.zeros(EXPERTS, EXPERTS, dtype=torch.bool)
    first, second, *_ = sorted(free.moved)
    unknown[first] = True
    unknown[second, free.mapping[second]] = True
    got = rewritten.run(values, run, RoutingSettings(1), 1, unknown)
    assert first not in got.moved
    assert second in got.moved
    assert got.mapping[second] != free.mapping[second]
    assert got.moved == free.moved - {first}
    nowhere = rewritten.run(values, run, RoutingSettings(1), 1, torch.ones_like(unknown))
    assert nowhere.moved == set()
    assert rewritten.run(values, run, RoutingSettings(1, 0.99), 1, ~torch.ones_like(unknown)).moved < free.moved


@pytest.mark.parametrize("module", [Padded, PaddedWithE], ids=lambda m: m.__name__)
def test_ids_of_no_expert_move_nowhere(module):
    """They are in no map, and what stands in them is no expert's part."""
    region = region_of(module())
    values = values_of(region)
    got = rewrite_region(region, way_of(region)).run(
        values, lambda graph, given: run_graph(graph, None, given, single=True), RoutingSettings(1), 1
    )
    named = run_of(region)(values)[region.gate.ids]
    real = (named >= 0) & (named < EXPERTS)
    assert not real.all()
    assert got.mapping.min() >= 0
    assert got.mapping.max() < EXPERTS
    unnamed = set(range(EXPERTS)) - set(named[real].tolist())
    assert got.moved.isdisjoint(unnamed)


def test_which_experts_moved():
    assert Got([], torch.tensor([0, 0, 2, 1]), 4).moved == {1, 3}


def test_a_region_that_cannot_be_rewritten():
    """Merging needs weights."""
    region = region_of(Indexed())
    gate = dataclasses.replace(region.gate, weights=None)
    assert isinstance(rewrite_region(region, Way(gate, True, ())), Skip)
    rewritten = rewrite_region(region, way_of(region))
    assert rewritten.gate is region.gate
    assert rewritten.region is region
    assert set(region.graph.nodes) <= set(rewritten.copies)
    assert all(copy.graph is rewritten.graph for copy in rewritten.copies.values())


def test_draws_differ_in_their_settings():
    """S = 2 only where it is below K."""
    assert [(s.select_top_k, s.threshold) for s in (settings_of(draw, 3) for draw in range(6))] == [
        (1, 0.0),
        (2, 0.0),
        (1, 0.0),
        (1, 0.5),
        (1, 0.0),
        (2, 0.0),
    ]
    assert [settings_of(draw, 3) for draw in range(4, 12)] == [settings_of(draw, 3) for draw in range(4)] * 2
    assert {settings_of(draw, 2).select_top_k for draw in range(4)} == {1}


@pytest.mark.parametrize("module", [RouterScale, RouterEmbedding], ids=lambda m: m.__name__)
def test_tables_are_the_experts_or_not(module):
    """What is seen to be an expert's takes new ids, and another table the old ones, whatever the rule said."""
    region = region_of(module())
    found, _ = told(region)
    wrong = tuple(
        type(use)(use.consumer, use.read, UseKind.LOOK_UP if use.kind.dispatches else UseKind.EXPERT_INDEX)
        for use in region.gate.uses
    )
    for uses in (region.gate.uses, wrong):
        turned = type(region)(**{**vars(region), "gate": type(region.gate)(**{**vars(region.gate), "uses": uses})})
        kinds = {
            tuple(nodes.shape(table_of(use)))[1:]: use.kind
            for use in with_proven_kinds(turned, found.tensors).uses
            if table_of(use) is not None
        }
        assert kinds == {(6, 6): UseKind.EXPERT_INDEX, (1,): UseKind.LOOK_UP}


def table_of(use):
    tables = [nodes.parameter_root(source) for source in nodes.operands(use.consumer)]
    return next((table for table in tables if table is not None and table.op == "placeholder"), None)


def test_what_never_reaches_the_exit_is_no_dispatch():
    region = region_of(Used(lambda b, x, ids, s: nn.functional.one_hot(ids, EXPERTS).sum(1) @ b.load))
    found, _ = told(region)
    for use in with_proven_kinds(region, found.tensors).uses:
        assert use.kind.dispatches is leads_to(use.consumer, region.ends[0])


def test_leads_to():
    region = region_of(Indexed())
    [logits] = leaves_of(region, "logits")
    assert leads_to(logits, region.ends[0])
    assert leads_to(logits, logits)
    assert leads_to(region.gate.ids, region.ends[0])
    assert not leads_to(region.ends[0], logits)
    assert not leads_to(region.gate.weights, region.gate.ids)


def test_tables_that_a_mask_picks_from():
    """The scores, at the product with the mask; not what reads the scores alone, nor where the mask has no scores."""
    region = region_of(MaskPicks())
    [(reader, table)] = picked_tables(region, region.gate, trace_sources(region))
    assert (nodes.kind(reader), nodes.kind(table)) == ("mul", "softmax")
    region = region_of(Indexed())
    assert picked_tables(region, region.gate, trace_sources(region)) == ()
