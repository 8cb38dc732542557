"""Hidden states for experts where there is no data: drawn at the mean and scale that the layer sees.

The norm in front of a gate hands on numbers of mean 0 and scale 1 in each channel, times its gain
g, plus its bias b. So each channel is drawn from a normal distribution of mean b and standard
deviation |g|. What data has beyond that, correlations between channels and differences between
tokens, is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..passes import Gate, NormScale, find_norm_scale
from ..passes.graph import nodes

log = logging.getLogger(__name__)


def scale_at(read: Node, router_input: Node, gate: str) -> NormScale:
    """The scale of what the experts read: of the norm in front of it, else of the one in front of the router.

    Standard normal where there is no norm, which the log says.

    Args:
        read: the hidden states that the experts take.
        router_input: those that the gate takes.
        gate: its name.
    """
    found = find_norm_scale(read)
    if isinstance(found, str) and nodes.last_size(read) == nodes.last_size(router_input):
        found = find_norm_scale(router_input)
    if isinstance(found, str):
        log.info("hidden states for %s are drawn standard normal: no norm was found in front of it, %s", gate, found)
        return NormScale()
    return found


def hidden_size_of(weight: torch.Tensor, gate: Gate) -> int:
    """H, the number of channels that a gate's router projects.

    The router's input gives it. A weight alone does not: it is [E, H] or [H, E], and may have
    further rows or columns for a shared expert or for none.

    Args:
        weight: the router's, for graphs in which the size of the input is no plain number.
        gate: whose router it is.
    """
    size = nodes.last_size(gate.router_input)
    if size is not None:
        return size
    rows, columns = weight.shape
    return rows if columns == gate.num_experts and rows != gate.num_experts else columns


def draw(
    count: int,
    size: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: NormScale | None = None,
    value: Callable[[Node], Any] = lambda node: None,
) -> torch.Tensor:
    """Hidden states [count, size].

    Args:
        count: how many.
        size: H.
        seed: of a generator on the CPU, so that every device draws the same.
        dtype: of the result; the numbers are drawn in float32.
        device: of the result.
        scale: gain and bias; None: standard normal.
        value: the tensor behind a graph input that the scale names.
    """
    normal = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)
    normal = normal.to(device)
    return (normal if scale is None else scale.apply(normal, value)).to(dtype)
