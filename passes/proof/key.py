"""A region's identity: equal layers of a model have equal regions, and are proven once."""

from __future__ import annotations

import hashlib
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..graph import nodes
from ..graph.identity import identity
from ..graph.leaf_modules import does_as_its_class
from .region import Region

_SMALL = 4096  # whole numbers of the model's state that are told apart by what they are; of others, a single one


def region_key(region: Region, module: GraphModule | None) -> str:
    """A hash of operations, constants, sizes, types, devices, and of single and whole numbers that the model holds."""
    gate = region.gate
    place = {node: number for number, node in enumerate(region.graph.nodes)}
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return f"%{place[value]}"
        if isinstance(value, (tuple, list)):
            return [type(value).__name__, *map(plain, value)]
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, slice):
            return ["slice", plain(value.start), plain(value.stop), plain(value.step)]
        return value

    for node in region.graph.nodes:
        leaf = region.leaves.get(node)
        if leaf is None:
            add(node.op, _target(node, module), plain(node.args), plain(dict(node.kwargs)), _kind_of(nodes.value(node)))
        else:
            add(leaf.kind, nodes.kind(leaf.source) == "cdist", _kind_of(nodes.value(node)), _content(leaf.held))
    add(gate.form, gate.num_experts, gate.top_k, gate.is_sorted, gate.needs_merge)
    add(plain([gate.selection, *gate.all_ids, gate.ids, gate.weights]), plain(list(region.readers)))
    add([(plain(use.consumer), plain(use.read), use.kind.name) for use in gate.uses])
    return digest.hexdigest()


def _target(node: Node, module: GraphModule | None) -> str:
    if node.op == "call_module" and module is not None:
        called = module.get_submodule(str(node.target))
        return repr(called) if _is_told_by_text(called) else str(identity(called))
    if node.op == "get_attr" and module is not None:
        return str(getattr(module, str(node.target), node.target))
    target = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    if isinstance(target, FunctionType):  # others may have its name, as each lambda of a module has
        return str(identity(target))
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def _is_told_by_text(called: nn.Module) -> bool:
    """Whether all that a module does, but for its tensors, is what its text says: one of torch's own as it is."""
    parts = called.modules()
    return all(type(part).__module__.startswith("torch.nn.") and does_as_its_class(part) for part in parts)


def _kind_of(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_kind_of(part) for part in value]
    shape = getattr(value, "shape", None)
    if shape is None:
        return str(value) if isinstance(value, (int, float, torch.SymInt)) else type(value).__name__
    sizes = [str(size) if isinstance(size, int) else f"s{size.node.hint}" for size in shape]
    return sizes, str(getattr(value, "dtype", "")), str(getattr(value, "device", ""))


def _content(held: Any) -> Any:
    if isinstance(held, torch.Tensor):
        few = held.numel() <= (1 if held.dtype.is_floating_point else _SMALL)
        return held.reshape(-1).tolist() if few else None
    return str(held)
