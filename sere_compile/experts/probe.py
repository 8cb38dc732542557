"""Measure how similar experts are without data: run each of them on the same random hidden states.

Counterfactual routing needs no knowledge of the model's code: the dispatch is run with expert e in the first slot
of a token at weight 1 and other experts behind it at weight 0, which leaves e's own output for that token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..errors import ProbeError
from ..passes import DispatchRegion, NormScale
from ..passes.graph import nodes
from .counterfactual import CounterfactualExperts, Dispatch
from .hidden_states import draw
from .metrics import FrobeniusAccumulator
from .module_tree import Experts

PROBE_TOKENS = 64
PROBE_SEED = 0
# Rows of one run of an experts module; each gathers K copies of expert weights under "batched_mm".
MODULE_ROWS = 512


@dataclass(frozen=True)
class Probed:
    """How alike a gate's experts are, float32 [E, E] each.

    Attributes:
        similarity: 1 - d / max d with d the Frobenius distance of the outputs, SERE (arXiv 2602.07616).
        projection: <A_u, A_v> / <A_v, A_v>, the scale of expert v that comes closest to u.
    """

    similarity: torch.Tensor
    projection: torch.Tensor


def probe_similarity(dispatch: Dispatch, rows: int, num_experts: int, top_k: int, device: torch.device) -> torch.Tensor:
    """The similarity alone, see `probe_experts`."""
    return probe_experts(dispatch, rows, num_experts, top_k, device).similarity


def probe_experts(dispatch: Dispatch, rows: int, num_experts: int, top_k: int, device: torch.device) -> Probed:
    """Compare a gate's experts on `PROBE_TOKENS` random tokens.

    Args:
        dispatch: runs `rows` rows at once, each with ids and weights of its own.
        rows: R, at least 1.
        num_experts: E.
        top_k: K, at most E.
        device: of ids and weights.

    Raises:
        ProbeError: an expert gives NaN or infinity on normally distributed hidden states.
    """
    if top_k > num_experts:
        raise ProbeError(f"a gate that selects {top_k} of {num_experts} experts cannot be probed")
    with torch.inference_mode(False), torch.no_grad():
        experts = CounterfactualExperts(dispatch, rows, top_k)
        accumulator = FrobeniusAccumulator(num_experts)
        accumulator.update(experts.outputs(torch.arange(PROBE_TOKENS, device=device), num_experts))
        return Probed(accumulator.similarity(), accumulator.projection())


def module_dispatch(
    experts: Experts,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: NormScale | None = None,
    value: Callable[[Node], Any] = lambda node: None,
) -> Dispatch:
    """The dispatch of an experts module that takes (hidden [T, H], ids [T, K], weights [T, K]).

    `scale` and `value` are those of `hidden_states.draw`.
    """
    table = draw(PROBE_TOKENS, hidden_size, PROBE_SEED, dtype, device, scale, value)
    return lambda token, ids, weights: experts(table[token], ids, weights.to(dtype))


def region_dispatch(
    region: DispatchRegion,
    values: Mapping[Node, Any],
    scales: Sequence[NormScale] | None = None,
    value: Callable[[Node], Any] = lambda node: None,
) -> tuple[Dispatch, int]:
    """The dispatch of a traced region, and how many rows one run of it takes.

    Args:
        region: from `passes.extract_dispatch`.
        values: what a call of the graph passed, for each graph input: tensors, and ints for symbolic sizes.
        scales: for each of the region's activations, see `hidden_states.draw`.
        value: see there.
    """
    symbols = {_fake(node).node.expr: int(v) for node, v in values.items() if isinstance(_fake(node), torch.SymInt)}
    inputs = [values[node] for node in region.inputs]
    ids_shape, ids_dtype = _concrete_shape(region.ids, symbols), _fake(region.ids).dtype
    weights_dtype = _fake(region.weights).dtype
    # ShapeProp, which symbolic_trace needs, records no device; the experts' weights are on the same one.
    on = [_fake(region.ids), *inputs]
    device = next((value.device for value in on if hasattr(value, "device")), torch.device("cpu"))
    rows = int(torch.Size(ids_shape[:-1]).numel())
    shapes = [_concrete_shape(node, symbols) for node in region.activations]
    given: Sequence[NormScale | None] = scales or [None] * len(shapes)
    tables = [
        draw(PROBE_TOKENS, shape[-1], PROBE_SEED, _fake(node).dtype, device, scale, value)
        for node, shape, scale in zip(region.activations, shapes, given, strict=True)
    ]

    def dispatch(token: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        activations = [_spread(table[token], shape) for table, shape in zip(tables, shapes, strict=True)]
        ids = ids.to(ids_dtype).reshape(ids_shape)
        weights = weights.to(weights_dtype).reshape(ids_shape)
        result = region.module(ids, weights, *inputs, *activations)
        return result.reshape(rows, -1)

    return dispatch, rows


def _fake(node: Node) -> Any:
    return nodes.value(node)


def _concrete_shape(node: Node, symbols: Mapping[Any, int]) -> tuple[int, ...]:
    """Sizes as numbers, without asking the tracer's symbols: that would specialise the graph being compiled."""
    sizes = _fake(node).shape
    return tuple(int(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else size for size in sizes)


def _spread(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows [R, H] in a shape that holds each of them once (tokens) or K times in a row (slots)."""
    copies = torch.Size(shape).numel() // rows.numel()
    return rows.repeat_interleave(copies, dim=0).reshape(shape)
