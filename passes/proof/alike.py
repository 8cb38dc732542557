"""Whether a program treats its experts alike: only then one can stand in another's place.

Asked where no way to rewrite was proven, to tell why. Two answers come from the parameters: experts without any of
their own, and experts of other sizes. The third comes from running: every expert is given the scores and the parameters
of another one, which changes no token where they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from ..graph import nodes
from .compare import distance
from .expert_parameters import ExpertParameters, Values
from .region import Region

_NAMED = 6  # experts that a text names at most
_NO_PART = "experts that compute nothing, are left out, share parameters, or run one after another are not re-routed"


def unlike_parameters(
    owners: Mapping[Node, int], experts: ExpertParameters, region: Region, sizes: Mapping[Node, Sequence[int]]
) -> str | None:
    """How the parameters of the experts differ, in words, or None.

    Args:
        owners: tensors that belong to one expert alone, and to which.
        experts: the parameters that were found to be exchangeable.
        region: of the experts.
        sizes: of these tensors.
    """
    largest: dict[int, tuple[int, ...]] = {}
    for node, expert in owners.items():
        shape = tuple(sizes[node])
        largest[expert] = max(largest.get(expert, ()), shape, key=lambda s: (_count(s), s))
    everyone = range(region.gate.num_experts)
    missing = [expert for expert in everyone if expert not in largest]
    if not largest:
        return None
    if missing and any(node not in owners for node in experts.stacks):
        return f"{_listed(sorted(largest))} parameters beside those that all experts have"
    if missing:
        end = region.originals.get(region.ends[0], region.ends[0])
        return f"{_listed(missing)} no parameter of {_own(missing)} on the way to {end.name}: {_NO_PART}"
    first = largest[0]
    other = next((expert for expert in everyone if largest[expert] != first), None)
    if other is None:
        return None
    return f"expert 0 has parameters of {list(first)}, and expert {other} of {list(largest[other])}"


def _count(sizes: Sequence[int]) -> int:
    return int(torch.Size(sizes).numel())


def _listed(experts: Sequence[int]) -> str:
    """`experts 1, 2 and 5 have`, or `expert 3 has`."""
    names = [str(expert) for expert in experts[:_NAMED]]
    if len(experts) == 1:
        return f"expert {names[0]} has"
    more = len(experts) - _NAMED
    last = f"{more} other{'s' * (more > 1)}" if more > 0 else names.pop()
    return f"experts {', '.join(names)} and {last} have"


def _own(experts: Sequence[int]) -> str:
    return "its own" if len(experts) == 1 else "their own"


def unlike_code(
    region: Region,
    run: Callable[[Values], Values],
    draws: Sequence[Values],
    experts: ExpertParameters,
    router: set[Node],
) -> str | None:
    """What changes where each expert has the scores and parameters of the one before it, in words, or None.

    Nothing is said where this cannot be told: the router then chooses otherwise, or more than it tells experts apart.

    Args:
        region: of the experts.
        run: it on values of its leaves.
        draws: of such values.
        experts: the parameters, all of them.
        router: state that is the router's.
    """
    count = region.gate.num_experts
    before_it = torch.arange(count).roll(1)  # by expert: the one whose scores and parameters it gets
    for values in draws:
        turned = _turned(region, values, before_it, experts, router)
        if turned is None:
            return None
        before, after = run(values), run(turned)
        if not _chose_the_next(region, before, after, count):
            return None
        exit_node = region.ends[0]
        if (apart := distance(before[exit_node], after[exit_node], exact=False)) is not None:
            name = region.originals.get(exit_node, exit_node).name
            return f"where each has the scores and the parameters of the one before it, {name} is off by {apart}"
    return None


def _turned(
    region: Region, values: Values, before_it: torch.Tensor, experts: ExpertParameters, router: set[Node]
) -> Values | None:
    """The values with parameters and all that the router tells of experts turned; None where something else may."""
    values = experts.swapped(values, before_it)
    columns, count = nodes.last_size(region.gate.router_weight), len(before_it)
    turned = dict(values)
    belonging = experts.tensors
    for node, leaf in region.leaves.items():
        value = values[node]
        if not isinstance(value, torch.Tensor) or leaf.kind == "hidden":
            continue
        by_expert = value.dim() > 0 and value.shape[-1] in (count, columns)
        if leaf.kind == "logits" or (node in router and by_expert):
            changed = value.clone()
            changed[..., :count] = value[..., before_it.to(value.device)]
            turned[node] = changed
        elif node not in belonging and any(size in (count, columns) for size in value.shape):
            return None  # such as a mask over the experts, or another router whose scores the ids pick
    return turned


def _chose_the_next(region: Region, before: Values, after: Values, count: int) -> bool:
    """Whether each slot has the next expert by the same score: routing that no turn changes."""
    gate = region.gate
    ids = before[gate.ids]
    expected = torch.where((ids >= 0) & (ids < count), (ids + 1) % count, ids)
    if not torch.equal(expected, after[gate.ids]):
        return False
    return gate.values is None or torch.allclose(before[gate.values], after[gate.values])
