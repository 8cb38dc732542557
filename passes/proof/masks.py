"""What a call says of its tokens: masks, flags, lengths, words. The next call may say other things.

In a first call often nothing is masked, and a proof that took its masks as they are would show nothing of the second.
So masks are made up, in several patterns: what one marks, its contrary leaves.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.fx import Node

from ..graph import nodes
from ..graph.columns import constant
from ..graph.walk import walk
from .region import Leaf, Region

_SHARE = 0.35  # of elements that are special numbers
_MASKED = 0.3  # of a mask's elements
_MOST_PATTERNS = 12
_FEW = 8  # numbers of the model's state that something is compared with
_FAR_BELOW = -1e9
_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "greater", "less_equal"})
_COMPARES |= {"greater_equal", "isin"}
_LOOKS_UP = frozenset({"index", "embedding", "gather", "take_along_dim", "take", "one_hot", "scatter", "bincount"})


_VIEWS = nodes.VALUE_PRESERVING | {"transpose", "permute", "expand"}
_STILL = frozenset({"state", "number"})  # leaves that belong to the model or to all calls alike


@dataclass(frozen=True)
class Mask:
    """A leaf that tells tokens apart.

    Attributes:
        held: what the traced call had there, if its numbers are other than 0 and 1.
        special: numbers that the program compares it with, and their neighbours; None for a plain mask.
        varies: whether other numbers than the held ones are made up.
    """

    held: torch.Tensor | None
    special: tuple[float, ...] | None
    varies: bool = True

    @property
    def variants(self) -> int:
        """How many ways there are to mark some elements: by each special number, or by any."""
        return 2 if self.special is None else len(self.special) + 1


class Masks:
    """The leaves of a region that tell tokens apart: no floating-point numbers, or such that are compared."""

    def __init__(self, region: Region) -> None:
        self._region = region
        made = [node for node, leaf in region.leaves.items() if leaf.kind in ("logits", "hidden")]
        self._made = set(walk(made, _followers))
        leaves = [(node, leaf) for node, leaf in region.leaves.items() if leaf.kind == "activation"]
        found = {node: self._mask(node, leaf) for node, leaf in leaves}
        self._masks = {node: mask for node, mask in found.items() if mask is not None}

    def __bool__(self) -> bool:
        return bool(self._masks)

    def __contains__(self, node: Node) -> bool:
        return node in self._masks

    @property
    def patterns(self) -> int:
        """How many patterns there are: every variant of each mask, and their combinations if these are few."""
        return min(math.prod(mask.variants for mask in self._masks.values()), _MOST_PATTERNS)

    @cached_property
    def joined(self) -> Node | None:
        """The one bool tensor through which alone all masks act, such as `(mask & (words != 7))`; None without one.

        How it comes to be marked is nothing to whatever reads it.
        """
        others = [n for n, leaf in self._region.leaves.items() if n not in self._masks and leaf.kind not in _STILL]
        apart = set(walk(others, _followers))
        made = set(walk(self._masks, lambda node: [user for user in _followers(node) if user not in apart]))
        ends = set(self._region.ends)
        read = [node for node in made if node in ends or any(user in apart for user in _followers(node))]
        roots = {nodes.behind(node, _VIEWS) for node in read}
        if len(roots) != 1 or any(nodes.writers(node) for node in made):
            return None
        [root] = roots
        return root if nodes.is_tensor(root) and nodes.value(root).dtype == torch.bool else None

    def _variant(self, node: Node, pattern: int) -> int:
        """Which variant of a mask a pattern takes: all are taken, and all combinations where these are few."""
        counts = {other: mask.variants for other, mask in self._masks.items()}
        if math.prod(counts.values()) <= _MOST_PATTERNS:
            before = itertools.takewhile(lambda other: other is not node, counts)
            return pattern // math.prod(counts[other] for other in before) % counts[node]
        if pattern < max(counts.values()):
            return pattern % counts[node]
        return random.Random(f"{list(counts).index(node)} {pattern}").randrange(counts[node])

    @property
    def are_told(self) -> bool:
        """Whether a call tells some by other numbers than 0 and 1."""
        return any(mask.held is not None and mask.varies for mask in self._masks.values())

    def as_called(self) -> Masks:
        """The same where what is told by other numbers than 0 and 1 is what it was in the traced call."""
        fixed = copy.copy(self)
        fixed._masks = {node: replace(mask, varies=mask.held is None) for node, mask in self._masks.items()}
        return fixed

    def value(
        self, node: Node, draw: int, pattern: int | None, sizes: list[int], generator: torch.Generator
    ) -> torch.Tensor:
        """Made-up numbers of one leaf, to be cast to its type.

        Args:
            node: the leaf.
            draw: without a pattern it tells which: everything real, nothing marked, or both.
            pattern: in [0, patterns).
            sizes: of the tensor.
            generator: of random numbers.
        """
        mask, like = self._masks[node], nodes.value(node)
        if (pattern is None and draw % 3 < 2) or not mask.varies:
            return self._uniform(mask, like, sizes, all_real=draw % 3 == 0, generator=generator)
        return self._mixed(mask, like, sizes, self._variant(node, pattern or 0), generator)

    def _uniform(
        self, mask: Mask, like: torch.Tensor, sizes: list[int], *, all_real: bool, generator: torch.Generator
    ) -> torch.Tensor:
        if mask.held is not None:
            return _repeated(mask.held, sizes)
        if like.dtype.is_floating_point:  # flags above 0, and what is added to scores
            return torch.rand(sizes, generator=generator) + 0.75 if all_real else torch.zeros(sizes)
        return torch.full(sizes, all_real)

    def _mixed(
        self, mask: Mask, like: torch.Tensor, sizes: list[int], variant: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Some elements as they may be in any call, and others of which the variant tells what they are."""
        if mask.special is None:
            return some_elements(sizes, _MASKED, generator) ^ (variant == 0)
        usual = torch.rand(sizes, generator=generator, dtype=torch.float64)
        other = usual
        if like.dtype.is_floating_point:
            usual = usual + 0.05
        else:
            usual = (torch.ones(sizes) if mask.held is None else _repeated(mask.held, sizes)).double()
            largest = float(usual.max()) if usual.numel() else 1.0
            other = (other * (largest + 1)).floor().clamp(max=largest)
        if variant < len(mask.special):
            other = torch.full_like(other, mask.special[variant])
        return torch.where(some_elements(sizes, _SHARE, generator), other, usual)

    def _mask(self, node: Node, leaf: Leaf) -> Mask | None:
        if not nodes.is_tensor(node):
            return None
        like, readers = nodes.value(node), self._readers(node)
        compared = {number for user in readers if nodes.kind(user) in _COMPARES for number in self._constants(user)}
        if like.dtype.is_floating_point:
            told = any(nodes.is_tensor(user) and not nodes.is_floating(user) for user in readers - self._made)
            return Mask(None, _with_neighbours(compared | {_FAR_BELOW})) if told else None
        held = leaf.held.cpu() if isinstance(leaf.held, torch.Tensor) and like.dtype != torch.bool else None
        if held is not None and not bool(((held != 0) & (held != 1)).any()):
            held = None
        # What is looked up has to stay in its table.
        looked_up = any(nodes.kind(user) in _LOOKS_UP for user in readers)
        if held is None and (like.dtype == torch.bool or looked_up or compared <= {0, 1}):
            return Mask(None, None)
        special = (0.0,) if looked_up else _with_neighbours(compared)
        return Mask(held, special if like.dtype.is_signed else tuple(number for number in special if number >= 0))

    def _readers(self, leaf: Node) -> set[Node]:
        """What reads the leaf, or what is computed of it beside logits and hidden states."""
        found: set[Node] = set()
        pending = [leaf]
        while pending:
            node = pending.pop()
            for user in node.users:
                if user not in found and nodes.reads_numbers(user, node):
                    found.add(user)
                    if user not in self._made:
                        pending.append(user)
        return found

    def _constants(self, user: Node) -> list[float]:
        numbers = [constant(argument) for argument in (*user.args, *user.kwargs.values())]
        for source in user.all_input_nodes:
            leaf = self._region.leaves.get(source)
            if leaf is not None and leaf.kind == "state" and isinstance(leaf.held, torch.Tensor):
                numbers += leaf.held.reshape(-1).tolist() if leaf.held.numel() <= _FEW else []
        return [number for number in numbers if number is not None]


def _followers(node: Node) -> list[Node]:
    return [follower for follower in nodes.followers(node) if nodes.reads_numbers(follower, node)]


def some_elements(sizes: Sequence[int], share: float, generator: torch.Generator) -> torch.Tensor:
    """Some elements true, the only one as well, and some of several false."""
    drawn = torch.rand(sizes, generator=generator)
    some = drawn < share
    if some.numel() and not bool(some.any()):
        some.view(-1)[int(drawn.argmin())] = True
    if some.numel() > 1 and bool(some.all()):
        some.view(-1)[int(drawn.argmax())] = False
    return some


def _repeated(held: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The numbers of a call, in a tensor of other sizes too."""
    if list(held.shape) == sizes:
        return held.detach().clone()
    numbers, count = held.detach().reshape(-1), torch.Size(sizes).numel()
    return numbers[torch.arange(count, device=numbers.device) % len(numbers)].view(sizes)


def _with_neighbours(numbers: set[float]) -> tuple[float, ...]:
    """Numbers and those beside them; 0 is what most programs fill up with."""
    beside = {number + step for number in numbers for step in (0, -1, 1)}
    return (0.0, *sorted(beside - {0.0}))
