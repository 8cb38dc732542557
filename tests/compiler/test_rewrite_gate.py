"""What `strict=True` proves of real models, and what it refuses."""

import pytest
import torch

import sere_compile
from sere_compile import SereConfig, sere_backend
from sere_compile.passes.verify_rewrite import SHOWN

from ..compiled import logits
from ..passes.moe_modules import ScatterCombine, expected, rows, similarity
from ..tiny_models import IMPLEMENTATIONS, MODELS, build, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TestVerification:
    """strict=True runs each gate at compile time, as traced and re-routed."""

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    @pytest.mark.parametrize("name", MODELS)
    def test_right_rewrites_are_proven(self, name, experts):
        """Every experts implementation passes, and computes what it computes without the proof."""
        model, ids = build(name, experts), tokens()
        sere_compile.attach(model, random_profile(model))
        results = []
        for strict in (True, False):
            torch._dynamo.reset()
            backend = sere_backend.with_options(select_top_k=1, inner="eager", strict=strict)
            results.append(logits(torch.compile(model, backend=backend), ids))
        assert torch.equal(*results)

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_report_says_what_was_proven(self, experts):
        """Inside a graph the definition; of a loop outside it what leaves, and the experts run for themselves."""
        config = SereConfig(select_top_k=1, strict=True)
        report = sere_compile.explain(build("qwen3_moe", experts), tokens(), use_cache=False, config=config)
        outside = "what the traced code makes of merged ids and weights; the experts outside the graph sum them"
        assert {row.proof for row in report.rewritten} == {outside if experts == "eager" else SHOWN}
        assert "proven" in str(report)

    def test_experts_outside_that_do_not_sum_are_refused(self, monkeypatch):
        """An experts module that forgets a token's last slot: a report row, and an error in a compiled model."""
        model, ids = build("qwen3_moe", "eager"), tokens()
        experts = type(model.model.layers[0].mlp.experts)
        forward = experts.forward
        monkeypatch.setattr(
            experts,
            "forward",
            lambda self, hidden_states, top_k_index, top_k_weights: forward(
                self, hidden_states, top_k_index[:, :-1], top_k_weights[:, :-1]
            ),
        )
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=1, strict=True))
        assert {row.status for row in report} == {"skipped"}
        assert "from the sum over experts" in report.rows[0].reason
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager", strict=True))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="from the sum over experts"):
            logits(compiled, ids)

    def test_a_wrong_rule_is_put_right(self, monkeypatch):
        """A dispatch that loses a slot is taken for one that sums both: it is merged all the same."""
        monkeypatch.setattr("sere_compile.passes.gate.UseKind.sums_duplicates", property(lambda kind: True))
        block = ScatterCombine()
        matrix = similarity()
        matrix = (matrix + matrix.T) / 2
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": matrix}))
        options = {"select_top_k": 1, "inner": "eager", "min_active": 0}
        with torch.no_grad():
            got = torch.compile(block, backend="sere", options=options)(rows())
            torch.testing.assert_close(got, expected(block, rows(), matrix.fill_diagonal_(1.0), 1))
