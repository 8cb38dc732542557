"""Find the module that owns a weight, among all live modules.

A compiled graph only sees tensors. One graph may serve every layer of a model, so the weight that a
call passes is the only thing that identifies the layer; the live modules say where that weight
belongs.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeGuard

import torch
from torch import nn

# torch.compile wraps a module in one that holds the original under this name.
_COMPILED_PREFIX = "_orig_mod"


@dataclass(frozen=True)
class Owner:
    """Where a parameter lives.

    Attributes:
        root: the outermost module.
        name: of the parameter in `root`, fully qualified.
        chain: the modules from the one that holds the parameter out to `root`.
    """

    root: nn.Module
    name: str
    chain: tuple[nn.Module, ...]

    @property
    def surroundings(self) -> tuple[nn.Module, ...]:
        """The modules that may hold a router's experts, innermost first: up to the layer, none that holds layers."""
        around = self.chain[:4]
        return self.chain[:3] if any(isinstance(module, nn.ModuleList) for module in around[1:]) else around

    @property
    def weight(self) -> torch.Tensor:
        """The parameter itself."""
        return getattr(self.chain[0], self.name.rpartition(".")[2])

    def beside(self, around: nn.Module) -> Iterator[nn.Module]:
        """The modules inside one of the surroundings, except the one that holds the weight."""
        weight = self.weight
        for child in around.modules():
            if child is not around and all(p is not weight for p in child.parameters(recurse=False)):
                yield child


class Owners:
    """Finds the owners of any number of weights with one scan of the heap, at the first question.

    It keeps every module alive that it has seen, and does not see later ones. So make one for one
    compilation or one call, and let go of it.
    """

    def __init__(self) -> None:
        self._parents: dict[int, tuple[nn.Module, str]] = {}
        self._holders: dict[int, tuple[nn.Module, str]] | None = None

    def find(self, weight: torch.Tensor) -> Owner | None:
        """The owner of a parameter, or None where no module holds it."""
        if self._holders is None:
            self._holders = {}
            self._record(live_modules())
        holder = self._holders.get(id(weight))
        if holder is None:
            return None
        chain, names = [holder[0]], [holder[1]]
        while id(chain[-1]) in self._parents and len(chain) < 100:
            parent, name = self._parents[id(chain[-1])]
            if name == _COMPILED_PREFIX:
                break
            chain.append(parent)
            names.append(name)
        return Owner(chain[-1], ".".join(reversed(names)), tuple(chain))

    def _record(self, modules: Iterable[nn.Module]) -> None:
        assert self._holders is not None
        for module in modules:
            for name, child in module.__dict__.get("_modules", {}).items():
                # Of several parents the wrapper that torch.compile made counts: it has the user's
                # name of the model.
                if child is not None and (name == _COMPILED_PREFIX or id(child) not in self._parents):
                    self._parents[id(child)] = (module, name)
            if isinstance(module, torch.fx.GraphModule):
                continue
            for name, parameter in module.__dict__.get("_parameters", {}).items():
                known = self._holders.get(id(parameter))
                # A bare nn.Module is what make_fx keeps a graph's constants in.
                if known is None or type(known[0]) is nn.Module:
                    self._holders[id(parameter)] = (module, name)


def find_owner(weight: torch.Tensor) -> Owner | None:
    """The owner of one parameter, for a single question; `Owners` answers several with one scan of the heap."""
    return Owners().find(weight)


def live_modules() -> list[nn.Module]:
    """Every module of this process. Costs a scan of the heap.

    The scan does not see what `gc.freeze` has set aside, as servers do once a model is loaded; the
    modules of the calls under way are found all the same.
    """
    found = {id(obj): obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module)}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if caller is not None and issubclass(type(caller), nn.Module) and id(caller) not in found:
            found |= {id(module): module for module in caller.modules()}
        frame = frame.f_back
    return list(found.values())


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

    Of several such weights around the same experts the nearest are taken: a head of the model is
    farther than a router. Several inside the module of the experts are their biases, if there are
    others around it. A table of words is none, however few there are.
    """
    modules = dict(root.named_modules())
    counts = {len(m) for m in modules.values() if isinstance(m, (nn.ModuleList, nn.ModuleDict))}
    counts = {count for count in counts | {p.shape[0] for p in root.parameters() if p.dim() >= 3} if count > 1}
    found: list[tuple[RouterModule, nn.Module, int]] = []
    for path, holder in modules.items():
        if isinstance(holder, nn.Embedding):
            continue
        parts = path.split(".") if path else []
        for name, weight in holder.named_parameters(recurse=False):
            sizes = counts.intersection(weight.shape) if weight.dim() == 2 else set()
            if not sizes:
                continue
            chain = tuple(modules[".".join(parts[:depth])] for depth in range(len(parts), -1, -1))
            owner = Owner(root, ".".join([*parts, name]), chain)
            for size in sizes:
                place = _nearest_experts(owner, size)
                if place is not None:
                    experts, distance = place
                    router = RouterModule(owner.name, weight, chain[: distance + 1])
                    found.append((router, experts, len(chain) - distance))
    return _without_farther_ones(found)


def _without_farther_ones(found: list[tuple[RouterModule, nn.Module, int]]) -> list[RouterModule]:
    """Of routers, each with experts near it and the depth at which both are in the model, those nearest to experts."""
    kept = []
    for experts in dict.fromkeys(experts for _, experts, _ in found):
        near = [(router, depth) for router, other, depth in found if other is experts]
        around = [(router, depth) for router, depth in near if router.modules[0] is not experts]
        if around and len(near) - len(around) > 1:
            near = around
        nearest = max(depth for _, depth in near)
        kept += [id(router) for router, depth in near if depth == nearest]
    return [router for router, _, _ in found if id(router) in kept]


def _nearest_experts(owner: Owner, num_experts: int) -> tuple[nn.Module, int] | None:
    """The module that holds `num_experts` experts, and how many modules out from the router it is found."""
    for distance, around in enumerate(owner.surroundings):
        for module in (around, *owner.beside(around)):
            listed = _may_be_experts(module) and len(module) == num_experts
            if listed or any(p.dim() >= 3 and p.shape[0] == num_experts for p in module.parameters(recurse=False)):
                return module, distance
    return None


def _may_be_experts(module: nn.Module) -> TypeGuard[nn.ModuleList | nn.ModuleDict]:
    """Whether it lists modules that are no layers of a model: those list modules themselves."""
    lists = (nn.ModuleList, nn.ModuleDict)
    return isinstance(module, lists) and not any(
        isinstance(inner, lists) for inner in module.modules() if inner is not module
    )
