"""What a program has to compute when its experts are re-routed, whatever its form.

The eager program runs with its own ids and weights. Where its ids are final, the parameters of expert u are replaced by
those of expert m(u), m being the map that re-routing defines for these ids. Nothing else is touched, so every result,
returned ids and losses too, is what a right rewrite has to give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_batchedtensor

from .forms.paddings import PADDINGS
from .program import Built, Program, build
from .rerouting import expert_map


@dataclass(frozen=True)
class Rerouting:
    """What is asked of the rewritten program.

    Attributes:
        matrices: similarity [E, E] by the path of a layer.
        select_top_k: S.
        threshold: rho.
    """

    matrices: Mapping[str, torch.Tensor]
    select_top_k: int
    threshold: float = 0.0


class Oracle:
    """The program in a version that reports its ids, with experts that can be exchanged."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._built: Built = build(program, self._report)
        self._names = {id(module): path for path, module in self._built.layers().items()}
        self._initial = {name: value.clone() for name, value in self._built.model.state_dict().items()}
        self._rerouting: Rerouting | None = None
        self._layers: frozenset[str] = frozenset()
        self._without_padding = False
        self.repeats = False  # whether the last run gave one token the same expert twice

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers with a gate."""
        return tuple(self._names.values())

    @property
    def meanings(self) -> tuple[bool, ...]:
        """The right values of `without_padding`: ids that a mask makes may count as chosen, or not."""
        return (False, True) if PADDINGS[self._program.choices["padding"]].sends else (False,)

    def run(
        self,
        inputs: tuple[torch.Tensor, ...],
        rerouting: Rerouting,
        layers: frozenset[str],
        *,
        without_padding: bool = False,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Results, and buffers after the call, of one forward with these layers re-routed.

        Args:
            inputs: of the model.
            rerouting: the map's matrices and options.
            layers: paths of those that are re-routed.
            without_padding: rows that the layer reports as padding make no primary experts.
        """
        self._rerouting, self._layers, self._without_padding = rerouting, layers, without_padding
        self.repeats = False
        try:
            with torch.no_grad():
                results = flat(self._built.model(*clones(inputs)))
                return results, {name: value.clone() for name, value in self._built.model.named_buffers()}
        finally:
            self._built.model.load_state_dict(self._initial)

    def _report(self, layer: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        path = self._names[id(layer)]
        if path not in self._layers or self._rerouting is None:
            return
        while is_batchedtensor(ids):
            ids = get_unwrapped(ids)
        rerouting = self._rerouting
        if self._without_padding and mask is not None:
            ids = ids[mask]
        tokens = ids.reshape(-1, ids.shape[-1]).tolist()
        mapping = expert_map(
            tokens,
            rerouting.matrices[path].tolist(),
            rerouting.select_top_k,
            rerouting.threshold,
        )
        moved = [[mapping[u] for u in token if 0 <= u < len(mapping)] for token in tokens]
        self.repeats |= any(len(set(token)) < len(token) for token in moved)
        with torch.no_grad():
            for name in self._program.experts:
                exchange(layer, name, mapping)


def exchange(layer: nn.Module, name: str, mapping: list[int]) -> None:
    """Give each expert u the parameters of expert mapping[u]; those behind its end keep theirs."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(layer.get_submodule(owner), attribute)
    if isinstance(found, nn.ModuleList):
        states = [{key: value.clone() for key, value in expert.state_dict().items()} for expert in found]
        for expert, source in zip(found, mapping, strict=False):
            expert.load_state_dict(states[source])
        return
    if isinstance(found, nn.ParameterList):
        values = [value.clone() for value in found]
        for value, source in zip(found, mapping, strict=False):
            value.copy_(values[source])
        return
    rows = torch.tensor([*mapping, *range(len(mapping), found.shape[0])])
    found.copy_(found.index_select(0, rows))


def flat(results: Any) -> list[torch.Tensor]:
    """The tensors of a tensor, tuple, list, dictionary or dataclass, in order."""
    if isinstance(results, torch.Tensor):
        return [results.detach().clone()]
    if isinstance(results, Mapping):
        results = results.values()
    elif not isinstance(results, (tuple, list)):
        results = vars(results).values()
    return [tensor for result in results for tensor in flat(result)]


def clones(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copies, so that no run sees what another did to its inputs."""
    return tuple(value.clone() for value in inputs)
