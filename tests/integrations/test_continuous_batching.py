"""transformers' continuous batching: requests of any length packed into one forward, decoded with re-routing."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import sere_compile
from sere_compile.testing import oracle_routing

from ..tiny_models import build, random_profile, tokens

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (3, 5, 4)]
NEW = 4


@pytest.fixture
def model(fresh_dynamo):
    made = build("qwen3_moe")
    made.profile = random_profile(made)
    sere_compile.attach(made, made.profile)
    return made


def served(model, **config):
    """The new tokens of every prompt, in order."""
    given = {"page_size": 8, "num_blocks": 16, "max_batch_tokens": 32, **config}
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    done = model.generate_batch(PROMPTS, greedy, ContinuousBatchingConfig(**given))
    outputs = sorted(done.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    return [output.generated_tokens for output in outputs]


@pytest.mark.slow
def test_requests_are_re_routed_as_the_oracle_does(model):
    """By `experts_implementation="sere"`: all tokens of a forward, of whatever request, are one batch."""
    sere_compile.register_experts(select_top_k=1)
    model.set_experts_implementation("sere")
    found = served(model)
    model.set_experts_implementation("eager")
    with oracle_routing(model, model.profile, 1):
        assert found == served(model)
    assert found != served(model)


@pytest.mark.slow
def test_a_decode_config_alone_is_left_aside_on_a_cpu(model):
    """The path that it is for needs flash attention on a GPU; transformers says so, and nothing is re-routed."""
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    sere = sere_compile.generate_config(select_top_k=1, inner="eager", collect_stats=True)
    assert served(model, decode_compile_config=sere) == served(model)
    with pytest.raises(sere_compile.SereError, match="no routing statistics"):
        sere_compile.stats(model)
