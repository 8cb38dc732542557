"""A gate that cannot be re-routed is left alone with its reason."""

import logging
import types

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SereConfig, sere_backend
from sere_compile.compiler.gate_plan import GatePlan, experts_are_live, without_look_alikes
from sere_compile.experts.owner import Owners
from sere_compile.passes import Evidence, Findings, Skip, SkipReason
from sere_compile.passes.graph import nodes
from sere_compile.report import SKIPPED
from sere_compile.similarity import binding

from ..passes.graph.written import Written
from ..passes.moe_modules import Indexed, rows

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Unweighted(nn.Module):
    """Experts summed without routing weights over a mask: re-routing would have nothing to merge duplicates in."""

    def __init__(self, hidden=6, experts=5):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.Parameter(torch.randn(experts, hidden, hidden))

    def forward(self, x):
        scores = self.router(x)
        mask = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1.0)
        return torch.einsum("te,th,ehd->td", mask, x, self.experts)


class TestRefusedGate:
    def test_is_left_alone_with_a_warning(self, caplog):
        """A gate that cannot be re-routed safely is named with the reason, and computes what it did."""
        model, x = Unweighted(), torch.randn(8, 6)
        with caplog.at_level(logging.WARNING), torch.no_grad():
            got = torch.compile(model, backend="sere", options={"inner": "eager"})(x)
        assert torch.equal(got, model(x))
        [message] = [r.message for r in caplog.records if "not re-routed" in r.message]
        assert message.startswith("router.weight is not re-routed: its dispatch needs merged duplicates")

    def test_strict_raises(self):
        """strict=True does not let a refused gate pass."""
        compiled = torch.compile(Unweighted(), backend="sere", options={"inner": "eager", "strict": True})
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"router\.weight cannot be"):
            compiled(torch.randn(8, 6))


def test_a_first_call_without_tokens_has_nothing_to_re_route(caplog):
    """Neither a warning nor, with strict=True, an error; the next call re-routes."""
    model, x = Indexed(), rows()
    backend = sere_backend.with_options(select_top_k=1, min_active=0, inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert torch.equal(compiled(x[:0]), model(x[:0]))
        assert not caplog.records
        assert not torch.equal(compiled(x), model(x))


class SharedRouter(nn.Module):
    """One router, read twice, and experts behind each reading: two sets of them, or one."""

    def __init__(self, sets, hidden=6, experts=5):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ParameterList(torch.randn(experts, hidden, hidden) for _ in range(sets))

    def forward(self, x):
        for turn in range(2):
            weights, ids = self.router(x).softmax(-1).topk(3)
            chosen = self.experts[turn % len(self.experts)][ids]
            x = torch.tanh(torch.einsum("th,tkhd,tk->td", x, chosen, weights))
        return x


@pytest.mark.parametrize("sets", [1, 2])
def test_a_router_of_two_sets_of_experts_is_refused(sets, caplog):
    """One matrix cannot describe both; of one set read twice it does."""
    model, x = SharedRouter(sets), torch.randn(8, 6)
    compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, min_active=0, inner="eager"))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got = compiled(x)
    told = [r.message for r in caplog.records if r.message.startswith("router.weight is not re-routed")]
    assert len(told) == (2 if sets == 2 else 0)
    assert torch.equal(got, model(x)) == (sets == 2)


def test_evidence_of_experts_that_no_graph_shows():
    """Experts beside the router count, else an attached matrix; what is no tensor of the model is none."""
    model = SharedRouter(1)
    weight = model.router.weight

    def seen(value, columns=5):
        return experts_are_live(lambda node: value, Owners())(None, columns)

    assert (seen(weight), seen(weight, 4), seen(7)) == (5, 0, 0)
    alone = nn.Linear(6, 5, bias=False)
    assert seen(alone.weight) == 0
    sere_compile.attach(alone, sere_compile.SimilarityProfile({"weight": torch.eye(5)}))
    assert (seen(alone.weight), seen(alone.weight, 4)) == (5, 4)


def plan_of(ids=(4, 3), top_k=3, **options):
    """A plan by hand for ids of some sizes."""
    w = Written()
    known = None if ids is None else torch.zeros(ids, dtype=torch.int64)
    gate = types.SimpleNamespace(top_k=top_k, ids=w.input(known))
    config = SereConfig().replace(**options)
    return GatePlan(gate, "router.weight", config, config, region=None, constant=torch.ones(1))


class TestDecide:
    """What there is to re-route, before anything is looked at."""

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ({"select_top_k": 1, "min_active": 0}, ""),
            ({"select_top_k": 3, "min_active": 0}, "S = 3: nothing to re-route"),
            (
                {"select_top_k": 5, "min_active": 0},
                "select_top_k=5 is more than K = 3: every expert of a token stays, nothing is re-routed",
            ),
            ({"select_top_k": 1, "min_active": 0, "ids": (0, 3)}, "no tokens: nothing to re-route"),
            ({"select_top_k": 1, "min_active": 0, "max_tokens": 2}, "more than max_tokens = 2 tokens"),
            ({"select_top_k": 1, "min_active": 0, "max_tokens": 4}, ""),
            ({"select_top_k": 1, "min_active": 0, "ids": None}, ""),
        ],
        ids=str,
    )
    def test_reasons(self, given, reason):
        plan = plan_of(**given)
        plan.decide(lambda gate, limit: nodes.shape(gate.ids)[0] > limit)
        assert plan.reason == reason
        assert plan.is_to_reroute is (reason == "")

    def test_a_batch_is_asked_for_its_size_only_where_there_is_a_limit(self):
        asked = []
        plan_of(select_top_k=1, min_active=0).decide(lambda gate, limit: asked.append(limit) or False)
        assert asked == []
        plan_of(select_top_k=1, min_active=0, max_tokens=9).decide(lambda gate, limit: asked.append(limit) or False)
        assert asked == [9]

    def test_a_refusal(self):
        plan = plan_of(select_top_k=1)
        assert plan.is_to_reroute
        skip = Skip(SkipReason.SHARED_ROUTER, None)
        plan.refuse(skip)
        assert (plan.status, plan.refusal, plan.reason, plan.is_to_reroute) == (SKIPPED, skip, str(skip), False)
        plan = plan_of(select_top_k=1)
        plan.status = SKIPPED
        assert not plan.is_to_reroute

    def test_settings(self):
        settings = plan_of(select_top_k=2, threshold=0.25, min_active=4).settings
        assert (settings.select_top_k, settings.min_active, settings.max_active) == (2, 4, 0)
        assert settings.threshold == pytest.approx(0.25, abs=1e-6)
        assert plan_of(select_top_k="auto", max_active=7).settings.max_active == 7

    def test_the_weight_of_a_call(self):
        plan = plan_of()
        assert plan.weight(["a", "b"]) is plan.constant
        plan.position = 0
        assert plan.weight(["a", "b"]) == "a"


def test_look_alikes_are_no_gates():
    """A refusal that is none of a gate goes to the selections that were skipped."""
    plans = [plan_of(select_top_k=1) for _ in range(3)]
    node = Written().given(2)
    plans[1].refuse(Skip(SkipReason.SHARED_ROUTER, node, evidence=Evidence.EXPERTS))
    plans[2].refuse(Skip(SkipReason.NO_DISPATCH, node, evidence=Evidence.IDS))
    assert plans[1].refusal.is_refused_gate
    assert not plans[2].refusal.is_refused_gate
    before = Skip(SkipReason.NO_ROUTER, node)
    gates, findings = without_look_alikes(plans, Findings((), (before,)))
    assert gates == plans[:2]
    assert findings.skips == (before, plans[2].refusal)


def test_a_matrix_that_was_probed_is_no_evidence():
    """Only one that a profile gave says how many experts there are."""
    alone = nn.Linear(6, 5, bias=False)
    binding.assign(alone.weight, "weight", torch.eye(5), "probed", from_profile=False)
    assert experts_are_live(lambda node: alone.weight, Owners())(None, 5) == 0
    binding.assign(alone.weight, "weight", torch.eye(5), "a file")
    assert experts_are_live(lambda node: alone.weight, Owners())(None, 7) == 5
