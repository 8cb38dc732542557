"""Measure how similar experts are without data: run each of them on the same random hidden states.

Counterfactual routing needs no knowledge of the model's code: the dispatch is run with expert e in
the first slot of a token at weight 1 and other experts behind it at weight 0, which leaves e's own
output for that token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..errors import ProbeError
from ..passes import DispatchRegion, Gate, NormScale, Skip
from ..passes.graph import nodes
from ..passes.graph.failures import FAILURES, short
from ..passes.graph.run_part import ValueOf
from .counterfactual import CounterfactualExperts, Dispatch
from .experts_module import Experts
from .hidden_states import draw, hidden_size_of, scale_at
from .metrics import FrobeniusAccumulator
from .spread import ATTACH, check_one_rank_can_probe, is_distributed

PROBE_TOKENS = 64
PROBE_SEED = 0
# Rows of one run of an experts module; each gathers K copies of expert weights under "batched_mm".
MODULE_ROWS = 512


@dataclass(frozen=True)
class Probed:
    """How alike a gate's experts are, float32 [E, E] each.

    Attributes:
        similarity: 1 - d / max d with d the Frobenius distance of the outputs, SERE (arXiv
            2602.07616).
        projection: <A_u, A_v> / <A_v, A_v>, the scale of expert v that comes closest to u.
    """

    similarity: torch.Tensor
    projection: torch.Tensor


def probe_gate(
    gate: Gate,
    region: DispatchRegion | Skip,
    name: str,
    weight: torch.Tensor,
    find_experts: Callable[[], Experts | None],
    value_of: ValueOf,
    advice: str,
) -> Probed:
    """Measure how alike a gate's experts are, see `find_dispatch`.

    Raises:
        ProbeError: the experts cannot be run, or one gives NaN or infinity.
    """
    dispatch, rows = find_dispatch(gate, region, name, weight, find_experts, value_of, advice)
    try:
        return probe_experts(dispatch, rows, gate.num_experts, gate.top_k, weight.device)
    except ProbeError as error:
        raise ProbeError(f"the experts of {name} cannot be probed: {error}. {advice}") from error
    except FAILURES as error:
        raise ProbeError(
            f"the experts of {name} cannot be probed: on random hidden states they raise {short(error)}. {advice}"
        ) from error


def find_dispatch(
    gate: Gate,
    region: DispatchRegion | Skip,
    name: str,
    weight: torch.Tensor,
    find_experts: Callable[[], Experts | None],
    value_of: ValueOf,
    advice: str,
) -> tuple[Dispatch, int]:
    """What runs a gate's experts on hidden states that are drawn, and how many rows it takes at once.

    They are run in the graph, else beside the router in the live model. The graph's own dispatch needs
    every tensor that it reads and a known number of tokens. Where it takes few rows at once, thousands
    of runs would be needed, and an experts module beside the router is run instead.

    Args:
        gate: as it was found.
        region: its dispatch, from `passes.extract_dispatch`, or why there is none.
        name: of the router's weight.
        weight: the router's.
        find_experts: gives the experts beside the router, see `experts_module.find_experts`; called
            if needed.
        value_of: what graph inputs and attributes hold; None for what only a call has.
        advice: what the user can do where the experts cannot be run; the end of the error's
            message.

    Raises:
        ProbeError: the experts can be run in neither place, or each rank holds a part of them.
    """
    if not isinstance(region, Skip) and (
        any(is_distributed(value_of(node)) for node in region.inputs) or any(map(nodes.exchanges, region.inside))
    ):
        raise ProbeError(f"the experts of {name} are spread over ranks, and one rank cannot measure them: {ATTACH}")
    found = _dispatch_in_graph(gate, region, name, value_of)
    experts = None if not isinstance(found, str) and found[1] >= PROBE_TOKENS else find_experts()
    if not isinstance(found, str) and experts is None:
        return found
    if isinstance(experts, nn.Module):
        check_one_rank_can_probe(experts, name)
    if experts is None:
        raise ProbeError(
            f"the experts of {name} cannot be probed: {found}, and no experts module stands beside its router in a "
            f"model of this process. {advice}"
        )
    scale = _known_scale(gate.router_input, gate, name, value_of)
    hidden_size = hidden_size_of(weight, gate)
    return module_dispatch(experts, hidden_size, weight.dtype, weight.device, scale, value_of), MODULE_ROWS


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
    value_of: ValueOf = lambda node: None,
) -> Dispatch:
    """The dispatch of an experts module that takes (hidden [T, H], ids [T, K], weights [T, K]).

    `scale` and `value_of` are those of `hidden_states.draw`.
    """
    table = draw(PROBE_TOKENS, hidden_size, PROBE_SEED, dtype, device, scale, value_of)
    return lambda token, ids, weights: experts(table[token], ids, weights.to(dtype))


def _dispatch_in_graph(
    gate: Gate, region: DispatchRegion | Skip, name: str, value_of: ValueOf
) -> tuple[Dispatch, int] | str:
    """The gate's dispatch as a function and its number of rows, or why the graph alone does not give it."""
    if isinstance(region, Skip):
        return str(region)
    unknown = next((node for node in region.inputs if value_of(node) is None), None)
    if unknown is not None:
        return f"their dispatch reads {unknown.name}, which only a call has"
    symbols = _symbols(gate, value_of)
    ids_shape = _concrete_shape(region.ids, symbols)
    shapes = [_concrete_shape(node, symbols) for node in region.activations]
    known = [shape for shape in shapes if shape is not None]
    if ids_shape is None or len(known) < len(shapes):
        return "their dispatch is traced for any number of tokens"
    scales = [_known_scale(node, gate, name, value_of) for node in region.activations]
    return _region_dispatch(region, ids_shape, known, scales, value_of)


def _region_dispatch(
    region: DispatchRegion,
    ids_shape: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]],
    scales: Sequence[NormScale],
    value_of: ValueOf,
) -> tuple[Dispatch, int]:
    """The dispatch of a traced region on drawn hidden states, and how many rows one run of it takes.

    Args:
        region: from `passes.extract_dispatch`.
        ids_shape: of the ids that it takes.
        shapes: of its activations.
        scales: of its activations, see `hidden_states.draw`.
        value_of: of its inputs.
    """
    inputs = [value_of(node) for node in region.inputs]
    ids_dtype, weights_dtype = nodes.value(region.ids).dtype, nodes.value(region.weights).dtype
    # ShapeProp, which symbolic_trace needs, records no device; the experts' weights are on the same
    # one.
    on = [nodes.value(region.ids), *inputs]
    device = next((value.device for value in on if hasattr(value, "device")), torch.device("cpu"))
    rows = int(torch.Size(ids_shape[:-1]).numel())
    tables = [
        draw(PROBE_TOKENS, shape[-1], PROBE_SEED, nodes.value(node).dtype, device, scale, value_of)
        for node, shape, scale in zip(region.activations, shapes, scales, strict=True)
    ]

    def dispatch(token: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        activations = [_spread(table[token], shape) for table, shape in zip(tables, shapes, strict=True)]
        ids = ids.to(ids_dtype).reshape(ids_shape)
        weights = weights.to(weights_dtype).reshape(ids_shape)
        return region.module(ids, weights, *inputs, *activations).reshape(rows, -1)

    return dispatch, rows


def _known_scale(read: Node, gate: Gate, name: str, value_of: ValueOf) -> NormScale:
    """The scale of the hidden states at a node, as far as the graph holds its tensors; else standard normal."""
    found = scale_at(read, gate.router_input, name)
    return found if all(value_of(node) is not None for node in found.parameters) else NormScale()


def _symbols(gate: Gate, value_of: ValueOf) -> dict[Any, int]:
    """The numbers behind symbolic sizes, where they are inputs of the graph."""
    sizes = [
        (nodes.value(node).node.expr, value_of(node))
        for node in gate.selection.graph.find_nodes(op="placeholder")
        if isinstance(nodes.value(node), torch.SymInt)
    ]
    return {symbol: int(number) for symbol, number in sizes if number is not None}


def _concrete_shape(node: Node, symbols: Mapping[Any, int]) -> tuple[int, ...] | None:
    """Sizes as numbers, without asking the tracer's symbols: that would specialise the graph being compiled."""
    sizes = [
        size.node.expr.subs(symbols) if isinstance(size, torch.SymInt) else size for size in nodes.value(node).shape
    ]
    if not all(isinstance(size, int) or size.is_number for size in sizes):
        return None
    return tuple(int(size) for size in sizes)


def _spread(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows [R, H] in a shape that holds each of them once (tokens) or K times in a row (slots)."""
    copies = torch.Size(shape).numel() // rows.numel()
    return rows.repeat_interleave(copies, dim=0).reshape(shape)
