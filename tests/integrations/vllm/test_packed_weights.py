"""gpt-oss's MXFP4 weights, kept as they were loaded, in vLLM's own modular kernel."""

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

from sere_compile.integrations.vllm import experts, packed_weights
from sere_compile.ops.expert_mlp.mxfp4 import mxfp4_sizes, unpack_mxfp4

from .test_experts import CPU, EXPERTS, HIDDEN, INNER, TritonExperts, layer, options, run

pytestmark = pytest.mark.vllm


class OAITritonExperts(TritonExperts):
    """What vLLM multiplies MXFP4 weights with."""


def packed_layer(keep=True, kernels=OAITritonExperts):
    """One of gpt-oss, with MXFP4 weights that vLLM's own method was asked to prepare, kept as they were or not.

    Its weights are then those that the bytes stand for, in place of a layout for a GPU.
    """
    runner = layer(MoEActivation.SWIGLUOAI, biased=True, kernels=kernels)
    routed, loaded, generator = runner.routed_experts, torch.nn.Module(), torch.Generator().manual_seed(1)
    method = GptOssMxfp4MoEMethod.__new__(GptOssMxfp4MoEMethod)
    method.moe_kernel, method.mxfp4_backend = routed.quant_method.moe_kernel, Mxfp4MoeBackend.NONE
    routed.quant_method = runner._quant_method = method
    held = method.moe_kernel.fused_experts
    for name, bias in (("w13", held.w1_bias), ("w2", held.w2_bias)):
        sizes, of_scales = mxfp4_sizes(getattr(routed, f"{name}_weight").shape)
        weight = torch.randint(256, sizes, dtype=torch.uint8, generator=generator)
        scale = torch.randint(121, 125, of_scales, dtype=torch.uint8, generator=generator)
        setattr(routed, f"{name}_weight", unpack_mxfp4(weight, scale).bfloat16())
        for suffix, tensor in (("weight", weight), ("weight_scale", scale), ("bias", bias)):
            setattr(loaded, f"{name}_{suffix}", torch.nn.Parameter(tensor, requires_grad=False))
    with packed_weights.keeping_packed_weights(keep):
        method.process_weights_after_loading(loaded)
    vars(routed).update({name: value for name, value in vars(loaded).items() if name.startswith("_sere")})
    return runner


def test_small_batches_of_packed_weights_are_ours(vllm_config):
    """gpt-oss's, which are read as they were loaded."""
    runner = packed_layer()
    assert packed_weights.packed_weights(runner.routed_experts).bytes == EXPERTS * 3 * HIDDEN * INNER * 17 // 32
    replaced = experts.replace_experts({"a": runner}, options("sere"), vllm_config, CPU)
    assert replaced.layers == 1
    assert replaced.text.endswith("MXFP4 weights are held twice for that, 0.00 GB more")
    for tokens, asked in ((1, 0), (7, 0), (257, 1)):
        output, expected, times = run(runner, tokens, vllm_config)
        assert times == asked
        assert (output.double() - expected).norm() < 0.01 * expected.norm()


def test_one_layer_of_packed_weights_keeps_all_from_being_loaded_anew(vllm_config):
    runners = {"packed": packed_layer(), "plain": layer()}
    replaced = experts.replace_experts(runners, options("sere"), vllm_config, CPU)
    assert replaced.layers == 2
    assert "a second time" in replaced.cannot_reload
    del runners["packed"]
    assert experts.replace_experts(runners, options("sere"), vllm_config, CPU).cannot_reload == ""


@pytest.mark.parametrize(("kernels", "keep", "change", "reason"), [
    (OAITritonExperts, False, {}, 'experts="sere" keeps a second time'),
    (TritonExperts, True, {}, "TritonExperts may change MXFP4 weights where they lie"),
    (OAITritonExperts, True, {"in_dtype": torch.float16}, "32 hidden states of torch.float16, and MXFP4 weights of 32"),
    (OAITritonExperts, True, {"hidden_dim": 64}, "64 hidden states of torch.bfloat16, and MXFP4 weights of 32"),
])  # fmt: skip
def test_packed_weights_that_are_left(vllm_config, kernels, keep, change, reason):
    runner = packed_layer(keep, kernels)
    for name, value in change.items():
        setattr(runner.moe_config, name, value)
    assert reason in experts.cannot_serve(runner)
    assert experts.replace_experts({"a": runner}, options("sere"), vllm_config, CPU) is None
    assert packed_weights.packed_weights(runner.routed_experts) is None


def test_vllms_method_is_its_own_again_after_loading():
    before = GptOssMxfp4MoEMethod.process_weights_after_loading
    with packed_weights.keeping_packed_weights(True):
        assert GptOssMxfp4MoEMethod.process_weights_after_loading is not before
    assert GptOssMxfp4MoEMethod.process_weights_after_loading is before
    with packed_weights.keeping_packed_weights(False):
        assert GptOssMxfp4MoEMethod.process_weights_after_loading is before
