"""Random inputs for the operators' tests, drawn so that each edge case turns up often.

A `Structure` is what a kernel is specialised on; on a GPU each one costs a compilation, so there is a short
list of them and many random contents for each.
"""

import contextlib
import dataclasses
import random
from unittest import mock

import torch

# Fills fresh memory in kernel tests. No test input has this id.
POISON = -77
GUARD = 64


@dataclasses.dataclass(frozen=True)
class Structure:
    experts: int
    slots: int
    select: int
    id_dtype: torch.dtype = torch.int64
    sim_dtype: torch.dtype = torch.float32
    masked: bool = False
    min_active: int = 0

    def __str__(self):
        types = f"{self.id_dtype}-{self.sim_dtype}".replace("torch.", "")
        mask = "-masked" if self.masked else ""
        return f"E{self.experts}-K{self.slots}-S{self.select}-{types}{mask}-min{self.min_active}"


I32, BF16, FP16 = torch.int32, torch.bfloat16, torch.float16

STRUCTURES = [
    # select_top_k from below 0 to above K, every K up to 8.
    Structure(8, 4, -1),
    Structure(8, 4, 0),
    Structure(8, 4, 1),
    Structure(8, 4, 2, masked=True),
    Structure(8, 4, 3, I32),
    Structure(8, 4, 4, masked=True, min_active=3),
    Structure(8, 4, 5),
    Structure(8, 1, 1),
    Structure(60, 1, 0, I32, masked=True),
    Structure(60, 2, 1, torch.int64, BF16),
    Structure(60, 3, 1, I32, FP16, masked=True),
    Structure(60, 4, 2, min_active=4),
    Structure(60, 5, 4, I32, masked=True, min_active=5),
    Structure(60, 6, 2, torch.int64, FP16),
    Structure(60, 7, 3, masked=True),
    Structure(60, 8, 1, I32, BF16, min_active=8),
    # Expert counts: one, fewer than a bit word, no power of two, Qwen3's, above.
    Structure(1, 2, 1),
    Structure(1, 3, 1, I32, masked=True, min_active=2),
    Structure(3, 2, 1, I32),
    Structure(3, 3, 1, masked=True, min_active=3),
    Structure(3, 3, 2, torch.int64, BF16),
    Structure(32, 4, 2),
    Structure(33, 4, 2, I32, masked=True, min_active=4),
    Structure(128, 8, 1),
    Structure(128, 8, 2, I32),
    Structure(128, 8, 2, torch.int64, BF16, masked=True),
    Structure(128, 8, 4, torch.int64, FP16, min_active=8),
    Structure(128, 8, 7, I32, masked=True, min_active=7),
    Structure(200, 6, 2, I32, BF16),
    Structure(200, 8, 3, masked=True, min_active=8),
    Structure(128, 64, 5, I32),
    # min_active from "always reached" to "never reached".
    *(Structure(16, 4, 1, min_active=m, masked=m % 2 == 1) for m in range(1, 7)),
    *(Structure(60, 6, 2, I32, min_active=m, masked=m % 2 == 0) for m in (1, 3, 8)),
]

TOKENS = (0, 1, 2, 2, 3, 5, 7, 13)
THRESHOLDS = (0.0, 0.0, 0.3, -1.0, 1e9)


@dataclasses.dataclass
class Case:
    ids: torch.Tensor
    similarity: torch.Tensor
    select: int
    threshold: float
    min_active: int
    mask: torch.Tensor | None
    weights: torch.Tensor

    def to(self, device):
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def options(self):
        """Every argument of the operator after the tensors."""
        return self.select, self.threshold, self.min_active, self.mask

    def flat(self, name):
        """ids, weights or mask as (nested) lists with one token dimension."""
        tensor = getattr(self, name)
        if tensor is None:
            return None
        return tensor.reshape(-1, *tensor.shape[self.ids.dim() - 1 :]).cpu().tolist()


def draw_similarity(rng, num_experts, dtype):
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if rng.random() < 0.5:
        # Few distinct values: ties in most rows, and -0.0 against 0.0.
        similarity = torch.randint(-2, 3, (num_experts, num_experts), generator=generator) * 0.15
        similarity = torch.where(similarity == 0, similarity.new_tensor(rng.choice([0.0, -0.0])), similarity)
    else:
        similarity = torch.rand(num_experts, num_experts, generator=generator)
    if rng.random() < 0.3:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
        where = torch.rand(similarity.shape, generator=generator) < rng.choice([0.1, 0.9, 1.0])
        similarity = torch.where(where, odd[torch.randint(0, 4, where.shape, generator=generator)], similarity)
    similarity = similarity.to(dtype)
    return similarity.T if rng.random() < 0.3 else similarity


def draw_ids(rng, structure, num_tokens, distinct):
    rows = []
    for _ in range(num_tokens):
        if distinct and structure.slots <= structure.experts:
            rows.append(rng.sample(range(structure.experts), structure.slots))
        else:
            rows.append([rng.randrange(structure.experts) for _ in range(structure.slots)])
    if rng.random() < 0.3:
        # Expert-parallel sentinels, and values whose low bits look like an expert.
        odd = (-1, structure.experts, structure.experts + 32, 2**31 - 1)
        rows = [[rng.choice(odd) if rng.random() < 0.3 else u for u in row] for row in rows]
    return torch.tensor(rows, dtype=structure.id_dtype).reshape(num_tokens, structure.slots)


def draw_case(structure, seed, num_tokens=None, distinct=None):
    """One random case. `distinct`: a token's ids differ (sentinels aside); None draws that too."""
    rng = random.Random(f"{structure}/{seed}")
    if num_tokens is None:
        num_tokens = rng.choice(TOKENS)
    if distinct is None:
        distinct = rng.random() < 0.7
    ids = draw_ids(rng, structure, num_tokens, distinct)
    mask = None
    if structure.masked:
        share = rng.choice([0.0, 0.5, 0.5, 1.0])
        mask = torch.tensor([rng.random() < share for _ in range(num_tokens)], dtype=torch.bool)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    layout = rng.random()
    if layout < 0.2:
        # The same values with strides (1, T) or a gap after each row.
        ids, weights = ids.T.contiguous().T, weights.T.contiguous().T
    elif layout < 0.4:
        ids = torch.cat([ids, ids], 1)[:, : structure.slots]
    if rng.random() < 0.3:
        shape = (num_tokens // 2, 2) if num_tokens % 2 == 0 else (1, num_tokens)
        ids, weights = ids.unflatten(0, shape), weights.unflatten(0, shape)
        mask = None if mask is None else mask.unflatten(0, shape)
    similarity = draw_similarity(rng, structure.experts, structure.sim_dtype)
    threshold = rng.choice(THRESHOLDS)
    return Case(ids, similarity, structure.select, threshold, structure.min_active, mask, weights)


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty returns memory full of `POISON`, and what is written past its end is an error."""
    buffers = []

    def poisoned(shape, *, dtype, device):
        size = torch.Size([shape] if isinstance(shape, int) else shape)
        buffer = torch.full((size.numel() + GUARD,), POISON, dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[: size.numel()].view(size)

    with mock.patch.object(torch, "empty", poisoned):
        yield
    for buffer in buffers:
        assert (buffer[-GUARD:] == POISON).all(), "a kernel wrote past the end of its output"


def exact_product(num_tokens, num_experts, width, dtype, device="cpu"):
    """Hidden states [T, H] and a router's weight [E, H] whose product is the same in any order of sums."""
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randint(-2, 3, (num_tokens, width), generator=generator).to(device, dtype)
    weight = torch.randint(-1, 2, (num_experts, width), generator=generator).to(device, dtype) / 16
    return hidden, weight
