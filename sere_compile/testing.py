"""Oracles for tests, examples and users who want to check a rewritten model themselves.

Nothing here shares code with the operators or the passes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import SereError


class SortedTopK(TorchFunctionMode):
    """`topk(sorted=False)` in descending order: re-routing ranks by score."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.topk, torch.Tensor.topk):
            args, kwargs["sorted"] = args[:4], True
        return func(*args, **kwargs)


def reroute_oracle(
    ids: torch.Tensor,
    similarity: torch.Tensor,
    select_top_k: int,
    threshold: float | str = 0.0,
    min_active: int = 0,
    max_active: int = 0,
) -> torch.Tensor:
    """Re-routed ids, one Python loop per sentence of SERE (arXiv 2602.07616); slow on purpose.

    Args:
        ids: int [..., K], in descending order of router score.
        similarity: [E, E].
        select_top_k: S.
        threshold: rho; with "q0.2" the least similar 20 % of experts are critical.
        min_active: minimum number of primary experts, 0 for none.
        max_active: budget of primary experts, up to which S grows; 0 for none.

    Returns:
        A new tensor like `ids`.
    """
    top_k, num_experts = ids.shape[-1], similarity.shape[0]
    tokens = ids.reshape(-1, top_k).tolist()
    matrix = similarity.float().tolist()
    critical_below = _critical_below(threshold, matrix)
    if not 0 < select_top_k < top_k:
        return ids.clone()

    def named(slots: int) -> set[int]:
        return {u for token in tokens for u in token[:slots] if 0 <= u < num_experts}

    while select_top_k < top_k and len(named(select_top_k + 1)) <= max_active:
        select_top_k += 1
    while select_top_k < top_k and len(named(select_top_k)) < min_active:
        select_top_k += 1
    if select_top_k >= top_k:
        return ids.clone()
    primary = named(select_top_k)
    target = {}
    for expert in {u for token in tokens for u in token if 0 <= u < num_experts} - primary:
        best, chosen = -math.inf, expert
        for candidate in sorted(primary):
            if matrix[expert][candidate] > best:
                best, chosen = matrix[expert][candidate], candidate
        target[expert] = expert if best < critical_below else chosen
    rerouted = [[target.get(u, u) for u in token] for token in tokens]
    return torch.tensor(rerouted, dtype=ids.dtype, device=ids.device).reshape(ids.shape)


def _critical_below(threshold: float | str, matrix: list[list[float]]) -> float:
    """The similarity below which an expert stays."""
    if not isinstance(threshold, str):
        return threshold if threshold > 0 else -math.inf
    best = sorted(max(row[:u] + row[u + 1 :]) for u, row in enumerate(matrix))
    return best[min(round(float(threshold[1:]) * len(best)), len(best) - 1)]


def projection_oracle(
    weights: torch.Tensor, ids: torch.Tensor, new_ids: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """Routing weights under `substitution="projection"`: those of re-routed slots times projection[old, new].

    Args:
        weights: [..., K].
        ids: int [..., K], before re-routing.
        new_ids: the same after it.
        projection: [E, E].
    """
    scaled = weights.clone().reshape(-1)
    for slot, (old, new) in enumerate(zip(ids.reshape(-1).tolist(), new_ids.reshape(-1).tolist(), strict=True)):
        if old != new:
            scaled[slot] = (scaled[slot].float() * projection[old, new]).to(weights.dtype)
    return scaled.reshape(weights.shape)


@contextlib.contextmanager
def oracle_routing(
    model: nn.Module,
    matrices: Mapping[str, torch.Tensor],
    select_top_k: int,
    threshold: float | str = 0.0,
    min_active: int | None = None,
    projections: Mapping[str, torch.Tensor] | None = None,
    active: dict[str, list[tuple[int, int]]] | None = None,
) -> Iterator[nn.Module]:
    """Let an eager model route as SERE would, by hooks on its routers.

    Works for routers that are modules of their own and return the expert ids [T, K] among their results, as those
    of transformers do. Inside the context their top-k is sorted, whatever they ask for.

    Args:
        model: run it eagerly inside the context.
        matrices: similarity by the name of each router's weight.
        select_top_k: S.
        threshold: rho, a number or "q0.2".
        projections: coefficients by the name of each router's weight, for substitution="projection"; then the router
            has to return the weights [T, K] beside the ids, in the form in which they are used.
        min_active: minimum number of primary experts; None means K, the backend's default.
        active: collects (experts before, experts after) for each call of each gate.

    Raises:
        SereError: a router returns no ids, when the model runs.
    """

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
            found = outputs if isinstance(outputs, tuple) else (outputs,)
            whole = [o for o in found if isinstance(o, torch.Tensor) and not o.is_floating_point()]
            if not whole:
                raise SereError(f"the module of {name}, a {type(module).__name__}, returns no expert ids")
            ids = whole[0]
            least = ids.shape[-1] if min_active is None else min_active
            new = reroute_oracle(ids, matrices[name], select_top_k, threshold, least)
            if active is not None:
                active.setdefault(name, []).append((len(ids.unique()), len(new.unique())))
            replaced = {id(ids): new}
            if projections is not None:
                weights = next(o for o in outputs if o.is_floating_point() and o.shape == ids.shape)
                replaced[id(weights)] = projection_oracle(weights, ids, new, projections[name])
            return tuple(replaced.get(id(output), output) for output in outputs)

        return hook

    handles = [model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook_for(name)) for name in matrices]
    try:
        with SortedTopK():
            yield model
    finally:
        for handle in handles:
            handle.remove()
