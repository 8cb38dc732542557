"""Every variant agrees with the eager oracle; one that cannot run, or keeps its experts, is named."""

import pytest
import torch

from sere_compile import SereError
from sere_compile.benchmark import decode_step, moe_layer, variant
from sere_compile.passes import Skip, SkipReason

from .made import results_of, results_row


@pytest.mark.parametrize("kind", ["layer", pytest.param("decode", marks=pytest.mark.slow)])
def test_every_variant_agrees_and_fewer_experts_are_active(subject, without_gpu, kind):
    """S=2 and S=1 agree with the eager oracle, and S=K with the eager model; the fewest experts are active at S=1."""
    bench = {"layer": moe_layer.bench_moe_layer, "decode": decode_step.bench_decode_step}[kind]
    kwargs = {} if kind == "layer" else {"prompt": 6, "steps": 4}
    rows = bench(subject, 5, [10**6, 2, 1], ["grouped_mm", "batched_mm"], 1e12, **kwargs)
    names = ["eager", "inductor grouped_mm", "inductor batched_mm", "sere S=K", "sere S=2", "sere S=1"]
    names += [] if torch.cuda.is_available() else [f"{name}, lower_experts" for name in names[3:]]
    names += ["sere, re-routes nothing"] if kind == "layer" else []
    assert [row.variant for row in rows] == names
    assert all(row.error < 1e-4 for row in rows)
    active = [row.active for row in rows[3:6]]
    assert active[0] > active[1] > active[2]
    unchanged = [row for row in rows if row.variant.startswith(("eager", "inductor", "sere S=K", "sere, "))]
    assert {row.active for row in unchanged} == {active[0]}
    results = results_of(rows)
    assert [results.speedup(row) for row in rows] == [None] * 3 + [2.0] * (len(rows) - 3)
    if kind == "layer":
        # 5 us at 1 TB/s are 5 MB; an expert has 3 projections of 32 x 16 in fp32, the router 16 x 32.
        assert rows[3].bandwidth_share == pytest.approx((active[0] * 3 + 1) * 32 * 16 * 4 / 5e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA graph replays what it recorded")
def test_each_variant_is_timed_with_its_own_experts(subject, monkeypatch):
    """Dynamo keeps graphs by code, and all variants call the same; what is compiled again is another variant."""
    ran = []

    def inner(module, _):
        computing = [name for name in ("expert_mlp", "grouped_mm", "bmm") if name in module.code]

        def run(*inputs):
            ran.append(computing[0])
            return module(*inputs)

        return run

    monkeypatch.setattr(variant, "INNER", inner)
    with torch.no_grad():
        moe_layer.bench_moe_layer(subject, 5, [1], ["grouped_mm", "batched_mm"], 1e12, rounds=2)
    torch._dynamo.reset()
    a_round = [name for name in ("grouped_mm", "bmm", "grouped_mm", "expert_mlp", "grouped_mm") for _ in range(6)]
    assert ran[-len(a_round) :] == a_round


def test_a_variant_without_memory_is_left_out(subject, without_gpu, bench, monkeypatch):
    """The others are measured, the results say which is missing, and the command's status is 1."""
    compiled = variant.Variant.compiled

    def too_large(self, function):
        if self.experts == "batched_mm":
            raise torch.OutOfMemoryError("tried to allocate 30 GiB\nfurther lines")
        return compiled(self, function)

    monkeypatch.setattr(variant.Variant, "compiled", too_large)
    results = bench(["layer"], ["grouped_mm", "batched_mm"])
    assert [row.variant for row in results.rows][:3] == ["eager", "inductor grouped_mm", "sere S=1"]
    assert results.failures == [
        "inductor batched_mm is not measured: the device is out of memory (tried to allocate 30 GiB)"
    ]
    assert not results.is_sound
    assert results.speedup(results.rows[2]) == 2.0


def test_experts_that_cannot_be_chosen(subject, monkeypatch):
    """transformers' refusal becomes one of ours, which names the model."""

    def refuse(implementation):
        raise ValueError("no such thing")

    monkeypatch.setattr(subject.model, "set_experts_implementation", refuse)
    with pytest.raises(SereError, match="Qwen3MoeForCausalLM cannot run its experts by grouped_mm: no such thing"):
        variant.use_experts(subject.model, "grouped_mm")


def test_token_error_is_not_moved_by_one_token_and_never_passes_nan():
    want = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    one_off = want.clone()
    one_off[3] = 100
    assert variant.token_error(one_off, want) == 0
    assert variant.token_error(want * 1.1, want) == pytest.approx(0.1, rel=1e-3)
    nan = torch.full_like(want, torch.nan)
    row = results_row(error=variant.token_error(nan, want))
    assert not row.agrees


def test_gates_that_keep_their_experts_are_noted(subject, bench, monkeypatch):
    """What the passes refuse appears under the table, with the reason and how often."""
    refuse = lambda gate, *_, **__: Skip(SkipReason.NOT_BATCHED, gate.ids, "too odd")  # noqa: E731
    monkeypatch.setattr("sere_compile.passes.pipeline.fuse_experts", refuse)
    options = variant.sere_backend.with_options(lower_experts="always")
    monkeypatch.setattr(variant, "sere_backend", options)
    results = bench(["layer"], ["grouped_mm"])
    reason = f"{SkipReason.NOT_BATCHED.value} (too odd)"
    assert results.notes == [f"3 compiled gates keep their experts: {reason}"]
    assert results.table().endswith("\nNote: " + results.notes[0])


def test_no_variant_twice():
    """Where S exceeds K it is K, once: Mixtral's K is 2."""
    names = [v.name for v in variant.all_variants((8, 2, 1), 2, ("grouped_mm",))]
    assert names == ["eager", "inductor grouped_mm", "sere S=K", "sere S=1"]
