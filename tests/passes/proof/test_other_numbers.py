"""Numbers of a call that are no tensors, as another call may have them."""

import pytest
import torch

from sere_compile.passes import Proof, verify_rewrite
from sere_compile.passes.proof.other_numbers import other_numbers

from ..moe_modules import TOKENS, Indexed, from_dynamo, one_gate, rows
from ..test_verify_rewrite import weights_of
from .regions import region_of


class Given(Indexed):
    """Tokens behind a length go to the first expert, or weigh nothing."""

    def __init__(self, sends=True, served=lambda x, length: True):
        super().__init__()
        self.sends, self.served = sends, served

    def forward(self, x, length):
        ids, weights = self.route(x)
        if not self.served(x, length):
            return x
        mask = (torch.arange(x.shape[0]) < length)[:, None]
        if self.sends:
            return self.dispatch(x, torch.where(mask, ids, torch.zeros_like(ids)), weights)
        return self.dispatch(x, ids, weights * mask)


def traced(module, x, length):
    """A graph for this number of tokens and any length."""
    torch._dynamo.mark_static(x, 0)
    return from_dynamo(module, x, length, dynamic=True)


def numbers(module, length=TOKENS):
    found = other_numbers(region_of(module, traced, length))
    assert len({str(symbol) for made in found for symbol in made}) <= 1
    return [number for made in found for number in made.values()]


def test_a_graph_without_numbers():
    assert other_numbers(region_of(Indexed(), lambda module, x: from_dynamo(module, x, dynamic=True))) == []


@pytest.mark.parametrize("length", [TOKENS, 3])
def test_others_than_that_of_the_traced_call(length):
    made = numbers(Given(), length)
    assert length not in made
    assert any(0 < number < TOKENS for number in made)


def test_only_what_the_graph_serves():
    assert all(number > TOKENS // 2 for number in numbers(Given(served=lambda x, length: length > TOKENS // 2)))
    assert numbers(Given(served=lambda x, length: length != 7), 8)


@pytest.mark.parametrize("length", [TOKENS, 3])
def test_tokens_behind_a_length_are_not_re_routed_with_their_expert(length):
    """A first call whose length is the number of tokens masks nothing: the proof has to see one that does."""
    graph = traced(Given(), rows(), length)
    refusal = verify_rewrite(one_gate(graph), weights_of(graph))
    assert not isinstance(refusal, Proof)
    assert "in place of another whole number" in refusal.detail or length != TOKENS


def test_weights_of_nothing_behind_a_length():
    graph = traced(Given(sends=False), rows(), TOKENS)
    assert isinstance(verify_rewrite(one_gate(graph), weights_of(graph)), Proof)


def test_what_is_proven_for_some_numbers_is_not_for_others():
    """Regions are equal, and the graphs' guards let other calls through."""
    found = []
    for served in (lambda x, length: length >= TOKENS, lambda x, length: length > 1):
        graph = traced(Given(served=served), rows(), TOKENS)
        found.append(isinstance(verify_rewrite(one_gate(graph), weights_of(graph)), Proof))
    assert found == [True, False]
