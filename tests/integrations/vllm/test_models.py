"""Every kind of router, in the real engine: the hook runs, S = K changes nothing, S < K does what transformers does."""

from __future__ import annotations

import pytest

from benchmarks import vllm_page as table
from benchmarks.vllm_measured import measure

from . import models
from .engine import TOKENS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("name", models.NAMES)
def test_router(name, tmp_path):
    """S = K: the tokens of vLLM alone. S < K: an oracle's ids in every forward, and fewer active experts.

    The tokens of both are those of transformers, alone and with our backend. And docs/vllm.md says so.
    """
    folder, profile, prompts = models.prepare(name, tmp_path)
    result = measure(name, folder, profile, prompts)
    assert result.identity == result.alone
    assert not result.wrong, result.wrong[0]
    assert result.hooked == result.layers
    # The prompts in one forward, and one forward for each further token.
    assert (result.forwards, result.active) == (TOKENS, TOKENS - 1)
    assert result.routed == TOKENS * result.layers
    assert result.after < result.before
    assert result.rerouted != result.alone
    assert result.alone == result.expected_alone
    assert result.rerouted == result.expected
    assert table.differs(table.read()[name], result.row()) == ""
