"""Experts kernels that take a token's experts for different ones, in vLLM's own modular kernel on a CPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from sere_compile.integrations.vllm import EngineMismatchError, experts, repeats

from .test_experts import CPU, EXPERTS, TOP_K, TritonExperts, layer, per_slot

pytestmark = pytest.mark.vllm


class SetExperts(TritonExperts):
    """As vLLM's kernels for MXFP4, by another name: a token's experts are a set, and ids of no expert are skipped."""

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, **others):
        again = (topk_ids[:, :, None] == topk_ids[:, None, :]).tril(-1).any(2)
        kept = torch.where(again | (topk_ids < 0), 0.0, topk_weights)
        super().apply(output, hidden_states, w1, w2, kept, topk_ids.clamp(min=0), activation, **others)


class OAITritonExperts(SetExperts):
    """By its name one that needs merging."""


class UnfusedOAITritonExperts(SetExperts):
    """And a token that names an expert twice gets no output at all: what the memory had."""

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named):
        memory = getattr(self, "memory", None)
        before = memory if memory is not None and memory.shape == output.shape else torch.zeros_like(output)
        super().apply(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)
        again = (topk_ids[:, :, None] == topk_ids[:, None, :]) & (topk_ids >= 0)[:, :, None]
        output.copy_(torch.where(again.tril(-1).any(2).any(1)[:, None], before, output))
        self.memory = output.clone()


class LeavesRows(UnfusedOAITritonExperts):
    """The same, and nobody knows."""


class TrtLlmFp8ExpertsModular(SetExperts):
    """A set up to 16 tokens alone."""

    def apply(self, output, hidden_states, *others, **named):
        kind = SetExperts if len(hidden_states) <= 16 else TritonExperts
        kind.apply(self, output, hidden_states, *others, **named)


class FlashInferExperts(SetExperts):
    """One that has no idea of slots without an expert."""

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named):
        super().apply(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)
        output[(topk_ids < 0).any(1)] = torch.nan


class SetsOfManyTokens(SetExperts):
    """A set above 256 tokens, and nobody knows."""

    def apply(self, output, hidden_states, *others, **named):
        kind = SetExperts if len(hidden_states) > 256 else TritonExperts
        kind.apply(self, output, hidden_states, *others, **named)


class OneScale(TritonExperts):
    """Right, with activations of one scale for all rows: how exact a token is depends on what others have."""

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named):
        super().apply(output, hidden_states, w1, w2, topk_weights, topk_ids, *others, **named)
        generator = torch.Generator().manual_seed(int(topk_ids.sum()))
        output.mul_(1 + 0.03 * torch.randn(output.shape, generator=generator))


@pytest.fixture
def vllm_config(vllm_config):
    """With batches of up to 300 tokens."""
    vllm_config.scheduler_config.max_num_batched_tokens = 300
    return vllm_config


def made(kernels):
    """A layer whose experts are these."""
    runner = layer(kernels=kernels)
    runner.router, runner.layer_name = SimpleNamespace(eplb_state=None), "moe"
    return runner


def outputs(runner, vllm_config, ids):
    """The layer's for tokens with these ids, and slot by slot."""
    hidden, weights, _ = experts._random_tokens(runner, len(ids), CPU)
    held, routed = repeats._experts(runner), runner.routed_experts
    expected = per_slot(hidden, routed.w13_weight, routed.w2_weight, weights, ids, routed.activation, held)
    return experts._layer(runner, vllm_config, (hidden, weights, ids)), expected


@pytest.mark.parametrize("kernels", [OAITritonExperts, UnfusedOAITritonExperts, TrtLlmFp8ExpertsModular])
def test_slots_of_one_expert_are_made_one_where_that_is_needed(kernels, vllm_config, caplog):
    runner, ids = made(kernels), torch.tensor([[1, 1], [2, 0], [3, 3]], dtype=torch.int32)
    got, expected = outputs(runner, vllm_config, ids)
    assert not torch.allclose(got.double(), expected, rtol=0.05, atol=0.05)
    with caplog.at_level(logging.INFO, "vllm.sere_compile"):
        assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == 1
    assert "made one in 1 of 1 MoE layers" in caplog.text
    got, expected = outputs(runner, vllm_config, ids)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [
    "OAITritonExperts", "UnfusedOAITritonExperts", "FlashInferExperts", "TrtLlmBf16ExpertsModular",
    "TrtLlmFp8ExpertsModular", "TrtLlmNvFp4ExpertsModular", "TrtLlmMxfp4ExpertsModular",
    "TrtLlmMxfp4Mxfp8ExpertsModular",  # vLLM 0.34
])  # fmt: skip
def test_kernels_that_need_it_are_known_by_name(name, vllm_config):
    kernels = type(name, (SetExperts,), {})
    assert repeats.merge_where_needed({"a": made(kernels)}, vllm_config, CPU) == 1


@pytest.mark.parametrize("kernels", [TritonExperts, OneScale])
def test_other_kernels_are_left_as_they_are(kernels, vllm_config):
    runner = made(kernels)
    assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == 0
    assert "apply" not in vars(repeats._experts(runner))


def test_a_kind_is_compared_once(vllm_config):
    first, second, other = made(OAITritonExperts), made(OAITritonExperts), made(TritonExperts)
    assert repeats.merge_where_needed({"a": first, "b": second, "c": other}, vllm_config, CPU) == 2
    assert repeats._experts(first).asked > 0
    assert repeats._experts(second).asked == 0
    assert "apply" in vars(repeats._experts(second))
    assert "apply" not in vars(repeats._experts(other))


@pytest.mark.parametrize(("kernels", "size"), [
    (SetExperts, 1), (LeavesRows, 1), (FlashInferExperts, 1), (SetsOfManyTokens, 300),
])  # fmt: skip
def test_a_kernel_that_is_wrong_is_refused(kernels, size, vllm_config):
    told = rf"a: {kernels.__name__} does not compute a token right .* in a batch of {size}: choose another"
    with pytest.raises(EngineMismatchError, match=told):
        repeats.merge_where_needed({"a": made(kernels)}, vllm_config, CPU)


def test_experts_have_the_rows_of_all_ranks(vllm_config):
    runner = made(SetsOfManyTokens)
    vllm_config.scheduler_config.max_num_batched_tokens = 200
    repeats.merge_where_needed({"a": runner}, vllm_config, CPU)
    runner.moe_config.moe_parallel_config.dp_size = 2
    with pytest.raises(EngineMismatchError, match="in a batch of 400"):
        repeats.merge_where_needed({"a": runner}, vllm_config, CPU)


def test_an_expert_of_zeros_does_not_end_the_comparison(vllm_config):
    runner = made(SetExperts)
    runner.routed_experts.w2_weight.data[1] = 0  # the first token's
    with pytest.raises(EngineMismatchError, match="in a batch of 2"):
        repeats.merge_where_needed({"a": runner}, vllm_config, CPU)


def test_how_far_a_comparison_came_is_said(vllm_config, monkeypatch, caplog):
    runner, apply = made(TritonExperts), TritonExperts.apply

    def too_large(self, output, hidden_states, *others, **named):
        if len(hidden_states) > 64:
            raise torch.OutOfMemoryError("no room")
        return apply(self, output, hidden_states, *others, **named)

    monkeypatch.setattr(TritonExperts, "apply", too_large)
    with caplog.at_level(logging.WARNING, "vllm.sere_compile"):
        assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == 0
    assert "could not be tried in a batch of 128, smaller ones are right (OutOfMemoryError: no room)" in caplog.text


def test_a_rank_repeats_experts_that_it_computes(vllm_config):
    """Another rank's share is nothing here: a set would not show."""
    runner = made(SetExperts)
    runner.routed_experts.expert_map = torch.tensor([-1] * (EXPERTS - 1) + [0], dtype=torch.int32)
    assert repeats._experts_here(runner).tolist() == [EXPERTS - 1]
    places = torch.arange(EXPERTS).flip(0)[:, None]
    runner.router.eplb_state = SimpleNamespace(logical_to_physical_map=places)
    assert repeats._experts_here(runner).tolist() == [0]
    runner.router.eplb_state = None
    runner.routed_experts.expert_map = None
    assert len(repeats._experts_here(runner)) == EXPERTS


def test_experts_of_weights_that_are_loaded_anew_are_merged_too(vllm_config):
    runner = made(OAITritonExperts)
    method, later = runner._quant_method, made(OAITritonExperts)._quant_method.moe_kernel
    method.process_weights_after_loading = lambda layer: setattr(method, "moe_kernel", later)
    repeats.merge_where_needed({"a": runner}, vllm_config, CPU)
    assert "apply" not in vars(later.fused_experts)
    method.process_weights_after_loading(runner.routed_experts)
    merging = vars(later.fused_experts)["apply"]
    method.process_weights_after_loading(runner.routed_experts)
    assert vars(later.fused_experts)["apply"] is merging, "the kernel stayed"
    ids = torch.tensor([[1, 1], [2, 0], [3, 3]], dtype=torch.int32)
    got, expected = outputs(runner, vllm_config, ids)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


def raises(*_, **__):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(("kernels", "merged"), [(SetExperts, 0), (OAITritonExperts, 1)])
@pytest.mark.parametrize("why", ["takes rows in the order", "are not finite", "are all zeros", "no such kernel"])
def test_what_cannot_be_compared_is_said_and_merged_where_it_is_known_to_need_it(
    kernels, merged, why, vllm_config, monkeypatch, caplog
):
    runner = made(kernels)
    if "rows" in why:
        runner._quant_method.moe_kernel.impl.prepare_finalize = SimpleNamespace()
        form = staticmethod(lambda: SimpleNamespace(name="BatchedExperts"))
        monkeypatch.setattr(SetExperts, "activation_format", form)
    elif "kernel" in why:
        monkeypatch.setattr(SetExperts, "apply", raises)
    else:
        monkeypatch.setattr(SetExperts, "wrong", torch.nan if "finite" in why else 0.0)
    with caplog.at_level(logging.WARNING, "vllm.sere_compile"):
        assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == merged
    assert why in caplog.text
    assert ("apply" in vars(repeats._experts(runner))) == bool(merged)
    if not merged:
        with pytest.raises(EngineMismatchError, match=f"a: whether SetExperts .* could not be tried .*{why}"):
            repeats.merge_where_needed({"a": runner}, vllm_config, CPU, strict=True)


def test_with_one_expert_per_token_there_is_nothing_to_compare(vllm_config):
    runner = made(FlashInferExperts)
    runner.moe_config.experts_per_token = 1
    assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == 0


def test_ours_are_put_before_and_taken_back_beside(vllm_config):
    """What was merged for vLLM's kernel stays when ours were compared with it."""
    runner = made(OAITritonExperts)
    assert repeats.merge_where_needed({"a": runner}, vllm_config, CPU) == 1
    merging = vars(repeats._experts(runner))["apply"]
    experts.put_before(runner, 4)()
    assert vars(repeats._experts(runner))["apply"] is merging
    assert TOP_K == 2
