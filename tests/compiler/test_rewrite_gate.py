"""What is proven of real models before they are re-routed, and what is refused."""

import types

import pytest
import torch

import sere_compile
from sere_compile import SereConfig, sere_backend
from sere_compile.compiler import rewrite_gate
from sere_compile.passes.verify_rewrite import SHOWN

from ..compiled import logits
from ..passes.moe_modules import Indexed, ScatterCombine, expected, rows, similarity
from ..passes.test_check_savings import Returning, by_table
from ..tiny_models import EAGER_SLOW, PAIRS, build, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TestVerification:
    """Each gate is run at compile time, as traced and re-routed."""

    @pytest.mark.parametrize(("name", "experts"), PAIRS)
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

    @pytest.mark.parametrize("experts", EAGER_SLOW)
    def test_report_says_what_was_proven(self, experts):
        """Inside a graph the definition; of a loop outside it too, by running that."""
        config = SereConfig(select_top_k=1)
        report = sere_compile.explain(build("qwen3_moe", experts), tokens(), use_cache=False, config=config)
        outside = f"{SHOWN}; the code outside the graph was run"
        assert {row.proof for row in report.rewritten} == {outside if experts == "eager" else SHOWN}
        assert "proven" in str(report)

    @pytest.mark.slow
    def test_experts_outside_that_no_rewrite_serves_are_refused(self, monkeypatch):
        """The mean of a token's distinct experts: a report row, and with strict=True an error."""
        model, ids = build("qwen3_moe", "eager"), tokens()
        experts = type(model.model.layers[0].mlp.experts)
        forward = experts.forward

        def mean_of_distinct(self, hidden_states, top_k_index, top_k_weights):
            again = (top_k_index[..., None] == top_k_index[..., None, :]).tril(-1).any(-1)
            share = (~again).to(top_k_weights)
            return forward(self, hidden_states, top_k_index, share / share.sum(-1, keepdim=True))

        monkeypatch.setattr(experts, "forward", mean_of_distinct)
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=1))
        assert {row.status for row in report} == {"skipped"}
        assert "run with the code that receives its ids" in report.rows[0].reason
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager", strict=True))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="run with the code that receives its ids"):
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


class InsideActivation(Indexed):
    """Weights inside the activation: new ids are right, and no coefficient may be multiplied to the weights."""

    def dispatch(self, x, ids, weights):
        made = (x[:, None, None, :] @ self.experts[ids]).squeeze(2)
        return torch.tanh(made * weights[..., None]).sum(1)


@pytest.mark.parametrize(("block", "proven"), [(InsideActivation, False), (Indexed, True)])
def test_what_is_refused_is_not_called_proven(block, proven, caplog):
    """With projections the weights change as well: that new ids alone were proven is no news of a refused gate."""
    model, config = block(), SereConfig(select_top_k=1, min_active=0, substitution="projection", inner="eager")
    matrix = similarity()
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    sere_compile.attach(model, sere_compile.SimilarityProfile({"router": matrix}, projections={"router": matrix}))
    with caplog.at_level("INFO", logger="sere_compile"), torch.no_grad():
        torch.compile(model, backend=sere_compile.SereBackend(config))(rows())
    assert ("is not re-routed" in caplog.text) != proven
    assert ("proven:" in caplog.text) == proven


def test_other_weights_in_a_functional_call_are_not_re_routed_in_silence(caplog):
    """The profile belongs to the model's own router weight, and the call brings another one."""
    model, x = ScatterCombine(), rows()
    matrix = similarity()
    sere_compile.attach(model, sere_compile.SimilarityProfile({"router": (matrix + matrix.T) / 2}))
    others = {name: torch.randn_like(value) for name, value in model.named_parameters()}

    def call(x):
        return torch.func.functional_call(model, others, (x,))

    backend = sere_backend.with_options(select_top_k=1, min_active=0, inner="eager")
    with torch.no_grad(), caplog.at_level("WARNING"):
        got = torch.compile(call, backend=backend)(x)
    assert torch.equal(got, call(x))
    assert any("is not re-routed" in record.message for record in caplog.records)


class TestWords:
    """What a report says of the passes for speed."""

    @pytest.mark.parametrize(
        ("done", "refused", "said"),
        [
            ((), {}, ""),
            (("fuse_experts",), {}, "experts"),
            (("verify_rewrite", "fuse_experts", "fuse_router", "fuse_reroute"), {}, "experts and routing"),
            (("fuse_router",), {"fuse_experts": "why"}, "routing; stock experts: why"),
            (
                (),
                {"fuse_experts": "why", "fuse_router": "so", "fuse_reroute": "no"},
                "stock experts: why; stock routing: so",
            ),
        ],
        ids=str,
    )
    def test_kernels(self, done, refused, said):
        assert rewrite_gate._kernels(types.SimpleNamespace(done=done, refused=refused)) == said


class TestSavings:
    """Where every expert computes every token, re-routing is right, and saves nothing."""

    def test_it_is_told(self, caplog):
        """In the report and the log; S = K is still the model's own."""
        block, x = Returning(by_table), rows()
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": symmetric()}))
        [row] = sere_compile.explain(block, x, config=SereConfig(select_top_k=1, min_active=0))
        assert (row.status, row.reason.split(",")[0]) == ("rewritten", "every expert computes every token")
        assert "WARNING" in caplog.text
        assert "is re-routed, but every expert computes every token" in caplog.text

    def test_nothing_is_told_of_others(self, caplog):
        block, x = Indexed(), rows()
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": symmetric()}))
        [row] = sere_compile.explain(block, x, config=SereConfig(select_top_k=1, min_active=0))
        assert (row.status, row.reason) == ("rewritten", "")
        assert "every expert" not in caplog.text


def symmetric():
    return ((similarity() + similarity().T) / 2).fill_diagonal_(1.0)
