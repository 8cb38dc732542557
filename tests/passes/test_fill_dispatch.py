"""`substitution="fill"` in whole models: numbers, identities, what needs no matrix, and where it falls back."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import sere_compile
from sere_compile import ConfigError, SereConfig
from sere_compile.lowering.standard_operators import decompose, sere_nodes
from sere_compile.passes import Evidence, Gate, RoutingSettings, Skip, SkipReason, Use, UseKind
from sere_compile.passes.evidence.gate_scores import gate_scores
from sere_compile.passes.fill_dispatch import _closes_with_zero, fill_dispatch
from sere_compile.passes.graph import nodes

from .. import tiny_models
from ..ops import fill_oracle
from . import moe_modules
from .graph.written import Written
from .test_find_gates import Model

FILL = {"select_top_k": 1, "substitution": "fill", "inner": "eager"}


def compiled(model: nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=sere_compile.sere_backend.with_options(**{**FILL, **options}))


def routed_by_oracle(block: moe_modules.Block, x: torch.Tensor, select: int, **options) -> torch.Tensor:
    """A block's output when the plain-Python oracle fills its slots."""
    block.ranked, before = True, getattr(block, "ranked", None)
    ids, weights = block.route(x)
    block.ranked = before
    scores = block.scores(x)
    choice = scores + block.bias if isinstance(block, moe_modules.BiasCorrected) else scores
    rows = fill_oracle.fill_rows(
        ids.tolist(), weights.double().tolist(), scores.double().tolist(), select, choice=choice.double().tolist(),
        **options,
    )  # fmt: skip
    return moe_modules.weighted_sum(block, x, torch.tensor(rows[0]), torch.tensor(rows[1]).to(x))


class InPlace(moe_modules.Indexed):
    """The last of what makes its scores is done in place."""

    def scores(self, x):
        return super().scores(x).add_(0.01)


class Sequences(moe_modules.Indexed):
    """Its ids are [B, T, K], and so are the rows of its scores."""

    def forward(self, x):
        several = x.view(2, -1, x.shape[-1])
        ids, weights = self.route(several)
        y = torch.tanh(several[:, :, None, None, :] @ self.experts[ids]).squeeze(3)
        return (y * weights[..., None]).sum(2).view(x.shape)


KINDS = [
    moe_modules.Indexed, moe_modules.Grouped, moe_modules.ScatterCombine, moe_modules.OneHotMask,
    moe_modules.IndexPut, moe_modules.SlotTable,
]  # fmt: skip


@pytest.mark.parametrize(
    "kind", [*KINDS, moe_modules.BiasCorrected, InPlace, Sequences], ids=lambda kind: kind.__name__
)
def test_blocks_equal_the_oracle(kind):
    """Every way of dispatching, also those that are wrong when a token names an expert twice; a biased selection."""
    torch.manual_seed(0)
    block, x = kind().eval(), moe_modules.rows()
    with torch.no_grad():
        torch.testing.assert_close(compiled(block)(x), routed_by_oracle(block, x, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ids_stay_distinct_so_nothing_is_merged(kind):
    """Where re-routing needs merged slots, filling dispatches plain ids."""
    graph = moe_modules.from_export(kind().eval(), moe_modules.rows())
    filled = sere_compile.rewrite(graph, config=SereConfig(select_top_k=1, substitution="fill"))
    names = [str(node.target) for node in filled.graph.nodes if "sere" in str(node.target)]
    assert names == ["sere.fill.default"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_models(name):
    """No matrix is probed, a batch of one and S = K change no bit, and slots do change."""
    model = tiny_models.build(name)
    tokens = tiny_models.tokens(batch=3, length=1)
    with torch.no_grad():
        usual = model(tokens).logits
        run = compiled(model, collect_stats=True)
        assert not torch.equal(run(tokens).logits, usual)
        counted = sere_compile.stats(run)
        assert any(row.slots_changed for row in counted.values())
        assert all(row.active_after <= row.active_before for row in counted.values())
        one = tokens[:1, :1]
        assert torch.equal(compiled(model)(one).logits, model(one).logits)
        top_k = model.config.num_experts_per_tok
        assert torch.equal(compiled(model, select_top_k=top_k)(tokens).logits, usual)
    report = sere_compile.explain(model, tokens, config=SereConfig(select_top_k=1, substitution="fill"))
    assert all((row.substitution, row.similarity) == ("fill", "") for row in report.rewritten)


def test_fused_router_fills_in_its_own_operator():
    """With the router fused the numbers are those of the operator behind it."""
    model, tokens = tiny_models.build("qwen3_moe"), tiny_models.tokens(batch=2, length=4)
    with torch.no_grad():
        apart = compiled(model, fuse_router=False)(tokens).logits
        torch.testing.assert_close(compiled(model, fuse_router="always")(tokens).logits, apart, rtol=1e-4, atol=1e-4)


class Returning(moe_modules.Indexed):
    """Its caller gets the ids as well."""

    def route(self, x):
        self.chosen, weights = super().route(x)
        return self.chosen, weights

    def forward(self, x):
        return super().forward(x), self.chosen


def test_a_fused_router_keeps_its_ids_for_others():
    """They see what the router chose; the dispatch is filled by the operator once more."""
    torch.manual_seed(0)
    block, x = Returning().eval(), moe_modules.rows()
    with torch.no_grad():
        _, ids = block(x)
        got, seen = compiled(block, fuse_router="always", lower_experts=False)(x)
        torch.testing.assert_close(got, routed_by_oracle(block, x, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(seen, ids)


class Overwrites(moe_modules.Indexed):
    """Its scores are gone when the dispatch begins."""

    def route(self, x):
        scores = self.scores(x)
        weights, ids = scores.topk(moe_modules.TOP_K, dim=-1)
        scores.zero_()
        return ids, weights / weights.sum(-1, keepdim=True)


def test_falls_back_to_re_routing_and_says_so(caplog):
    """The report has the reason; strict raises it."""
    block, x = Overwrites().eval(), moe_modules.rows()
    config = SereConfig(select_top_k=1, substitution="fill")
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        report = sere_compile.explain(block, x, config=config)
        (row,) = report.rewritten
        assert row.substitution == "reroute"
        assert "not filled" in row.reason
        assert "overwrites them" in row.reason
        torch._dynamo.reset()
        compiled(block)(x)
        assert "re-routed, not filled" in caplog.text
        with pytest.raises(BackendCompilerFailed, match="cannot be filled"):
            compiled(block, strict=True)(x)


def test_scores_that_are_gone_are_a_refusal_of_a_gate():
    """Something is known of it; the graph stays as it was."""
    graph = moe_modules.from_dynamo(Overwrites(), moe_modules.rows())
    gate, before = moe_modules.one_gate(graph), str(graph.graph)
    skip = fill_dispatch(gate, RoutingSettings(1))
    assert (skip.reason, skip.evidence, nodes.kind(skip.node)) == (SkipReason.NO_SCORES, Evidence.EXPERTS, "zero")
    assert skip.is_refused_gate
    assert str(graph.graph) == before


@pytest.mark.parametrize("known", [True, False])
def test_weights_that_nobody_knows_are_no_weights_to_fill(known):
    """The refusal is what was found of them, else that there are none."""
    graph = moe_modules.from_export(moe_modules.Indexed(), moe_modules.rows())
    gate, before = moe_modules.one_gate(graph), str(graph.graph)
    why = Skip(SkipReason.BENT_WEIGHTS, gate.selection, "for once") if known else None
    skip = fill_dispatch(dataclasses.replace(gate, weights=None, weights_skip=why), RoutingSettings(1))
    if known:
        assert skip == dataclasses.replace(why, evidence=Evidence.EXPERTS)
    else:
        assert (skip.reason, skip.node, skip.detail) == (SkipReason.NO_WEIGHTS, gate.ids, nodes.place(gate.ids))
    assert skip.is_refused_gate
    assert str(graph.graph) == before


@pytest.mark.parametrize("other", ["choice", "worth"])
def test_scores_of_other_rows_fill_nothing(other, monkeypatch):
    """Each row of ids is filled by a row of scores."""
    graph = moe_modules.from_export(moe_modules.Indexed(), moe_modules.rows())
    gate = moe_modules.one_gate(graph)
    found = gate_scores(gate)
    more = next(node for node in graph.graph.nodes if len(nodes.shape(node) or ()) == 3)
    changed = dataclasses.replace(found, **{other: more})
    monkeypatch.setattr("sere_compile.passes.fill_dispatch.gate_scores", lambda gate: changed)
    before = str(graph.graph)
    skip = fill_dispatch(gate, RoutingSettings(1))
    assert (skip.reason, skip.node, skip.evidence) == (SkipReason.NO_SCORES, more, Evidence.EXPERTS)
    assert skip.detail == f"{more.name} has other rows than its ids"
    assert str(graph.graph) == before


def test_a_selection_without_scores_fills_nothing(monkeypatch):
    graph = moe_modules.from_export(moe_modules.Indexed(), moe_modules.rows())
    gate = moe_modules.one_gate(graph)
    monkeypatch.setattr("sere_compile.passes.fill_dispatch.gate_scores", lambda gate: None)
    skip = fill_dispatch(gate, RoutingSettings(1))
    assert (skip.reason, skip.node, skip.evidence) == (SkipReason.NO_SCORES, gate.selection, Evidence.EXPERTS)
    assert skip.detail == "its selection reads no one tensor of them"


@pytest.mark.parametrize(
    ("write", "closes"),
    [
        (lambda w, x, mask: w.call("masked_fill", x, mask, 0.0), True),
        (lambda w, x, mask: w.call("masked_fill", x, mask, value=0), True),
        (lambda w, x, mask: w.call(torch.where, mask, x, 0.0), True),
        (lambda w, x, mask: w.call("masked_fill", x, mask, float("-inf")), False),
        (lambda w, x, mask: w.call("masked_fill", x, mask, False), False),
        (lambda w, x, mask: w.call(torch.where, mask, x, x), False),
        (lambda w, x, mask: w.call(torch.mul, x, 0), False),
    ],
    ids=["zeros", "by keyword", "where", "closed", "no number", "no numbers", "a product"],
)
def test_masks_that_put_zeros(write, closes):
    w = Written()
    assert _closes_with_zero(write(w, w.given(4, 8), w.input(torch.ones(4, 8) > 0))) is closes


def test_exports_fill_without_a_profile():
    """The program decomposes to plain ATen, without a scatter, and gives the same numbers."""
    model, x = moe_modules.Indexed().eval(), moe_modules.rows()
    program = torch.export.export(model, (x,), strict=False)
    filled = sere_compile.rewrite(program, config=SereConfig(select_top_k=1, substitution="fill"))
    plain = decompose(filled)
    assert not sere_nodes(plain)
    added = {str(n.target) for n in plain.graph.nodes} - {str(n.target) for n in program.graph.nodes}
    assert not [name for name in added if "scatter" in name or "cumsum" in name or "sort" in name]
    with torch.no_grad():
        torch.testing.assert_close(plain.module()(x), routed_by_oracle(model, x, 1), rtol=1e-4, atol=1e-5)


def test_a_share_of_similarities_is_no_threshold_here():
    """The message says what to give instead."""
    with pytest.raises(ConfigError, match='substitution="fill" has none'):
        SereConfig(substitution="fill", threshold="q0.2")


def written_gate(choose, half=False):
    """A gate written by hand, in a graph; `choose(w, logits)` gives what is selected from, ids, and weights."""
    w = Model()
    if half:
        w.x = w.call("half", w.x)
    logits = w.call(nn.functional.linear, w.x, w.input(nn.Parameter(torch.rand(8, 6).to(w.x.meta["example_value"]))))
    choice, ids, weights = choose(w, logits)
    rows = w.call("view", w.x, 4, 1, 1, 6)
    experts = w.input(nn.Parameter(torch.rand(8, 6, 6).to(w.x.meta["example_value"])))
    y = w.call("squeeze", w.call(torch.matmul, rows, w.pick(experts, ids)), 2)
    found = w.find(w.call(torch.sum, w.mul(y, w.column(weights)), 1))
    assert len(found.gates) == 1, found.skips
    return w, found.gates[0], choice, logits


def of_softmax(w, logits):
    scores = w.call(torch.softmax, logits, -1)
    values, ids = w.top_k(scores, 2)
    return scores, ids, values


def of_logits(w, logits):
    values, ids = w.top_k(logits, 2)
    return logits, ids, w.call(torch.softmax, values, -1)


def biased(w, logits):
    scores = w.call(torch.sigmoid, logits)
    choice = w.call(torch.add, scores, w.weight(8))
    _, ids = w.top_k(choice, 2)
    return choice, ids, w.call(torch.gather, scores, 1, ids)


def in_groups(number):
    def choose(w, logits):
        scores = w.call(torch.softmax, logits, -1)
        choice = w.call("masked_fill", scores, w.input(torch.arange(32).view(4, 8) % 3 == 0), number)
        values, ids = w.top_k(choice, 2)
        return choice, ids, values

    return choose


def filled_by(choose, settings=None, **how):
    """The only operator that fills, what it was given, and the gate."""
    w, gate, choice, logits = written_gate(choose, **how)
    done = fill_dispatch(gate, settings or RoutingSettings(1))
    assert not isinstance(done, Skip), done
    [node] = [n for n in w.graph.nodes if nodes.kind(n) == "sere.fill"]
    w.graph.lint()
    return node, gate, choice, logits, done


class TestByHand:
    def test_probabilities_rank_and_weigh(self):
        node, gate, choice, _, done = filled_by(of_softmax, RoutingSettings(1, 0.25, 3))
        assert node.args == (gate.ids, gate.weights, choice, 1, 0.25, 3)
        assert node.kwargs == {}
        assert (done.gate, done.merged, done.filled) == (gate, False, True)
        assert done.new_ids.args == (node, 0)
        ids, weights = nodes.value(node)
        assert (ids.shape, weights.shape) == ((4, 2), (4, 2))
        assert nodes.value(done.new_ids).dtype == torch.int64
        [new_weights] = [user for user in node.users if user.args[1] == 1]
        assert nodes.value(new_weights).dtype == torch.float32

    def test_a_budget_is_an_option(self):
        assert filled_by(of_softmax, RoutingSettings(1, max_active=5))[0].kwargs == {"max_active": 5}

    def test_the_dispatch_reads_what_was_filled(self):
        node, gate, _, _, done = filled_by(of_softmax)
        [weights] = [user for user in node.users if user.args[1] == 1]
        assert [nodes.kind(user) for user in done.new_ids.users] == ["index"]
        assert [nodes.kind(user) for user in weights.users] == ["unsqueeze"]
        assert list(gate.ids.users) == list(gate.weights.users) == [node]

    @pytest.mark.parametrize("half", [False, True])
    def test_logits_are_worth_their_softmax(self, half):
        node, _, choice, logits, _ = filled_by(of_logits, half=half)
        assert choice is logits
        worth = node.args[2]
        assert (worth.target, worth.args) == (torch.ops.aten.softmax.int, (logits, -1, torch.float32))
        assert nodes.value(worth).dtype == torch.float32
        assert nodes.shape(worth) == (4, 8)
        assert node.kwargs == {"choice": logits}

    def test_a_bias_ranks_alone(self):
        node, _, choice, _, _ = filled_by(biased)
        assert nodes.kind(node.args[2]) == "sigmoid"
        assert node.kwargs == {"choice": choice}

    def test_zeros_outside_of_groups_are_closed(self):
        node, _, choice, _, _ = filled_by(in_groups(0.0))
        ranking = node.kwargs["choice"]
        assert ranking.target is torch.ops.aten.masked_fill.Scalar
        assert (ranking.args[0], ranking.args[2]) == (choice, float("-inf"))
        closed = ranking.args[1]
        assert (closed.target, closed.args) == (torch.ops.aten.eq.Scalar, (choice, 0))
        assert nodes.value(closed).dtype == torch.bool
        assert nodes.value(ranking).dtype == torch.float32
        assert node.args[2] is choice
        assert filled_by(in_groups(float("-inf")))[0].kwargs == {}

    def test_scores_that_are_overwritten_later(self):
        """What overwrites them first is named; a write in front of the selection is what they are."""

        def overwritten(w, logits):
            scores = w.call(torch.softmax, logits, -1)
            scores = w.call("add_", scores, 0.1)
            values, ids = w.top_k(scores, 2)
            w.call("mul_", w.call("view", scores, -1), 2)
            w.call("zero_", scores)
            return scores, ids, values

        _, gate, _, _ = written_gate(overwritten)
        skip = fill_dispatch(gate, RoutingSettings(1))
        assert (skip.reason, skip.detail, skip.node.name) == (SkipReason.NO_SCORES, "mul_ overwrites them", "mul_")

    def test_only_some_readers_of_the_weights(self):
        w, gate, _, _ = written_gate(of_softmax)
        fill_dispatch(gate, RoutingSettings(1), readers=())
        [node] = [n for n in w.graph.nodes if nodes.kind(n) == "sere.fill"]
        assert [nodes.kind(user) for user in gate.weights.users if user is not node] == ["unsqueeze"]

    def test_behind_a_fused_router_it_routes_once_more(self):
        """Others read the ids as they were: its own operator stays as it is."""
        w = Model()
        logits = w.call(nn.functional.linear, w.x, w.weight(8, 6))
        route = w.call(torch.ops.sere.route.default, logits, None, 2, "softmax", True)
        weights, ids = w.pick(route, 0), w.pick(route, 1)
        y = w.mul(w.outputs(ids), w.column(weights))
        w.give(y, beside := w.call(torch.neg, ids))
        [fetched] = [user for user in ids.users if user is not beside]
        uses = Use(fetched, ids, UseKind.EXPERT_INDEX), Use(beside, ids, UseKind.STATISTIC)
        gate = Gate(
            route, ids, weights, w.x, w.x, 8, 2, "softmax", True, uses, weights=weights, form="top-k", all_ids=(ids,)
        )
        before = route.args, dict(route.kwargs)
        done = fill_dispatch(gate, RoutingSettings(1, 0.5, 2, 3))
        [other] = [node for node in w.graph.nodes if nodes.kind(node) == "sere.route" and node is not route]
        assert (route.args, dict(route.kwargs)) == before
        schema = [argument.name for argument in route.target._schema.arguments]
        told = {**dict(zip(schema, other.args, strict=False)), **other.kwargs}
        assert told == {
            "logits": logits, "bias": None, "top_k": 2, "scoring": "softmax", "renormalize": True, "fill": True,
            "select_top_k": 1, "threshold": 0.5, "min_active": 2, "max_active": 3,
        }  # fmt: skip
        assert done.new_ids.args == (other, 1)
        assert nodes.value(done.new_ids) is nodes.value(ids)
        assert list(done.new_ids.users) == [fetched]
        [new_weights] = [user for user in other.users if user is not done.new_ids]
        assert new_weights.args == (other, 0)
        assert [nodes.kind(user) for user in new_weights.users] == ["unsqueeze"]
        assert nodes.operand(beside) is ids
        assert done.filled
