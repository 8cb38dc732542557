"""`from_pretrained(..., gguf_file=...)`: experts that are dequantised as they are loaded are re-routed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sere_compile
from sere_compile.testing import oracle_routing

from ..compiled import logits
from ..tiny_models import LAYERS, VOCABULARY, random_profile, tokens

gguf = pytest.importorskip("gguf", reason="transformers reads GGUF files by the package gguf")
pytest.importorskip("accelerate", reason="transformers asks for it to load a GGUF file")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# GGUF files do not hold the experts' width as transformers reads them: it is the default of the class.
CONFIG = {
    "hidden_size": 64, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip


def write(model, path):
    """A Qwen3-MoE model as llama.cpp's converter names its tensors: matrices as Q8_0, the rest float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, LAYERS)
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            layer = name.split(".")[2]
            parts = zip(("gate", "up"), tensor.chunk(2, 1), strict=True)
            found = {f"blk.{layer}.ffn_{part}_exps.weight": value for part, value in parts}
        elif name.endswith("down_proj"):
            found = {f"blk.{name.split('.')[2]}.ffn_down_exps.weight": tensor}
        else:
            found = {f"{names.get_name(name.removesuffix('.weight'))}.weight": tensor}
        for new, value in found.items():
            numbers = value.contiguous().numpy()
            if "_exps" in new:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(new, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
            else:
                writer.add_tensor(new, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_quantised_file_is_re_routed(tmp_path):
    """S = K changes no bit of the dequantised model, S = 1 is what the oracle gives; every gate is found."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG)
    original = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in original.model.layers:
            layer.mlp.gate.weight.normal_()
    write(original, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    up = [m.model.layers[0].mlp.experts.gate_up_proj for m in (original, model)]
    assert 0 < (up[0] - up[1]).abs().max() < 1e-2 * up[0].abs().max()
    ids = tokens(6, 1)
    report = sere_compile.explain(model, ids, use_cache=False)
    assert [row.status for row in report] == ["rewritten"] * LAYERS
    profile = random_profile(model)
    expected = logits(model, ids)
    with oracle_routing(model, profile, 1):
        rerouted = logits(model, ids)
    assert not torch.allclose(rerouted, expected, atol=1e-3)
    sere_compile.attach(model, profile)
    for select, wanted, tolerance in ((4, expected, 0), (1, rerouted, 1e-4)):
        options = {"select_top_k": select, "min_active": 0, "inner": "eager"}
        found = logits(torch.compile(model, backend="sere", options=options), ids)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
