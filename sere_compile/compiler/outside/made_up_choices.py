"""Choices that are made up in place of a router's, and the calls that put them into a graph."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...passes import Gate
from ...passes.graph import nodes
from ...passes.proof.made_up import by_turns

DRAWS = 3  # in which a block is run, at least
_Picked = collections.namedtuple("_Picked", ("values", "indices"))


@dataclass(frozen=True)
class Draw:
    """What the choices of one run are made up of.

    Attributes:
        seed: of the choices.
        scores: at which they are made: the router's "own", "others", or "equal" ones for all.
        absent: the expert that nobody chooses.
        chosen: experts that are to be chosen behind the first, by turns.
    """

    seed: int = 0
    scores: str = "own"
    absent: int | None = None
    chosen: Sequence[int] = ()

    @property
    def seed_of_scores(self) -> int:
        """Of the scores at which they are made."""
        return self.seed + 1000 * (self.scores == "others")


class Tell:
    """A call in a graph that keeps what a node gives."""

    __name__ = "tell"

    def __init__(self, told: list[torch.Tensor]) -> None:
        self._told = told

    def __call__(self, value: torch.Tensor) -> None:
        """Keeps a copy."""
        self._told.append(value.detach().clone())


class Score:
    """A call in a graph that puts other logits in place of the router's, where they are asked for.

    Args:
        draw: gives that of the run that is under way.
    """

    __name__ = "score"

    def __init__(self, draw: Callable[[], Draw]) -> None:
        self._draw = draw

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, or others."""
        draw = self._draw()
        if draw.scores == "own":
            return logits
        if draw.scores == "equal":
            return torch.zeros_like(logits)
        generator = torch.Generator().manual_seed(draw.seed_of_scores)
        return logits * (torch.rand(logits.shape, generator=generator) + 0.5).to(logits)


class Choose:
    """A call in a graph that puts a made-up choice in place of the router's.

    Args:
        draw: gives that of the run that is under way.
        scores: float [.., E], of which the router selects.
        gate: of the graph.
    """

    __name__ = "choose"

    def __init__(self, draw: Callable[[], Draw], scores: Node, gate: Gate) -> None:
        self._draw = draw
        self._columns = nodes.last_size(scores) or 0
        self._steps = gate.form == "steps"
        self._flat = len(nodes.shape(gate.ids) or ()) < len(nodes.shape(scores) or ())  # max without keepdim
        self._places = max(gate.top_k - 1, 1)

    def __call__(self, chosen: Any) -> Any:
        """The choice in the form of what the router's selection gives."""
        draw = self._draw()
        if self._steps:  # scores, of which each step takes the best that is left
            order = self._order(chosen.shape[:-1]).to(chosen.device)
            level = torch.arange(self._columns, 0, -1, device=chosen.device).to(chosen) / self._columns
            # Close ones: sparsemixer's weights are all 1 where no score comes within 2 % of the best.
            level = 1 - (1 - level) / 100 if draw.scores == "others" else level
            return torch.zeros_like(chosen).scatter(-1, order, level.expand(order.shape))
        ids = chosen if isinstance(chosen, torch.Tensor) else chosen[1]
        leading = ids.shape if self._flat else ids.shape[:-1]
        order = self._order(leading).to(ids)
        made_up = (order[..., 0] if self._flat else order[..., : ids.shape[-1]]).contiguous()
        if isinstance(chosen, torch.Tensor):
            return made_up
        generator = torch.Generator().manual_seed(draw.seed_of_scores)
        values = torch.rand(order.shape, generator=generator)
        # Weights of every order, too: what is left out for weighing little has to show.
        values = 10 ** (-4 * values) if draw.seed % 3 == 2 else values + 0.1
        values = values.sort(-1, descending=True)[0].to(chosen[0])
        values = values[..., 0] if self._flat else values[..., : ids.shape[-1]]
        return _Picked(values.contiguous(), made_up)

    def _order(self, leading: Sequence[int]) -> torch.Tensor:
        draw = self._draw()
        return made_up_order(leading, self._columns, draw.seed, draw.absent, draw.chosen, self._places)


def made_up_order(
    leading: Sequence[int],
    columns: int,
    seed: int,
    last: int | None = None,
    chosen: Sequence[int] = (),
    places: int = 1,
) -> torch.Tensor:
    """An order of all experts for each token, int64 [*leading, columns].

    With an even seed the first choices are two experts only, so that most tokens name an expert twice after re-routing.
    With an odd one the expert `last` is every token's last choice. The experts `chosen` take `places` of each token
    behind its first choice, by turns.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(*leading, columns, generator=generator)
    if chosen:
        rows = keys.view(-1, columns)
        for place, expert in enumerate(by_turns(chosen, len(rows), places)):
            rows[torch.arange(len(rows)), expert] = place - float(places)
    if last is not None:
        keys[..., last] = 2
    order = keys.argsort(-1)
    if seed % 2 or columns < 2:
        return order
    rows = torch.arange(order[..., 0].numel()).view(order.shape[:-1])
    first = (rows % 2)[..., None]
    return torch.cat([first, order[order != first].view(*order.shape[:-1], -1)], -1)
