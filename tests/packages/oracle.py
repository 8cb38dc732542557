"""What re-routing defines: the original program, with its own ids and weights, where expert u computes as m(u).

The parameters are exchanged in an eager run, between a layer's selection and its experts. Nothing of `passes` is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sere_compile.testing import reroute_oracle

from .gated import Layer


class Exchanged(TorchFunctionMode):
    """Exchanges experts' parameters behind each selection of K among E inside a layer; `maps` is what was exchanged."""

    def __init__(self, layers: Sequence[Layer], matrices: Mapping[str, torch.Tensor], select_top_k: int) -> None:
        super().__init__()
        self.layers, self.matrices, self.select_top_k = layers, matrices, select_top_k
        self.maps: dict[str, dict[int, int]] = {}
        self._inside: Layer | None = None
        self._kept: list[list[torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        layer = self._inside
        if layer is None or func not in (torch.topk, torch.Tensor.topk) or self._kept:
            return result
        top_k = args[1] if len(args) > 1 else kwargs["k"]
        if (top_k, args[0].shape[-1]) == (layer.drawn or layer.top_k, len(layer.experts)):
            with torch._C.DisableTorchFunction():
                self._exchange(layer, args[0].topk(layer.top_k, dim=-1).indices)
        return result

    def _exchange(self, layer: Layer, ids: torch.Tensor) -> None:
        new = reroute_oracle(ids, self.matrices[layer.router], self.select_top_k, 0.0, layer.top_k)
        mapped = {int(u): int(v) for u, v in zip(ids.flatten(), new.flatten(), strict=True)}
        self.maps[layer.router] = {u: v for u, v in mapped.items() if u != v}
        self._kept = [[parameter.clone() for parameter in expert] for expert in layer.experts]
        for old, target in self.maps[layer.router].items():
            for parameter, value in zip(layer.experts[old], self._kept[target], strict=True):
                parameter.copy_(value)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Exchanged]:
        """Run the model inside."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.callback(
                    layer.around.register_forward_pre_hook(lambda *_, layer=layer: self._enter(layer)).remove
                )
                stack.callback(layer.around.register_forward_hook(lambda *_, layer=layer: self._leave(layer)).remove)
            stack.enter_context(self)
            yield self

    def _enter(self, layer: Layer) -> None:
        self._inside = layer if layer.router in self.matrices else None

    def _leave(self, layer: Layer) -> None:
        with torch._C.DisableTorchFunction():
            for expert, kept in zip(layer.experts, self._kept, strict=False):
                for parameter, value in zip(expert, kept, strict=True):
                    parameter.copy_(value)
        self._inside, self._kept = None, []
