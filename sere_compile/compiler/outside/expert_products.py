"""Whether a run of a block computes every expert for every token, seen in the products that it makes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...experts.trial_block import ExpertSlices
from ...passes.graph.failures import program_errors
from .arguments import Arguments, detached
from .trial import Trial

# By operation, which of its arguments are multiplied.
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten.mul.Tensor: (0, 1),
}
_COPIES = frozenset({_aten.clone.default, _aten._to_copy.default})
_FETCHES = frozenset({_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.embedding.default})


def computes_all(trial: Trial, experts: list[ExpertSlices], inputs: Arguments) -> bool:
    """Whether every expert computes every token, into a table of which the choice picks or weighs."""
    parameters = [tensor for one in experts for tensor in one.tensors]
    tokens = trial.graphs.ids[0].numel() // trial.gate.top_k
    with trial.aside_of_model(), WatchProducts(parameters, tokens, trial.block.num_experts) as watch:
        args, kwargs = copy.deepcopy(tree_map(detached, inputs))
        with program_errors():
            trial.block.module(*args, **kwargs)
    return watch.makes_all


class WatchProducts(TorchDispatchMode):
    """Counts the multiplications with experts' parameters, and looks for a table of what all of them give.

    Args:
        parameters: of the experts.
        tokens: T, of the run that is watched.
        num_experts: E.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], tokens: int, num_experts: int) -> None:
        super().__init__()
        self._work = {_memory(tensor): 0 for tensor in parameters if tensor.dim() > 1}
        self._whole = dict.fromkeys(self._work, 0)
        for tensor in parameters:
            if tensor.dim() > 1:
                self._whole[_memory(tensor)] += tokens * tensor.numel()
        self._tables = {(tokens, num_experts), (num_experts, tokens)}
        self._copies: list[torch.Tensor] = []  # of parameters, which a product may read instead
        self._copied: dict[int, int] = {}
        self._has_table = self._is_fetched = False

    @property
    def makes_all(self) -> bool:
        """Whether each expert was multiplied with each token, none fetched, and all results stood in one tensor."""
        return (
            bool(self._work)
            and self._has_table
            and not self._is_fetched
            and all(done >= self._whole[memory] for memory, done in self._work.items())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and see what it is."""
        result = func(*args, **(kwargs or {}))
        if func in _COPIES and (memory := self._parameter(args[0])) is not None:
            self._copies.append(result)
            self._copied[_memory(result)] = memory
        if func in _FETCHES:
            self._is_fetched |= any(self._parameter(leaf) is not None for leaf in tree_leaves(args))
        for position in _PRODUCTS.get(func, ()):
            if (memory := self._parameter(args[position])) is not None:
                shared = 1 if func is _aten.mul.Tensor else args[_PRODUCTS[func][0]].shape[-1]
                self._work[memory] += result.numel() * shared
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and leaf.is_floating_point() and leaf.dim() > 2:
                self._has_table |= self._is_table(leaf.shape)
        return result

    def _parameter(self, value: Any) -> int | None:
        """The parameter's memory that a value is a view or copy of."""
        if not _is_tensor(value):
            return None
        memory = self._copied.get(_memory(value), _memory(value))
        return memory if memory in self._work else None

    def _is_table(self, sizes: torch.Size) -> bool:
        """Whether sizes are those of [T, E, ..] or [E, T, ..], with the tokens of sequences counted as they are."""
        leading = [tuple(sizes[:2])]
        if len(sizes) > 3:
            leading += [(math.prod(sizes[:2]), sizes[2]), (sizes[0], math.prod(sizes[1:3]))]
        return any(pair in self._tables for pair in leading)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
