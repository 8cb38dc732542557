"""Options of re-routing in the engine: the tokens of transformers with our backend, for a trained model and text."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

import sere_compile
from sere_compile.integrations.vllm import plugin
from sere_compile.integrations.vllm.routers import KnownRouter

from . import models
from .engine import TOKENS, engine, generate, hooks
from .lockstep import in_transformers

pytestmark = pytest.mark.vllm

MODEL = models.SHIPPED / "qwen3"
LAYERS = {"model.layers.[23].*": {"select_top_k": 3}, "*.0.*": {"select_top_k": 4}}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return models.calibrated(MODEL, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize("options", [
    {"select_top_k": 1, "min_active": 0, "substitution": "projection"},
    {"select_top_k": "auto", "max_active": 10},
    {"select_top_k": 1, "min_active": 0, "threshold": "q0.2", "per_gate": LAYERS},
], ids=["projection", "budget", "share and layers"])  # fmt: skip
def test_options(profile, options):
    """Text in, as a user sends it, through the model's own tokenizer."""
    texts, ids = models.texts(MODEL)
    with engine(MODEL, {**options, "profile": profile, "collect_stats": True}, skip_tokenizer_init=False) as llm:
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        outputs = llm.generate(texts, params, use_tqdm=False)
        counted = sere_compile.stats(llm)
        # S = K for the first layer, where a layer has options of its own.
        assert len(hooks(llm).hooks) == (3 if "per_gate" in options else 4)
    assert [list(output.prompt_token_ids) for output in outputs] == ids
    assert any(gate.slots_changed for gate in counted.values())
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == in_transformers(MODEL, ids, profile, **options)


@pytest.mark.parametrize("name", ["qwen3, trained", "mixtral, trained", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("select", [1, 2])
def test_fill(name, select, tmp_path):
    """Without a profile, of every kind of router that has no groups: the tokens of transformers with the backend."""
    model, profile, ids = models.prepare(name, tmp_path)
    options = {"select_top_k": select, "min_active": 0, "substitution": "fill"}
    if select == 2 and name.startswith("mixtral"):
        options |= {"select_top_k": "auto", "max_active": 3}
    with engine(model, {**options, "strict": True, "collect_stats": True}) as llm:
        tokens = generate(llm, ids)
        counted = sere_compile.stats(llm).values()
    assert all(gate.active_after < gate.active_before for gate in counted)
    # In transformers a profile switches the backend on; filling does not read it.
    assert tokens == in_transformers(model, ids, profile, **options)
    assert tokens != in_transformers(model, ids, profile, **{**options, "substitution": "reroute"})


@pytest.mark.parametrize("substitution", ["reroute", "fill"])
def test_gates_whose_product_is_routings(substitution, profile, monkeypatch):
    """The same tokens where `sere::route` selects, and makes the logits of the hidden states that gates hand on."""

    def known(router, dtype):  # on CPUs vLLM's router is a class of its own
        return KnownRouter(None, router.top_k, "softmax", True, 1.0, 1, 1, "max", dtype)

    def hold(hooks, runners, original=plugin.hold_gates):
        for runner in runners.values():  # on CPUs their weights are packed, and gone
            weight = runner.gate(torch.eye(runner.gate.input_size))[0].T.contiguous()
            runner.gate.weight = torch.nn.Parameter(weight, requires_grad=False)
        return original(hooks, runners)

    monkeypatch.setattr(plugin, "SELECTS_ON", ("cuda", "cpu"))
    monkeypatch.setattr(plugin, "known_router", known)
    monkeypatch.setattr(plugin, "hold_gates", hold)
    _, ids = models.texts(MODEL)
    options = {"select_top_k": 1, "min_active": 0, "substitution": substitution}
    with engine(MODEL, {**options, "profile": profile, "router": "gate", "strict": True}) as llm:
        tokens = generate(llm, ids)
        assert all(hook.gate is not None and hook.calls for hook in hooks(llm).hooks.values())
    assert tokens == in_transformers(MODEL, ids, profile, **options)


def test_projection_needs_coefficients(profile, tmp_path):
    path = tmp_path / "profile.safetensors"
    sere_compile.SimilarityProfile(dict(sere_compile.SimilarityProfile.load(profile))).save(path)
    with (
        pytest.raises(sere_compile.ProfileError, match="needs projection coefficients, and this profile has none for"),
        engine(MODEL, {"select_top_k": 1, "substitution": "projection", "profile": str(path)}),
    ):
        pass


def test_a_pattern_that_fits_no_layer_is_an_error_with_strict(profile):
    options = {"strict": True, "per_gate": {"model.layer.0.*": {"select_top_k": 1}}, "profile": profile}
    with (
        pytest.raises(sere_compile.ConfigError, match=r"no gate of this model matches 'model\.layer\.0\.\*'"),
        engine(MODEL, options),
    ):
        pass
