"""Models that bitsandbytes and torchao quantise as transformers loads them: stacked experts stay, and are re-routed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM, TorchAoConfig

from ..tiny_models import LAYERS, VOCABULARY
from .test_quantised_experts import logits, re_routed

# Rows of 64, the block of bitsandbytes: its kernel for a CPU takes none that are shorter.
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
}  # fmt: skip

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]


def bits(count):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=count == 4, load_in_8bit=count == 8)


def int8():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "config",
    [lambda: bits(4), lambda: bits(8), int8],
    ids=["bitsandbytes, 4 bit", "bitsandbytes, 8 bit", "torchao, int8 weights"],
)
def test_linear_layers_are_quantised_and_experts_re_routed(config, tmp_path):
    """As the oracle does it; the table of docs/transformers.md."""
    config = config()
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    plain = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()
    for layer in plain.model.layers:
        layer.mlp.gate.weight.data.normal_()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert len(model.model.layers) == LAYERS
    for layer, original in zip(model.model.layers, plain.model.layers, strict=True):
        assert torch.equal(layer.mlp.experts.down_proj, original.mlp.experts.down_proj)
        assert type(layer.self_attn.q_proj.weight) is not torch.nn.Parameter
    with torch._dynamo.config.patch(recompile_limit=64):  # one process runs the same code quantised and not
        found, wanted = re_routed(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(model), atol=1e-3)
