"""`sere::reroute`: reference and kernel against the oracle, properties, and the torch.compile stack around it.

2,344 random cases: 40 structures (cases.py), each with 45 contents for the reference and, where there is
something to re-route, 16 for the kernel. Without CUDA the kernel runs under Triton's interpreter with small
launch blocks, because that goes through a set's reduction one element at a time.
"""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sere_compile.ops import reroute
from sere_compile.ops.reroute.reference import (
    apply_map,
    expert_map,
    in_range,
    leading_tokens,
    named_by_comparison,
    named_by_scatter,
    primary_experts,
    reroute_reference,
)

from ..thinned import thinned
from .cases import STRUCTURES, Structure, draw_case, poisoned_memory
from .oracle import as_fp32_rows, reroute_rows

OP = torch.ops.sere.reroute.default

# The case of the paper's model family, small.
TYPICAL = Structure(60, 4, 2, masked=True, min_active=4)


def expected(case):
    rows = reroute_rows(
        case.flat("ids"), as_fp32_rows(case.similarity), case.select, case.threshold, case.min_active,
        case.flat("mask"),
    )  # fmt: skip
    return torch.tensor(rows, dtype=case.ids.dtype).reshape(case.ids.shape)


def assert_is(result, want, case):
    """Same ids, in a contiguous tensor of the case's dtype and device."""
    torch.testing.assert_close(result.cpu(), want, rtol=0, atol=0)
    assert result.dtype == case.ids.dtype
    assert result.device == case.ids.device
    assert result.is_contiguous()


def launch(case, config="auto"):
    """The kernel's launcher, on poisoned memory. config: "auto" is small under the interpreter."""
    from sere_compile.ops.reroute.kernel import LaunchConfig, launch_reroute

    if config == "auto":
        config = None if case.ids.is_cuda else LaunchConfig(slots=32, chunk=16, num_warps=4)
    with poisoned_memory():
        return launch_reroute(case.ids, case.similarity, *case.options, config)


def identity_structure(structure):
    return not 0 < structure.select < structure.slots


CHANGING = [structure for structure in STRUCTURES if not identity_structure(structure)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_operator_equals_oracle(structure, device):
    """The operator (on CPU its ATen reference) does what the method's text says, on random inputs."""
    for seed in range(40):
        case = draw_case(structure, seed).to(device)
        assert_is(reroute(case.ids, case.similarity, *case.options), expected(case), case)


@pytest.mark.parametrize("named", [named_by_scatter, named_by_comparison])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_reference_equals_oracle_on_its_own(structure, named, device):
    """The reference alone is right on every device, also as exporters use it: without a scatter."""
    for seed in range(40, 45):
        case = draw_case(structure, seed).to(device)
        assert_is(reroute_reference(case.ids, case.similarity, *case.options, named=named), expected(case), case)


class TestReference:
    """Parts of it, by hand."""

    @pytest.mark.parametrize("named", [named_by_scatter, named_by_comparison])
    def test_which_experts_a_row_names(self, named):
        """Ids of no expert name none; of a row without ids nothing is known."""
        found = named(torch.tensor([[1, 1, -1], [4, 0, 3]]), 4)
        assert found.tolist() == [[0, 1, 0, 0], [1, 0, 0, 1]]
        assert found.dtype == torch.int32
        assert named(torch.zeros(2, 0, dtype=torch.int64), 3).tolist() == [[0] * 3] * 2
        assert named(torch.zeros(2, 0, dtype=torch.int64), 3).dtype == torch.int32

    def test_experts_in_range(self):
        assert in_range(torch.tensor([-2, -1, 0, 3, 4]), 4).tolist() == [False, False, True, True, False]

    def test_where_experts_go(self):
        """To the most similar primary one, the first of equals; below the threshold, or where none is, nowhere."""
        similarity = torch.tensor([[1.0, 0.5, 0.5, 0.9], [0.2, 1, 0.3, 1], [0.4, math.nan, 1, 1], [0, 0.1, 0.7, 1]])
        primary = torch.tensor([False, True, True, False])
        assert expert_map(similarity, primary, 0.0).tolist() == [1, 1, 2, 2]
        assert expert_map(similarity, primary, 0.5).tolist() == [1, 1, 2, 2]
        assert expert_map(similarity, primary, 0.6).tolist() == [0, 1, 2, 2]
        assert expert_map(similarity, torch.zeros(4, dtype=torch.bool), 0.0).tolist() == [0, 1, 2, 3]
        assert expert_map(torch.full((2, 2), -math.inf), torch.tensor([True, False]), 0.0).tolist() == [0, 1]
        assert expert_map(torch.full((2, 2), -0.5), torch.tensor([True, False]), 0.0).tolist() == [0, 0]

    def test_a_map_leaves_other_numbers(self):
        ids = torch.tensor([[2, -1, 5], [0, 3, 1]], dtype=torch.int32)
        mapped = apply_map(ids, torch.tensor([1, 1, 0]))
        assert mapped.tolist() == [[0, -1, 5], [1, 3, 1]]
        assert mapped.dtype == torch.int32

    def test_leading_tokens(self):
        assert leading_tokens(4, torch.tensor([2])).tolist() == [True, True, False, False]
        assert leading_tokens(3, torch.tensor([0])).tolist() == [False] * 3

    @pytest.mark.parametrize(
        ("select", "least", "most", "primary"),
        [
            (1, 0, 0, [0]), (2, 0, 0, [0, 1, 2]), (3, 0, 0, [0, 1, 2, 3]),
            (1, 1, 0, [0]), (1, 2, 0, [0, 1, 2]), (1, 4, 0, [0, 1, 2, 3]), (1, 5, 0, list(range(6))),
            (1, 0, 1, [0]), (1, 0, 2, [0]), (1, 0, 3, [0, 1, 2]), (2, 0, 1, [0, 1, 2]), (1, 0, 4, [0, 1, 2, 3]),
            (1, 0, 5, [0, 1, 2, 3]), (1, 0, 6, list(range(6))), (1, 3, 1, [0, 1, 2]), (1, 9, 1, list(range(6))),
            (3, 0, 1, [0, 1, 2, 3]),
        ],
    )  # fmt: skip
    def test_primary_experts(self, select, least, most, primary):
        """Slots name 0; 1 and 2; 3 and 0; 4 and 5: S is widened, never narrowed, and at K every expert stays."""
        ids = torch.tensor([[0, 1, 3, 4], [0, 2, 0, 5]])
        for named in (named_by_scatter, named_by_comparison):
            found = primary_experts(ids, 6, select, least, None, most, named)
            assert found.nonzero().flatten().tolist() == primary
            padded = primary_experts(
                torch.cat([ids, torch.full((1, 4), 5)]), 6, select, least, torch.tensor([True, True, False]), most
            )
            assert torch.equal(padded, found)

    @pytest.mark.parametrize("named", [named_by_scatter, named_by_comparison])
    def test_slots_without_an_expert_do_not_count(self, named):
        """The second slots are taken as well where the first ones name fewer experts than asked for, or none."""
        ids = torch.tensor([[-1, 3, 5], [-1, 6, 1]])
        for least, primary in ((0, []), (1, [3]), (2, list(range(6)))):  # 6 is no expert; S = K keeps every one
            found = primary_experts(ids, 6, 1, least, None, named=named)
            assert found.nonzero().flatten().tolist() == primary

    @pytest.mark.parametrize("least", [0, 1, 2])
    def test_padding_alone_has_no_primary_expert(self, least):
        """But where some are asked for: then all stay."""
        found = primary_experts(torch.tensor([[0, 1, 2]]), 4, 1, least, torch.tensor([False]))
        assert found.tolist() == [least > 0] * 4

    def test_no_slot_to_re_route_is_a_fresh_copy(self):
        ids = torch.arange(8).view(4, 2).T
        for select in (-1, 0, 4, 5):
            copy = reroute_reference(ids, torch.rand(8, 8), select)
            assert torch.equal(copy, ids)
            assert copy.is_contiguous()
            assert copy.data_ptr() != ids.data_ptr()
        assert not torch.equal(reroute_reference(ids, torch.rand(8, 8), 1), ids)

    def test_masks_and_numbers_of_tokens_together(self):
        """A row makes primaries where neither leaves it out; behind the real ones nothing changes."""
        ids, similarity = (
            torch.tensor([[0, 3], [1, 3], [2, 3], [0, 3]]),
            torch.tensor([[1.0] * 4] * 3 + [[0.1, 0.5, 0.9, 1]]),
        )
        mask, real = torch.tensor([True, False, True, True]), torch.tensor([3])
        assert reroute_reference(ids, similarity, 1)[:, 1].tolist() == [2] * 4
        assert reroute_reference(ids, similarity, 1, real_tokens=torch.tensor([2]))[:, 1].tolist() == [1, 1, 3, 3]
        assert reroute_reference(ids, similarity, 1, token_mask=~mask)[:, 1].tolist() == [1] * 4
        found = reroute_reference(ids, similarity, 1, token_mask=mask, real_tokens=real)
        assert found[:, 1].tolist() == [2, 2, 2, 3]
        found = reroute_reference(ids, similarity, 1, token_mask=mask, real_tokens=torch.tensor([2]))
        assert found.tolist() == [[0, 0], [0, 0], [2, 3], [0, 3]]

    @pytest.mark.parametrize("options", [(1,), (1, 0.5, 2), (1, 0.5, 2, None, 3)], ids=str)
    @pytest.mark.parametrize("named", [named_by_scatter, named_by_comparison])
    def test_tensors_on_another_device(self, options, named):
        ids, matrix = torch.zeros(4, 3, dtype=torch.int64, device="meta"), torch.rand(6, 6, device="meta")
        found = reroute_reference(ids, matrix, *options, real_tokens=torch.ones(1).long().to("meta"), named=named)
        assert found.device.type == "meta"


@pytest.mark.parametrize("structure", thinned(CHANGING, range(0, len(CHANGING), 2)), ids=str)
def test_kernel_equals_oracle(structure, kernel_device):
    """The kernel writes every slot, nothing else, and chooses exactly as the oracle (ties, NaN, sentinels)."""
    for seed in range(100, 116):
        case = draw_case(structure, seed).to(kernel_device)
        assert_is(launch(case), expected(case), case)


@pytest.mark.parametrize("num_tokens", [127, 128, 129, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("structure", [Structure(8, 2, 1), Structure(40, 4, 1, masked=True, min_active=12)], ids=str)
def test_kernel_size_classes(structure, num_tokens, kernel_device):
    """One launch up to 1024 tokens, two above: same result on both sides of each border."""
    from sere_compile.ops.reroute.kernel import LaunchConfig

    case = draw_case(structure, 0, num_tokens).to(kernel_device)
    config = "auto" if kernel_device == "cuda" else LaunchConfig(slots=2048, chunk=64, num_warps=4)
    assert_is(launch(case, config), expected(case), case)


@pytest.mark.parametrize("structure", [Structure(8, 4, 2), Structure(60, 4, 2, min_active=4)], ids=str)
def test_kernel_with_its_own_launch_config(structure, kernel_device):
    """What launch_config returns is a launch that works (the interpreter tests replace it elsewhere)."""
    case = draw_case(structure, 3, 3).to(kernel_device)
    assert_is(launch(case, None), expected(case), case)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [257, 512, 1024])
@pytest.mark.parametrize("slots", [8, 64])
def test_kernel_limits(experts, slots):
    """The largest expert and slot counts the kernel accepts."""
    case = draw_case(Structure(experts, slots, 2, masked=True, min_active=9), 0, 33).to("cuda")
    assert_is(reroute(case.ids, case.similarity, *case.options), expected(case), case)


@pytest.mark.parametrize(("experts", "slots"), [(1025, 4), (80, 65)])
def test_beyond_kernel_limits(experts, slots, device):
    """More experts or slots than the kernel takes still work: the reference runs."""
    case = draw_case(Structure(experts, slots, 2), 1, 5).to(device)
    assert_is(reroute(case.ids, case.similarity, *case.options), expected(case), case)


def row_ids(*rows):
    return torch.tensor(rows)


def test_lowest_index_wins_ties(kernel_device):
    """Equal similarities, 0.0 and -0.0 among them, go to the lowest primary expert."""
    similarity = torch.zeros(6, 6)
    similarity[5, 1], similarity[5, 2] = -0.0, 0.0
    ids = row_ids([2, 5], [1, 5], [4, 5])
    want = row_ids([2, 1], [1, 1], [4, 1])
    assert reroute(ids, similarity, 1).equal(want)
    case = draw_case(Structure(6, 2, 1), 0)
    case.ids, case.similarity, case.threshold = ids, similarity, 0.0
    assert launch(case.to(kernel_device)).cpu().equal(want)


def test_masked_tokens_make_no_primaries_but_are_mapped():
    """Padding rows neither protect their experts nor keep them."""
    similarity = torch.eye(6)
    similarity[5, 1] = 0.5
    ids = row_ids([1, 2], [5, 3])
    mask = torch.tensor([True, False])
    assert reroute(ids, similarity, 1, token_mask=mask).equal(row_ids([1, 1], [1, 1]))
    assert reroute(ids, similarity, 1).equal(row_ids([1, 1], [5, 1]))


def test_all_masked_changes_nothing():
    """Without a primary expert there is nowhere to go."""
    case = draw_case(TYPICAL, 0, 5)
    mask = torch.zeros(case.ids.shape[:-1], dtype=torch.bool)
    assert reroute(case.ids, case.similarity, 2, token_mask=mask).equal(case.ids)


def test_sentinels_pass_through_and_are_never_primary():
    """Expert-parallel sentinels -1 and E in a primary slot protect nobody; in other slots they stay."""
    similarity = torch.rand(4, 4)
    ids = row_ids([-1, 3], [4, 2], [1, -1], [1, 4])
    assert reroute(ids, similarity, 1).equal(row_ids([-1, 1], [4, 1], [1, -1], [1, 4]))


def test_threshold_keeps_critical_experts():
    """Below the threshold an expert stays; at it, it goes (the comparison is strict)."""
    similarity = torch.eye(4)
    similarity[2, 0], similarity[3, 0] = 0.25, 0.5
    ids = row_ids([0, 2], [0, 3])
    assert reroute(ids, similarity, 1, threshold=0.5).equal(row_ids([0, 2], [0, 0]))
    assert reroute(ids, similarity, 1, threshold=0.0).equal(row_ids([0, 0], [0, 0]))


def test_a_matrix_of_16_bits_is_compared_with_the_threshold_in_fp32(kernel_device):
    """0.30078125 in bfloat16 is below 0.3015, which in bfloat16 would be the same number."""
    similarity = torch.eye(4, dtype=torch.bfloat16)
    similarity[2, 0] = 0.3
    ids = row_ids([0, 2], [0, 1])
    case = draw_case(Structure(4, 2, 1), 0)
    case.ids, case.similarity = ids, similarity
    for threshold, want in ((0.3015, 2), (0.3, 0)):
        assert reroute(ids, similarity, 1, threshold=threshold)[0].tolist() == [0, want]
        case.threshold = threshold
        assert launch(case.to(kernel_device)).cpu()[0].tolist() == [0, want]


def test_kernel_reads_a_mask_with_strides(kernel_device):
    """A column of a wider table, as padding often is."""
    case = draw_case(Structure(8, 3, 1), 0, 4, distinct=True).to(kernel_device)
    case.ids = case.ids.reshape(4, 3)
    case.mask = torch.tensor([[True, False], [False, True], [True, False], [False, True]], device=kernel_device)[:, 0]
    assert case.mask.stride() == (2,)
    assert_is(launch(case), expected(case), case)


@pytest.mark.parametrize(("min_active", "changes"), [(0, True), (2, True), (3, True), (4, False), (5, False)])
def test_min_active_widens_the_primary_set(min_active, changes):
    """One token [0 1 2 3]: S' grows from 1 until S' = min_active, and S' = K changes nothing."""
    ids = row_ids([0, 1, 2, 3])
    width = max(min_active, 1)
    want = row_ids([u if u < width or not changes else 0 for u in range(4)])
    similarity = torch.ones(4, 4)
    assert reroute(ids, similarity, 1, min_active=min_active).equal(want)


def test_min_active_counts_real_tokens_only():
    """Experts of padding rows do not help to reach min_active."""
    ids = row_ids([0, 1, 2], [3, 4, 5])
    similarity = torch.ones(6, 6)
    mask = torch.tensor([True, False])
    assert reroute(ids, similarity, 1, min_active=2).equal(row_ids([0, 0, 0], [3, 0, 0]))
    assert reroute(ids, similarity, 1, min_active=2, token_mask=mask).equal(row_ids([0, 1, 0], [0, 0, 0]))
    assert reroute(ids, similarity, 1, min_active=3, token_mask=mask).equal(ids)


REAL_STRUCTURES = [
    Structure(8, 3, 1, I32 := torch.int32),
    Structure(60, 4, 2, masked=True, min_active=4),
    Structure(128, 8, 1, I32, torch.bfloat16),
]


def expected_of_leading(case, real):
    """The oracle on the first `real` tokens; the others as they were."""
    rows, mask = case.flat("ids"), case.flat("mask")
    counted = [i < real and (mask is None or mask[i]) for i in range(len(rows))]
    new = reroute_rows(rows, as_fp32_rows(case.similarity), case.select, case.threshold, case.min_active, counted)
    kept = [new[i] if i < real else rows[i] for i in range(len(rows))]
    return torch.tensor(kept, dtype=case.ids.dtype).reshape(case.ids.shape)


def number(real, device):
    return torch.tensor([real], device=device)


@pytest.mark.parametrize("structure", REAL_STRUCTURES, ids=str)
@pytest.mark.parametrize("real", [-1, 0, 1, 4, 6, 7, 2**40])
def test_tokens_behind_the_real_ones_neither_count_nor_change(structure, real, device):
    for seed in range(5):
        case = draw_case(structure, seed, 7).to(device)
        result = reroute(case.ids, case.similarity, *case.options, real_tokens=number(real, device))
        assert_is(result, expected_of_leading(case, real), case)


@pytest.mark.parametrize("structure", REAL_STRUCTURES, ids=str)
@pytest.mark.parametrize(("num_tokens", "reals"), [(7, (-1, 0, 1, 4, 7, 2**40)), (1030, (0, 5, 1029, 1030))])
def test_kernel_reads_how_many_tokens_are_real(structure, num_tokens, reals, kernel_device):
    """In one launch and in two."""
    from sere_compile.ops.reroute.kernel import LaunchConfig, launch_reroute

    small = LaunchConfig(32, 16, 4) if num_tokens < 1024 else LaunchConfig(2048, 64, 4)
    case = draw_case(structure, 1, num_tokens).to(kernel_device)
    for real in reals:
        with poisoned_memory():
            result = launch_reroute(
                case.ids, case.similarity, *case.options, None if case.ids.is_cuda else small,
                real_tokens=number(real, kernel_device),
            )  # fmt: skip
        assert_is(result, expected_of_leading(case, real), case)


def test_kernel_with_a_budget_reads_how_many_tokens_are_real(kernel_device):
    """With two real tokens S grows to 2 within a budget of 3; with four it stays 1."""
    from sere_compile.ops.reroute.kernel import LaunchConfig, launch_reroute

    ids = row_ids([0, 1, 3], [0, 2, 3], [4, 5, 3], [5, 4, 3]).to(kernel_device)
    similarity = torch.ones(6, 6, device=kernel_device)
    config = None if ids.is_cuda else LaunchConfig(32, 16, 4)
    for real in (2, 4):
        one = number(real, kernel_device)
        want = reroute_reference(ids, similarity, 1, 0.0, 0, None, 3, one)
        assert launch_reroute(ids, similarity, 1, 0.0, 0, None, config, 3, one).equal(want)
        assert want[0, 1] == (1 if real == 2 else 0)


@pytest.mark.gpu
def test_cuda_graph_follows_the_number_of_real_tokens():
    case = draw_case(Structure(128, 8, 2, torch.int32), 0, 32, distinct=True).to("cuda")
    ids, real = case.ids.reshape(32, 8).contiguous(), number(32, "cuda")
    reroute(ids, case.similarity, 2, real_tokens=real)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = reroute(ids, case.similarity, 2, real_tokens=real)
    for now in (32, 0, 5):
        real.fill_(now)
        graph.replay()
        assert result.equal(reroute_reference(ids, case.similarity, 2, real_tokens=real))
        assert result.equal(ids) == (now == 0)


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 12))
    slots = draw(st.integers(1, 6))
    structure = Structure(
        experts, slots, draw(st.integers(-1, slots + 1)), masked=draw(st.booleans()),
        min_active=draw(st.integers(0, slots + 2)),
    )  # fmt: skip
    return draw_case(structure, draw(st.integers(0, 2**30)), draw(st.integers(0, 9)))


def real_rows(case, ids):
    rows = ids.reshape(-1, ids.shape[-1])
    return rows if case.mask is None else rows[case.mask.reshape(-1)]


def active(case, ids):
    ids = ids.reshape(-1)
    return set(ids[(ids >= 0) & (ids < case.similarity.shape[0])].tolist())


@settings(max_examples=200, deadline=None)
@given(cases())
def test_properties(case):
    """What every caller relies on, whatever the input."""
    before = case.ids.clone(), case.similarity.clone()
    result = reroute(case.ids, case.similarity, *case.options)
    # The inputs are untouched, and the output is memory of its own even when nothing changes.
    assert case.ids.equal(before[0])
    assert case.similarity.view(torch.int32).equal(before[1].view(torch.int32))
    if result.numel():
        assert result.untyped_storage().data_ptr() != case.ids.untyped_storage().data_ptr()
    if not 0 < case.select < case.ids.shape[-1]:
        assert result.equal(case.ids)
        return
    # Slots of real tokens below S stay.
    first_new, first_old = (real_rows(case, x)[:, : case.select] for x in (result, case.ids))
    assert first_new.equal(first_old)
    # No expert becomes active that was not, sentinels stay where they are.
    assert active(case, result) <= active(case, case.ids)
    sentinel = (case.ids < 0) | (case.ids >= case.similarity.shape[0])
    assert result[sentinel].equal(case.ids[sentinel])
    # The map is per expert.
    mapping = {}
    for old, new in zip(case.ids.reshape(-1).tolist(), result.reshape(-1).tolist(), strict=True):
        assert mapping.setdefault(old, new) == new
    # Doing it twice changes nothing more: primary slots stay, so the second map is the first one.
    assert reroute(result, case.similarity, *case.options).equal(result)
    # Only the map matters, not the order of the tokens.
    mask = None if case.mask is None else case.mask.flip(0)
    flipped = reroute(case.ids.flip(0), case.similarity, *case.options[:-1], mask)
    assert flipped.equal(result.flip(0))


def arguments(**changes):
    valid = {
        "topk_ids": torch.zeros(3, 4, dtype=torch.int64), "similarity": torch.zeros(8, 8), "select_top_k": 2,
        "min_active": 0, "token_mask": None,
    }  # fmt: skip
    return valid | changes


BAD_ARGUMENTS = [
    ({"topk_ids": torch.zeros(3, 4)}, TypeError, r"topk_ids: expected dtype .*int32 or .*int64, got .*float32"),
    ({"topk_ids": torch.tensor(1)}, ValueError, r"topk_ids: expected shape \[\.\.\., K\], got a 0-dim"),
    ({"similarity": torch.zeros(8, 7)}, ValueError, r"similarity: expected shape \[E, E\].* got \[8, 7\]"),
    ({"similarity": torch.zeros(8)}, ValueError, r"similarity: expected shape \[E, E\].* got \[8\]"),
    ({"similarity": torch.zeros(0, 0)}, ValueError, r"similarity: .*E >= 1, got \[0, 0\]"),
    ({"similarity": torch.zeros(8, 8, dtype=torch.int64)}, TypeError, r"similarity: .* got torch.int64"),
    ({"similarity": torch.zeros(8, 8, dtype=torch.float64)}, TypeError, r"similarity: .* got torch.float64"),
    ({"similarity": torch.zeros(8, 8, device="meta")}, ValueError, r"similarity: expected device cpu.* got meta"),
    ({"min_active": -1}, ValueError, r"min_active: expected 0 .* got -1"),
    ({"token_mask": torch.ones(3)}, TypeError, r"token_mask: expected dtype torch.bool, got torch.float32"),
    ({"token_mask": torch.ones(3, 4).bool()}, ValueError, r"token_mask: expected shape \[3\].* got \[3, 4\]"),
    ({"token_mask": torch.ones(3, device="meta").bool()}, ValueError, r"token_mask: expected device cpu"),
    ({"real_tokens": torch.ones(1)}, TypeError, r"real_tokens: expected dtype torch.int64, got torch.float32"),
    ({"real_tokens": torch.tensor(1)}, ValueError, r"real_tokens: expected shape \[1\], got \[\]"),
    ({"real_tokens": torch.ones(1, device="meta").long()}, ValueError, r"real_tokens: expected device cpu"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
@pytest.mark.parametrize("tracing", [False, True])
def test_bad_arguments_are_named(changes, error, message, tracing):
    """A wrong argument is reported by name with expected and actual, in eager and while tracing."""
    fake = FakeTensorMode(allow_non_fake_inputs=True) if tracing else contextlib.nullcontext()
    if tracing and isinstance(bad := next(iter(changes.values())), torch.Tensor) and bad.device.type == "meta":
        pytest.skip("fake tensors are made from meta tensors; the eager case covers the check")
    with fake, pytest.raises(error, match=message):
        reroute(**arguments(**changes))


def test_bad_argument_under_torch_compile_names_it():
    """The message survives Dynamo, which wraps the exception."""
    with pytest.raises(Exception, match=r"similarity: expected shape \[E, E\]"):
        torch.compile(reroute, backend="eager", fullgraph=True)(**arguments(similarity=torch.zeros(8, 7)))


OPCHECKED = (
    TYPICAL,
    Structure(8, 4, 4),
    Structure(8, 4, 0, I32),
    Structure(60, 8, 2, I32, torch.bfloat16),
    Structure(128, 8, 1, torch.int64, torch.float16, masked=True),
    Structure(3, 3, 1, I32, masked=True, min_active=5),
)


# By default one with tokens; the others, and without tokens, in the lane `slow`.
@pytest.mark.parametrize(("num_tokens", "structure"), thinned(itertools.product((6, 0, 1), OPCHECKED), (5,)), ids=str)
def test_opcheck(structure, num_tokens, device):
    """Schema, fake kernel, autograd registration and AOT dispatch with symbolic shapes are consistent."""
    for seed in range(2):
        case = draw_case(structure, seed, num_tokens).to(device)
        torch.library.opcheck(OP, (case.ids, case.similarity, *case.options))
        torch.library.opcheck(OP, (case.ids, case.similarity, *case.options, 0, number(seed, device)))


def test_fake_cuda_without_cuda():
    """Tracing for CUDA works on a machine without it: shape, dtype and device come from the fake kernel."""
    with FakeTensorMode():
        ids = torch.empty(2, 5, 8, dtype=torch.int32, device="cuda").transpose(0, 1)
        similarity = torch.empty(60, 60, dtype=torch.bfloat16, device="cuda")
        result = reroute(ids, similarity, 2)
    assert (result.shape, result.dtype, result.device.type) == ((5, 2, 8), torch.int32, "cuda")
    assert result.is_contiguous()


@pytest.mark.slow
def test_torch_compile_equals_eager(device):
    """Inductor, whole graph, symbolic token count: same ids as eager."""
    torch._dynamo.reset()
    structure = Structure(60, 4, 2, masked=True, min_active=4)
    compiled = torch.compile(reroute, fullgraph=True, dynamic=True)
    for seed, num_tokens in enumerate((6, 13, 2, 120)):
        case = draw_case(structure, seed, num_tokens).to(device)
        # One layout: Dynamo compiles again for other strides.
        ids, similarity = case.ids.reshape(-1, 4).contiguous(), case.similarity.contiguous()
        options = 2, 0.3, 4, case.mask.reshape(-1)
        assert compiled(ids, similarity, *options).equal(reroute(ids, similarity, *options))


def test_torch_compile_identity_returns_fresh_memory(device):
    """S >= K compiled is a copy, not the input: a caller may write into the result."""
    torch._dynamo.reset()
    case = draw_case(Structure(8, 4, 4), 0, 5).to(device)
    result = torch.compile(reroute, fullgraph=True)(case.ids, case.similarity, 4)
    assert result.equal(case.ids)
    assert result.data_ptr() != case.ids.data_ptr()


class Gate(torch.nn.Module):
    def __init__(self, num_experts, device):
        super().__init__()
        self.register_buffer("similarity", torch.rand(num_experts, num_experts, device=device))

    def forward(self, ids, mask):
        return reroute(ids, self.similarity, 2, 0.1, 4, mask)


def test_export_keeps_the_operator_and_decomposes_to_aten(device):
    """torch.export with a dynamic T holds one sere::reroute; the reference as decomposition leaves only ATen."""
    tokens = torch.export.Dim("tokens", max=4096)
    gate = Gate(60, device)
    case = draw_case(TYPICAL, 0, 6).to(device)
    inputs = case.ids.reshape(6, 4), case.mask.reshape(6)
    program = torch.export.export(gate, inputs, dynamic_shapes=({0: tokens}, {0: tokens}))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [OP]
    plain = program.run_decompositions({OP: reroute_reference})
    targets = {n.target for n in plain.graph.nodes if n.op == "call_function"}
    assert OP not in targets
    assert all(t.namespace == "aten" for t in targets if isinstance(t, torch._ops.OpOverload))
    for num_tokens in (1, 17):
        other = draw_case(TYPICAL, 1, num_tokens).to(device)
        ids, mask = other.ids.reshape(-1, 4), other.mask.reshape(-1)
        want = gate(ids, mask)
        assert program.module()(ids, mask).equal(want)
        assert plain.module()(ids, mask).equal(want)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 32, 1024, 1500])
def test_cuda_graph_replay(num_tokens):
    """A captured call follows new ids on replay: no host sync, nothing baked in."""
    first, second = (
        draw_case(Structure(128, 8, 2, masked=True, min_active=8), seed, num_tokens).to("cuda") for seed in (0, 1)
    )
    ids, mask = first.ids.reshape(-1, 8).contiguous(), first.mask.reshape(-1).contiguous()
    options = 2, 0.3, 8, mask
    reroute(ids, first.similarity, *options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = reroute(ids, first.similarity, *options)
    for case in (first, second):
        ids.copy_(case.ids.reshape(-1, 8))
        mask.copy_(case.mask.reshape(-1))
        result.fill_(-77)
        graph.replay()
        assert result.equal(reroute_reference(ids, first.similarity, *options))


@pytest.mark.gpu
def test_reduce_overhead():
    """torch.compile with CUDA graphs gives eager's ids on every replay."""
    torch._dynamo.reset()
    compiled = torch.compile(reroute, mode="reduce-overhead", fullgraph=True)
    similarity = torch.rand(128, 128, device="cuda")
    for seed in range(5):
        ids = draw_case(Structure(128, 8, 2), seed, 32).ids.reshape(32, 8).contiguous().cuda()
        torch.compiler.cudagraph_mark_step_begin()
        assert compiled(ids, similarity, 2, 0.3, 8).equal(reroute_reference(ids, similarity, 2, 0.3, 8))


@pytest.mark.gpu
def test_tensors_on_another_gpu():
    """The launch goes to the tensors' GPU, not to the current one (models spread over several)."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = draw_case(TYPICAL, 0, 6).to("cuda:1")
    assert_is(reroute(case.ids, case.similarity, *case.options), expected(case), case)


@pytest.mark.parametrize("run", ["operator", "lowered", "kernel"])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("min_active", [0, 5])
@pytest.mark.parametrize("max_active", [1, 6, 9, 14, 16, 40])
def test_budget_of_active_experts(run, min_active, max_active, padding, kernel_device):
    """The largest S whose union fits the budget, at least the given one; min_active may ask for more.

    Where S reaches K nothing changes, in padding rows neither.
    """
    from sere_compile.ops.reroute.kernel import LaunchConfig, launch_reroute

    generator = torch.Generator().manual_seed(max_active)
    ids = torch.stack([torch.randperm(16, generator=generator)[:5] for _ in range(4)])
    similarity = torch.rand(16, 16, generator=generator)
    unions = [len(ids[:, :width].unique()) for width in range(1, 6)]
    width = max([1, *(w for w in range(1, 6) if unions[w - 1] <= max_active)])
    width = max(width, next((w for w in range(1, 6) if unions[w - 1] >= min_active), 5))
    ids = torch.cat([ids, ids.flip(0)[:padding] * 5 % 16])
    mask = torch.arange(4 + padding) < 4
    rows = reroute_rows(ids.tolist(), as_fp32_rows(similarity), width, real=mask.tolist())
    mask = mask.to(kernel_device) if padding else None
    arguments = (ids.to(kernel_device), similarity.to(kernel_device), 1, 0.0, min_active, mask)
    if run == "operator":
        result = OP(*arguments, max_active=max_active)
    elif run == "lowered":
        result = reroute_reference(*arguments, max_active=max_active, named=named_by_comparison)
    else:
        config = LaunchConfig(slots=8, chunk=16, num_warps=1)
        result = launch_reroute(*arguments, config, max_active)
    assert result.tolist() == rows
