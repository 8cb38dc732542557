"""gpt-oss with experts in MXFP4: the numbers of the model as it was loaded, re-routed, and what cannot be packed."""

import copy
import functools
import io
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

import sere_compile
from sere_compile import ConfigError
from sere_compile.integrations.packed_experts import PackedExperts, pack_experts
from sere_compile.ops.expert_mlp.mxfp4 import unpack_mxfp4

from ..compiled import logits, oracle_logits
from ..tiny_models import VOCABULARY, build, gpt_oss, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def dequantised(dtype=torch.float32, **options):
    """A model whose experts are numbers of MXFP4, as of a checkpoint."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=4, sliding_window=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **options,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name)
            experts, depth, columns = weight.shape
            blocks = torch.randint(256, (experts, columns, depth // 2), dtype=torch.uint8)
            scales = torch.randint(120, 126, (experts, columns, depth // 32), dtype=torch.uint8)
            weight.data = unpack_mxfp4(blocks, scales).transpose(1, 2).contiguous()
    return model.to(dtype)


def packed(model):
    model = copy.deepcopy(model)
    assert sere_compile.pack_experts(model) == 2
    return model


def expert_bytes(model):
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "experts" in n and "bias" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_in_a_fraction_of_the_bytes(dtype):
    model = dequantised(dtype)
    small = packed(model)
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            assert torch.equal(getattr(layer.mlp.experts, name), getattr(other.mlp.experts, name))
    assert expert_bytes(small) * 8 * dtype.itemsize == expert_bytes(model) * 4.25


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_prompts_are_computed_as_they_were(implementation):
    """Above the operator's 256 tokens; weights that lie otherwise in memory may be summed in another order."""
    model = dequantised()
    small = packed(model)
    for one in (model, small):
        one.set_experts_implementation(implementation)
    prompt = tokens(4, 70)
    torch.testing.assert_close(logits(small, prompt), logits(model, prompt), rtol=1e-3, atol=1e-4)


def test_small_batches_are_our_operator(monkeypatch):
    """Which never unpacks a layer."""
    model, ids = dequantised(), tokens(6, 1)
    small = packed(model)
    monkeypatch.setattr("sere_compile.integrations.packed_experts._unpack", None)
    torch.testing.assert_close(logits(small, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("select", [1, 2, 4])
def test_the_backend_re_routes_it(select):
    """S < K is what the oracle makes of the model as it was loaded; S = K changes no bit."""
    model, ids = dequantised(), tokens(6, 1)
    profile = random_profile(model, router="router")
    small = packed(model)
    sere_compile.attach(small, profile)
    options = {"select_top_k": select, "threshold": 0.0, "inner": "eager", "strict": True}
    got = logits(torch.compile(small, backend="sere", options=options), ids)
    torch.testing.assert_close(got, oracle_logits(model, profile, ids, select), **CLOSE)
    if select == 4:
        assert torch.equal(got, logits(torch.compile(small, backend="eager"), ids))


def test_what_explain_says():
    report = sere_compile.explain(packed(dequantised()), tokens(6, 1), use_cache=False)
    assert [(row.status, row.dispatch) for row in report.rows] == [("rewritten", "indexed weights")] * 2


@pytest.mark.slow
def test_inductor_compiles_both_ways():
    model = dequantised()
    compiled = torch.compile(packed(model))
    for ids in (tokens(6, 1), tokens(4, 70)):
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


def test_experts_implementation_sere_re_routes_it():
    model, ids = dequantised(), tokens(6, 1)
    profile = random_profile(model, router="router")
    small = packed(model)
    sere_compile.register_experts(select_top_k=1)
    small.set_experts_implementation("sere")
    sere_compile.attach(small, profile)
    torch.testing.assert_close(logits(small, ids), oracle_logits(model, profile, ids, 1), **CLOSE)


def test_calibration_measures_what_it_measured_before():
    model = dequantised()
    batches = [tokens(2, 20, seed) for seed in range(2)]
    before, after = (sere_compile.calibrate(one, batches) for one in (model, packed(model)))
    assert set(before) == set(after) != set()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-3)


def test_a_copy_a_file_and_a_cast():
    model, ids = dequantised(), tokens(6, 1)
    small = packed(model)
    want = logits(small, ids)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids), want)
    other = packed(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(small.state_dict())
    assert torch.equal(logits(other, ids), want)
    cast = small.to(torch.bfloat16)
    assert cast.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert isinstance(cast.model.layers[0].mlp.experts, PackedExperts)
    torch.testing.assert_close(logits(cast, ids), logits(model.to(torch.bfloat16), ids), rtol=0.1, atol=0.1)


def test_a_checkpoint_as_transformers_loads_it(tmp_path):
    """In the names and shapes of gpt-oss's own files; packed again, its bytes are those of the file."""
    small = packed(dequantised(torch.bfloat16))
    config = small.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name: tensor.unflatten(-1, (-1, 16)).clone() if name.endswith("_blocks") else tensor.clone()
        for name, tensor in small.state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    assert pack_experts(loaded) == 2
    again = loaded.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in small.state_dict().items())


class TestRefusals:
    def refuses(self, model, message):
        before = {name: id(module) for name, module in model.named_modules()}
        with pytest.raises(ConfigError, match=message):
            pack_experts(model)
        assert {name: id(module) for name, module in model.named_modules()} == before

    def test_a_model_without_experts_of_gpt_oss(self):
        self.refuses(build("mixtral"), "MixtralForCausalLM has no experts of gpt-oss to pack: load a gpt-oss model")

    def test_what_is_packed_already(self):
        self.refuses(packed(dequantised()), "all experts of GptOssForCausalLM are packed already")

    def test_other_numbers_in_the_last_layer(self):
        """Nothing is changed in the first either."""
        model = dequantised()
        model.model.layers[1].mlp.experts.down_proj.data[3, 4, 5] = 0.3
        self.refuses(model, r"model.layers.1.mlp.experts: .* got others in 1 of 64 blocks.*Mxfp4Config\(dequantize")

    def test_another_activation(self):
        self.refuses(dequantised(swiglu_limit=6.0), r"alpha and limit \(1.702, 6.0\), and the kernels have 1.702 and 7")

    @pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"device": "meta"}], ids=str)
    def test_weights_that_no_kernel_takes(self, change):
        self.refuses(dequantised().to(**change), "expected weights in torch.bfloat16 or torch.float32, got")

    @pytest.mark.parametrize(
        "add",
        [
            lambda experts: setattr(experts, "forward", functools.partial(type(experts).forward, experts)),
            lambda experts: experts.register_forward_hook(lambda *given: None),
            lambda experts: experts.register_full_backward_pre_hook(lambda *given: None),
        ],
        ids=["forward", "hook", "backward"],
    )
    def test_hooks(self, add):
        """accelerate's forward would go on with the experts that were replaced, and a hook would be lost."""
        model = dequantised()
        add(model.model.layers[1].mlp.experts)
        self.refuses(model, "model.layers.1.mlp.experts has hooks or a forward of its own, as accelerate")

    def test_sizes_that_are_no_multiple_of_32(self):
        self.refuses(gpt_oss(), r"model.layers.0.mlp.experts: weights: expected")
