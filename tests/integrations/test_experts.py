"""`experts_implementation="sere"`: eager models of transformers, re-routed by the registry of experts functions."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import sere_compile
from sere_compile import ConfigError
from sere_compile.compiler.gate_matrices import warn_of_probing
from sere_compile.idle import tell_once
from sere_compile.testing import oracle_routing

from ..compiled import logits
from ..tiny_models import build, gpt_oss, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def registered():
    sere_compile.register_experts(select_top_k=1)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_eager_model_is_re_routed(name):
    """As the oracle does it, each layer by its own matrix."""
    model, ids = build(name), tokens(6, 1)
    profile = random_profile(model)
    with oracle_routing(model, profile, 1):
        expected = logits(model, ids)
    original = logits(model, ids)
    model.set_experts_implementation("sere")
    sere_compile.attach(model, profile)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, original, atol=1e-3)


def test_a_router_beside_experts_with_biases():
    """gpt-oss: the biases of its experts have a row for each expert too."""
    model, ids = gpt_oss(), tokens(6, 1)
    profile = random_profile(model, router="router")
    with oracle_routing(model, profile, 1):
        expected = logits(model, ids)
    model.set_experts_implementation("sere")
    sere_compile.attach(model, profile)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"select_top_k": 9}, "select_top_k=9 is more than K = "),
        ({"threshold": 2.0}, "threshold=2 is above every similarity"),
        ({"per_gate": {"nothing": {"select_top_k": 2}}}, "no gate of .* matches 'nothing'"),
    ],
)
def test_options_that_cannot_act_are_told_once(options, told, caplog):
    tell_once.reset()
    sere_compile.register_experts(**{"select_top_k": 1, **options})
    model = build("qwen3_moe")
    sere_compile.attach(model, random_profile(model))
    model.set_experts_implementation("sere")
    for _ in range(2):
        logits(model, tokens(6, 1))
    [record] = caplog.records
    assert re.search(told, record.getMessage())


def test_probing_is_told_once(caplog):
    """As the backend does."""
    warn_of_probing.reset()
    model = build("qwen3_moe")
    model.set_experts_implementation("sere")
    logits(model, tokens(6, 1))
    [record] = caplog.records
    assert record.getMessage().startswith("no similarity profile is attached: experts are probed")


@pytest.mark.slow
def test_options_and_matrices_can_change():
    """Registered again with other options, or attached anew, the next call follows."""
    model, ids = build("qwen3_moe"), tokens(6, 1)
    original = logits(model, ids)
    model.set_experts_implementation("sere")
    for seed, select in ((0, 1), (1, 2)):
        profile = random_profile(model, seed)
        sere_compile.attach(model, profile)
        sere_compile.register_experts(select_top_k=select)
        with oracle_routing(model, profile, select):
            model.set_experts_implementation("grouped_mm")
            expected = logits(model, ids)
        model.set_experts_implementation("sere")
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    sere_compile.register_experts(select_top_k=4)
    torch.testing.assert_close(logits(model, ids), original, rtol=0, atol=0)


def test_prefill_stays_stock():
    """More tokens than max_tokens: not a bit changes."""
    model, ids = build("qwen3_moe"), tokens(4, 8)
    original = logits(model, ids)
    sere_compile.register_experts(select_top_k=1, max_tokens=31)
    model.set_experts_implementation("sere")
    assert torch.equal(logits(model, ids), original)
    assert not torch.equal(logits(model, ids[:2]), original[:2])


@pytest.mark.slow
def test_a_checkpoint_is_loaded_with_it_and_generates(tmp_path):
    """Without a profile the experts are probed, by the same rule in every process."""
    build("qwen3_moe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="sere")
    ids = tokens(6, 3)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first = model.generate(ids, **settings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="sere")
    assert torch.equal(again.generate(ids, **settings), first)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(logits(model, ids[:, :1]), logits(stock, ids[:, :1]))


@pytest.mark.slow
def test_under_torch_compile():
    """Compiled, the numbers are those of eager mode."""
    model, ids = build("qwen3_moe"), tokens(6, 1)
    sere_compile.attach(model, random_profile(model))
    model.set_experts_implementation("sere")
    expected = logits(model, ids)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"selecttopk": 1}, "did you mean 'select_top_k'"),
        ({"collect_stats": True}, "collect_stats acts on graphs"),
        ({"substitution": "fill"}, "substitution acts on graphs"),
    ],
)
def test_bad_options(options, told):
    with pytest.raises(ConfigError, match=told):
        sere_compile.register_experts(**options)
