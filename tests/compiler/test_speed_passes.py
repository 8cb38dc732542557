"""The speed passes in the backend, on real models: same numbers up to rounding, and a switch for each."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile.passes.graph.nodes import kind

from .. import tiny_models


def compiled(model, seen, dynamic=None, **options):
    """The model through the backend, without an inner compiler; the kinds of its operations go to `seen`."""

    def inner(graph, _):
        seen.append([kind(node) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    backend = sere_compile.sere_backend.with_options(inner=inner, min_active=0, **options)
    return torch.compile(model, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mixtral", "grouped_mm"),
        pytest.param("qwen2_moe", "batched_mm", marks=pytest.mark.slow),
        pytest.param("mixtral", "batched_mm", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "batched_mm", marks=pytest.mark.slow),
    ],
)
def test_speed_passes_give_the_stock_logits(name, experts):
    """float32 logits of whole models, re-routed and not, to 1e-5; every layer has one operator of each kind."""
    model = tiny_models.build(name, experts)
    sere_compile.attach(model, tiny_models.random_profile(model))
    for select_top_k in (1, tiny_models.TOP_K[name]):
        logits, seen = [], []
        for on in (False, "always"):
            with torch.no_grad():
                run = compiled(model, seen, select_top_k=select_top_k, lower_experts=on, fuse_router=on)
                logits.append(run(tiny_models.tokens(), use_cache=False).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5 * float(logits[0].abs().max()))
        assert [kinds.count("sere.expert_mlp") for kinds in seen] == [0, tiny_models.LAYERS]
        assert [kinds.count("sere.route") for kinds in seen] == [0, tiny_models.LAYERS]
        # Re-routing is part of the routing.
        assert [kinds.count("sere.reroute") for kinds in seen] == [tiny_models.LAYERS if select_top_k == 1 else 0, 0]
        assert "topk" not in seen[1]
        assert not {"bmm", "transformers.grouped_mm_fallback", "sort"} & set(seen[1])


@pytest.mark.slow
@pytest.mark.parametrize("version", [2, 3])
def test_groups_of_experts_are_routed(version):
    """DeepSeek-V2 and V3 limit a token to groups of experts; the operator does, with and without re-routing."""
    model, logits = tiny_models.grouped_deepseek(version), {}
    sere_compile.attach(model, tiny_models.random_profile(model))
    for select_top_k in (1, 4):
        for on in (False, "always"):
            seen = []
            with torch.no_grad():
                run = compiled(model, seen, select_top_k=select_top_k, lower_experts=False, fuse_router=on)
                logits[select_top_k, on] = run(tiny_models.tokens(), use_cache=False).logits
            assert seen[0].count("sere.route") == (tiny_models.LAYERS if on else 0)
        scale = float(logits[select_top_k, False].abs().max())
        both = logits[select_top_k, "always"], logits[select_top_k, False]
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5 * scale)
    assert (logits[1, False] - logits[4, False]).abs().max() > 1e-2 * scale


@pytest.mark.slow
def test_more_than_256_tokens_stay():
    """Beyond the operator's reach the stock dispatch is kept, in the same model."""
    model, seen = tiny_models.build("mixtral", "batched_mm"), []
    with torch.no_grad():
        run = compiled(model, seen, select_top_k=2, lower_experts="always")
        run(tiny_models.tokens(2, 5), use_cache=False)
        run(tiny_models.tokens(3, 6), use_cache=False)
        run(tiny_models.tokens(3, 90), use_cache=False)
    lowered = ["sere.expert_mlp" in kinds for kinds in seen]
    assert lowered[-1] is False
    assert all(lowered[:-1])
    assert len(lowered) == 3  # static, dynamic, and dynamic beyond 256 tokens


def test_gradients_keep_the_stock_dispatch(caplog):
    """The operator has no gradient."""
    model, seen = tiny_models.build("mixtral", "batched_mm"), []
    with caplog.at_level(logging.INFO, logger="sere_compile.compiler.rewrite_gate"):
        run = compiled(model, seen, select_top_k=2, lower_experts="always", fuse_router="always")
        run(tiny_models.tokens(), use_cache=False)
    assert not {"sere.expert_mlp", "sere.route"} & set(seen[0])
    assert "gradients are on" in caplog.text


@pytest.mark.slow
def test_many_slots_an_expert_keep_the_stock_dispatch(caplog):
    """Where grouped matmuls are as fast they stay, and the user can see why: in the log and in `explain`."""
    model, seen = tiny_models.build("mixtral", "grouped_mm"), []
    experts, top_k = model.config.num_local_experts, tiny_models.TOP_K["mixtral"]
    few = 32 * experts // top_k
    for tokens, is_lowered in ((few, True), (few + 1, False)):
        with torch.no_grad(), caplog.at_level(logging.INFO, logger="sere_compile.compiler.rewrite_gate"):
            compiled(model, seen, select_top_k=1, lower_experts="always")(
                tiny_models.tokens(1, tokens), use_cache=False
            )
        assert ("sere.expert_mlp" in seen[-1]) == is_lowered
        assert ("keeps its experts: more slots than" in caplog.text) == (not is_lowered)
    config = sere_compile.SereConfig(select_top_k=1, lower_experts="always", fuse_router="always")
    kept = "stock experts: more slots than our kernels are faster for (more than 32 "
    report = sere_compile.explain(model, tiny_models.tokens(1, few + 1), use_cache=False, config=config)
    assert all(row.kernels.startswith(f"routing; {kept}") for row in report)
    assert kept in str(report)
    report = sere_compile.explain(model, tiny_models.tokens(1, few), use_cache=False, config=config)
    assert [row.kernels for row in report] == ["experts and routing"] * tiny_models.LAYERS


class ManySlots(nn.Module):
    """17 of 256 tiny experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 256, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(256, 8, 8)) for _ in range(2))

    def forward(self, hidden):
        weights, ids = torch.topk(self.gate(hidden).softmax(-1), 17)
        slots = hidden.repeat_interleave(17, 0).unsqueeze(1)
        act = nn.functional.silu(torch.bmm(slots, self.up[ids.reshape(-1)]))
        out = torch.bmm(act, self.down[ids.reshape(-1)]).squeeze(1) * weights.reshape(-1, 1)
        return out.view(-1, 17, 8).sum(1)


def test_more_slots_than_a_kernel_takes_keep_the_stock_dispatch(caplog):
    """The operator would fall back on copies of the weights of every slot."""
    seen = []
    for tokens in (240, 241):
        with torch.no_grad(), caplog.at_level(logging.INFO, logger="sere_compile.compiler.rewrite_gate"):
            compiled(ManySlots(), seen, select_top_k=17, lower_experts="always", dynamic=False)(torch.randn(tokens, 8))
    assert ["sere.expert_mlp" in kinds for kinds in seen] == [True, False]
    assert "keeps its experts: more slots than our kernels take (more than 4096)" in caplog.text


def test_a_cpu_keeps_the_stock_dispatch_by_default():
    """Ours round in another order, and S = K is to change no bit there."""
    model, seen = tiny_models.build("mixtral", "batched_mm"), []
    with torch.no_grad():
        compiled(model, seen, select_top_k=2)(tiny_models.tokens(), use_cache=False)
    assert not {"sere.expert_mlp", "sere.route"} & set(seen[0])


def test_a_budget_bounds_the_active_experts():
    """select_top_k="auto": the primary experts of a forward fit the budget, and a wide one changes nothing."""
    model = tiny_models.build("qwen3_moe", "batched_mm")
    sere_compile.attach(model, tiny_models.random_profile(model))
    active = []
    for max_active in (5, 16):
        with torch.no_grad():
            run = compiled(model, [], select_top_k="auto", max_active=max_active, collect_stats=True)
            run(tiny_models.tokens(1, 5), use_cache=False)
        active.append([row.mean_active_after for row in sere_compile.stats(model).values()])
        before = [row.mean_active_before for row in sere_compile.stats(model).values()]
        sere_compile.reset_stats(model)
    # Top-1 of 5 tokens always fits 5; all 16 experts always fit 16.
    assert all(count <= 5 < start for count, start in zip(active[0], before, strict=True))
    assert active[1] == before


def test_a_budget_goes_with_auto():
    """Neither option means anything without the other."""
    for options in ({"select_top_k": "auto"}, {"max_active": 8}, {"select_top_k": 2, "max_active": 8}):
        with pytest.raises(sere_compile.SereError, match="go together"):
            sere_compile.SereConfig(**options)


@pytest.mark.parametrize("option", ["lower_experts", "fuse_router"])
def test_options_are_checked(option):
    """A misspelt value is an error."""
    with pytest.raises(sere_compile.SereError, match=f'{option} must be True, False or "always"'):
        sere_compile.SereConfig(**{option: "sometimes"})


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_on_a_gpu_they_are_on_by_default(experts):
    """bfloat16 logits through Inductor stay as close to float32 eager as the stock path's, within a factor."""
    model = tiny_models.build("qwen3_moe", experts, torch.bfloat16, "cuda")
    exact = tiny_models.build("qwen3_moe", experts, torch.float32, "cuda")
    exact.load_state_dict(model.state_dict())
    tokens = tiny_models.tokens(device="cuda")
    errors = []
    with torch.no_grad():
        expected = exact(tokens, use_cache=False).logits
        for on in (False, True):
            torch._dynamo.reset()
            backend = sere_compile.sere_backend.with_options(select_top_k=4, lower_experts=on, fuse_router=on)
            logits = torch.compile(model, backend=backend)(tokens, use_cache=False).logits
            # A token whose 4th and 5th expert are within rounding may choose the other: the median token counts.
            errors.append((logits.float() - expected).square().mean(-1).sqrt().median())
    assert errors[1] <= 1.5 * errors[0]
