"""What users write in vLLM's configuration; no vLLM is needed to check it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sere_compile import ConfigError, ProfileError, SimilarityProfile
from sere_compile.integrations.vllm import read_options
from sere_compile.integrations.vllm.matrices import find_profile, match_layers
from sere_compile.integrations.vllm.routing import BatchState, RoutingHook, selection_scores
from sere_compile.ops import reroute


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
    (True, {}, "must be a dict"),
    ({"threshold": 0.2}, {"select_top_k": 1, "threshold": 0.1}, "threshold stands in"),
])  # fmt: skip
def test_mistakes_are_named(sere, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_options(vllm_config(sere, overrides))


def profile(*names):
    return SimilarityProfile({name: torch.eye(4) for name in names})


def test_layers_are_matched_by_number():
    """vLLM and transformers name the block differently."""
    layers = {f"model.layers.{i}.block_sparse_moe.experts": 4 for i in (2, 10)}
    matched = match_layers(profile("model.layers.10.mlp.gate.weight", "model.layers.2.mlp.gate.weight"), layers, True)
    assert list(matched) == list(layers)


def test_a_stage_of_a_pipeline_leaves_matrices_over():
    gates = profile("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
    layers = {"model.layers.1.mlp.experts": 4}
    assert list(match_layers(gates, layers, complete=False)) == list(layers)
    with pytest.raises(ProfileError, match=r"does not have: model\.layers\.0\."):
        match_layers(gates, layers, complete=True)


def test_the_reference_matrices_of_a_checkpoint_are_found(tmp_path):
    matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.0]])
    assert find_profile(None, str(tmp_path)) is None
    assert find_profile(None, "organisation/name") is None
    torch.save({0: matrix}, tmp_path / "similarity_matrices.pt")
    for found in (find_profile(None, str(tmp_path)), find_profile(str(tmp_path / "similarity_matrices.pt"), "")):
        assert torch.equal(found["model.layers.0.mlp.gate.weight"], matrix)


class Router:
    """As vLLM's: an unsorted top-k."""

    def __init__(self, top_k=3, bias=None):
        self.top_k, self.e_score_correction_bias, self.scoring_func = top_k, bias, "sigmoid"

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        scores = router_logits.sigmoid() + (0 if self.e_score_correction_bias is None else self.e_score_correction_bias)
        ids = scores.topk(self.top_k).indices.flip(1)
        return router_logits.sigmoid().gather(1, ids), ids.to(torch.int32)


def hooked(router, state, experts=8, **options):
    matrix = torch.rand(experts, experts, generator=torch.Generator().manual_seed(0))
    settings = {"select_top_k": 1, "threshold": 0.0, "min_active": 0, "mask_padding": True, "collect_stats": True}
    return RoutingHook(router, matrix, state=state, **{**settings, **options})


def decoding(tokens):
    return {"layer": SimpleNamespace(max_query_len=1, num_actual_tokens=tokens)}


@pytest.mark.parametrize("bias", [None, torch.tensor([0.9, 0, 0.7, 0, 0.8, 0, 0, 0])])
def test_an_unsorted_choice_is_rerouted_in_the_order_it_was_chosen(bias):
    """With a correction bias the order of the weights is another one."""
    router, state = Router(bias=bias), BatchState(torch.device("cpu"), "decode", None, 1)
    hook = hooked(router, state)
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize(("options", "metadata", "active"), [
    (("decode", None, 1), SimpleNamespace(max_query_len=1), True),
    (("decode", None, 3), SimpleNamespace(max_query_len=3), True),
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
