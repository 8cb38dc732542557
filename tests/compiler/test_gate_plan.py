"""A gate that cannot be re-routed is left alone with its reason."""

import logging

import pytest
import torch
from torch import nn

from sere_compile import sere_backend

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
