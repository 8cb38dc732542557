"""What a batch may be, and which of its tokens count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sere_compile import CalibrationError

from ..tiny_models import gate_names, tokens
from .plain import expert_outputs, plain_frobenius, run


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the data set is empty: batches gave no batch"),
        ([{"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 3)}], "all its tokens are padding"),
        (tokens(2, 3), "batches is an iterable of batches, got Tensor; a single batch goes in a list"),
        ({"input_ids": tokens(2, 3)}, "got dict; a single batch"),
        ("text", "got str"),
        (3, "got int"),
        ([[1, 2]], "a batch is a mapping of keyword arguments, .* or a tensor; got list"),
        (["text"], "got str"),
        ([{1: tokens(2, 3)}], "got dict"),
        ([{"input_ids": tokens(2, 3), "attention_mask": torch.ones(2)}], r"must be a tensor \[batch, length\]"),
    ],
)
def test_data_of_a_wrong_kind(qwen, batches, message):
    """The message says what is wrong and what is right."""
    with pytest.raises(CalibrationError, match=message):
        run(qwen, batches)


def test_mask_of_other_tokens(qwen):
    """A model that routes other tokens than the mask is of."""
    batch = {"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = qwen

        def forward(self, input_ids, attention_mask):
            return self.inner(torch.cat([input_ids, input_ids]), use_cache=False)

    message = r"cannot be determined at inner.* which sees 20 tokens: .*mask \(2, 5\)"
    with pytest.raises(CalibrationError, match=message):
        run(Twice(), [batch])


def test_padding_does_not_count(qwen):
    """Tokens with mask 0, on either side, are run but not compared."""
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :4], mask[2, 3:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    got = run(qwen, [batch], chunk=5)
    assert got.metadata["tokens"] == str(int(mask.sum()))
    for name, outputs in expert_outputs(qwen, [batch]).items():
        expected = plain_frobenius(outputs[:, mask.flatten().bool()])
        torch.testing.assert_close(got[name], expected.float(), rtol=0, atol=1e-5)


def test_stops_at_max_tokens(qwen):
    """The last batch counts in part, those behind it are not read."""
    batches = iter([tokens(2, 5, seed) for seed in range(4)])
    got = run(qwen, batches, max_tokens=13)
    assert got.metadata["tokens"] == "13"
    assert len(list(batches)) <= 2
    outputs = expert_outputs(qwen, [tokens(2, 5, seed) for seed in range(2)])
    for name in gate_names():
        torch.testing.assert_close(got[name], plain_frobenius(outputs[name][:, :13]).float(), rtol=0, atol=1e-5)
