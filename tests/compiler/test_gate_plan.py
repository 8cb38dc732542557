"""A gate that cannot be re-routed is left alone with its reason."""

import logging

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import sere_backend
from sere_compile.compiler.gate_plan import experts_are_live
from sere_compile.experts.owner import Owners

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
