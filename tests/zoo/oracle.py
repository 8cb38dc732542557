"""What a model has to compute when its experts are re-routed: forced in eager mode, with nothing of `passes`.

transformers' experts are modules called with (hidden states, top_k_index, top_k_weights). The ids are exchanged there,
behind every look-up of the router; where a model makes others of them before, as they leave the router.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sere_compile.testing import SortedTopK, reroute_oracle

from .registry import ENTRIES

_IDS = ("top_k_index", "router_indices")  # as experts modules name their parameter
_Reroute = Callable[[str, torch.Tensor], torch.Tensor]


def selecting_modules(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are called once for each selection of experts, by their name in the model."""
    suffix = ENTRIES[name].selecting
    if suffix:
        return {path: module for path, module in model.named_modules() if type(module).__name__.endswith(suffix)}
    return {path: module for path, module in model.named_modules() if _takes_ids(module)}


def _takes_ids(module: nn.Module) -> bool:
    return _ids_parameter(module) is not None


def _ids_parameter(module: nn.Module) -> str | None:
    names = inspect.signature(module.forward).parameters
    return next((name for name in _IDS if name in names), None)


def router_weights(model: nn.Module, columns: int) -> dict[str, torch.Tensor]:
    """Every parameter that could be a router's by its shape: more than there are, which does no harm."""
    return {name: weight for name, weight in model.named_parameters() if weight.dim() == 2 and columns in weight.shape}


@contextlib.contextmanager
def counting(name: str, model: nn.Module) -> Iterator[list[str]]:
    """Collects, in order, the paths of the modules that select."""
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for path, module in selecting_modules(name, model).items():
            stack.callback(module.register_forward_pre_hook(lambda *_, path=path: calls.append(path)).remove)
        yield calls


@contextlib.contextmanager
def rerouted(
    name: str, model: nn.Module, gates: Mapping[str, torch.Tensor], select_top_k: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Let an eager model route as SERE would; collects the ids [T, K] of every call before and after.

    Args:
        name: the architecture.
        model: called inside the context.
        gates: similarity by the name of each router weight that is re-routed.
        select_top_k: S; `min_active` is K, the backend's default.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def new_ids(path: str, ids: torch.Tensor) -> torch.Tensor:
        matrix = _matrix_beside(path, gates)
        if matrix is None:
            return ids
        seen.append((ids, reroute_oracle(ids, matrix, select_top_k, 0.0, ids.shape[-1])))
        return seen[-1][1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(SortedTopK())
        for path, module in selecting_modules(name, model).items():
            if _takes_ids(module):
                stack.callback(_exchange_ids(path, module, new_ids))
            elif type(module).__name__.endswith("TopkRouter"):
                stack.callback(_exchange_result(path, module, new_ids))
            else:
                stack.callback(_own_gating(path, module, new_ids))
        yield seen


def _matrix_beside(path: str, gates: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The matrix of the router beside the module: the one gate under the nearest common parent."""
    parent = path
    while parent:
        found = [gate for gate in gates if gate.startswith(parent + ".")]
        if found:
            assert len(found) == 1, f"{path}: several routers {found}"
            return gates[found[0]]
        parent, _, last = parent.rpartition(".")
        if last.isdigit():  # a layer: what stands beside it is another layer's
            return None
    return None


def _exchange_ids(path: str, module: nn.Module, new_ids: _Reroute) -> Callable[[], None]:
    name = _ids_parameter(module)
    assert name is not None
    position = list(inspect.signature(module.forward).parameters).index(name)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if name in kwargs:
            return args, {**kwargs, name: new_ids(path, kwargs[name])}
        return (*args[:position], new_ids(path, args[position]), *args[position + 1 :]), kwargs

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _exchange_result(path: str, router: nn.Module, new_ids: _Reroute) -> Callable[[], None]:
    """A router's result ends in the ids."""

    def hook(_: nn.Module, args: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*result[:-1], new_ids(path, result[-1]))

    return router.register_forward_hook(hook).remove


def _own_gating(path: str, gating: Any, new_ids: _Reroute) -> Callable[[], None]:
    """JetMoE's gating sorts slots by expert itself: the same results from re-routed ids."""

    def forward(hidden: torch.Tensor) -> tuple[Any, ...]:
        logits = gating.layer(hidden).float()
        scores, ids = logits.topk(gating.top_k, dim=1)
        slots = new_ids(path, ids).flatten()
        order = slots.argsort(stable=True)
        weights = scores.softmax(1).type_as(hidden).flatten()[order]
        sizes = torch.bincount(slots, minlength=gating.num_experts).tolist()
        return order, order // gating.top_k, weights, sizes, logits

    gating.forward = forward
    return lambda: delattr(gating, "forward")
