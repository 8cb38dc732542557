"""The rewritten gate of the three models, as each tracer shows it. EXPECTTEST_ACCEPT=1 updates the literals."""

from importlib import metadata

import pytest
import torch

from sere_compile.passes import RoutingSettings, find_gates, reroute_dispatch

from ..graph_snapshot import snapshot
from ..tiny_models import build
from .moe_modules import add_matrix

expecttest = pytest.importorskip("expecttest")
unclamped = pytest.mark.skipif(
    metadata.version("transformers").startswith("5.17."), reason="its batched_mm clamps ids before it gathers weights"
)


def rewritten(name, experts, tracer):
    """The first layer's MoE block, traced and re-routed with S = 1, rho = 0.25 and min_active = 3."""
    block = build(name, experts).model.layers[0].mlp
    hidden = torch.randn(4, 6, 32)
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        if tracer == "dynamo":
            torch.compile(block, backend=capture)(hidden)
        else:
            graphs.append(torch.export.export(block, (hidden,)).graph_module)
    torch._dynamo.reset()
    found = [(graph, gate) for graph in graphs for gate in find_gates(graph, lambda weight, experts: True).gates]
    [(graph, gate)] = found
    done = reroute_dispatch(gate, add_matrix(graph, torch.eye(gate.num_experts)), RoutingSettings(1, 0.25, 3))
    graph.graph.lint()
    return snapshot(done)


def test_mixtral_dynamo():
    """In-place normalisation stays in front; only the ids that are sorted are new."""
    expecttest.assert_expected_inline(
        rewritten("mixtral", "grouped_mm", "dynamo"),
        """\
%0 = topk(scores, 2, dim=-1)
%1 = item(%0, 0) -> float32[24, 2]
%2 = item(%0, 1) -> int64[24, 2]
%3 = sum(%1, dim=-1, keepdim=True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 2]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 2]
%6 = view(%5, -1) -> int64[48]
%7 = sort(%6)
""",
    )


def test_mixtral_export():
    """The same in ATen."""
    expecttest.assert_expected_inline(
        rewritten("mixtral", "grouped_mm", "export"),
        """\
%0 = topk(scores, 2)
%1 = item(%0, 0) -> float32[24, 2]
%2 = item(%0, 1) -> int64[24, 2]
%3 = sum(%1, [-1], True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 2]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 2]
%6 = view(%5, [-1]) -> int64[48]
%7 = sort(%6)
""",
    )


def test_qwen2_moe_dynamo():
    """Weights that are not normalised are the selected scores."""
    expecttest.assert_expected_inline(
        rewritten("qwen2_moe", "grouped_mm", "dynamo"),
        """\
%0 = topk(scores, 4, dim=-1)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%4 = view(%3, -1) -> int64[96]
%5 = sort(%4)
""",
    )


def test_qwen2_moe_export():
    """The same in ATen."""
    expecttest.assert_expected_inline(
        rewritten("qwen2_moe", "grouped_mm", "export"),
        """\
%0 = topk(scores, 4)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%4 = view(%3, [-1]) -> int64[96]
%5 = sort(%4)
""",
    )


def test_qwen3_moe_dynamo():
    """Like Mixtral, with K = 4 of 16."""
    expecttest.assert_expected_inline(
        rewritten("qwen3_moe", "grouped_mm", "dynamo"),
        """\
%0 = topk(scores, 4, dim=-1)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sum(%1, dim=-1, keepdim=True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 4]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%6 = view(%5, -1) -> int64[96]
%7 = sort(%6)
""",
    )


def test_qwen3_moe_export():
    """The same in ATen."""
    expecttest.assert_expected_inline(
        rewritten("qwen3_moe", "grouped_mm", "export"),
        """\
%0 = topk(scores, 4)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sum(%1, [-1], True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 4]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%6 = view(%5, [-1]) -> int64[96]
%7 = sort(%6)
""",
    )


@unclamped
def test_batched_mm_dynamo():
    """Both gathers of expert weights read the new ids through one view."""
    expecttest.assert_expected_inline(
        rewritten("qwen3_moe", "batched_mm", "dynamo"),
        """\
%0 = topk(scores, 4, dim=-1)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sum(%1, dim=-1, keepdim=True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 4]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%6 = view(%5, -1) -> int64[96]
%7 = index(experts[16, 32, 32], %6) -> float32[96, 32, 32]
%8 = index(experts[16, 32, 16], %6) -> float32[96, 32, 16]
""",
    )


@unclamped
def test_batched_mm_export():
    """The same in ATen."""
    expecttest.assert_expected_inline(
        rewritten("qwen3_moe", "batched_mm", "export"),
        """\
%0 = topk(scores, 4)
%1 = item(%0, 0) -> float32[24, 4]
%2 = item(%0, 1) -> int64[24, 4]
%3 = sum(%1, [-1], True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 4]
%5 = sere.reroute(%2, similarity, 1, 0.25, 3) -> int64[24, 4]
%6 = view(%5, [-1]) -> int64[96]
%7 = index(experts[16, 32, 32], [%6]) -> float32[96, 32, 32]
%8 = index(experts[16, 32, 16], [%6]) -> float32[96, 32, 16]
""",
    )


def test_eager_experts_dynamo():
    """Ids that leave for an eager expert loop are merged: ids and weights change together."""
    expecttest.assert_expected_inline(
        rewritten("mixtral", "eager", "dynamo"),
        """\
%0 = topk(scores, 2, dim=-1)
%1 = item(%0, 0) -> float32[24, 2]
%2 = item(%0, 1) -> int64[24, 2]
%3 = sum(%1, dim=-1, keepdim=True) -> float32[24, 1]
%4 = div!(%1, %3) -> float32[24, 2]
%5 = sere.reroute_merged(%2, %4, similarity, 1, 0.25, 3)
%6 = item(%5, 0) -> int64[24, 2]
%7 = item(%5, 1) -> float32[24, 2]
output(%6, %7)
""",
    )
