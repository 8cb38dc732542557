"""Experts of which each rank holds a part: running them alone gives a part of the result, or waits for other ranks."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn

from ..errors import ProbeError

ATTACH = "attach a profile to every rank's model"


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`: a rank holds its part of it."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(tensor, known.DTensor)


def spread_over_ranks(module: nn.Module) -> str:
    """What of a module other ranks have to take part in, in words; empty where nothing is seen.

    Parameters that are `DTensor`s, groups of several processes or meshes of several devices that a module in it keeps,
    and the mark of transformers, whose parallel layers hold a rank's part as a plain tensor while they run.
    """
    if not _several_ranks():
        return ""
    for name, parameter in module.named_parameters():
        if is_distributed(parameter):
            return f"{name} is spread over ranks"
    for name, inner in module.named_modules():
        if getattr(inner, "_is_hooked", False) is True or any(_is_group(value) for value in vars(inner).values()):
            return f"{name or type(inner).__name__} exchanges with other ranks"
    return ""


def check_one_rank_can_probe(module: nn.Module, name: str) -> None:
    """Refuse to run experts of which other ranks hold a part.

    Raises:
        ProbeError: they do; the message names the gate and what was seen.
    """
    if spread := spread_over_ranks(module):
        raise ProbeError(f"the experts of {name} cannot be probed by one rank: {spread}; {ATTACH}")


def _is_group(value: Any) -> bool:
    meshes = sys.modules.get("torch.distributed.device_mesh")
    groups = tuple(kind for kind in (getattr(dist, "ProcessGroup", None), getattr(meshes, "DeviceMesh", None)) if kind)
    return bool(groups) and isinstance(value, groups) and value.size() > 1


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
