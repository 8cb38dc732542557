"""`explain` on models, compiled or not."""

import copy

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import SereConfig, SimilarityProfile, sere_backend

from .compiled import Dense, logits, oracle_logits
from .tiny_models import build, gate_names, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Normalised(nn.Module):
    """Counts its calls, and has a norm ahead of the router."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False)
        self.stack = nn.Parameter(torch.randn(4, 8, 8))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        x = self.norm(x)
        weights, ids = self.gate(x).softmax(-1).topk(2)
        return (torch.einsum("th,tkhf->tkf", x, self.stack[ids]) * weights[..., None]).sum(1)


class TestExplain:
    def test_changes_nothing_and_probes_nothing(self):
        """`explain` runs the original model and measures no similarity."""
        model, ids = build("mixtral"), tokens()
        before = logits(model, ids)
        sere_compile.explain(model, ids, use_cache=False)
        assert sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[0])).matrix is None
        assert torch.equal(logits(model, ids), before)

    @pytest.mark.parametrize("capture", ["default", "auto"])
    def test_leaves_nothing_in_the_model(self, capture):
        """Neither statistics of a norm in training mode, nor a count in a list."""
        model = Normalised().train()
        report = sere_compile.explain(model, torch.randn(6, 8) + 1, config=SereConfig(capture=capture))
        assert [row.status for row in report] == ["rewritten"]
        assert not model.norm.running_mean.any()
        assert torch.equal(model.norm.running_var, torch.ones(8))
        assert (int(model.norm.num_batches_tracked), model.calls) == (0, [])

    def test_identity_and_skips_have_reasons(self):
        """S = K is reported as identity; a selection that is no gate as skipped, with its line."""
        model, ids = build("mixtral"), tokens()
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=2))
        assert [row.status for row in report] == ["identity"] * 2
        dense = sere_compile.explain(Dense(), torch.randn(2, 8))
        assert "0 MoE gates found" in str(dense)
        assert "compiled.py" in dense.rows[0].name
        assert dense.rows[0].status == "skipped"

    def test_leaves_the_recompile_limit_to_the_user(self):
        """Explaining many times does not use up the recompiles that the user's own compile is allowed."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        for _ in range(12):
            assert len(sere_compile.explain(model, ids, use_cache=False).rewritten) == 2
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        expected = oracle_logits(model, profile, ids, 1)
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_works_on_a_model_compiled_in_place(self):
        """`model.compile()` does not hide the model from `explain`, and stays in force afterwards."""
        model, ids = build("mixtral"), tokens()
        model.compile(backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        logits(model, ids)
        assert len(sere_compile.explain(model, ids, use_cache=False).rewritten) == 2
        assert model._compiled_call_impl is not None

    def test_works_on_a_compiled_model(self):
        """A model that is compiled already is explained all the same."""
        model, ids = build("mixtral"), tokens()
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "eager"})
        logits(compiled, ids)
        assert len(sere_compile.explain(compiled, ids, use_cache=False).rewritten) == 2


@pytest.mark.parametrize("select", [1, 2])
@pytest.mark.parametrize("how", ["torch.compile", "sere_compile.compile", "rewrite"])
def test_statistics_are_those_of_one_call(how, select):
    """Whatever is tried and proven on the way."""
    torch.manual_seed(0)
    model, x = Normalised().train(), torch.randn(6, 8) + 1
    other = copy.deepcopy(model)
    matrix = torch.rand(4, 4)
    profile = SimilarityProfile({"gate.weight": (matrix + matrix.T) / 2})
    sere_compile.attach(model, profile)
    options = {"select_top_k": select, "min_active": 0}
    if how == "rewrite":
        program = torch.export.export(model, (x,))
        sere_compile.rewrite(program, profile=profile, config=SereConfig(**options))
    else:
        compiled = (
            torch.compile(model, backend=sere_backend.with_options(inner="eager", **options))
            if how == "torch.compile"
            else sere_compile.compile(model, inner="eager", **options)
        )
        compiled(x), other(x)
    after, wanted = dict(model.named_buffers()), dict(other.named_buffers())
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


class Wrapped(nn.Module):
    """Code that several modules share, as decorators of transformers are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def recompile_limit_hit():
    """Dynamo has compiled `Wrapped.forward` as often as it may, and for one module more."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for module in (nn.ReLU(), nn.Tanh(), nn.Sigmoid()):
            torch.compile(Wrapped(module), backend="eager")(torch.ones(2))
    yield
    torch._dynamo.reset()
    counters.clear()


def test_a_recompile_limit_that_was_hit_is_named(recompile_limit_hit):
    """What was compiled too often is no graph any more, and no reason to doubt that the model is an MoE."""
    report = sere_compile.explain(Wrapped(nn.Linear(4, 4)), torch.ones(2, 4))
    assert "recompile_limit" in report.hint
    assert "torch._dynamo.reset()" in report.hint
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert "Is the model an MoE" in sere_compile.explain(Wrapped(nn.Linear(4, 4)), torch.ones(2, 4)).hint
