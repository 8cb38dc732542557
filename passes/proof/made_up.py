"""Values for the inputs of a region: logits, hidden states and other activations made up, the model's state as held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.run_part import HALF, plain_number
from .masks import Masks
from .region import Leaf, Region

_LARGE = 1 << 24  # numbers from which on a matrix is taken as it is held: made up it would cost its memory again
_ALMOST_ONE, _FAR_LESS = 6.0, 26.0  # logits whose sigmoids are nearly 1, and how far below them one is nearly 0
_APART = 0.5  # by how much a first choice is ahead of the next
_LEAST_SURE, _MOST_SURE = -2, 4  # powers of two that scale logits
_MANY_CALLS = 1_000_000  # that a counter may have counted
_LIMIT, _LOW = 256, 2  # a number from which on it may be a limit that nothing reached, and what it may become
# Numbers that the program itself holds, and no call or training changes.
_CONSTANTS = ("_tensor_constant", "lifted_tensor", "c_")
Sizes = Mapping[Any, int]  # numbers by symbol, in place of those of the traced call


def state_values(region: Region, *, single: bool) -> dict[Node, Any]:
    """The state of the model, with matrices made up: held ones may be all zero, or the same in each expert.

    Args:
        region: see `cut_region`.
        single: half-precision state becomes float32.
    """
    generator = torch.Generator().manual_seed(11)
    values: dict[Node, Any] = {}
    for node, leaf in region.leaves.items():
        if leaf.kind == "number":
            values[node] = plain_number(nodes.value(node) if leaf.held is None else leaf.held)
        elif leaf.kind == "state":
            values[node] = _state(node, leaf, generator, single)
    return values


def later_state(region: Region, state: Mapping[Node, Any], draw: int, *, lowers_limits: bool = True) -> dict[Node, Any]:
    """Small state as it may be in another layer, or after training or many calls.

    A scale that is 1 at first and a gain of 0 hide what is multiplied by them, a counter what begins late, and a limit
    what it does once it is lower. Numbers that are not below 0 stay so.

    Args:
        region: see `cut_region`.
        state: of `state_values`.
        draw: is the seed, and tells what counters are at, and whether limits are low.
        lowers_limits: whether they may be, where the program takes that.
    """
    low = lowers_limits and draw % 2 == 1
    generator = torch.Generator().manual_seed(307 + draw)
    values: dict[Node, Any] = {}
    for node, leaf in region.leaves.items():
        value = state.get(node)
        if leaf.kind != "state" or not isinstance(value, torch.Tensor) or value.numel() == 0:
            continue
        if str(leaf.source.target).startswith(_CONSTANTS):
            continue
        if low and not nodes.writers(leaf.source) and _may_be_limit(value):
            values[node] = torch.full_like(value, _LOW)
        elif value.dtype.is_floating_point and value.dim() < 2 and value.element_size() > 1:
            values[node] = _moved(value, generator)
        elif value.dtype in (torch.int32, torch.int64) and value.numel() == 1 and nodes.writers(leaf.source):
            values[node] = torch.full_like(value, (_MANY_CALLS, 0)[draw % 2])
    return values


def _may_be_limit(value: torch.Tensor) -> bool:
    """Whether it is a single large number; FP8 compares as another type does, and complex numbers do not."""
    return value.numel() == 1 and not value.is_complex() and bool(value.double() >= _LIMIT)


def _moved(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other numbers of the same order; infinities stay."""
    known = value[value.isfinite()]
    step = torch.rand(value.shape, generator=generator).to(value) * known.abs().mean().clamp(min=0.5).nan_to_num(0.5)
    sign = torch.where(value < 0, -1.0, 1.0).to(value)
    return value + step * sign


def activation_values(
    region: Region,
    draw: int,
    *,
    single: bool,
    chosen: Sequence[int] = (),
    sizes: Sizes | None = None,
    masks: Masks | None = None,
    pattern: int | None = None,
) -> dict[Node, Any]:
    """Logits, hidden states and other activations.

    Args:
        region: see `cut_region`.
        draw: is the seed, and tells how masks are filled and whether two experts are the first choices.
        single: half-precision activations become float32.
        chosen: experts that tokens choose behind their first, by turns.
        sizes: see `Sizes`; also for the region's numbers.
        masks: of the region, if they are known.
        pattern: of these, some tokens marked and others not; None leaves it to the draw.
    """
    generator = torch.Generator().manual_seed(101 + draw)
    masks = Masks(region) if masks is None else masks
    values: dict[Node, Any] = {}
    for node, leaf in region.leaves.items():
        if leaf.kind == "logits":
            values[node] = _logits(region, node, draw, generator, single, chosen, sizes)
        elif node in masks:
            shape = [plain_number(size, sizes) for size in nodes.value(node).shape]
            values[node] = _as_in(node, masks.value(node, draw, pattern, shape, generator), single)
        elif leaf.kind in ("hidden", "activation"):
            values[node] = _activation(node, leaf, generator, single, sizes)
        elif leaf.kind == "number" and sizes:
            values[node] = plain_number(nodes.value(node), sizes)
    return values


def unevenly_sure(region: Region, values: Mapping[Node, Any], draw: int) -> dict[Node, Any]:
    """The values of a draw with logits by which a router is sure of its choice to another degree for each token.

    Weights of the second choice are of every order then: what a dispatch leaves out for weighing little is seen.
    """

    def scaled(logits: torch.Tensor, leaf: Leaf) -> torch.Tensor:
        rows = torch.arange(logits[..., 0].numel()).view(*logits.shape[:-1], 1)
        # Multiples of the golden ratio leave no gap, however few they are.
        degree = (rows * 0.6180339887 + draw * 0.381966) % 1
        return logits * 2 ** (_LEAST_SURE + degree * (_MOST_SURE - _LEAST_SURE)).to(logits)

    return _with_logits(region, values, scaled)


def crowded(region: Region, values: Mapping[Node, Any]) -> dict[Node, Any]:
    """The values of a draw with logits by which every token prefers the first expert."""

    def crowding(logits: torch.Tensor, leaf: Leaf) -> torch.Tensor:
        changed = logits.clone()
        changed[..., 0] = changed.amax(-1) + 1
        return changed

    return _with_logits(region, values, crowding)


def without(region: Region, values: Mapping[Node, Any], expert: int) -> dict[Node, Any]:
    """The values of a draw with logits by which tokens prefer every other expert to one, as far as its bias allows."""

    def leaving_out(logits: torch.Tensor, leaf: Leaf) -> torch.Tensor:
        is_distance = nodes.kind(leaf.source) == "cdist"
        changed = logits + (0.0 if is_distance else _ALMOST_ONE - logits.amin())
        changed[..., expert] = changed.amax() + _FAR_LESS if is_distance else _ALMOST_ONE - _FAR_LESS
        return changed

    return _with_logits(region, values, leaving_out)


def _with_logits(
    region: Region, values: Mapping[Node, Any], change: Callable[[torch.Tensor, Leaf], torch.Tensor]
) -> dict[Node, Any]:
    """The values of a draw with other logits, new tensors made of its own."""
    logits = {node: leaf for node, leaf in region.leaves.items() if leaf.kind == "logits"}
    return {**values, **{node: change(values[node], leaf) for node, leaf in logits.items()}}


def redrawn(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Other numbers of the same kind in place of a parameter's: floats at random, whole numbers in another order."""
    generator = torch.Generator().manual_seed(seed)
    if not value.dtype.is_floating_point:
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.reshape(-1)[order].view(value.shape)
    if value.element_size() == 1:
        return torch.rand(value.shape, generator=generator).to(device=value.device, dtype=value.dtype)
    noise = torch.randn(value.shape, generator=generator) * _spread(value)
    near_zero = value.dim() >= 2 or not bool((value > 0).all())
    changed = noise if near_zero else value.cpu() * (1 + 0.5 * torch.rand(value.shape, generator=generator))
    return changed.to(device=value.device, dtype=value.dtype)


def _state(node: Node, leaf: Leaf, generator: torch.Generator, single: bool) -> Any:
    held, like = leaf.held, nodes.value(node)
    dtype = torch.float32 if single and like.dtype in HALF else like.dtype
    is_matrix = len(like.shape) >= 2 and dtype.is_floating_point and dtype.itemsize > 1
    sizes = [plain_number(size) for size in like.shape]
    if isinstance(held, torch.Tensor) and (not is_matrix or held.numel() > _LARGE):
        # Of the model's own numbers those that a call may count in are copied, whoever writes to them.
        return held.detach().to(dtype, copy=held.dim() < 2)
    device = held.device if isinstance(held, torch.Tensor) else nodes.device(node)
    if is_matrix:
        made = torch.randn(sizes, generator=generator)
        return (made * _spread(made)).to(device=device, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype, device=device)
    return (torch.rand(sizes, generator=generator) + 0.05).to(device=device, dtype=dtype)


def _spread(value: torch.Tensor) -> float:
    """A scale that keeps the numbers in the order of 1 through a product with the tensor."""
    return (2 / sum(value.shape[-2:])) ** 0.5 if value.dim() >= 2 else 0.5


def _activation(node: Node, leaf: Leaf, generator: torch.Generator, single: bool, others: Sizes | None) -> Any:
    like = nodes.value(node)
    sizes = [plain_number(size, others) for size in like.shape]
    if leaf.kind == "hidden":
        return _as_in(node, torch.randn(sizes, generator=generator), single)
    # Positive: they may be scores, and a dispatch may take weights above 0 for its mask.
    return _as_in(node, torch.rand(sizes, generator=generator) + 0.05, single)


def _as_in(node: Node, made: torch.Tensor, single: bool) -> torch.Tensor:
    """The numbers in the type and on the device of what they stand for."""
    dtype = nodes.value(node).dtype
    return made.to(device=nodes.device(node), dtype=torch.float32 if single and dtype in HALF else dtype)


def _logits(
    region: Region,
    node: Node,
    draw: int,
    generator: torch.Generator,
    single: bool,
    chosen: Sequence[int],
    others: Sizes | None,
) -> torch.Tensor:
    """Two experts are the first choices in even draws, so that most tokens name an expert twice; any in odd ones."""
    gate, like = region.gate, nodes.value(node)
    sizes = [plain_number(size, others) for size in like.shape]
    made = torch.randn(sizes, generator=generator)
    distances = nodes.kind(region.leaves[node].source) == "cdist"
    made = made.abs() + 0.1 if distances else made
    rows = made.view(-1, sizes[-1])
    if draw % 2 == 0:
        best = rows.amin(-1) / 2 if distances else rows.amax(-1) + _APART
        if chosen and not distances:
            _choose(rows, chosen, gate.top_k - 1)
        pair = torch.randperm(gate.num_experts, generator=generator)[:2]
        first = pair[torch.arange(len(rows)) % len(pair)]
        rows[torch.arange(len(rows)), first] = best
    dtype = torch.float32 if single and like.dtype in HALF else like.dtype
    return made.to(device=nodes.device(node), dtype=dtype)


def _choose(rows: torch.Tensor, chosen: Sequence[int], places: int) -> None:
    """Give each row the next few of the experts that are to be chosen as its best, ahead of the others by less."""
    best = rows.amax(-1)
    for place, expert in enumerate(by_turns(chosen, len(rows), places)):
        rows[torch.arange(len(rows)), expert] = best + _APART * (places - place) / (places + 1)


def by_turns(chosen: Sequence[int], rows: int, places: int) -> torch.Tensor:
    """int64 [places, rows]: the next few of the experts that are to be chosen, for each row."""
    return torch.tensor(list(chosen))[torch.arange(rows * places).view(rows, places).T % len(chosen)]
