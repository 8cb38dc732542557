"""`cluster.cu`: routing in one launch equals the reference, with a CPU's instructions in the place of a GPU's.

On a GPU the operators' own tests run it: test_fill.py, test_route_fill.py, test_route_reroute.py.
"""

import dataclasses
import itertools
import shutil

import pytest
import torch

from sere_compile.ops.cuda import cluster
from sere_compile.ops.cuda.cluster import Rows, Selection
from sere_compile.ops.fill.op import _rows
from sere_compile.ops.route.reference import Rerouting, route_reference

from ..thinned import thinned
from . import cuda_on_cpu, test_route_reroute
from .cases import exact_product
from .test_fill import Structure, assert_is, draw_case
from .test_route_fill import Case

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
I32, BF16, FP16 = torch.int32, torch.bfloat16, torch.float16

# With the tokens of each.
GIVEN = [
    (Structure(8, 4, 1), 40),
    (Structure(128, 8, 2, I32, BF16, masked=True, min_active=8), 13),
    (Structure(16, 4, 2, masked=True, max_active=3, min_active=5), 40),
    (Structure(9, 2, 1, I32, BF16, threshold=0.125), 1),
    (Structure(60, 6, 2, masked=True, choice=True), 13),
    (Structure(33, 5, 2, floats=FP16, min_active=12, threshold=0.03125), 40),
    (Structure(200, 7, 1, I32, masked=True), 29),
    (Structure(256, 16, 3, choice=True), 13),
]
SELECTED = [
    (Case(128, 8, 1), 70),
    (Case(128, 8, 2, dtype=FP16, threshold=0.1, min_active=8), 13),
    (Case(60, 6, 3, dtype=torch.float32, scoring="softmax_after", min_active=20), 40),
    (Case(37, 5, 2, bias=True, scoring="sigmoid", min_active=9), 13),
    (Case(40, 4, 1, bias=True, weights=BF16), 13),
    (Case(16, 4, 1, max_active=9, scoring="none"), 40),
    (Case(256, 16, 1, bias=True, scoring="none", weights=FP16), 5),
]
# Without groups, and with rows of similarities that no lane can have all at once.
REROUTED = [
    *(case for case in test_route_reroute.CASES if case.groups[1] == case.groups[0]),
    test_route_reroute.Case(256, 16, 1, min_active=40, projection=True),
    test_route_reroute.Case(200, 9, 3, scoring="sigmoid", dtype=torch.float32, threshold=0.9),
]


def cuts(num_tokens, experts):
    """(blocks, threads): as few blocks as can be, and several of which the last may have no token."""
    least = -(-max(experts, 32) // 32)
    for blocks in (1 if num_tokens <= 32 else 4, 8):
        warps = max(least, -(-num_tokens // blocks))
        yield blocks, 32 * warps


@needs_compiler
@pytest.mark.parametrize(("structure", "tokens"), thinned(GIVEN, (1,)), ids=str)
def test_given_experts(structure, tokens, tmp_path):
    """Ids, weights and scores as they come: what `sere::fill` gives, whatever the number of blocks."""
    for cut in cuts(tokens, structure.experts):
        case = draw_case(structure, 5, tokens)
        ids, weights = (t.reshape(-1, structure.slots).contiguous() for t in (case.ids, case.weights))
        scores, choice = (None if t is None else _rows(t) for t in (case.scores, case.choice))
        mask = None if case.mask is None else case.mask.reshape(-1)
        numbers = structure.select, structure.threshold, structure.min_active, structure.max_active
        outs = torch.full_like(ids, -77), torch.full_like(weights, torch.nan)
        rows = Rows(scores, choice, None, ids, weights, mask)
        folder = tmp_path / str(cut[0])
        folder.mkdir()
        cuda_on_cpu.run_cluster(rows, Rerouting(None, *numbers, fill=True), Selection(), outs, cut, folder)
        assert_is((outs[0].view(case.ids.shape), outs[1].view(case.weights.shape)), case, rounding=2)


@needs_compiler
@pytest.mark.parametrize(("threshold", "min_active"), [(0.0, 8), (0.01, 0)])
def test_where_the_batch_loses_nothing_masked_tokens_do_not_either(threshold, min_active, tmp_path):
    """The last token says nothing, and its experts are no other token's."""
    ids = torch.tensor([[0, 1], [2, 3], [4, 5]])
    scores = torch.arange(24.0).view(3, 8)
    weights, mask = torch.full((3, 2), 0.5), torch.tensor([True, True, False])
    outs = torch.full_like(ids, -77), torch.full_like(weights, torch.nan)
    rows = Rows(scores, ids=ids, weights=weights, mask=mask)
    filling = Rerouting(None, 1, threshold, min_active, fill=True)
    cuda_on_cpu.run_cluster(rows, filling, Selection(), outs, (1, 128), tmp_path)
    assert torch.equal(outs[0], ids)
    assert torch.equal(outs[1], weights)


@needs_compiler
@pytest.mark.parametrize(("case", "tokens"), thinned(SELECTED, (3,)), ids=str)
def test_selected_experts(case, tokens, tmp_path):
    """Logits: what `sere::route` gives, also where some tokens are padding and some take no part."""
    for seed, cut in enumerate(cuts(tokens, case.experts)):
        logits, bias, scoring, filling = case.draw(tokens, seed, "cpu")
        if seed:
            real, taking_part = (torch.tensor([tokens - n]) for n in (2, 4))
            filling = dataclasses.replace(filling, real_tokens=real, rerouted_tokens=taking_part)
        want = route_reference(logits, bias, scoring, filling)
        outs = torch.full_like(want[1], -77), torch.full_like(want[0], torch.nan)
        folder = tmp_path / str(cut[0])
        folder.mkdir()
        selection = Selection(scoring.scoring, scoring.renormalize, scoring.epsilon, scoring.scale)
        cuda_on_cpu.run_cluster(Rows(logits, bias=bias), filling, selection, outs, cut, folder)
        assert torch.equal(outs[0], want[1])
        close = {"rtol": 2e-5, "atol": 1e-6} if case.weights == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
        torch.testing.assert_close(outs[1], want[0], **close)


@needs_compiler
@pytest.mark.parametrize(("place", "case"), thinned([*enumerate(REROUTED)], (4,)), ids=str)
def test_rerouted_experts(place, case, tmp_path):
    """Logits and similarities, among them NaN and infinite ones: what `sere::route` gives, for those tokens alone."""
    tokens = 13
    for seed, cut in enumerate(cuts(tokens, case.experts)):
        logits, bias, scoring, rerouting = case.draw(tokens, seed, "cpu")
        similarity = rerouting.similarity.clone()
        similarity.view(-1)[:: 5 + seed] = torch.tensor([torch.nan, -torch.inf, torch.inf])[seed]
        real, rerouted = (torch.tensor([n]) if (place + seed) % 2 else None for n in (9, 7))
        rerouting = dataclasses.replace(
            rerouting, similarity=similarity.to((torch.float32, BF16, FP16)[place % 3]), real_tokens=real,
            rerouted_tokens=rerouted, ids_dtype=I32 if seed else torch.int64,
        )  # fmt: skip
        want = route_reference(logits, bias, scoring, rerouting)
        outs = torch.full_like(want[1], -77), torch.full_like(want[0], torch.nan)
        folder = tmp_path / str(cut[0])
        folder.mkdir()
        selection = Selection(scoring.scoring, scoring.renormalize, scoring.epsilon, scoring.scale)
        cuda_on_cpu.run_cluster(Rows(logits, bias=bias), rerouting, selection, outs, cut, folder)
        assert torch.equal(outs[0], want[1])
        torch.testing.assert_close(outs[1], want[0], rtol=2e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize(
    ("case", "dtype", "tokens", "width"),
    thinned(
        [
            (test_route_reroute.CASES[0], BF16, 13, 512),
            (test_route_reroute.CASES[2], FP16, 31, 256),
            (test_route_reroute.CASES[4], BF16, 1, 2560),
            (test_route_reroute.Case(256, 16, 1, min_active=40), FP16, 19, 256),
            (Case(128, 8, 2), BF16, 32, 256),
        ],
        (0, 2),
    ),
    ids=str,
)
def test_logits_of_hidden_states(case, dtype, tokens, width, tmp_path):
    """Hidden states and the router's weight: what routing gives by their product, whose numbers are exact here."""
    _, bias, scoring, rerouting = case.draw(tokens, 0, "cpu")
    hidden, router = exact_product(tokens, case.experts, width, dtype)
    want = route_reference((hidden.float() @ router.float().T).to(dtype), bias, scoring, rerouting)
    outs = torch.full_like(want[1], -77), torch.full_like(want[0], torch.nan)
    selection = Selection(scoring.scoring, scoring.renormalize, scoring.epsilon, scoring.scale)
    cut = cluster.cut(tokens, case.experts, has_hidden=True)
    cuda_on_cpu.run_cluster(Rows(hidden, bias=bias, router=router), rerouting, selection, outs, cut, tmp_path)
    assert torch.equal(outs[0], want[1])
    torch.testing.assert_close(outs[1], want[0], rtol=2e-5, atol=1e-6)


def test_cut():
    """A warp for each token, a thread for each expert, and no more than there can be."""
    for tokens, experts in itertools.product(range(1, cluster.MOST_TOKENS + 1), (8, 128, 200, cluster.MOST_EXPERTS)):
        blocks, threads = cluster.cut(tokens, experts)
        assert blocks <= cluster.MOST_BLOCKS
        assert blocks * threads // 32 >= tokens
        assert experts <= threads <= 1024
        assert threads % 32 == 0
        if tokens <= cluster.MOST_REROUTED_TOKENS:
            assert threads <= 512  # `__launch_bounds__` of re-routing
        if tokens <= cluster.MOST_HIDDEN_TOKENS:
            blocks, threads = cluster.cut(tokens, experts, has_hidden=True)
            assert tokens <= blocks * threads // 32
            assert experts <= threads // 32 * 16 <= 256


def test_what_is_taken(monkeypatch):
    """Up to 256 tokens and experts, 16 slots, in the dtypes that it computes in; sizes that are known."""
    monkeypatch.setattr(cluster.nvrtc, "serves", lambda device: True)
    scores = torch.zeros(4, 128)
    assert cluster.takes(scores.shape, 8, scores, scores, None)
    assert not cluster.takes(scores.shape, 17, scores)
    assert not cluster.takes(scores.shape, 8, scores.double())
    assert not cluster.takes(scores.shape, 8, scores, scores.double())
    for shape in ((0, 128), (257, 128), (16, 17, 128), (4, 257)):
        assert not cluster.takes(shape, 8, scores), shape
    assert cluster.takes((16, 16, 256), 16, scores)


def test_which_hidden_states_are_taken(monkeypatch):
    """16 bits, contiguous, aligned, whole steps of columns for each block, and what shared memory has room for."""
    monkeypatch.setattr(cluster.nvrtc, "serves", lambda device: True)
    hidden, router = torch.zeros(8, 2048, dtype=BF16), torch.zeros(128, 2048, dtype=BF16)
    assert cluster.takes_hidden(hidden, router, 8, None, router)
    assert cluster.takes_hidden(hidden.view(2, 4, -1).half(), router.half(), 8)
    for other in (hidden.float(), hidden.half(), torch.zeros(2048, 8, dtype=BF16).T, torch.zeros(33, 2048, dtype=BF16)):
        assert not cluster.takes_hidden(other, router, 8)
    assert not cluster.takes_hidden(torch.zeros(8 * 2048 + 1, dtype=BF16)[1:].view(8, 2048), router, 8)
    assert not cluster.takes_hidden(hidden[:, :2016].contiguous(), router[:, :2016].contiguous(), 8)
    wide, of_many = torch.zeros(32, 16384, dtype=BF16), torch.zeros(256, 16384, dtype=BF16)
    assert not cluster.takes_hidden(wide, of_many, 8)
    assert cluster.takes_hidden(wide[:8], of_many, 8)


def test_a_machine_without_hopper_takes_nothing():
    """The operators go to Triton or to the reference."""
    assert not cluster.takes((4, 8), 2, torch.zeros(4, 8))


def test_shared_memory_fits_beside_another_block():
    """The most that is asked for: two blocks fit on a multiprocessor."""
    one = cluster.Cluster(256, 16, 1, False, True, "scores", *[False] * 10, 0, 0, 0, 0, 0)
    assert dataclasses.replace(one, experts=8).shared_bytes < one.shared_bytes <= 112 * 1024
