"""A program's `attention_mask` hides padding from re-routing."""

from __future__ import annotations

import logging

import pytest
import torch

from sere_compile import SereConfig
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.standard_operators import sere_nodes

from .models import SmallMoE, hidden_states, small_profile

CONFIG = SereConfig(select_top_k=1, min_active=0)


class Careless(SmallMoE):
    """[B, L, width] and a mask that it does not look at."""

    def forward(self, hidden, attention_mask):
        batch, length, width = hidden.shape
        return super().forward(hidden.reshape(-1, width)).view(batch, length, width)


class Masked(Careless):
    """Hides its results, as attention would, but routes every token."""

    def forward(self, hidden, attention_mask):
        return super().forward(hidden, attention_mask) * (attention_mask != 0)[..., None]


def program(model, mask):
    hidden = hidden_states(12).view(3, 4, 8)
    return export_rewritten(model.eval(), (hidden, mask), profile=small_profile(), config=CONFIG, dynamic_shapes="auto")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_makes_no_expert_primary(dtype):
    """Real tokens come out as without the padding, whatever stands in it; without a mask they do not."""
    masked = program(Masked(), torch.ones(3, 4, dtype=dtype))
    hidden = hidden_states(10, seed=3).view(2, 5, 8)
    mask = torch.ones(2, 5, dtype=dtype)
    mask[:, 2:] = 0
    with torch.no_grad():
        alone = masked.module()(hidden[:, :2].contiguous(), mask[:, :2].contiguous())
        padded = masked.module()(hidden, mask)
        unmasked = masked.module()(hidden, torch.ones_like(mask))
    torch.testing.assert_close(padded[:, :2], alone)
    assert not torch.allclose(unmasked[:, :2], alone, atol=1e-2)


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(3, 1, 4, 4, dtype=torch.int64)], ids=["float", "4-D"])
def test_a_mask_of_another_kind_is_told(mask, caplog):
    with caplog.at_level(logging.WARNING):
        [gate] = sere_nodes(program(Careless(), mask))
    assert gate.kwargs.get("token_mask") is None
    assert "does not say which tokens are real: padding makes experts primary" in caplog.text


def test_a_mask_of_other_tokens_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        [gate] = sere_nodes(program(Careless(), torch.ones(3, 2, dtype=torch.int64)))
    assert gate.kwargs.get("token_mask") is None
    assert "which are not those of attention_mask" in caplog.text
