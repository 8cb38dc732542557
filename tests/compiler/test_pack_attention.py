"""Attention beside the gates, on real models: which options change it, what is told, and that logits stay."""

import logging

import pytest
import torch
from transformers import StaticCache

import sere_compile
from sere_compile.integrations.transformers import cache_argument
from sere_compile.passes.graph.nodes import kind

from .. import tiny_models


def decode(name, **options):
    """Logits of one step after a prompt, through the backend, and the kinds of the step's operations."""
    model, ids = tiny_models.build(name), tiny_models.tokens()
    sere_compile.attach(model, tiny_models.random_profile(model))
    cache = {cache_argument(model): StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)}
    seen = []

    def inner(graph, _):
        seen.extend(kind(node) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    backend = sere_compile.sere_backend.with_options(inner=inner, select_top_k=1, min_active=0, **options)
    with torch.no_grad():
        model(input_ids=ids, **cache)
        step = torch.compile(model, backend=backend, dynamic=False)
        return step(input_ids=ids[:, :1], **cache).logits, seen


def test_a_decode_step_copies_no_keys(caplog):
    """Grouped queries of Qwen3-MoE: no expansion is left, and the logits are those of the copies, to rounding."""
    with caplog.at_level(logging.INFO, logger="sere_compile"):
        logits, seen = decode("qwen3_moe", pack_gqa="always")
    assert f"{tiny_models.LAYERS} calls of one token read keys and values once per group of heads" in caplog.text
    assert seen.count("scaled_dot_product_attention") == tiny_models.LAYERS
    # Each layer's keys and values; what remains is not attention's.
    want, copied = decode("qwen3_moe", pack_gqa=False)
    assert copied.count("expand") - seen.count("expand") == 2 * tiny_models.LAYERS
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_by_default_a_cpu_keeps_its_attention():
    """Kernels for CPUs round other rows otherwise, and S = K changes no bit."""
    _, seen = decode("mixtral")
    assert "expand" in seen


class Attention(torch.nn.Module):
    """Attention of one token with copied keys, and no gate."""

    def forward(self, q, k):
        keys = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(k), -1, *k.shape[2:])
        return torch.nn.functional.scaled_dot_product_attention(q, keys, keys)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_without_a_gate_stays():
    seen = []

    def inner(graph, _):
        seen.extend(kind(node) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    backend = sere_compile.sere_backend.with_options(inner=inner, pack_gqa="always")
    torch.compile(Attention(), backend=backend)(torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8))
    assert "expand" in seen


def test_why_attention_keeps_its_copies_is_told(caplog):
    """A graph with a gate and attention that is causal: the pass refuses it with its reason."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(8, 4, bias=False)
            self.experts = torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x, q, k):
            keys = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(k), -1, *k.shape[2:])
            out = torch.nn.functional.scaled_dot_product_attention(q, keys, keys, is_causal=True)
            weights, ids = self.gate(x).softmax(-1).topk(2)
            return (torch.einsum("td,tkde->tke", x, self.experts[ids]) * weights[..., None]).sum(1), out

    torch._dynamo.reset()
    backend = sere_compile.sere_backend.with_options(inner="eager", select_top_k=1, pack_gqa="always")
    with caplog.at_level(logging.INFO, logger="sere_compile"), torch.no_grad():
        torch.compile(Both(), backend=backend)(torch.randn(5, 8), torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8))
    assert "copies keys and values for each query head: is_causal is True" in caplog.text
