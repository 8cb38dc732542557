"""Routers that `sere::route` stands in for: believed only where it selects as they do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.integrations.vllm import plugin, routers
from sere_compile.integrations.vllm.routing import BatchState, RoutingHook

EXPERTS, TOP_K, TOKENS = 16, 4, 8
DECODE, PREFILL = ({"layer": SimpleNamespace(max_query_len=length)} for length in (1, 7))


class FusedTopKRouter:
    """As the engine's of this name."""

    top_k, scoring_func, renormalize = TOP_K, "softmax", True
    e_score_correction_bias = None
    routed_scaling_factor = 1.0
    asked = 0

    def scores(self, logits):
        return logits.float().softmax(-1) if self.scoring_func == "softmax" else logits.float().sigmoid()

    def choice(self, scores):
        return scores

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        self.asked += 1
        scores = self.scores(router_logits)
        ids = self.choice(scores).sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.routed_scaling_factor, ids.to(indices_type or torch.int32)


class FusedTopKBiasRouter(FusedTopKRouter):
    scoring_func, routed_scaling_factor = "sigmoid", 2.5
    e_score_correction_bias = torch.linspace(-1, 1, EXPERTS)

    def choice(self, scores):
        return scores + self.e_score_correction_bias.to(scores.device)


class GroupedTopKRouter(FusedTopKBiasRouter):
    """Two of four groups, ranked by their two best; the best expert last."""

    num_expert_group, topk_group = 4, 2

    def choice(self, scores):
        choice = super().choice(scores)
        groups = choice.view(len(choice), 4, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        is_open = torch.zeros(len(choice), 4, dtype=torch.bool, device=scores.device).scatter(1, best, True)
        return torch.where(is_open[:, :, None], groups, -torch.inf).flatten(1)

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        weights, ids = super()._compute_routing(hidden_states, router_logits)
        return weights.flip(1), ids.flip(1).to(indices_type or torch.int32)


KINDS = [FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter]


def known(router, device, dtype=torch.float32):
    found = routers.known_router(router, dtype)
    if found.bias is not None:
        found = routers.KnownRouter(**{**vars(found), "bias": found.bias.to(device)})
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_router_of_a_known_kind_is_believed(kind, dtype, device):
    assert routers.differs(kind(), known(kind(), device, dtype), EXPERTS, torch.device(device)) == ""


@pytest.mark.parametrize(("change", "reason"), [
    ({"choice": lambda scores: -scores}, "other experts for 512 of 512 tokens"),
    ({"scores": lambda logits: logits.float().softmax(-1) ** 2}, "weights"),
    ({"scores": lambda logits: logits.gone}, "could not be compared: AttributeError"),
    ({"top_k": 3}, r"ids of shape \[512, 3\]"),
])  # fmt: skip
def test_a_router_that_does_something_else_is_not(change, reason, device):
    router = FusedTopKRouter()
    believed = known(router, device)
    vars(router).update(change)
    assert re.match(reason, routers.differs(router, believed, EXPERTS, torch.device(device)))


@pytest.mark.parametrize("changes", [
    {"scoring_func": "sqrtsoftplus"}, {"num_fused_shared_experts": 1}, {"_hash_indices_table": 1}, {"bias_vl": 1},
])  # fmt: skip
def test_other_settings_are_not_known(changes):
    router = FusedTopKBiasRouter()
    vars(router).update(changes)
    assert routers.known_router(router, torch.float32) is None
    assert routers.known_router(SimpleNamespace(scoring_func="softmax"), torch.float32) is None


def test_kinds_differ_by_everything_but_the_values_of_a_bias():
    one, other = FusedTopKBiasRouter(), FusedTopKBiasRouter()
    other.e_score_correction_bias = -one.e_score_correction_bias
    assert routers.known_router(one, torch.float32).kind == routers.known_router(other, torch.float32).kind
    other.renormalize = False
    assert routers.known_router(one, torch.float32).kind != routers.known_router(other, torch.float32).kind


def on_device(router, device):
    """As an engine has it: the bias is a parameter."""
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias = router.e_score_correction_bias.to(device)
    return router


def hook(router, device, **options):
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(EXPERTS, EXPERTS, generator=generator)
    config = SereConfig(**{"select_top_k": 1, "min_active": 0, **options})
    state = BatchState(torch.device(device), "decode", None, 1)
    similarity = None if config.substitution == "fill" else ((half + half.T) / 2).fill_diagonal_(1.0)
    made = RoutingHook(router, similarity, config, state, num_experts=EXPERTS)
    made.install()
    return made


def in_order(weights, ids):
    """By expert and weight, for slots may be anywhere."""
    rows = zip(weights.tolist(), ids.tolist(), strict=True)
    return [sorted((i, round(w, 5)) for w, i in zip(*row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("kind", "substitution"), [*((kind, "reroute") for kind in KINDS), *((kind, "fill") for kind in KINDS[:2])]
)
@pytest.mark.parametrize("indices_type", [None, torch.int64, torch.uint32], ids=str)
def test_the_hook_selects_as_the_router_and_reroutes_as_before(kind, substitution, indices_type, device):
    """Decode, prefill and padding; the router is not asked, but for logits of another type. Filling likewise."""
    router, plain = (on_device(kind(), device) for _ in range(2))
    made, before = (hook(one, device, substitution=substitution) for one in (router, plain))
    made.known = known(router, device)
    assert made.selects
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).to(device)
    changed = False
    for metadata, real in ((DECODE, TOKENS), (PREFILL, TOKENS), (DECODE, 5), (DECODE, 0)):
        padding = torch.arange(TOKENS, device=device) >= real
        for one in (made, before):
            one.state.begin(metadata, padding)
        weights, ids = router._compute_routing(logits, logits, indices_type)
        expected = plain._compute_routing(logits, logits, indices_type)
        assert ids.dtype == expected[1].dtype
        ids, wanted = ids.long(), expected[1].long()
        assert in_order(weights[:real], ids[:real]) == in_order(expected[0][:real], wanted[:real])
        assert (ids[real:].int() == -1).all()
        assert (weights[real:] == 0).all()
        changed |= in_order(weights[:real], ids[:real]) != in_order(
            *(t[:real] for t in kind()._compute_routing(logits, logits))
        )
    assert changed
    assert router.asked == 0
    router._compute_routing(logits.half(), logits.half(), indices_type)
    assert router.asked == 1
    assert made.has_run


@pytest.mark.parametrize("options", [{"collect_stats": True}, {"substitution": "projection"}], ids=str)
def test_what_needs_the_ids_before_keeps_the_router(options, device):
    made = hook(FusedTopKRouter(), device, **options)
    made.projection = torch.ones(1) if "substitution" in options else None
    assert not made.selects


def test_only_on_cuda(device):
    """And there in every layer whose kind was compared."""
    hooks = {name: hook(FusedTopKRouter(), device) for name in ("a", "b")}
    moe = SimpleNamespace(moe_config=SimpleNamespace(router_logits_dtype=None, in_dtype=torch.bfloat16))
    count = plugin.select_in_hooks(hooks, {"a": moe, "b": moe}, torch.device(device))
    assert count == (2 if device == "cuda" else 0)
    assert all((one.known is not None) == (device == "cuda") for one in hooks.values())
