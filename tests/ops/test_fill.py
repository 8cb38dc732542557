"""`sere::fill`: reference and kernels against the oracle, identities, edge cases, tracing, arguments."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sere_compile.ops import fill
from sere_compile.ops.fill.reference import Keeping, fill_batches, fill_reference, filled_ids

from ..thinned import thinned
from . import fill_oracle
from .cases import poisoned_memory

OP = torch.ops.sere.fill.default
I32, BF16, FP16 = torch.int32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the kernels are specialised on; on a GPU each costs a compilation."""

    experts: int
    slots: int
    select: int
    ids: torch.dtype = torch.int64
    floats: torch.dtype = torch.float32
    masked: bool = False
    min_active: int = 0
    max_active: int = 0
    threshold: float = 0.0
    choice: bool = False

    def __str__(self):
        return "-".join(str(v).replace("torch.", "") for v in dataclasses.astuple(self))


STRUCTURES = [
    Structure(8, 4, -1),
    Structure(8, 4, 4, masked=True),
    Structure(8, 4, 1),
    Structure(8, 4, 3, I32, masked=True, min_active=5),
    Structure(4, 4, 1, choice=True),
    Structure(16, 4, 1, max_active=6),
    Structure(16, 4, 2, masked=True, max_active=3, min_active=5),
    Structure(9, 2, 1, I32, BF16, threshold=0.125),
    Structure(60, 6, 2, masked=True, choice=True),
    Structure(33, 5, 2, floats=FP16, min_active=12, threshold=0.03125),
    Structure(128, 8, 1, choice=True),
    Structure(128, 8, 2, I32, BF16, masked=True, min_active=8),
    Structure(128, 8, 4, max_active=24, choice=True),
    Structure(200, 7, 1, I32, masked=True),
    Structure(512, 16, 2, masked=True, choice=True),
    Structure(512, 16, 1, floats=BF16, max_active=40),
    Structure(320, 12, 5, I32, choice=True, threshold=0.015625),
    Structure(1, 1, 1),
    Structure(64, 8, 1, min_active=8),
    Structure(64, 8, 3, floats=BF16, masked=True, choice=True, max_active=16),
]
# Where slots are lost.
LOSING = [s for s in STRUCTURES if 0 < s.select < s.slots]
CASES = 100  # of each structure: 2,000 in all
TOKENS = (0, 1, 2, 3, 5, 8, 13, 40)


@dataclasses.dataclass
class Case:
    structure: Structure
    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    mask: torch.Tensor | None
    choice: torch.Tensor | None

    def to(self, device):
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def arguments(self):
        s = self.structure
        numbers = (s.select, s.threshold, s.min_active, self.mask, s.max_active)
        return (self.ids, self.weights, self.scores, *numbers, self.choice)

    def lists(self, name):
        tensor = getattr(self, name)
        if tensor is None:
            return None
        flat = tensor.reshape(-1, *tensor.shape[self.ids.dim() - 1 :])
        return (flat if tensor is self.ids or tensor is self.mask else flat.double()).cpu().tolist()

    def expected(self):
        s = self.structure
        options = {"threshold": s.threshold, "min_active": s.min_active, "max_active": s.max_active}
        rows = [self.lists(name) for name in ("ids", "weights", "scores")]
        ids, weights = fill_oracle.fill_rows(
            *rows, s.select, real=self.lists("mask"), choice=self.lists("choice"), **options
        )
        shape = self.ids.shape
        return (
            torch.tensor(ids, dtype=self.ids.dtype).reshape(shape),
            torch.tensor(weights, dtype=torch.float64).reshape(shape).to(self.weights.dtype),
        )


def draw_case(structure: Structure, seed: int, num_tokens: int | None = None) -> Case:
    """Scores and weights are small whole numbers times a power of two: ties are common, sums of squares exact."""
    rng = random.Random(f"{structure}/{seed}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    tokens = rng.choice(TOKENS) if num_tokens is None else num_tokens
    experts, slots = structure.experts, structure.slots

    def whole(shape, limit):
        return torch.randint(0, limit, shape, generator=generator).float()

    favourite = whole((experts,), 20) if rng.random() < 0.5 else 0.0  # tokens that agree keep few experts
    scores = ((whole((tokens, experts), 12) + favourite) / 32).to(structure.floats)
    choice = None
    if structure.choice:
        choice = (scores.float() + whole((experts,), 6) / 16 - rng.choice([0, 2])).to(structure.floats)
        closed = torch.rand(tokens, experts, generator=generator) < rng.choice([0.0, 0.0, 0.3, 0.8])
        choice = choice.masked_fill(closed, rng.choice([float("-inf"), float("nan"), torch.finfo(choice.dtype).min]))
        if rng.random() < 0.2:
            choice[:, rng.randrange(experts)] = float("inf")
    rank = torch.nan_to_num((scores if choice is None else choice).float(), nan=-1e30)
    ids = rank.sort(dim=-1, descending=True, stable=True).indices[:, :slots].to(structure.ids)
    weights = ((whole((tokens, slots), 64) + rng.choice([0, 1])) / 64).sort(-1, descending=True).values
    weights = weights.to(structure.floats)
    if rng.random() < 0.3:
        odd = torch.tensor([-1, experts, experts + 32, 2**31 - 1]).to(ids.dtype)
        where = torch.rand(ids.shape, generator=generator) < rng.choice([0.1, 0.5, 1.0])
        ids = torch.where(where, odd[torch.randint(0, 4, ids.shape, generator=generator)], ids)
    mask = None
    if structure.masked:
        mask = torch.rand(tokens, generator=generator) < rng.choice([0.0, 0.5, 1.0])
    layout = rng.random()
    if layout < 0.2:
        ids, weights = ids.T.contiguous().T, weights.T.contiguous().T
        scores = torch.cat([scores, scores], 1)[:, :experts]
    elif layout < 0.4:
        ids, scores = torch.cat([ids, ids], 1)[:, :slots], scores.T.contiguous().T
    if rng.random() < 0.3:
        shape = (tokens // 2, 2) if tokens % 2 == 0 else (1, tokens)
        ids, weights, scores = (t.unflatten(0, shape) for t in (ids, weights, scores))
        mask, choice = (None if t is None else t.unflatten(0, shape) for t in (mask, choice))
    return Case(structure, ids, weights, scores, mask, choice)


def assert_is(result, case, rounding=1):
    """Ids exactly; weights up to the rounding of fp32 sums and, in 16 bits, of the last step."""
    ids, weights = case.expected()
    torch.testing.assert_close(result[0].cpu(), ids, rtol=0, atol=0)
    torch.testing.assert_close(
        result[1].cpu().float(), weights.float(), rtol=max(2e-6, rounding * torch.finfo(weights.dtype).eps), atol=1e-12,
        equal_nan=True,
    )  # fmt: skip
    assert (result[0].dtype, result[1].dtype) == (case.ids.dtype, case.weights.dtype)
    assert result[0].device == result[1].device == case.ids.device
    assert result[0].is_contiguous()
    assert result[1].is_contiguous()


def launch(case, tile=None):
    from sere_compile.ops.fill.launch import Ranking, launch_fill

    s = case.structure
    ids, weights, scores = (t.reshape(-1, t.shape[-1]) for t in (case.ids, case.weights, case.scores))
    choice = None if case.choice is None else case.choice.reshape(-1, s.experts).contiguous()
    mask = None if case.mask is None else case.mask.reshape(-1)
    keeping = Keeping(s.select, s.threshold, s.min_active, s.max_active)
    ranking = Ranking(scores.contiguous(), choice=choice)
    with poisoned_memory():
        new = launch_fill(ids, weights, ranking, keeping, mask, tile)
    return tuple(t.view(case.ids.shape) for t in new)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_operator_equals_oracle(structure, device):
    """The operator (on CPU its ATen reference) does what the method's text says, on 2,000 random cases."""
    for seed in range(CASES):
        case = draw_case(structure, seed).to(device)
        assert_is(fill(*case.arguments), case)


@pytest.mark.parametrize("structure", thinned(LOSING, range(1, len(LOSING), 8)), ids=str)
def test_kernel_equals_oracle(structure, kernel_device):
    """The kernels too, and they write every slot and nothing else. (The interpreter truncates to 16 bits.)"""
    interpreted = kernel_device != "cuda"
    for seed in range(CASES, CASES + (4 if interpreted else CASES)):
        tokens = (0, 3, 5, 13)[seed % 4] if interpreted else None
        case = draw_case(structure, seed, tokens).to(kernel_device)
        assert_is(launch(case), case, rounding=2)


@pytest.mark.parametrize("tile", thinned([((1, 4),), ((2, 2),), ((8, 4),)], (1,)), ids=str)
def test_tiles(tile, kernel_device):
    """The result does not depend on how tokens are cut into programs, nor on the rows of statistics."""
    from sere_compile.ops.fill.launch import Tile

    for structure, tokens in ((STRUCTURES[11], 19), (STRUCTURES[8], 70)):
        case = draw_case(structure, 7, tokens).to(kernel_device)
        assert_is(launch(case, Tile(*tile)), case, rounding=2)


def test_by_hand():
    """The first choices 0 and 1 stay; each token's other expert goes to the other's first choice."""
    ids = torch.tensor([[0, 2], [1, 3]])
    weights = torch.tensor([[0.5, 0.375], [0.75, 0.125]])
    scores = torch.tensor([[0.4, 0.05, 0.3, 0.1], [0.08, 0.6, 0.1, 0.12]])
    new_ids, new = fill(ids, weights, scores, 1)
    assert new_ids.tolist() == [[0, 1], [1, 0]]
    # For the first token 1 is worth 0.875 / 0.7 * 0.05, three quarters of it are given.
    first, second = (0.5, 0.75 * 0.875 / 0.7 * 0.05), (0.75, 0.75 * 0.875 / 0.72 * 0.08)
    factors = [(0.875 / sum(row)) ** 0.75 for row in (first, second)]
    torch.testing.assert_close(new, torch.tensor([first, second]) * torch.tensor(factors)[:, None])


def test_first_choices_come_before_heavier_experts():
    """Expert 3 has the larger mass, but it is nobody's first choice and there is room for two."""
    ids = torch.tensor([[0, 3], [1, 3], [0, 3]])
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    new_ids, _ = fill(ids, weights, torch.tensor([[0.4, 0.1, 0.1, 0.4]]).repeat(3, 1), 1)
    assert new_ids.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_a_budget_below_the_first_choices_takes_their_heaviest():
    """Three first choices, room for two."""
    ids = torch.tensor([[0, 3], [1, 3], [2, 3]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.5]])
    new_ids, _ = fill(ids, weights, torch.tensor([[0.3, 0.2, 0.1, 0.4]]).repeat(3, 1), 1, max_active=2)
    assert new_ids.tolist() == [[0, 2], [0, 2], [2, 0]]


def test_a_closed_expert_gets_no_weight(kernel_device):
    """Where groups leave a token too few kept experts, it names others at weight 0, and no expert that nobody kept."""
    structure = Structure(6, 3, 1, choice=True)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.375, 0.125]])
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.4, 0.4, 0.4], [0.4, 0.4, 0.4, 0.5, 0.3, 0.2]])
    choice = scores.masked_fill(torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool(), float("-inf"))
    case = Case(structure, ids, weights, scores, None, choice).to(kernel_device)
    # Two first choices serve no token, so S is 2: 0, 3, 1 and 4 are kept.
    for new_ids, new in (fill(*case.arguments), launch(case)):
        assert new_ids.tolist() == [[0, 1, 3], [3, 4, 0]]
        assert new[:, 2].tolist() == [0, 0]
        torch.testing.assert_close(new[:, 0].cpu(), 0.5 * torch.tensor([1 / 0.75, 1 / 0.875]) ** 0.75)


@pytest.mark.parametrize("select", [0, 3, 4])
def test_nothing_to_keep_is_the_identity(select, device):
    """S <= 0 and S >= K: fresh tensors with the same bits."""
    case = draw_case(Structure(16, 3, select), 1, 9).to(device)
    new_ids, new = fill(*case.arguments)
    assert torch.equal(new_ids, case.ids)
    assert torch.equal(new, case.weights)
    assert new_ids.untyped_storage().data_ptr() != case.ids.untyped_storage().data_ptr()
    assert new.untyped_storage().data_ptr() != case.weights.untyped_storage().data_ptr()


def test_a_batch_of_one_is_the_identity(kernel_device):
    """One token names K experts and K are kept: every bit stays, whatever the numbers are."""
    weights = torch.tensor([[float("nan"), -0.0, 1e-45, 0.1]])
    for structure in (Structure(8, 4, 1), Structure(8, 4, 2, max_active=2), Structure(8, 4, 1, threshold=0.5)):
        case = draw_case(structure, 3, 1)
        ids = torch.tensor([[5, 0, 7, 2]])
        case = dataclasses.replace(case, ids=ids, weights=weights, scores=torch.rand(1, 8)).to(kernel_device)
        for new_ids, new in (fill(*case.arguments), launch(case)):
            assert new_ids.cpu().equal(ids)
            assert new.cpu().view(torch.int32).equal(weights.view(torch.int32))


def test_tokens_that_lose_nothing_keep_every_bit(kernel_device):
    """The first token's experts stay, so its weights do too, NaN and -0.0 included."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]])
    weights = torch.tensor([[0.9, -0.0, 0.5], [float("nan"), 0.2, 0.1], [0.5, 0.2, 0.1]])
    case = Case(Structure(5, 3, 1, max_active=3), ids, weights, torch.rand(3, 5), None, None).to(kernel_device)
    for new_ids, new in (fill(*case.arguments), launch(case)):
        assert new_ids.tolist() == [[0, 1, 2]] * 3
        assert new[0].cpu().view(torch.int32).equal(weights[0].view(torch.int32))
        assert new[1].isnan().tolist() == [True, False, True]


def test_ids_stay_distinct_and_experts_few():
    """A property over random routing: distinct ids, all of them kept, as many experts as the first S name."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(24, 32, generator=generator).softmax(-1)
        weights, ids = scores.topk(6)
        new_ids, new = fill(ids, weights, scores, 1 + seed % 5)
        assert all(len(set(row)) == 6 for row in new_ids.tolist())
        union = ids[:, : 1 + seed % 5].unique()
        assert set(ids[:, 0].tolist()) <= set(new_ids.unique().tolist())
        assert len(new_ids.unique()) <= max(len(union), 6)
        assert (new >= 0).all()


@pytest.mark.parametrize("structure", thinned([STRUCTURES[i] for i in (2, 5, 8, 10)], (1,)), ids=str)
def test_gradient(structure, device):
    """With respect to weights and scores, against finite differences, closed experts and sentinels included."""
    for seed in range(3):
        case = draw_case(structure, seed, 4).to(device)
        weights = case.weights.double().requires_grad_()
        # Away from the steps at which other experts are kept.
        scores = (case.scores.double() + torch.rand(case.scores.shape, device=device).double() / 64).requires_grad_()
        choice = case.scores if case.choice is None else case.choice
        numbers = (structure.select, structure.threshold, structure.min_active, case.mask, structure.max_active)
        moved = weights.detach() + torch.rand(weights.shape, device=device).double() / 256
        weights = moved.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda w, s, c=case, n=numbers, r=choice: fill(c.ids, w, s, *n, r)[1], (weights, scores)
        )


def test_independent_batches_are_as_one_by_one():
    """`fill_batches` over P batches is P calls of the operator, padding included."""
    case = draw_case(Structure(64, 8, 2, masked=True, choice=True), 5, 40)
    tensors = [t.reshape(8, 5, -1) for t in (case.ids, case.weights, case.scores, case.choice)]
    real = torch.rand(8, 5) < 0.8
    both = fill_batches(*tensors, real, Keeping(2))
    for p in range(8):
        ids, weights, scores, choice = (t[p] for t in tensors)
        alone = fill(ids, weights, scores, 2, 0.0, 0, real[p], 0, choice)
        assert torch.equal(both[0][p], alone[0])
        torch.testing.assert_close(both[1][p], alone[1], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("structure", thinned(STRUCTURES[2:14:3], (3,)), ids=str)
def test_opcheck(structure, device):
    """Schema, fake implementation, autograd registration and dynamic shapes."""
    for tokens in (1, 5):
        torch.library.opcheck(OP, draw_case(structure, 0, tokens).to(device).arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break(device):
    """One graph for every T, with the results of the eager call."""
    compiled = torch.compile(fill, fullgraph=True, dynamic=True)
    for seed, tokens in enumerate((3, 8, 70)):
        case = draw_case(STRUCTURES[10], seed, tokens).to(device)
        torch.testing.assert_close(compiled(*case.arguments), fill(*case.arguments), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 256])
def test_cuda_graph(tokens):
    """Captured once, replayed on other contents: no host synchronisation, nothing left from the call before."""
    cases = [draw_case(Structure(128, 8, 2, choice=True, masked=True), seed, tokens) for seed in range(4)]
    cases = [
        dataclasses.replace(c, **{n: getattr(c, n).reshape(tokens, -1) for n in ("ids", "weights", "scores", "choice")})
        for c in cases
    ]
    cases = [dataclasses.replace(c, mask=c.mask.reshape(-1)).to("cuda") for c in cases]
    static = cases[0]
    fill(*static.arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fill(*static.arguments)
    for case in cases[1:]:
        for name in ("ids", "weights", "scores", "choice", "mask"):
            getattr(static, name).copy_(getattr(case, name))
        graph.replay()
        assert_is(out, case)


@pytest.mark.gpu
def test_many_tokens():
    """A prefill: more tokens than rows of statistics, and the reference on the same device."""
    case = draw_case(Structure(128, 8, 1, choice=True), 1, 3000).to("cuda")
    ids, weights = fill(*case.arguments)
    expected = fill_reference(*case.arguments)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=2e-6, atol=1e-12, equal_nan=True)


BAD = [
    ({"topk_ids": torch.zeros(3, 2)}, TypeError, r"topk_ids: expected dtype torch.int32 or torch.int64"),
    ({"topk_ids": torch.tensor(1)}, ValueError, r"topk_ids: expected shape \[..., K\]"),
    ({"topk_weights": torch.zeros(3, 2).long()}, TypeError, "topk_weights: expected a floating-point dtype"),
    (
        {"topk_weights": torch.zeros(3, 3)},
        ValueError,
        r"topk_weights: expected shape \[3, 2\] \(of topk_ids\), got \[3, 3\]",
    ),
    ({"scores": torch.zeros(3, 4).long()}, TypeError, "scores: expected a floating-point dtype"),
    ({"scores": torch.zeros(2, 4)}, ValueError, r"scores: expected shape \[3, 'E'\], got \[2, 4\]"),
    ({"scores": torch.zeros(3, 1)}, ValueError, "scores: expected at least K = 2 experts, got 1"),
    ({"choice": torch.zeros(3, 5)}, ValueError, r"choice: expected shape \[3, 4\]"),
    ({"token_mask": torch.zeros(3)}, TypeError, "token_mask: expected dtype torch.bool"),
    ({"token_mask": torch.zeros(2).bool()}, ValueError, r"token_mask: expected shape \[3\]"),
    ({"min_active": -1}, ValueError, "min_active: expected 0"),
    ({"max_active": -1}, ValueError, "max_active: expected 0"),
    ({"scores": torch.zeros(3, 4, device="meta")}, ValueError, "scores: expected device cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_refusals(change, error, message):
    """Each wrong argument is named, with what was expected; while tracing too."""
    good = {"topk_ids": torch.zeros(3, 2).long(), "topk_weights": torch.zeros(3, 2), "scores": torch.zeros(3, 4)}
    with pytest.raises(error, match=message):
        fill(**{**good, "select_top_k": 1, **change})


def test_fake_tensors_have_the_shape_of_the_inputs():
    """Without data: dtypes, shapes and fresh contiguous memory."""
    with FakeTensorMode():
        ids, weights = torch.zeros(3, 5, 4, dtype=I32), torch.zeros(3, 5, 4, dtype=BF16).transpose(0, 1).transpose(0, 1)
        new_ids, new = fill(ids, weights, torch.zeros(3, 5, 9), 2)
    assert (new_ids.shape, new_ids.dtype, new.shape, new.dtype) == (ids.shape, I32, weights.shape, BF16)


@pytest.mark.parametrize("numbers", [(1,), (1, 0.1, 3), (1, 0.0, 0, 4)], ids=str)
def test_the_reference_on_another_device(numbers):
    """Everything that it makes is where its tensors are."""
    ids, weights = torch.zeros(4, 3, dtype=torch.int64, device="meta"), torch.rand(4, 3, device="meta")
    select, threshold, least, most = (*numbers, *(0.0, 0, 0)[len(numbers) - 1 :])
    real = torch.ones(4, dtype=torch.bool, device="meta")
    found = fill_reference(ids, weights, torch.rand(4, 6, device="meta"), select, threshold, least, real, most)
    assert [x.device.type for x in found] == ["meta"] * 2


class TestFilledIds:
    """By hand: lost slots, in order, take the kept experts of the highest choice that the token does not name."""

    @staticmethod
    def filled(ids, choice, kept):
        new, lost = filled_ids(torch.tensor([[ids]]), torch.tensor([[choice]]), torch.tensor([kept]).bool())
        return new.flatten().tolist(), lost.flatten().tolist()

    def test_in_order_of_choice(self):
        choice = [0.1, 0.4, 0.3, 0.4, 0.2]
        assert self.filled([0, 2, 4], choice, [0, 1, 0, 1, 1]) == ([1, 3, 4], [True, True, False])
        assert self.filled([3, 2, 0], choice, [1, 1, 0, 1, 1]) == ([3, 1, 0], [False, True, False])

    def test_where_none_is_left_the_id_stays(self):
        assert self.filled([3, 2, 4], [0.1, 0.4, 0.3, 0.4, 0.2], [1, 0, 0, 0, 0]) == ([0, 2, 4], [True, True, True])
        assert self.filled([3, 2], [0.1, 0.4, 0.3, 0.4], [0, 0, 0, 0]) == ([3, 2], [True, True])

    def test_ids_of_no_expert_are_not_lost(self):
        assert self.filled([-1, 4, 0], [0.1, 0.4, 0.3, 0.4], [0, 1, 0, 0]) == ([-1, 4, 1], [False, False, True])

    def test_closed_experts_come_last(self):
        closed = float("-inf")
        assert self.filled([0, 2, 4], [closed, closed, 0.3, 0.1, 0.2], [0, 1, 0, 1, 0])[0] == [3, 1, 4]
        assert self.filled([0], [0.1, float("nan"), -1.0], [0, 1, 1])[0] == [2]
