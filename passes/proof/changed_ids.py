"""What becomes of ids on their way from the gate to the experts.

Re-routing acts on the ids that the gate names. Where `torch.where(real, ids, ids[:1])` or a remainder puts other
numbers in their place, experts that nobody reads would keep others active, and those that are read would not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from ..gate import Gate


def changed_id(gate: Gate, values: Mapping[Node, Any]) -> str | None:
    """Which id of an expert is another where the dispatch reads it, in words, or None.

    Args:
        gate: of a region, with the kinds of its uses.
        values: of the region's nodes.
    """
    ids = values[gate.ids].flatten().long()
    for read in dict.fromkeys(use.read for use in gate.dispatch_uses):
        found = values[read]
        if found.dtype.is_floating_point or found.numel() != ids.numel():
            continue
        after = found.flatten().long()
        changed = (ids >= 0) & (ids < gate.num_experts) & (after != ids)
        # A transposed copy has the same ids in another order.
        if bool(changed.any()) and not torch.equal(ids.sort().values, after.sort().values):
            return f"id {int(ids[changed][0])} becomes {int(after[changed][0])} in {read.name}, behind re-routing"
    return None
