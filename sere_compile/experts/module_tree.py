"""Find the module that owns a router weight, and the experts beside it.

A compiled graph only sees tensors. One graph may serve every layer of a model, so the weight that a call passes
is the only thing that tells the layer; the live modules tell where that weight belongs.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

# torch.compile wraps a module in one that holds the original under this name.
_COMPILED_PREFIX = "_orig_mod"
# What experts modules of transformers take first; GPT-OSS has names of its own.
_EXPERTS_SIGNATURES = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)


@dataclass(frozen=True)
class Owner:
    """Where a parameter lives: the outermost module, its name there, and the modules on the way, innermost first."""

    root: nn.Module
    name: str
    chain: tuple[nn.Module, ...]


def find_owner(weight: torch.Tensor) -> Owner | None:
    """The owner of a parameter among all live modules, or None. Costs a scan of the heap: ask once a weight."""
    modules = [obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module)]
    parents: dict[int, tuple[nn.Module, str]] = {}
    holder: tuple[nn.Module, str] | None = None
    for module in modules:
        for name, child in module.__dict__.get("_modules", {}).items():
            # Of several parents the wrapper that torch.compile made counts: it says what the user calls the model.
            if child is not None and (name == _COMPILED_PREFIX or id(child) not in parents):
                parents[id(child)] = (module, name)
        for name, parameter in module.__dict__.get("_parameters", {}).items():
            if parameter is weight and not isinstance(module, torch.fx.GraphModule):
                # A bare nn.Module is what make_fx keeps a graph's constants in.
                holder = holder if holder is not None and type(holder[0]) is not nn.Module else (module, name)
    if holder is None:
        return None
    chain, names = [holder[0]], [holder[1]]
    while id(chain[-1]) in parents and len(chain) < 100:
        parent, name = parents[id(chain[-1])]
        if name == _COMPILED_PREFIX:
            break
        chain.append(parent)
        names.append(name)
    return Owner(chain[-1], ".".join(reversed(names)), tuple(chain))


Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def find_experts(weight: torch.Tensor, num_experts: int) -> Experts | None:
    """The experts beside a router as a function (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].

    Looks in the modules around the router, innermost first, for a module with the signature
    (hidden_states, top_k_index, top_k_weights), or a list of `num_experts` modules that each take hidden states.
    """
    owner = find_owner(weight)
    return None if owner is None else _experts_around(owner, weight, num_experts)


def find_experts_module(weight: torch.Tensor, num_experts: int) -> nn.Module | None:
    """The module beside a router that takes (hidden_states, top_k_index, top_k_weights): the user's own code."""
    found = find_experts(weight, num_experts)
    return found if isinstance(found, nn.Module) else None


def _experts_around(owner: Owner, weight: torch.Tensor, num_experts: int) -> Experts | None:
    for around in _surroundings(owner):
        for module in _beside(around, weight):
            if _takes_routing(module) and (_holds_experts(module, num_experts) or _counts_experts(module, num_experts)):
                return module
            if isinstance(module, nn.ModuleList) and len(module) == num_experts:
                return _ExpertList(module)
    return None


def experts_stand_beside(weight: torch.Tensor, num_experts: int) -> bool:
    """Whether experts are seen around the router, callable or not: evidence for ids that leave a graph.

    Beyond `find_experts`: weights stacked over the experts, [E, .., ..], in a module around the router, for experts
    that take sorted rows and counts instead of ids; or a dictionary of `num_experts` modules.
    """
    owner = find_owner(weight)
    if owner is None:
        return False
    if _experts_around(owner, weight, num_experts) is not None:
        return True
    return any(
        _holds_experts(around, num_experts)
        or any(isinstance(child, nn.ModuleDict) and _counts(child) == num_experts for child in around.modules())
        for around in _surroundings(owner)
    )


def count_experts_beside(weight: torch.Tensor, columns: int) -> int:
    """How many experts compute something around a router with `columns` columns; 0 where none are seen.

    Some experts of a router may compute nothing. They may still have a row in one of two stacks of weights, where the
    smaller stack tells, or none at all, where experts that take routing beside the router tell.
    """
    owner = find_owner(weight)
    if owner is None:
        return 0
    as_many = experts_stand_beside(weight, columns)
    for around in _surroundings(owner):
        for module in _beside(around, weight):
            stacks = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() >= 3}
            fewer = [size for size in stacks if 1 < size <= columns]
            if fewer and (columns in stacks if as_many else _takes_routing(module)):
                return min(fewer)
    return columns if as_many else 0


@dataclass(frozen=True)
class RouterModule:
    """A router weight by the looks of the modules around it.

    Attributes:
        name: of the weight.
        weight: [E, H] or [H, E].
        modules: from the one that holds the weight to the one that holds the experts as well.
    """

    name: str
    weight: torch.Tensor
    modules: tuple[nn.Module, ...]


def routers_in(root: nn.Module) -> list[RouterModule]:
    """Every weight of a model that has a row or column for each of the experts around it, whether it runs or not.

    Of several such weights around the same experts the nearest are taken: a head of the model is farther than a router.
    """
    modules = dict(root.named_modules())
    counts = {len(m) for m in modules.values() if isinstance(m, (nn.ModuleList, nn.ModuleDict))}
    counts = {count for count in counts | {p.shape[0] for p in root.parameters() if p.dim() >= 3} if count > 1}
    found: list[tuple[RouterModule, nn.Module, int]] = []
    nearest: dict[nn.Module, int] = {}
    for path, holder in modules.items():
        parts = path.split(".") if path else []
        for name, weight in holder.named_parameters(recurse=False):
            sizes = counts.intersection(weight.shape) if weight.dim() == 2 else set()
            if not sizes:
                continue
            chain = tuple(modules[".".join(parts[:depth])] for depth in range(len(parts), -1, -1))
            owner = Owner(root, ".".join([*parts, name]), chain)
            for size in sizes:
                place = _nearest_experts(owner, weight, size)
                if place is not None:
                    experts, distance = place
                    depth = len(chain) - distance
                    nearest[experts] = max(depth, nearest.get(experts, 0))
                    found.append((RouterModule(owner.name, weight, chain[: distance + 1]), experts, depth))
    return [router for router, experts, depth in found if depth == nearest[experts]]


def _nearest_experts(owner: Owner, weight: torch.Tensor, num_experts: int) -> tuple[nn.Module, int] | None:
    """The module that holds `num_experts` experts, and how many modules out from the router it is found."""
    for distance, around in enumerate(_surroundings(owner)):
        for module in (around, *_beside(around, weight)):
            listed = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) == num_experts
            if listed or any(p.dim() >= 3 and p.shape[0] == num_experts for p in module.parameters(recurse=False)):
                return module, distance
    return None


def _counts(experts: nn.ModuleDict) -> int:
    """How many experts a dictionary holds, which may hold a dropout besides and say so."""
    told = getattr(experts, "num_experts", None)
    return told if isinstance(told, int) and told <= len(experts) else len(experts)


def _surroundings(owner: Owner) -> tuple[nn.Module, ...]:
    """The modules in which experts of a router may be, innermost first: up to the layer, none that holds layers."""
    around = owner.chain[:4]
    return owner.chain[:3] if any(isinstance(module, nn.ModuleList) for module in around[1:]) else around


def _beside(module: nn.Module, weight: torch.Tensor) -> Iterator[nn.Module]:
    for child in module.modules():
        if child is not module and all(p is not weight for p in child.parameters(recurse=False)):
            yield child


def _takes_routing(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters)
    return tuple(parameters[:3]) in _EXPERTS_SIGNATURES


def _holds_experts(module: nn.Module, num_experts: int) -> bool:
    return any(p.dim() >= 3 and p.shape[0] == num_experts for p in module.parameters())


def _counts_experts(module: nn.Module, num_experts: int) -> bool:
    """Experts stacked in two dimensions, [E * width, hidden], tell their number only by name."""
    stacked = all(p.dim() >= 2 and p.shape[0] % num_experts == 0 for p in module.parameters())
    return stacked and getattr(module, "num_experts", None) == num_experts


class _ExpertList:
    """A list of expert modules called one after the other, weighted by the routing."""

    def __init__(self, experts: nn.ModuleList) -> None:
        self.experts = experts

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = None
        for expert in ids.unique().tolist():
            token, slot = torch.where((ids == expert) & (weights != 0))
            if not len(token):
                continue
            result = self.experts[expert](hidden[token]) * weights[token, slot, None].to(hidden.dtype)
            total = hidden.new_zeros(len(hidden), result.shape[-1]) if total is None else total
            total.index_add_(0, token, result)
        return hidden.new_zeros(hidden.shape) if total is None else total
