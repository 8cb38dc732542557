"""Find gates in an eager run: what a traced graph does not show because it never got into one.

Scores are followed from a router's weight through the operations that keep one score per expert, to
a selection over them. Experts that stand beside the weight make it a gate. Graphs, and `passes`,
play no part.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..experts.experts_module import count_experts_beside
from ..experts.owner import Owners

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 1, _aten.addmm: 2, _aten.bmm: 1, _aten.baddbmm: 2, _aten.matmul: 1, _aten.linear: 1}
# Selections and how many experts each takes; None: all of them, in order.
_SELECTIONS = {_aten.topk: lambda args: args[1], _aten.argmax: lambda args: 1, _aten.max: lambda args: 1}
# Columns of a router that are no experts' are cut off before the selection.
_CUTS = (_aten.slice, _aten.narrow)
_SORTS = {_aten.sort: lambda args: None, _aten.argsort: lambda args: None}


@dataclass(frozen=True)
class EagerSelection:
    """One selection over scores that a router projected.

    Attributes:
        weight: the router's parameter, [E, H] or [H, E].
        num_experts: E, how many of the scores selected from are experts'.
        top_k: K, None where a sort puts all scores in order.
        place: `file.py:123` of the user's code.
    """

    weight: torch.Tensor
    num_experts: int
    top_k: int | None
    place: str


class WatchSelections(TorchDispatchMode):
    """Collects the selections of experts while it is active; each weight once.

    Attributes:
        found: the selections.
        owners: of the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners = Owners()
        self.found: list[EagerSelection] = []
        # Views and casts of a parameter, and scores that it projected, by the parameter.
        self._weights = WeakIdKeyDictionary()
        self._scores = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        first = args[0] if args else None
        if packet in _SELECTIONS or packet in _SORTS:
            self._select(packet, args)
        if isinstance(result, torch.Tensor):
            self._follow(packet, first, args, result)
        return result

    def _follow(self, packet: Any, first: Any, args: tuple[Any, ...], result: torch.Tensor) -> None:
        if packet in _PRODUCTS:
            factor = args[_PRODUCTS[packet]]
            weight = self._weight_of(factor)
            if weight is not None and result.shape[-1] in weight.shape:
                self._scores[result] = weight
            return
        sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
        known = next((self._scores[source] for source in sources if source in self._scores), None)
        if known is not None and result.is_floating_point() and result.dim():
            if result.shape[-1] == next(s for s in sources if s in self._scores).shape[-1] or packet in _CUTS:
                self._scores[result] = known
            return
        weight = self._weight_of(first)
        if weight is not None and result.dim() == 2 and result.numel() == weight.numel():
            self._weights[result] = weight

    def _weight_of(self, tensor: Any) -> torch.Tensor | None:
        """The two-dimensional parameter that a tensor is, or is a view or cast of."""
        if isinstance(tensor, torch.nn.Parameter) and tensor.dim() == 2:
            return tensor
        return self._weights.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def _select(self, packet: Any, args: tuple[Any, ...]) -> None:
        scores = args[0]
        weight = self._scores.get(scores)
        dim = _dimension(packet, args)
        over_last = dim in (-1, scores.dim() - 1)
        if weight is None or not over_last or any(seen.weight is weight for seen in self.found):
            return
        top_k = {**_SELECTIONS, **_SORTS}[packet](args)
        num_experts = count_experts_beside(self.owners.find(weight), scores.shape[-1])
        if num_experts:
            self.found.append(EagerSelection(weight, num_experts, top_k, _users_line(sys._getframe(2))))


def _dimension(packet: Any, args: tuple[Any, ...]) -> int | None:
    """The dimension selected over; None for all at once."""
    position = 2 if packet is _aten.topk else 1
    default = None if packet in (_aten.argmax, _aten.max) else -1
    found = args[position] if len(args) > position else default
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def _users_line(frame: FrameType | None) -> str:
    """The innermost line of code outside torch and this package."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] != "torch" and module != __name__:
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
