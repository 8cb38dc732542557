"""The hook behind a router, without an engine: what a recorded graph and expert parallelism ask of it.

The tests in `vllm/` run it in the real engine, which has no GPU here; these run it on one where there is one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.integrations.vllm.routing import BatchState, RoutingHook, cannot_fill
from sere_compile.testing import reroute_oracle

from ..ops import fill_oracle

EXPERTS, TOP_K, TOKENS, WIDTH = 16, 4, 8, 32
DECODE, PREFILL = ({"layer": SimpleNamespace(max_query_len=length)} for length in (1, 7))


class FusedTopKRouter:
    """Selects as the engine's router of this name: best first on CUDA, int32 ids."""

    top_k = TOP_K
    scoring_func = "softmax"

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        weights, ids = router_logits.softmax(-1).topk(TOP_K, dim=-1)
        return weights, ids.to(indices_type or torch.int32)


class UnsortedRouter(FusedTopKRouter):
    """The same experts, the best one last."""

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type)
        return weights.flip(-1), ids.flip(-1)


class OwnExpertsRouter(FusedTopKRouter):
    """A rank's view under expert parallelism: experts of other ranks are -1."""

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type)
        return weights, torch.where(ids % 2 == 0, ids, -1)


def similarity() -> torch.Tensor:
    matrix = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(0))
    return ((matrix + matrix.T) / 2).fill_diagonal_(1.0)


def hook(router, device: str, **options) -> RoutingHook:
    config = SereConfig(**{"select_top_k": 1, "min_active": 0, **options})
    made = RoutingHook(router, similarity(), config, BatchState(torch.device(device), "decode", None, 1))
    made.install()
    return made


def inputs(device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    return hidden.to(device), torch.randn(TOKENS, EXPERTS, generator=generator).to(device)


def test_recorded_graphs_follow_the_batch(device):
    """One recording; decode, prefill and padded batches by replay, with other tokens each time."""
    router = FusedTopKRouter()
    state = hook(router, device).state
    hidden, logits = inputs(device)
    static = (hidden.clone(), logits.clone())
    replay = _recorded(lambda: router._compute_routing(*static), device)
    changed = 0
    for seed, (metadata, real) in enumerate([(DECODE, TOKENS), (PREFILL, TOKENS), (DECODE, 5), (None, 8), (DECODE, 1)]):
        for held, new in zip(static, inputs(device, seed), strict=True):
            held.copy_(new)
        padding = torch.arange(TOKENS, device=device) >= real
        state.begin(metadata, padding if real < TOKENS else None)
        ids = static[1].softmax(-1).topk(TOP_K, dim=-1).indices.cpu()
        expected = ids.clone()
        if metadata is DECODE:
            expected[:real] = reroute_oracle(expected[:real], similarity(), 1)
        got = replay()[1].cpu().long()
        assert torch.equal(got[:real], expected[:real])
        changed += int((got[:real] != ids[:real]).sum())
    assert changed, "the case re-routes nothing"


def _recorded(call, device: str):
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay():
        graph.replay()
        return held

    return replay


def test_counts_are_of_real_tokens_in_active_batches(device):
    """Padding rows count as nothing, and neither does a prefill."""
    router = FusedTopKRouter()
    made = RoutingHook(
        router, similarity(), SereConfig(select_top_k=1, min_active=0, collect_stats=True),
        BatchState(torch.device(device), "decode", None, 1),
    )  # fmt: skip
    made.install()
    hidden, logits = inputs(device)
    before = logits.softmax(-1).topk(TOP_K, dim=-1).indices[:5].cpu()
    after = reroute_oracle(before, similarity(), 1)
    padding = torch.arange(TOKENS, device=device) >= 5
    for metadata in (DECODE, PREFILL):
        made.state.begin(metadata, padding)
        router._compute_routing(hidden, logits)
    counted = made.stats()
    assert (counted.calls, counted.tokens, counted.slots) == (1, 5, 5 * TOP_K)
    assert counted.slots_changed == int((before != after).sum()) > 0
    assert (counted.mean_active_before, counted.mean_active_after) == (len(before.unique()), len(after.unique()))


def test_batches_of_padding_alone_are_not_counted(device):
    """As engines make them up while they warm up and record graphs; and after a reset the count begins anew."""
    router = FusedTopKRouter()
    made = hook(router, device, collect_stats=True)
    hidden, logits = inputs(device)

    def forward(metadata, real):
        made.state.begin(metadata, torch.arange(TOKENS, device=device) >= real)
        router._compute_routing(hidden, logits)

    forward(DECODE, 0)
    forward(None, TOKENS)
    assert (made.state.forwards, made.state.active_forwards, made.stats().calls) == (0, 0, 0)
    forward(DECODE, 5)
    forward(PREFILL, TOKENS)
    assert (made.state.forwards, made.state.active_forwards, made.stats().calls) == (2, 1, 1)
    made.state.reset()
    made.reset()
    forward(DECODE, 5)
    assert (made.state.forwards, made.state.active_forwards, made.stats().calls) == (1, 1, 1)


@pytest.mark.gpu
def test_a_beginning_that_was_recorded_counts_and_switches_in_each_replay():
    """The engine's second model runner records it with the forward, while all rows are padding."""
    router = FusedTopKRouter()
    made = hook(router, "cuda", collect_stats=True)
    state, static = made.state, inputs("cuda")
    padding = torch.ones(TOKENS, dtype=torch.bool, device="cuda")

    def forward():
        state.begin(DECODE, padding)
        return router._compute_routing(*static)

    replay = _recorded(forward, "cuda")
    state.reset()
    made.reset()
    ids = static[1].softmax(-1).topk(TOP_K, dim=-1).indices.cpu()
    for real in (3, 0, TOKENS):
        padding.copy_(torch.arange(TOKENS, device="cuda") >= real)
        state.begin(PREFILL, None)  # what ran between two replays
        got = replay()[1].cpu().long()
        assert torch.equal(got[:real], reroute_oracle(ids[:real], similarity(), 1))
        assert torch.equal(got[real:], ids[real:])
    assert state.active_forwards == made.stats().calls == 2


@pytest.mark.parametrize("indices_type", [torch.int32, torch.int64, torch.uint32], ids=str)
def test_ids_keep_their_type(device, indices_type):
    """Kernels ask for a type of ids; some for one in which PyTorch can do little."""
    router = FusedTopKRouter()
    made = hook(router, device, collect_stats=True)
    made.projection = similarity().to(device)
    made.state.begin(DECODE, None)
    hidden, logits = inputs(device)
    _, ids = router._compute_routing(hidden, logits, indices_type)
    assert ids.dtype is indices_type
    assert made.stats().slots_changed
    expected = reroute_oracle(logits.softmax(-1).topk(TOP_K, dim=-1).indices.cpu(), similarity(), 1)
    assert torch.equal(ids.cpu().long(), expected)


def test_slots_of_an_unsorted_router_stay_in_place(device):
    router = UnsortedRouter()
    hook(router, device).state.begin(DECODE, None)
    hidden, logits = inputs(device)
    weights, ids = router._compute_routing(hidden, logits)
    best_first = logits.softmax(-1).topk(TOP_K, dim=-1)
    assert torch.equal(ids.cpu().flip(-1).long(), reroute_oracle(best_first.indices.cpu(), similarity(), 1))
    assert torch.equal(weights, best_first.values.flip(-1))


def test_experts_of_other_ranks_pass_through(device):
    """They are nobody's target, make no expert primary, and stay what they are, also with projected weights."""
    router = OwnExpertsRouter()
    made = hook(router, device)
    made.projection = similarity().to(device)
    made.state.begin(DECODE, None)
    hidden, logits = inputs(device)
    weights, ids = router._compute_routing(hidden, logits)
    before_weights, before = OwnExpertsRouter()._compute_routing(hidden, logits)
    # The weights rank the slots, and a slot of another rank has the lowest rank of all.
    order = torch.where(before >= 0, before_weights, -1.0).argsort(dim=-1, descending=True, stable=True)
    expected = reroute_oracle(before.gather(1, order).cpu(), similarity(), 1)
    back = torch.zeros_like(expected).scatter(1, order.cpu(), expected)
    assert torch.equal(ids.cpu(), back)
    assert torch.equal(ids == -1, before == -1)
    assert torch.equal(weights[before == -1], before_weights[before == -1])
    assert (ids != before).any()


@pytest.mark.parametrize("kind", [FusedTopKRouter, UnsortedRouter])
def test_slots_are_filled_by_the_router_logits(device, kind):
    """With `substitution="fill"` there is no matrix; ids and weights are the oracle's, each slot in its place."""
    router = kind()
    made = RoutingHook(
        router, None, SereConfig(select_top_k=1, substitution="fill", collect_stats=True),
        BatchState(torch.device(device), "decode", None, 1), num_experts=EXPERTS,
    )  # fmt: skip
    made.install()
    hidden, logits = inputs(device)
    made.state.begin(None, None)  # not active: the router's own choice
    idle = router._compute_routing(hidden, logits)
    assert all(torch.equal(*pair) for pair in zip(idle, kind()._compute_routing(hidden, logits), strict=True))
    made.state.begin(DECODE, None)
    weights, ids = router._compute_routing(hidden, logits)
    scores = logits.double().softmax(-1).cpu()
    best_first = scores.topk(TOP_K, dim=-1)
    rows = fill_oracle.fill_rows(best_first.indices.tolist(), best_first.values.tolist(), scores.tolist(), 1)
    flipped = (lambda x: x.flip(-1)) if kind is UnsortedRouter else (lambda x: x)
    assert torch.equal(flipped(ids).cpu().long(), torch.tensor(rows[0]))
    torch.testing.assert_close(flipped(weights).cpu().double(), torch.tensor(rows[1]).double(), rtol=1e-5, atol=1e-7)
    assert made.stats().slots_changed


def test_routers_that_cannot_be_filled_say_why():
    """Their choice is no function of logits and bias alone."""
    grouped = SimpleNamespace(num_expert_group=4, topk_group=2)
    assert "groups" in cannot_fill(grouped)
    assert "custom_routing_function" in cannot_fill(SimpleNamespace(custom_routing_function=len))
    assert "scores by relu" in cannot_fill(SimpleNamespace(scoring_func="relu"))
    assert cannot_fill(FusedTopKRouter()) == ""
