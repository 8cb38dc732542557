"""Which tensors of the model are the experts' parameters, and along which dimension the expert is counted.

Told by running: a part of a parameter belongs to expert e if the exit changes for tokens that name e, and for no other,
when the part is exchanged. The routing weights are the router's: a number per expert that scales them before they meet
anything that depends on hidden states is none of the expert's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..graph import nodes
from .compare import changed_rows
from .made_up import redrawn
from .region import Region
from .sources import Sources, trace_sources

Values = dict[Node, Any]
Run = Callable[[Values], Values]
_MANY = 600  # parameters that are tried one by one at most
_MANY_TO_TELL = 256  # ... where it is only to tell why a proof failed
_EACH_TOKEN = 16  # tokens that must stay as they are, one by one, where a stack might be one expert's own tensor
_FURTHER = 12  # draws at most that tell apart the experts of such


@dataclass(frozen=True)
class Stack:
    """A tensor that holds a part for each expert: `size // experts` rows each, one after the other or in turn.

    Attributes:
        dim: along which the expert is counted.
        experts: how many have a part in it.
        in_turn: whether row 0 is expert 0's, row 1 expert 1's.
        first: the first of these experts; others are on other ranks where there are more.
    """

    dim: int
    experts: int
    in_turn: bool = False
    first: int = 0

    def rows(self, size: int, device: torch.device) -> torch.Tensor:
        """The expert that each row along the dimension belongs to."""
        row = torch.arange(size, device=device)
        return self.first + (row % self.experts if self.in_turn else row // (size // self.experts))

    def holds(self, expert: torch.Tensor) -> torch.Tensor:
        """Whether experts have a part in it, bool of the shape of their numbers."""
        return (expert >= self.first) & (expert < self.first + self.experts)

    def exchanged(self, value: torch.Tensor, mapping: torch.Tensor) -> torch.Tensor:
        """The tensor in which expert u's part is that of mapping[u]; zero where that one is on another rank."""
        size, row = value.shape[self.dim], torch.arange(value.shape[self.dim], device=mapping.device)
        owner = self.rows(size, mapping.device)
        target = owner.clone()
        known = owner < len(mapping)
        target[known] = mapping[owner[known]]
        here = self.holds(target)
        target = torch.where(here, target, owner)
        places = row + (target - owner) * (1 if self.in_turn else size // self.experts)
        parts = _movable(value).index_select(self.dim, places)
        if not bool(here.all()):
            parts = parts.index_fill(self.dim, (~here).nonzero().squeeze(-1), 0)
        return parts.view(value.dtype)


def _movable(value: torch.Tensor) -> torch.Tensor:
    """The same bytes in a type that PyTorch indexes: it has no such operators for floats of 8 bits."""
    return value.view(torch.uint8) if value.dtype.is_floating_point and value.element_size() == 1 else value


@dataclass
class ExpertParameters:
    """The experts' parameters of a region.

    Attributes:
        stacks: tensors that hold the parameters of all experts.
        lists: tensors that belong to one expert each, by role: {expert: tensor}.
    """

    stacks: dict[Node, Stack] = field(default_factory=dict)
    lists: list[dict[int, Node]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.stacks or self.lists)

    @property
    def tensors(self) -> set[Node]:
        """Every leaf that holds parameters of experts."""
        return set(self.stacks) | {node for role in self.lists for node in role.values()}

    def unknown_moves(self, experts: int) -> torch.Tensor | None:
        """Where a rank holds a part of the experts: bool [E, E], the moves of a slot that its program cannot show.

        A slot that leaves for another rank adds nothing here, as with parameters of zero. One that comes from there
        has no parameters here to exchange. Both are one function of the new id: its use that still saw the old id
        would be found in a slot that leaves, or that moves within the rank.
        """
        parts = [stack for stack in self.stacks.values() if stack.experts < experts]
        if not parts:
            return None
        here = parts[0].holds(torch.arange(experts))
        return ~here[:, None] & here

    def swapped(self, values: Values, mapping: torch.Tensor) -> Values:
        """The values in which expert u's parameters are those of expert mapping[u], int64 [E]."""
        changed = dict(values)
        for node, stack in self.stacks.items():
            changed[node] = stack.exchanged(values[node], mapping.to(values[node].device))
        for role in self.lists:
            for expert, node in role.items():
                changed[node] = values[role.get(int(mapping[expert]), node)]
        return changed


class Told:
    """Finds the experts' parameters of one region by running it.

    Args:
        region: see `cut_region`.
        run: it on values of its leaves.
        draws: of such values.
        draw_choosing: another draw, from its number and the experts that tokens shall choose by turns.
    """

    def __init__(
        self, region: Region, run: Run, draws: list[Values], draw_choosing: Callable[[int, list[int]], Values]
    ) -> None:
        self._region, self._run, self._draw_choosing = region, run, draw_choosing
        self._exit = region.ends[0]
        self._sources = trace_sources(region)
        self._experts = region.gate.num_experts
        self._draws: list[Values] = []
        self._before: list[Values] = []
        self._ids: list[torch.Tensor] = []
        for values in draws:
            self._add(values)
        self._of_shape = Counter(self._draws[0][node].shape for node in self._candidates())

    def _add(self, values: Values) -> None:
        before = self._run(values)
        self._draws.append(values)
        self._before.append(before)
        self._ids.append(before[self._region.gate.ids].reshape(-1, self._region.gate.top_k).cpu())

    def find(self) -> tuple[ExpertParameters, Sources]:
        """The parameters, and what each node of the region depends on."""
        found = ExpertParameters()
        rest = []
        for node in self._candidates():
            stack = next((s for s in self._layouts(node) if self._fits(node, s)), None)
            if stack is None:
                rest.append(node)
            else:
                found.stacks[node] = stack
        for role in self._named(rest):
            if self._is_role(role):
                found.lists.append(role)
        left = [node for node in rest if node not in found.tensors]
        found.lists += self._one_by_one(left)
        return found, self._sources

    def owners(self) -> dict[Node, int]:
        """Every parameter that is one expert's alone, of whatever shape; empty where this cannot be told of each."""
        candidates = self._candidates()
        if len(candidates) > _MANY_TO_TELL:
            return {}
        possible, spare = self._possible_owners(candidates, all_act=False)
        if len(possible) < len(candidates) or any(len(experts) > 1 for experts in possible.values()):
            return {}
        # What changes every token may be a stack, and all of them may name one expert.
        return {node: next(iter(experts)) for node, experts in possible.items() if experts and node in spare}

    @property
    def draws(self) -> list[Values]:
        """The draws that were run, without exchanged parameters."""
        return self._draws

    def _candidates(self) -> list[Node]:
        router = self._sources.router
        reach = self._sources.state[self._exit]
        leaves = self._region.leaves
        return [n for n, leaf in leaves.items() if leaf.kind == "state" and n in reach and n not in router]

    def _layouts(self, node: Node) -> Iterator[Stack]:
        sizes = tuple(self._draws[0][node].shape)
        columns = nodes.last_size(self._region.gate.router_weight) or 0
        counts = dict.fromkeys(count for count in (self._experts, columns) if count >= self._experts)
        for count in counts:
            yield from (Stack(dim, count) for dim, size in enumerate(sizes) if size == count)
        if sizes and self._experts < sizes[0] < 2 * self._experts and sizes[0] not in counts:
            yield Stack(0, sizes[0])
        if sizes and sizes[0] < self._experts and self._experts % sizes[0] == 0 and self._is_part(node):
            yield from (Stack(0, sizes[0], first=first) for first in range(0, self._experts, sizes[0]))
        for in_turn in (False, True):
            larger = [(d, size) for d, size in enumerate(sizes) if size > self._experts and size % self._experts == 0]
            yield from (Stack(dim, self._experts, in_turn) for dim, _ in larger)

    def _is_part(self, node: Node) -> bool:
        """Whether a tensor is this rank's part of one that ranks share: other experts may be elsewhere."""
        return nodes.kind(self._region.leaves[node].source) == "to_local"

    def _fits(self, node: Node, stack: Stack) -> bool:
        """Whether exchanging the parts of some experts changes tokens that name one of them, and only those."""

        def exchanged(values: Values, chosen: torch.Tensor, seed: int) -> Values:
            value = values[node]
            owner = stack.rows(value.shape[stack.dim], torch.device("cpu"))
            rows = torch.isin(owner, chosen).nonzero().squeeze(-1).to(value.device)
            part = _movable(value).index_select(stack.dim, rows).view(value.dtype)
            other = redrawn(part, seed) if part.numel() else part
            return {node: _movable(value).index_copy(stack.dim, rows, _movable(other)).view(value.dtype)}

        alike = self._of_shape[self._draws[0][node].shape]
        return self._changes_only(exchanged, tokens=_EACH_TOKEN if alike >= self._experts else 1)

    def _is_role(self, role: dict[int, Node]) -> bool:
        def exchanged(values: Values, chosen: torch.Tensor, seed: int) -> Values:
            named = [role[e] for e in chosen.tolist() if e in role]
            return {node: redrawn(values[node], seed + i) for i, node in enumerate(named)}

        return self._changes_only(exchanged)

    def _changes_only(self, exchanged: Callable[[Values, torch.Tensor, int], Values], tokens: int = 1) -> bool:
        changed_any = False
        for number, (values, ids) in enumerate(zip(self._draws, self._ids, strict=True)):
            for chosen in self._sets(ids[:tokens]):
                rows = self._changed(number, values | exchanged(values, chosen, 7 + number))
                if rows is None or bool((rows & ~torch.isin(ids, chosen).any(-1)).any()):
                    return False
                changed_any = changed_any or bool(rows.any())
        return changed_any

    def _sets(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The experts of the first token, and those that each token does not name."""
        everyone = torch.arange(self._experts)
        named = [torch.isin(everyone, token) for token in ids]
        return [everyone[named[0]], *(everyone[~of] for of in named)]

    def _changed(self, draw: int, values: Values) -> torch.Tensor | None:
        """The tokens whose row of the exit differs, bool [T]; None where nothing can be told by rows."""
        after = self._run(values)[self._exit]
        return changed_rows(self._before[draw][self._exit], after, len(self._ids[draw]))

    def _named(self, rest: list[Node]) -> Iterator[dict[int, Node]]:
        """Tensors of one shape whose names differ in one number, which takes as many values as there are experts."""
        groups: dict[Any, dict[int, Node]] = {}
        for node in rest:
            name = str(self._region.leaves[node].source.target)
            for match in re.finditer(r"\d+", name):
                shape = tuple(self._draws[0][node].shape)
                key = (name[: match.start()], name[match.end() :], shape)
                groups.setdefault(key, {})[int(match.group())] = node
        for members in groups.values():
            if len(members) >= self._experts and len(members) % self._experts == 0:
                ordered = [members[number] for number in sorted(members)]
                roles = len(ordered) // self._experts
                for role in range(roles):
                    yield dict(enumerate(ordered[role::roles]))

    def _one_by_one(self, left: list[Node]) -> list[dict[int, Node]]:
        """Tensors whose names tell nothing: each is exchanged alone, and the tokens that change tell its expert."""
        shapes = [tuple(self._draws[0][node].shape) for node in left]
        left = [node for node, shape in zip(left, shapes, strict=True) if shapes.count(shape) >= self._experts]
        if not left or len(left) > _MANY:
            return []
        owners = self._owners(left)
        roles: dict[Any, dict[int, Node]] = {}
        places: dict[Any, int] = {}
        for node, expert in owners.items():
            shape = tuple(self._draws[0][node].shape)
            place = places.get((shape, expert), 0)
            places[shape, expert] = place + 1
            roles.setdefault((shape, place), {})[expert] = node
        return list(roles.values())

    def _owners(self, nodes_left: list[Node]) -> dict[Node, int]:
        """The one expert that all tokens name which change with a tensor, and no token that does not."""
        possible, _ = self._possible_owners(nodes_left, all_act=True)
        return {node: next(iter(experts)) for node, experts in possible.items() if len(experts) == 1}

    def _possible_owners(self, nodes_left: list[Node], all_act: bool) -> tuple[dict[Node, set[int]], set[Node]]:
        """Of each tensor that changes tokens, the experts that all of them name; and the tensors that leave a token.

        With `all_act` none that a token names which stays: a ReLU may keep a tensor from acting on it.
        """
        possible = {node: set(range(self._experts)) for node in nodes_left}
        changing: set[Node] = set()
        spare: set[Node] = set()
        for number in range(len(self._draws) + _FURTHER):
            unsettled = [node for node in nodes_left if node not in changing or len(possible[node]) > 1]
            if not unsettled:
                break
            if number == len(self._draws):
                shuffled = torch.randperm(self._experts, generator=torch.Generator().manual_seed(number))
                self._add(self._draw_choosing(number, shuffled.tolist()))
            for node in unsettled:
                rows = self._changed(number, self._draws[number] | {node: redrawn(self._draws[number][node], 5)})
                if rows is not None and not bool(rows.all()):
                    spare.add(node)
                if rows is not None and bool(rows.any()):
                    changing.add(node)
                    possible[node] &= _shared(self._ids[number][rows])
                    possible[node] -= set(self._ids[number][~rows].unique().tolist()) if all_act else set()
        return {node: possible[node] for node in nodes_left if node in changing}, spare


def _shared(ids: torch.Tensor) -> set[int]:
    """The experts that every one of some tokens names."""
    first, *others = (set(token) for token in ids.tolist())
    return first.intersection(*others)
