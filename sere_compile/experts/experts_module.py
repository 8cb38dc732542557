"""The experts beside a router: found by the modules around its weight, called as a function of ids and weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from .owner import Owner

# What experts modules of transformers take first; GPT-OSS has names of its own.
_EXPERTS_SIGNATURES = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def find_experts(owner: Owner | None, num_experts: int) -> Experts | None:
    """The experts beside a router as a function (hidden [T, H], ids [T, K], weights [T, K]) -> [T, H].

    Looks in the modules around the router, innermost first, for a module with the signature
    (hidden_states, top_k_index, top_k_weights), or a list of `num_experts` modules that each take
    hidden states.

    Args:
        owner: of the router's weight, see `owner.Owners`; None: no module holds it, and there are
            no experts.
        num_experts: E.
    """
    if owner is None:
        return None
    for around in owner.surroundings:
        for module in owner.beside(around):
            if _takes_routing(module) and (_holds_experts(module, num_experts) or _counts_experts(module, num_experts)):
                return module
            if isinstance(module, nn.ModuleList) and len(module) == num_experts and all(map(_can_be_called, module)):
                return _ExpertList(module)
    return None


def experts_stand_beside(owner: Owner | None, num_experts: int) -> bool:
    """Whether experts are seen around the router, callable or not: evidence for ids that leave a graph.

    Beyond `find_experts`: weights stacked over the experts, [E, .., ..], in a module around the
    router, for experts that take sorted rows and counts instead of ids; or a dictionary of
    `num_experts` modules, or a list of as many weights.
    """
    if owner is None:
        return False
    if find_experts(owner, num_experts) is not None:
        return True
    return any(
        _holds_experts(around, num_experts)
        or any(isinstance(child, nn.ModuleDict) and _counts(child) == num_experts for child in around.modules())
        or any(_lists_weights(child, num_experts) for child in around.modules())
        for around in owner.surroundings
    )


def count_experts_beside(owner: Owner | None, columns: int) -> int:
    """How many experts compute something around a router with `columns` columns; 0 where none are seen.

    Some experts of a router may compute nothing. They may still have a row in one of two stacks of
    weights: then the smaller stack gives the number. Or they have none at all: then the experts
    that take routing beside the router do.
    """
    if owner is None:
        return 0
    as_many = experts_stand_beside(owner, columns)
    for around in owner.surroundings:
        for module in owner.beside(around):
            stacks = {p.shape[0] for p in module.parameters(recurse=False) if p.dim() >= 3}
            fewer = [size for size in stacks if 1 < size <= columns]
            if fewer and (columns in stacks if as_many else _takes_routing(module)):
                return min(fewer)
    return columns if as_many else 0


def _can_be_called(module: nn.Module) -> bool:
    """Whether it computes something by itself, unlike a dictionary of modules that are called one by one."""
    return type(module).forward is not nn.Module.forward


def _counts(experts: nn.ModuleDict) -> int:
    """How many experts a dictionary holds. It may hold a dropout as well, and then gives the number itself."""
    given = getattr(experts, "num_experts", None)
    return given if isinstance(given, int) and given <= len(experts) else len(experts)


def _takes_routing(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters)
    return tuple(parameters[:3]) in _EXPERTS_SIGNATURES


def _holds_experts(module: nn.Module, num_experts: int) -> bool:
    return any(p.dim() >= 3 and p.shape[0] == num_experts for p in module.parameters())


def _lists_weights(module: nn.Module, num_experts: int) -> bool:
    return isinstance(module, nn.ParameterList) and len(module) == num_experts and all(p.dim() > 1 for p in module)


def _counts_experts(module: nn.Module, num_experts: int) -> bool:
    """Experts stacked in two dimensions, [E * width, hidden], give their number only by name."""
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
