"""The packages themselves, where they are installed.

pip install --no-deps litgpt st-moe-pytorch fairscale torchtitan mistral-inference, and what they import:
lightning lightning-utilities psutil beartype colt5-attention local-attention hyper-connections einx torch-einops-utils
spmd-types tyro simple-parsing docstring-parser mistral-common fire xformers
"""

import pytest
import torch

import sere_compile
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.testing import reroute_oracle

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def imported(module):
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed", exc_type=ImportError)


def similarity(experts):
    half = torch.rand(experts, experts, generator=torch.Generator().manual_seed(1))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def test_litgpt():
    """A whole GPT of two layers: its loop over masks is captured, or nothing would be re-routed."""
    litgpt = imported("litgpt.model")
    config = litgpt.Config(
        block_size=16, vocab_size=96, padded_vocab_size=96, n_layer=2, n_head=4, n_embd=32, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE",
        intermediate_size=48, moe_intermediate_size=48, n_expert=12, n_expert_per_token=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = litgpt.GPT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    matrix = similarity(12)
    names = [f"transformer.h.{layer}.mlp.gate.weight" for layer in range(2)]
    sere_compile.attach(model, SimilarityProfile(dict.fromkeys(names, matrix)))
    ids = torch.randint(0, 96, (2, 4))

    plain = model(ids)
    assert torch.equal(sere_compile.compile(model, select_top_k=3, inner="eager")(ids), plain)

    def forward(block, x):
        """The sum over slots, from re-routed ids."""
        rows = x.view(-1, x.shape[-1])
        scores, chosen = block.gate(rows).topk(3)
        chosen = reroute_oracle(chosen, matrix, 1, 0.0, 3)
        weights = scores.softmax(1)
        slots = [sum(w * block.experts[e](row) for w, e in zip(ws, es, strict=True))
                 for row, ws, es in zip(rows, weights, chosen.tolist(), strict=True)]  # fmt: skip
        return torch.stack(slots).view(x.shape)

    blocks = [layer.mlp for layer in model.transformer.h]
    for block in blocks:
        block.forward = forward.__get__(block)
    expected = model(ids)
    for block in blocks:
        del block.forward
    assert not torch.allclose(expected, plain, atol=1e-2)
    got = sere_compile.compile(model, select_top_k=1, inner="eager")(ids)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_st_moe_pytorch_is_left_alone():
    """Its experts have a capacity: nothing is re-routed."""
    package = imported("st_moe_pytorch")
    torch.manual_seed(0)
    model = package.MoE(dim=16, num_experts=8, gating_top_n=2).eval().requires_grad_(False)
    x = torch.randn(2, 8, 16)
    torch.manual_seed(0)  # whether a token keeps its second expert is drawn by chance
    expected = model(x).outputs
    compiled = torch.compile(model, backend=sere_compile.sere_backend.with_options(select_top_k=1, inner="eager"))
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x).outputs, expected)
    assert not sere_compile.explain(model, x, config=SereConfig(select_top_k=1)).rewritten


def test_fairscale_gate_is_left_alone():
    """Two arg-maxima and a capacity: nothing is re-routed."""
    package = imported("fairscale.nn.moe")
    torch.manual_seed(0)
    gate = package.Top2Gate(16, 8).eval().requires_grad_(False)
    gate.wg.weight.normal_(0, 0.5)
    experts = torch.randn(8, 16, 16)

    def layer(x):
        _, combine, dispatch = gate(x)
        inputs = torch.einsum("sec,sm->ecm", dispatch.to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, torch.bmm(inputs, experts))

    x = torch.randn(16, 16)
    torch.manual_seed(0)
    expected = layer(x)
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend = sere_compile.sere_backend.with_options(select_top_k=1, inner="eager")
    assert torch.compile(layer, backend=backend)(x).shape == expected.shape
    assert not sere_compile.explain(layer, x, config=SereConfig(select_top_k=1)).rewritten


def prepared(model, gate, matrix):
    """A model with weights that make routing differ, and its profile."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        parameter.normal_(0, 0.5, generator=generator)
    sere_compile.attach(model, SimilarityProfile({gate: matrix}))
    return model


def compared(model, x, expected, top_k, tolerance):
    """S = K bit-equal, S = 1 equal to the oracle, which is another result; the tolerance is of the largest output."""
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(sere_compile.compile(model, select_top_k=top_k, inner="eager")(x), plain)
        want = expected()
        allowed = tolerance * float(want.abs().max())
        assert float((want - plain).abs().max()) > 10 * allowed, "the case re-routes nothing"
        got = sere_compile.compile(model, select_top_k=1, inner="eager")(x)
    assert float((got - want).abs().max()) <= allowed


def test_mistral_inference():
    """Its MoE layer: `results[token] += ..` in a loop over `selected == i`."""
    package = imported("mistral_inference.moe")
    linear = torch.nn.Linear
    layer = package.MoeLayer([linear(16, 16) for _ in range(8)], linear(16, 8, bias=False), package.MoeArgs(8, 3))
    matrix = similarity(8)
    model, x = prepared(layer, "gate.weight", matrix), torch.randn(10, 16)

    def expected():
        scores, ids = model.gate(x).topk(3)
        ids, weights = reroute_oracle(ids, matrix, 1, 0.0, 3), scores.softmax(1)
        return torch.stack([
            sum(w * model.experts[e](row) for w, e in zip(ws, es, strict=True))
            for row, ws, es in zip(x, weights, ids.tolist(), strict=True)
        ])  # fmt: skip

    compared(model, x, expected, 3, 1e-5)


def test_torchtitan():
    """Its MoE layer, experts in bfloat16: counts of a mask, where a duplicate counts once, beside sorted slots."""
    moe = imported("torchtitan.models.common.moe")
    dispatcher = imported("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher
    config = moe.MoE.Config(
        num_experts=8,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=16, hidden_dim=32, num_experts=8),
            token_dispatcher=dispatcher.Config(num_experts=8, top_k=3),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=8, gate=moe.Linear.Config(in_features=16, out_features=8), top_k=3
        ),
    )
    matrix = similarity(8)
    model, x = prepared(config.build(), "router.gate.weight", matrix), torch.randn(2, 5, 16)
    experts = model.routed_experts.inner_experts

    def expected():
        rows = x.view(-1, 16)
        scores = model.router.gate(rows).sigmoid()
        ids = scores.topk(3)[1]
        weights = scores.gather(1, ids)
        ids = reroute_oracle(ids, matrix, 1, 0.0, 3)
        up = torch.nn.functional.silu(torch.einsum("td,efd->tef", rows, experts.w1_EFD))
        each = torch.einsum("tef,edf->ted", up * torch.einsum("td,efd->tef", rows, experts.w3_EFD), experts.w2_EDF)
        table = torch.zeros_like(scores).scatter_add(1, ids, weights)
        return torch.einsum("te,ted->td", table, each).view(x.shape)

    compared(model, x, expected, 3, 2e-2)
