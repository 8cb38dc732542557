"""`sere::expert_mlp` in vLLM's own modular kernel, with experts that a CPU can compute in place of Triton's."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    biased_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from sere_compile import ConfigError, SereConfig
from sere_compile.benchmark import vllm_experts
from sere_compile.integrations.vllm import EngineMismatchError, experts
from sere_compile.integrations.vllm.engine import kernels_that_ask_the_router
from sere_compile.integrations.vllm.options import VllmOptions

from . import models
from .engine import engine, generate

pytestmark = pytest.mark.vllm

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 32, 32
CPU = torch.device("cpu")


class TritonExperts(triton_moe.TritonExperts):
    """Computes each slot on its own in float64; counts how often it is asked."""

    wrong = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = 0

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, **others):
        self.asked += 1
        output.copy_(self.wrong * per_slot(hidden_states, w1, w2, topk_weights, topk_ids, activation, self))


def per_slot(hidden, w1, w2, weights, ids, activation, held):
    rows = []
    for x, token_weights, token_ids in zip(hidden.double(), weights.double(), ids.tolist(), strict=True):
        total = torch.zeros(hidden.shape[1], dtype=torch.float64)
        for weight, expert in zip(token_weights, token_ids, strict=True):
            first, second = (0 if b is None else b[expert].double() for b in (held.w1_bias, held.w2_bias))
            both = w1[expert].double() @ x + first
            if activation is MoEActivation.SWIGLUOAI:
                gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                act = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                gate, up = both.chunk(2)
                act = gate * torch.sigmoid(gate) * up
            total += weight * (w2[expert].double() @ act + second)
        rows.append(total)
    return torch.stack(rows)


def layer(activation=MoEActivation.SILU, biased=False, dtype=torch.bfloat16, kernels=TritonExperts):
    """A MoE layer as the plug-in sees it, around vLLM's own modular kernel and method."""
    config = FusedMoEConfig(
        num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=INNER,
        num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=activation, device="cpu",
        routing_method=RoutingMethodType.Renormalize, in_dtype=dtype,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    w1, w2, b1, b2 = (
        torch.randn(shape, generator=generator).mul(0.3).to(dtype)
        for shape in ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER), (EXPERTS, 2 * INNER), (EXPERTS, HIDDEN))
    )
    quant = biased_moe_quant_config(b1, b2) if biased else FusedMoEQuantConfig.make()
    kernel = mk.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), kernels(config, quant))
    method = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.moe_kernel = kernel
    routed = SimpleNamespace(
        quant_method=method, w13_weight=w1, w2_weight=w2, activation=activation, expert_map=None,
        apply_router_weight_on_input=False, global_num_experts=EXPERTS, _ensure_moe_quant_config_init=lambda: None,
    )  # fmt: skip
    routed.forward_modular = lambda x, topk_weights, topk_ids: UnquantizedFusedMoEMethod.forward_native(
        method, routed, x, topk_weights, topk_ids, None, None
    )
    return SimpleNamespace(routed_experts=routed, _quant_method=method, moe_config=config)


def options(choice, strict=False):
    return VllmOptions(SereConfig(strict=strict), experts=choice)


def run(runner, tokens, vllm_config):
    """Output of the layer, the same in float64, and how often vLLM's experts were asked."""
    held = runner._quant_method.moe_kernel.fused_experts
    inputs = experts._random_tokens(runner, tokens, CPU)
    before = held.asked
    output = experts._layer(runner, vllm_config, inputs)
    routed = runner.routed_experts
    expected = per_slot(inputs[0], routed.w13_weight, routed.w2_weight, *inputs[1:], routed.activation, held)
    return output, expected, held.asked - before


@pytest.mark.parametrize(("activation", "biased"), [(MoEActivation.SILU, False), (MoEActivation.SWIGLUOAI, True)])
def test_small_batches_are_ours_and_large_ones_vllms(vllm_config, activation, biased):
    runner = layer(activation, biased)
    replaced = experts.replace_experts({"a": runner, "b": layer(activation, biased)}, options("sere"), vllm_config, CPU)
    assert replaced.layers == 2
    assert "up to 256 tokens" in replaced.text
    for tokens, asked in ((1, 0), (7, 0), (256, 0), (257, 1)):
        output, expected, times = run(runner, tokens, vllm_config)
        assert times == asked
        # Rounded to bfloat16 after the activation and at the end.
        assert (output.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("held", [False, True])
def test_weights_that_are_loaded_anew_are_ours_too_unless_they_are_held_twice(vllm_config, monkeypatch, held):
    runner, later = layer(), layer()._quant_method.moe_kernel
    runner.layer_name, method = "moe", runner._quant_method
    method.process_weights_after_loading = lambda layer: setattr(method, "moe_kernel", later)
    assert experts.replace_experts({"moe": runner}, options("sere"), vllm_config, CPU)
    if held:
        experts.after_reload(runner, None, experts._cannot_reload(object()))
        with pytest.raises(ConfigError, match=r"moe: weights cannot be loaded anew: .* a second time"):
            method.process_weights_after_loading(runner.routed_experts)
        assert method.moe_kernel is not later
        return
    method.process_weights_after_loading(runner.routed_experts)
    _, _, asked = run(runner, 3, vllm_config)
    assert asked == 0


def test_experts_that_are_never_asked_are_not_replaced(vllm_config):
    """Else a comparison would be of vLLM's kernels with themselves."""
    runner = layer()
    runner._quant_method.moe_kernel.fused_experts.post_gemm2_hook = print
    assert experts.compare(runner, vllm_config, CPU, 64).startswith("sere::expert_mlp was not asked")


def test_what_computes_something_else_is_not_replaced(vllm_config, monkeypatch, caplog):
    monkeypatch.setattr(TritonExperts, "wrong", 1.05)
    runner = layer()
    with caplog.at_level(logging.INFO, experts.log.name):
        monkeypatch.setattr(experts.log, "handlers", [caplog.handler])
        assert experts.replace_experts({"a": runner}, options("sere"), vllm_config, CPU) is None
    assert "sere::expert_mlp differs from them by" in caplog.text
    assert run(runner, 3, vllm_config)[2] == 1


def test_kernels_that_do_not_run_are_not_replaced(vllm_config, monkeypatch):
    """As Triton's on this machine."""
    monkeypatch.setattr(TritonExperts, "apply", triton_moe.TritonExperts.apply)
    runner = layer()
    assert experts.compare(runner, vllm_config, CPU, 64).startswith("sere::expert_mlp could not be compared with them")
    with pytest.raises(ConfigError, match=r'a: experts="sere" is out of reach: sere::expert_mlp could not be'):
        experts.replace_experts({"a": runner}, options("sere", strict=True), vllm_config, CPU)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda r: setattr(r.routed_experts, "expert_map", torch.zeros(8)), "expert parallelism"),
    (lambda r: setattr(r.routed_experts, "apply_router_weight_on_input", True), "router weights on the input"),
    (lambda r: setattr(r.routed_experts, "activation", MoEActivation.RELU2), "the activation relu2"),
    (lambda r: setattr(r.routed_experts, "w2_weight", r.routed_experts.w2_weight.float()), "weights of torch.bfloat16"),
    (lambda r: delattr(r.routed_experts, "expert_map"), "not as those of the releases that were tested"),
    (lambda r: setattr(r, "_quant_method", SimpleNamespace(moe_kernel=None)), "neither bfloat16 or float16"),
])  # fmt: skip
def test_layers_of_another_kind_say_why_they_are_left(vllm_config, monkeypatch, caplog, change, reason):
    runner = layer()
    change(runner)
    with caplog.at_level(logging.INFO, experts.log.name):
        monkeypatch.setattr(experts.log, "handlers", [caplog.handler])
        assert experts.replace_experts({"a": runner, "b": runner}, options("sere"), vllm_config, CPU) is None
    assert "compute the experts of 2 MoE layers: " in caplog.text
    assert reason in caplog.text


def test_by_default_only_where_it_was_measured(vllm_config):
    """Not on a CPU; and never with "vllm"."""
    for choice in ("auto", "vllm"):
        runner = layer()
        assert experts.replace_experts({"a": runner}, options(choice), vllm_config, CPU) is None
        assert run(runner, 3, vllm_config)[2] == 1


def test_how_many_tokens_are_ours():
    """64 at 128 experts and K = 8; fewer where few experts get many slots each, which reads their weights twice."""
    qwen, mixtral, many = (
        SimpleNamespace(moe_config=SimpleNamespace(experts_per_token=k, num_local_experts=e))
        for e, k in ((128, 8), (8, 2), (512, 32))
    )
    assert [experts.most_tokens(r, False) for r in (qwen, mixtral, many)] == [64, 32, 64]
    assert [experts.most_tokens(r, True) for r in (qwen, mixtral, many)] == [256, 256, 128]


def test_the_engine_keeps_its_experts_on_a_cpu(tmp_path):
    """Forced, in the real engine: it starts, says why not, and gives the tokens it gives alone."""
    folder = models.save("qwen3_moe", tmp_path)
    with engine(folder) as llm:
        alone = generate(llm, models.prompts(4))
    with engine(folder, {"select_top_k": 99, "experts": "sere"}) as llm:
        assert generate(llm, models.prompts(4)) == alone


def test_while_a_model_is_made_no_kernel_may_route_by_itself():
    """And after it the classes are what they were."""

    class Routes(mk.FusedMoEExpertsMonolithic):
        @staticmethod
        def _supports_current_device():
            return False

    config = layer().moe_config
    before = vars(mk.FusedMoEExperts)["is_supported_config"]
    from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

    asked = hasattr(FusedMoERouter, "supports_monolithic_kernels")
    with kernels_that_ask_the_router():
        if asked:
            assert FusedMoERouter.supports_monolithic_kernels.fget(None) is False
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            Routes, config, None, None, mk.FusedMoEActivationFormat.Standard
        )
        assert not supported
        assert "routes adjusted after routing" in reason
    assert vars(mk.FusedMoEExperts)["is_supported_config"] is before


@pytest.mark.parametrize("fits", [True, False])
def test_where_only_a_kernel_that_routes_by_itself_fits_the_error_says_so(monkeypatch, fits):
    """And where none would fit without SERE either, the error is vLLM's own."""

    class Routes(mk.FusedMoEExpertsMonolithic):
        pass

    monkeypatch.setattr(mk.FusedMoEExperts, "is_supported_config", staticmethod(lambda *_: (fits, "the device")))
    error, message = (EngineMismatchError, "Routes routes by itself") if fits else (NotImplementedError, "^No INT4")

    def make_a_model():
        with kernels_that_ask_the_router():
            assert not mk.FusedMoEExperts.is_supported_config(Routes, None)[0]
            raise NotImplementedError("No INT4 MoE backend supports the deployment configuration.")

    with pytest.raises(error, match=message):
        make_a_model()


def test_the_kernel_that_benchmarks_compare_with_is_where_it_was():
    """`sere bench` calls it on a GPU; here it is found, and takes what it is given."""
    vllm_experts.register()
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop(vllm_experts.NAME)
    given = inspect.signature(fused_experts).bind(*range(5), activation=MoEActivation("silu"))
    assert [*given.arguments] == ["hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation"]
    for name in vllm_experts._ACTIVATIONS.values():
        assert MoEActivation(name).is_gated
