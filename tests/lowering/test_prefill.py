"""(input_ids, attention_mask) to logits: the model's own, for a batch with padding."""

from __future__ import annotations

import pytest
import torch

from sere_compile.lowering.prefill import Prefill

from .. import tiny_models


def test_logits_are_the_models():
    model = tiny_models.build("qwen3_moe")
    ids = tiny_models.tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        logits = Prefill(model)(ids, mask)
        torch.testing.assert_close(logits, model(input_ids=ids, attention_mask=mask).logits)
        assert not torch.allclose(logits, model(input_ids=ids).logits, atol=1e-2)
    names, results = Prefill(model).names()
    assert len(names) == len(Prefill(model).example_inputs()) == len(Prefill(model).dynamic_shapes())
    assert results == ["logits"]


def test_a_mask_of_another_size():
    with pytest.raises(RuntimeError):
        Prefill(tiny_models.build("qwen3_moe"))(tiny_models.tokens(2, 5), torch.ones(2, 4, dtype=torch.int64))
