"""`kernel_gains`: the sizes up to which gates get kernels of ours, from the gate's ids alone."""

import dataclasses

import pytest
import torch

from sere_compile.passes import SkipReason, has_more_tokens
from sere_compile.passes.kernel_gains import check_experts_gain, check_router_gains

from .moe_modules import Indexed, from_export, one_gate, rows


def gate_of(tokens, experts=8, top_k=3):
    """A gate whose ids have these sizes."""
    gate = one_gate(from_export(Indexed(), rows()))
    gate.ids.meta["val"] = torch.empty(tokens, top_k, device="meta")
    return dataclasses.replace(gate, num_experts=experts, top_k=top_k)


@pytest.mark.parametrize(
    ("gate", "router", "experts"),
    [
        (gate_of(85), None, None),
        (gate_of(86), None, "more slots than our kernels are faster for (more than 32 for each of its 8 experts)"),
        (gate_of(256, 64), None, None),
        (gate_of(257, 64), "more tokens than our kernels are faster for (more than 256)", "same"),
        (gate_of(256, 1024, 17), None, "more slots than our kernels take (more than 4096)"),
    ],
    ids=["few slots", "many slots", "few tokens", "many tokens", "too many slots"],
)
def test_sizes(gate, router, experts):
    """The limits are those of docs/kernels.md, each with its reason; the last size that is taken is taken."""
    found = [check(gate, False) for check in (check_router_gains, check_experts_gain)]
    assert [None if skip is None else str(skip) for skip in found] == [router, router if experts == "same" else experts]


def test_gradients():
    """The kernels give none."""
    for check in (check_router_gains, check_experts_gain):
        assert check(gate_of(1), True).reason is SkipReason.GRADIENTS


def test_more_tokens():
    """Tokens, not slots, are compared; no limit is never passed."""
    gate = gate_of(10)
    assert [has_more_tokens(gate, limit) for limit in (9, 10, None)] == [True, False, False]
