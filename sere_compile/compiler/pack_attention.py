"""Attention beside the gates of a graph: where it may read keys and values once per group, and what is told of it."""

from __future__ import annotations

import logging

import torch
from torch.fx import GraphModule

from ..config import SereConfig
from ..passes.pack_gqa import pack_gqa

log = logging.getLogger(__name__)


def pack_attention(module: GraphModule, config: SereConfig, device: torch.device) -> None:
    """Run the pass `pack_gqa` over a graph, if the options ask for it.

    Args:
        module: is changed.
        config: of all gates.
        device: where the graph runs.
    """
    if not config.acts("pack_gqa", device):
        return
    done = pack_gqa(module.graph)
    if done.packed:
        log.info("attention: %d calls of one token read keys and values once per group of heads", len(done.packed))
    for name, reason in done.refused.items():
        log.info("attention: %s copies keys and values for each query head: %s", name, reason)
