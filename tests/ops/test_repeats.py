"""`merge_repeats`: definition and kernel against a loop over tokens. Without CUDA the kernel runs interpreted."""

import pytest
import torch

from sere_compile.ops.repeats import merge_repeats
from sere_compile.ops.repeats.merge import merge_repeats_reference


def by_loop(ids, weights):
    """Token by token, slot by slot."""
    new_ids, new_weights = ids.clone(), weights.clone()
    for row, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.double().tolist(), strict=True)):
        for slot, expert in enumerate(row_ids):
            slots = [other for other, named in enumerate(row_ids) if named == expert]
            if expert < 0 or len(slots) == 1:
                continue
            is_first = slots[0] == slot
            new_ids[row, slot] = expert if is_first else -1
            new_weights[row, slot] = sum(row_weights[other] for other in slots) if is_first else 0.0
    return new_ids, new_weights


def drawn(tokens, slots, experts, dtype=torch.float32, ids_dtype=torch.int64):
    """Many repeats, and slots of no expert. Weights are eighths, whose sums are exact in any dtype."""
    generator = torch.Generator().manual_seed(tokens * slots)
    ids = torch.randint(-1, experts, (tokens, slots), generator=generator).to(ids_dtype)
    return ids, (torch.randint(0, 16, (tokens, slots), generator=generator) / 8).to(dtype)


CASES = [
    (1, 2, 2, torch.float32, torch.int64), (7, 4, 5, torch.float32, torch.int32), (5, 1, 3, torch.float32, torch.int16),
    (70, 8, 16, torch.bfloat16, torch.int32), (3, 6, 4, torch.float64, torch.int64),
    (2, 32, 9, torch.float16, torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case):
    ids, weights = drawn(*case)
    for got, want in zip(merge_repeats(ids, weights), by_loop(ids, weights), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_definition(case, kernel_device):
    from sere_compile.ops.repeats.kernel import launch_merge_repeats

    ids, weights = drawn(*case)
    ids, weights = ids.to(kernel_device), weights.to(kernel_device)
    for got, want in zip(launch_merge_repeats(ids, weights), merge_repeats_reference(ids, weights), strict=True):
        assert torch.equal(got, want)


def test_slots_that_are_alone_keep_their_bits():
    ids, weights = torch.tensor([[3, 1, -1, 2]]), torch.tensor([[-0.0, float("inf"), float("nan"), 1e-45]])
    got_ids, got = merge_repeats(ids, weights)
    assert torch.equal(got_ids, ids)
    assert torch.equal(got.view(torch.int32), weights.view(torch.int32))


def test_no_tokens(kernel_device):
    from sere_compile.ops.repeats.kernel import launch_merge_repeats

    ids = torch.empty(0, 4, dtype=torch.int32, device=kernel_device)
    got = launch_merge_repeats(ids, ids.float())
    assert [one.shape for one in got] == [ids.shape] * 2
