"""Random matrices, and small models of transformers that they fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

E, H = 8, 16


NAME = "model.layers.{layer}.mlp.gate.weight"


GATES = [NAME.format(layer=layer) for layer in range(3)]


TINY = {
    "vocab_size": 64,
    "hidden_size": H,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def matrix(seed=0, experts=E):
    """A random similarity matrix [experts, experts]: symmetric, ones on the diagonal."""
    half = torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def matrices(names=GATES, experts=E):
    return {name: matrix(seed, experts) for seed, name in enumerate(names)}


def changed(value, row=1, column=2):
    """A matrix with one entry replaced."""
    result = matrix()
    result[row, column] = value
    return result


def build(kind, device="cpu"):
    """A tiny model of transformers with three MoE layers of E experts."""
    transformers = pytest.importorskip("transformers")
    options = {
        "Mixtral": {"num_local_experts": E, "intermediate_size": H},
        "Qwen2Moe": {"num_experts": E, "intermediate_size": H, "moe_intermediate_size": E},
        "Qwen3Moe": {"num_experts": E, "intermediate_size": H, "moe_intermediate_size": E, "head_dim": E},
        "GptOss": {"num_local_experts": E, "intermediate_size": E, "head_dim": E},
        "Phimoe": {"num_local_experts": E, "intermediate_size": H},
        "Jamba": {
            "num_experts": E,
            "intermediate_size": H,
            "expert_layer_offset": 0,
            "expert_layer_period": 1,
        },
        "JetMoe": {"num_local_experts": E, "intermediate_size": H, "kv_channels": E},
        "LongcatFlash": {
            "num_layers": 1,
            "n_routed_experts": E,
            "zero_expert_num": 2,
            "ffn_hidden_size": H,
            "expert_ffn_hidden_size": E,
        },
    }[kind]
    config = getattr(transformers, kind + "Config")(**TINY, **options)
    with torch.device(device):
        return getattr(transformers, kind + "ForCausalLM")(config)


def coefficients(names=GATES, experts=E):
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(experts, experts, generator=generator) for name in names}


class ListMoe(nn.Module):
    """The layout of most models outside transformers: a router beside a ModuleList of experts."""

    def __init__(self, router="router", experts=E):
        super().__init__()
        setattr(self, router, nn.Linear(H, experts, bias=False))
        self.experts = nn.ModuleList(nn.Linear(H, experts, bias=False) for _ in range(experts))
        self.shared_expert = nn.Linear(H, experts, bias=False)


def stack(*layers):
    """A model whose layers are `blocks.N.ffn`, each with a projection that has E rows beside it."""
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for ffn in layers:
        block = nn.Module()
        block.k_proj, block.ffn = nn.Linear(H, E, bias=False), ffn
        model.blocks.append(block)
    return model
