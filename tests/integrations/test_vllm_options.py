"""What users write in vLLM's configuration, and what re-routing makes of it; no vLLM is needed to check it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sere_compile import ConfigError, SereConfig
from sere_compile.integrations.vllm import read_options
from sere_compile.integrations.vllm.routing import BatchState, RoutingHook, selection_scores
from sere_compile.ops import reroute
from sere_compile.testing import projection_oracle, reroute_oracle


def vllm_config(sere=None, overrides=None):
    additional = {} if sere is None else {"sere": sere}
    return SimpleNamespace(additional_config=additional, model_config=SimpleNamespace(hf_overrides=overrides or {}))


def test_nothing_is_switched_on_unless_asked():
    assert read_options(vllm_config()) is None
    assert read_options(vllm_config(overrides={"threshold": 0.1})) is None
    assert read_options(vllm_config({})).config.select_top_k is None


def test_both_ways_to_switch_it_on():
    ours = read_options(vllm_config({"select_top_k": 1, "threshold": 0.1}))
    theirs = read_options(vllm_config(overrides={"select_top_k": 1, "threshold": 0.1, "rope_theta": 5}))
    assert ours == theirs
    assert (ours.config.select_top_k, ours.config.threshold, ours.phase) == (1, 0.1, "decode")


@pytest.mark.parametrize(("sere", "overrides", "message"), [
    ({"select_topk": 1}, {}, "unknown option 'select_topk' of sere; did you mean 'select_top_k'"),
    ({"inner": "eager"}, {}, "unknown option 'inner'"),
    ({"select_top_k": 0}, {}, "select_top_k must be"),
    ({"phase": "prefill"}, {}, "phase must be one of 'decode', 'all'"),
    ({"profile": 3}, {}, "profile must be the path"),
    ({"routing_batch": "group"}, {}, "routing_batch must be one of 'rank', 'all_ranks', got 'group'"),
    ({"routing_batch": "all_ranks", "substitution": "fill"}, {}, 'substitution="fill" takes the tokens\' own scores'),
    ({"routing_batch": "all_ranks", "per_gate": {"*.0.*": {"substitution": "fill"}}}, {}, "other ranks do not have"),
    ({"substitution": "projected"}, {}, 'substitution must be "reroute", "projection" or "fill"'),
    ({"select_top_k": "auto"}, {}, "max_active go together"),
    ({"threshold": "0.2"}, {}, 'such as "q0.2"'),
    ({"per_gate": {"*.0.*": {"phase": "all"}}}, {}, "phase"),
    ({"per_gate": {"*.0.*": {"max_tokens": 3}}}, {}, "one limit for all layers"),
    (True, {}, "must be a dict"),
    ({"threshold": 0.2}, {"select_top_k": 1, "threshold": 0.1}, "threshold stands in"),
])  # fmt: skip
def test_mistakes_are_named(sere, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_options(vllm_config(sere, overrides))


class Router:
    """As vLLM's: an unsorted top-k."""

    def __init__(self, top_k=3, bias=None):
        self.top_k, self.e_score_correction_bias, self.scoring_func = top_k, bias, "sigmoid"

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        scores = router_logits.sigmoid() + (0 if self.e_score_correction_bias is None else self.e_score_correction_bias)
        ids = scores.topk(self.top_k).indices.flip(1)
        return router_logits.sigmoid().gather(1, ids), ids.to(torch.int32)


def hooked(router, state, experts=8, projection=None, **options):
    matrix = torch.rand(experts, experts, generator=torch.Generator().manual_seed(0))
    config = SereConfig(**{"select_top_k": 1, "min_active": 0, "collect_stats": True, **options})
    return RoutingHook(router, matrix, config, state, projection)


def random_logits(tokens, seed=1):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def decoding(tokens):
    return {"layer": SimpleNamespace(max_query_len=1, num_actual_tokens=tokens)}


@pytest.mark.parametrize("bias", [None, torch.tensor([0.9, 0, 0.7, 0, 0.8, 0, 0, 0])])
def test_an_unsorted_choice_is_rerouted_in_the_order_it_was_chosen(bias):
    """With a correction bias the order of the weights is another one."""
    router, state = Router(bias=bias), BatchState(torch.device("cpu"), "decode", None, 1)
    hook = hooked(router, state)
    logits = random_logits(5)
    weights, ids = router._compute_routing(logits, logits, None)
    scores = selection_scores(router, ids, weights, logits)
    assert torch.equal(scores.flip(1).sort(descending=True).indices, torch.arange(3).expand(5, 3))
    state.begin(decoding(5), None)
    new_weights, new_ids = hook.compute_routing(logits, logits)
    assert torch.equal(new_weights, weights)
    assert torch.equal(new_ids.flip(1), reroute(ids.flip(1), hook.matrix, 1))
    assert hook.has_run
    assert hook.stats().calls == 1


def test_a_batch_with_a_prompt_is_left_alone():
    router, state = Router(), BatchState(torch.device("cpu"), "decode", None, 1)
    hook, logits = hooked(router, state), torch.randn(5, 8)
    state.begin({"layer": SimpleNamespace(max_query_len=2)}, None)
    assert torch.equal(hook.compute_routing(logits, logits)[1], router._compute_routing(logits, logits, None)[1])
    assert hook.stats().calls == 0


def test_padding_makes_no_expert_primary():
    router, state = Router(), BatchState(torch.device("cpu"), "all", None, 1)
    hook, logits = hooked(router, state), torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    state.begin(decoding(2), torch.arange(6) >= 2)
    padded = hook.compute_routing(logits, logits)[1][:2]
    state.begin(decoding(2), None)
    assert torch.equal(padded, hook.compute_routing(logits[:2], logits[:2])[1])
    assert hook.stats().slots_changed > 0


@pytest.mark.parametrize("options", [
    {"threshold": "q0.4"},
    {"threshold": 0.7},
    {"select_top_k": 2, "min_active": None},
    {"substitution": "projection"},
])  # fmt: skip
def test_options_come_to_what_the_oracles_say(options):
    """By the oracle, whose ids are best first; `min_active` None is K."""
    projection = torch.rand(8, 8, generator=torch.Generator().manual_seed(2))
    state = BatchState(torch.device("cpu"), "all", None, 1)
    hook = hooked(Router(), state, projection=projection if "substitution" in options else None, **options)
    state.begin(decoding(6), None)
    logits = random_logits(6)
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    weights, ids = (t.flip(1) for t in Router()._compute_routing(logits, logits, None))
    least = options.get("min_active", 0)
    settings = (options.get("select_top_k", 1), options.get("threshold", 0.0), 3 if least is None else least)
    expected = reroute_oracle(ids, matrix, *settings)
    new_weights, new_ids = (t.flip(1) for t in hook.compute_routing(logits, logits))
    assert torch.equal(new_ids, expected)
    assert not torch.equal(new_ids, ids)
    scaled = projection_oracle(weights, ids, expected, projection) if "substitution" in options else weights
    torch.testing.assert_close(new_weights, scaled)


def test_a_budget_chooses_the_largest_s_that_keeps_it():
    """All of K where all fit, S = 1 where not even that does."""
    state = BatchState(torch.device("cpu"), "all", None, 1)
    logits = random_logits(3)
    ids = Router()._compute_routing(logits, logits, None)[1].flip(1)
    sizes = [len(ids[:, :s].unique()) for s in (1, 2, 3)]
    assert sizes[0] < sizes[1] < sizes[2]
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    for budget, s in ((1, 1), (sizes[0], 1), (sizes[1], 2)):
        hook = hooked(Router(), state, select_top_k="auto", max_active=budget)
        state.begin(decoding(3), None)
        new_ids = hook.compute_routing(logits, logits)[1].flip(1)
        assert torch.equal(new_ids, reroute_oracle(ids, matrix, s)), (budget, s)


def test_projection_leaves_other_batches_and_sentinels_alone():
    """Weights of slots that stay are the router's, bit for bit."""

    class Sentinels(Router):
        def _compute_routing(self, *args, **kwargs):
            weights, ids = super()._compute_routing(*args, **kwargs)
            return weights, torch.where(ids == ids[0, 0], 8, torch.where(ids == ids[1, 1], -1, ids)).to(torch.int32)

    router, state = Sentinels(), BatchState(torch.device("cpu"), "decode", None, 1)
    hook = hooked(router, state, projection=torch.full((8, 8), 0.5), substitution="projection")
    logits = random_logits(5)
    weights, ids = router._compute_routing(logits, logits, None)
    assert {-1, 8} <= set(ids.flatten().tolist())
    state.begin({"layer": SimpleNamespace(max_query_len=2)}, None)
    assert torch.equal(hook.compute_routing(logits, logits)[0], weights)
    state.begin(decoding(5), None)
    new_weights, new_ids = hook.compute_routing(logits, logits)
    outside = (ids < 0) | (ids >= 8)
    assert torch.equal(new_ids[outside], ids[outside])
    assert torch.equal(new_weights, torch.where(new_ids != ids, weights * 0.5, weights))
    assert (new_ids != ids).any()
    assert new_ids.dtype == torch.int32


@pytest.mark.parametrize(("options", "metadata", "active"), [
    (("decode", None, 1), SimpleNamespace(max_query_len=1), True),
    (("decode", None, 3), SimpleNamespace(max_query_len=3, num_prefills=2), True),
    (("decode", None, 1), SimpleNamespace(num_prefills=0), True),
    (("decode", None, 1), SimpleNamespace(num_prefills=1), False),
    (("decode", None, 1), SimpleNamespace(), False),
    (("all", None, 1), SimpleNamespace(), True),
    (("all", 4, 1), SimpleNamespace(num_actual_tokens=5), False),
    (("all", 4, 1), SimpleNamespace(num_actual_tokens=4), True),
    (("all", None, 1), None, False),
])  # fmt: skip
def test_which_batches_are_rerouted(options, metadata, active):
    state = BatchState(torch.device("cpu"), *options)
    state.begin(None if metadata is None else {"layer": metadata}, None)
    assert bool(state.active) is active
