"""Decoding steps: which experts are active in all of them, and a decoder that starts over."""

import types

import pytest
import torch

from sere_compile import SereError
from sere_compile.benchmark import decode_step
from sere_compile.testing import oracle_routing


def test_active_experts_are_those_of_all_steps(subject, without_gpu, monkeypatch):
    """Later tokens are others than the first, and what is timed is all of them."""
    counts = []
    decoder = decode_step.Decoder(subject, 3, prompt=6, steps=4)
    _, active = decode_step._references(subject, decoder, [1], 4)
    monkeypatch.setattr(decoder, "steps", 1)
    _, first = decode_step._references(subject, decoder, [1], 4)
    monkeypatch.setattr(decoder, "steps", 4)
    decoder.reset()
    with oracle_routing(subject.model, subject.matrices, 4, active=(calls := {})):
        for _ in range(4):
            decoder.step(decoder.forward)
    counts = [after for gate in calls.values() for _, after in gate]
    assert len(counts) == 2 * 4
    assert active[4] == pytest.approx(sum(counts) / len(counts))
    assert active != first


def test_a_cache_with_other_state(subject, monkeypatch):
    """Linear attention has state that a static cache of keys and values would lose."""
    layer = type("LinearAttentionLayer", (), {})
    monkeypatch.setattr("transformers.StaticCache", lambda **_: types.SimpleNamespace(layers=[layer()]))
    with pytest.raises(SereError, match="with a cache of LinearAttentionLayer cannot be timed"):
        decode_step.Decoder(subject, 3, prompt=6, steps=4)


def test_the_decoder_is_set_back_before_each_run(subject, without_gpu):
    """A second run repeats the first, token by token."""
    decoder = decode_step.Decoder(subject, 3, prompt=6, steps=4)
    runs = []
    for _ in range(2):
        decoder.reset()
        runs.append([])
        for _ in range(4):
            decoder.step(decoder.forward)
            runs[-1].append(decoder.logits.clone())
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)
