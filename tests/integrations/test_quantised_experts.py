"""Quantised experts of transformers: what is found and re-routed, with what needs a GPU replaced by plain PyTorch."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations import finegrained_fp8, mxfp4

import sere_compile
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.testing import oracle_routing

from ..tiny_models import VOCABULARY, build, tokens
from .fp8_kernels import KERNELS, UNROUNDED, build_fp8

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
IDS = tokens(4, 3)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def similarity_of(model):
    """A random similarity for every router."""
    routers = {name: len(p) for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))}
    halves = {name: torch.rand(n, n, generator=torch.Generator().manual_seed(0)) for name, n in routers.items()}
    return SimilarityProfile({name: ((half + half.T) / 2).fill_diagonal_(1.0) for name, half in halves.items()})


def re_routed(model, **options):
    """Logits at S = 1 through the backend, and those of the eager oracle."""
    profile = similarity_of(model)
    sere_compile.attach(model, profile)
    compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "eager", **options})
    with oracle_routing(model, profile, 1):
        wanted = logits(model)
    return logits(compiled), wanted


def fp8_linear(hidden, weight, scale, activation_scale=None):
    """What the FP8 kernel computes, but for the rounding of activations."""
    blocks = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return F.linear(hidden, weight.float() * blocks[: weight.shape[0], : weight.shape[1]])


@pytest.mark.slow
def test_fp8_experts_are_re_routed():
    """Their loop runs outside the graph; FP8 weights with block scales, the matmul in plain PyTorch."""
    model = build("qwen3_moe")
    for layer in model.model.layers:
        experts = finegrained_fp8.FP8Experts(model.config, block_size=(16, 16))
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).data = getattr(layer.mlp.experts, name).detach().to(torch.float8_e4m3fn)
            scale = getattr(experts, f"{name}_scale_inv")
            scale.data = torch.full_like(scale, 0.5)
        experts.linear = fp8_linear
        layer.mlp.experts = experts
    model.set_experts_implementation("eager")
    found, wanted = re_routed(model)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, logits(model))


@pytest.mark.parametrize("experts", [pytest.param("batched_mm", marks=pytest.mark.slow), "grouped_mm"])
def test_fp8_experts_of_the_hub_are_re_routed(experts, monkeypatch):
    """As a checkpoint is loaded: the oracle's logits bit for bit."""
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", KERNELS)
    model = build_fp8(experts)
    found, wanted = re_routed(model)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, logits(model))


@pytest.mark.parametrize(
    ("experts", "kernels"),
    [
        pytest.param("batched_mm", KERNELS, marks=pytest.mark.slow),
        ("grouped_mm", KERNELS),
        ("batched_mm", UNROUNDED),  # the name of a kernel is no proof of what it computes
    ],
    ids=["batched", "grouped", "other numbers"],
)
def test_fp8_experts_become_the_operator(experts, kernels, monkeypatch, caplog):
    """Which rounds activations as they do; only where it is asked for, as nobody compared the speed."""
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", kernels)
    graphs = []

    def inner(graph, inputs):
        graphs.append(graph.graph)
        return graph

    with caplog.at_level("INFO", "sere_compile"):
        found, wanted = re_routed(build_fp8(experts), inner=inner, lower_experts="always")
    calls = [node for graph in graphs for node in graph.nodes if node.target is torch.ops.sere.expert_mlp.default]
    if kernels is KERNELS:
        assert [call.kwargs["fp8_activations"] for call in calls] == [True, True]
        # Of two layers: what each product rounds depends on the last bits of what comes before.
        assert (found - wanted).float().norm() < 6e-2 * wanted.float().norm()
    else:
        assert not calls
        assert "no expert layer of ours gives its numbers" in caplog.text
        assert torch.equal(found, wanted)


def test_fp8_experts_keep_their_kernels_unless_asked(monkeypatch, caplog):
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", KERNELS)
    monkeypatch.setattr(SereConfig, "acts", lambda self, switch, device: switch == "lower_experts")  # as on CUDA
    with caplog.at_level("INFO", "sere_compile"):
        found, wanted = re_routed(build_fp8("batched_mm"))
    assert torch.equal(found, wanted)
    assert 'not compared with its own (FP8 weights; lower_experts="always" takes ours)' in caplog.text


@torch.library.custom_op("test_quantised::routing", mutates_args=())
def routing(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects experts where no graph sees it, as the Triton kernel does."""
    best = scores.topk(top_k, -1)
    return best.values.softmax(-1), best.indices


@routing.register_fake
def _(scores, top_k):
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@pytest.fixture
def gpt_oss(monkeypatch):
    """gpt-oss with the layer that MXFP4 puts in; its kernels are the plain experts, behind an opaque selection."""
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_local_experts=8, num_experts_per_tok=4,
        vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    hub = types.SimpleNamespace(routing=types.SimpleNamespace(routing=lambda s, k: (routing(s, k), None, None)))
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", hub, raising=False)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.forward_routed = lambda x, routed, *_, own=experts: own(x, routed[1], routed[0])
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, experts)
    return model


def test_mxfp4_selects_in_a_kernel(gpt_oss):
    """Nothing is found, and the model is what it was."""
    report = sere_compile.explain(gpt_oss, input_ids=IDS, use_cache=False)
    assert (len(report.gates), bool(report.hint)) == (0, True)
    found, _ = re_routed(gpt_oss)
    torch.testing.assert_close(found, logits(gpt_oss))


def test_mxfp4_calls_its_router_where_it_is_hooked(gpt_oss):
    """`experts._is_hooked = True`, which expert parallelism sets: the router's ids reach the experts."""
    for layer in gpt_oss.model.layers:
        layer.mlp.experts._is_hooked = True
    found, wanted = re_routed(gpt_oss)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, logits(gpt_oss))


@torch.library.custom_op("test_quantised::whole_layer", mutates_args=())
def whole_layer(hidden: torch.Tensor, router: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Router and experts in one call, as kernels do that replace a layer (MegaBlocks, by `use_kernels=True`)."""
    rows = hidden.flatten(0, -2)
    weights, ids = F.linear(rows, router).softmax(-1).topk(4, -1)
    gate, value = torch.einsum("tgh,th->tg", up[ids].flatten(1, 2), rows).view(*ids.shape, -1).chunk(2, -1)
    outs = torch.einsum("tkhi,tki->tkh", down[ids], F.silu(gate) * value)
    return (outs * (weights / weights.sum(-1, keepdim=True))[..., None]).sum(1).view(hidden.shape)


@whole_layer.register_fake
def _(hidden, router, up, down):
    return torch.empty_like(hidden)


class KernelLayer(nn.Module):
    """What `use_kernels=True` makes of a layer: its parameters, and a forward that is one kernel."""

    def __init__(self, layer):
        super().__init__()
        self.gate, self.experts = layer.gate, layer.experts

    def forward(self, hidden):
        return whole_layer(hidden, self.gate.weight, self.experts.gate_up_proj, self.experts.down_proj)


def test_a_layer_that_is_one_kernel_is_named_and_left_alone(caplog):
    """Nothing selects where it can be seen: the report names the routers, a compile warns, strict raises."""
    model = build("qwen3_moe")
    plain = logits(model)
    for layer in model.model.layers:
        layer.mlp = KernelLayer(layer.mlp)
    torch.testing.assert_close(logits(model), plain)
    report = sere_compile.explain(model, input_ids=IDS, use_cache=False)
    assert not report.gates
    assert "model.layers.0.mlp.gate.weight, model.layers.1.mlp.gate.weight), and no top-k of PyTorch" in report.hint
    assert "use_kernels=True" in str(report)
    found, _ = re_routed(model)
    assert torch.equal(found, logits(model))
    assert "sere found no MoE gate in the compiled code: it runs unchanged" in caplog.text
    torch._dynamo.reset()
    strict = torch.compile(model, backend="sere", options={"strict": True, "inner": "eager"})
    with pytest.raises(BackendCompilerFailed, match="GateNotFoundError: sere found no MoE gate"):
        logits(strict)
