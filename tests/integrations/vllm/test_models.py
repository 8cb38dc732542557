"""Every kind of router, in the real engine: the hook runs, S = K changes nothing, S < K does what transformers does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import sere_compile
from sere_compile import SimilarityProfile
from sere_compile.integrations.vllm import stats
from sere_compile.testing import reroute_oracle

from . import models
from .engine import TOKENS, engine, generate, hooks

pytestmark = pytest.mark.vllm

BATCH = 8
SETTINGS = {"select_top_k": 1, "min_active": 0}
ROWS: dict[str, str] = {}


@pytest.fixture(scope="module", params=models.NAMES)
def model(request, tmp_path_factory):
    """Name, folder and profile file of a saved model with a random similarity matrix for each gate."""
    folder = models.save(request.param, tmp_path_factory.mktemp(request.param))
    generator = torch.Generator().manual_seed(1)
    matrices = {}
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            half = torch.rand(len(weight), len(weight), generator=generator)
            matrices[name] = ((half + half.T) / 2).fill_diagonal_(1.0)
    assert len(matrices) == 2
    # Not in the model's folder: vLLM takes every safetensors file there for weights.
    profile = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    SimilarityProfile(matrices, {"method": "random"}).save(profile)
    return request.param, folder, str(profile)


def in_transformers(folder, profile, **options):
    """The same continuations by transformers and the backend `sere`; prompts are above max_tokens."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sere_compile.attach(network, SimilarityProfile.load(profile))
    torch._dynamo.reset()
    settings = {**SETTINGS, "max_tokens": BATCH, "inner": "eager", **options}
    step = torch.compile(network, backend="sere", options=settings)
    ids, cache, tokens = torch.tensor(models.prompts(BATCH)), None, []
    with torch.no_grad():
        for _ in range(TOKENS):
            output = step(ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            tokens.append(ids)
    return torch.cat(tokens, 1).tolist()


def check_every_choice(hook, wrong: list[str], seen: list[int]) -> None:
    """Compare what a hook gives with an oracle, one token after the other, whenever the engine routes."""

    def compute_routing(hidden, logits, indices_type, *, input_ids=None):
        _, ids = hook.original(hidden, logits, indices_type, input_ids=input_ids)
        weights, new_ids = hook.compute_routing(hidden, logits, indices_type, input_ids=input_ids)
        bias = hook.router.e_score_correction_bias
        scores = logits.float() if bias is None else logits.float().sigmoid() + bias
        expected = ids
        if hook.state.active:
            order = [sorted(range(ids.shape[1]), key=lambda k, t=t: -scores[t, ids[t, k]]) for t in range(len(ids))]
            order = torch.tensor(order)
            rerouted = reroute_oracle(ids.gather(1, order), hook.matrix, 1)
            expected = torch.zeros_like(ids).scatter(1, order, rerouted)
        seen.append(len(ids))
        if not torch.equal(new_ids, expected):
            wrong.append(f"{new_ids.tolist()} instead of {expected.tolist()}")
        return weights, new_ids

    hook.router._compute_routing = compute_routing


def rotate_heads_correctly(monkeypatch):
    """The CPU kernel of vLLM 0.32.0 rotates queries [T, heads, D] of two heads wrongly, [T, heads * D] rightly.

    Latent attention passes the former, so without this DeepSeek's tokens differ from those of transformers with SERE
    or without. To go when vLLM's kernel takes three dimensions.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)


def test_router(model, monkeypatch):
    """S = K: the tokens of vLLM alone. S < K: an oracle's ids in every forward, and fewer active experts.

    The tokens of both are those of transformers, alone and with our backend.
    """
    name, folder, profile = model
    if name.startswith("deepseek"):
        rotate_heads_correctly(monkeypatch)
    prompts = models.prompts(BATCH)
    with engine(folder) as llm:
        alone = generate(llm, prompts)
    with engine(folder, {"select_top_k": 99, "profile": profile}) as llm:
        assert not hooks(llm).hooks
        identity = generate(llm, prompts)
    with engine(folder, {**SETTINGS, "profile": profile, "collect_stats": True}) as llm:
        installed = hooks(llm)
        wrong: list[str] = []
        seen: list[int] = []
        for hook in installed.hooks.values():
            check_every_choice(hook, wrong, seen)
        rerouted = generate(llm, prompts)
        counted = stats(llm)
    assert identity == alone
    assert not wrong, wrong[0]
    assert len(seen) == 2 * TOKENS
    assert len(installed.hooks) == 2
    assert all(hook.has_run for hook in installed.hooks.values())
    # The prompts in one forward, and one forward for each further token.
    assert (installed.state.forwards, installed.state.active_forwards) == (TOKENS, TOKENS - 1)
    assert {gate.calls for gate in counted.values()} == {TOKENS - 1}
    before = sum(gate.mean_active_before for gate in counted.values()) / 2
    after = sum(gate.mean_active_after for gate in counted.values()) / 2
    assert after < before
    assert rerouted != alone
    ROWS[name] = f"| {name} | {models.KINDS[name]} | 2 of 2 | yes | {before:.1f} | {after:.1f} |"
    print(ROWS[name])
    assert alone == in_transformers(folder, profile, select_top_k=99)
    assert rerouted == in_transformers(folder, profile)
