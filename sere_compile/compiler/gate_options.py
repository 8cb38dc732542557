"""Options that differ from gate to gate, where a compiled graph knows a gate only by the weight that a call passes.

Dynamo reuses one graph for every layer with the same code, and the numbers of a gate are constants
in it. So a graph with per-gate options carries a guard on each router weight: a layer with other
options compiles a graph of its own (one for each set of options, not for each layer). Binding
checks again, in case the guard could not be had.
"""

from __future__ import annotations

import fnmatch
import logging
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Node

from ..config import SereConfig
from ..errors import ConfigError
from ..experts.owner import Owner, Owners
from ..similarity import binding
from . import dynamo

log = logging.getLogger(__name__)


def config_of(config: SereConfig, weight: torch.Tensor, fallback_name: str, owners: Owners) -> SereConfig:
    """The options of the gate with this router weight."""
    return config.for_gate(_name(weight, fallback_name, owners)) if config.per_gate else config


def guard(config: SereConfig, expected: SereConfig, node: Node, fallback_name: str) -> None:
    """Let Dynamo compile anew for a router weight that has other options than those in the graph.

    Args:
        config: the whole configuration.
        expected: the options in the graph.
        node: the placeholder of the router weight, in the graph that is being compiled.
        fallback_name: of a weight that no module owns.
    """
    if not config.per_gate:
        return

    def same(weight: object) -> bool:
        # Owners of their own: a guard lives as long as the compiled code, and would keep the
        # modules alive.
        return isinstance(weight, torch.Tensor) and config_of(config, weight, fallback_name, Owners()) == expected

    if not dynamo.guard_input(node, same, f"sere options of {fallback_name}"):
        log.debug("no guard on the options of %s: another gate with other options will be an error", fallback_name)


def check(config: SereConfig, used: SereConfig, weight: torch.Tensor, fallback_name: str, owners: Owners) -> None:
    """Refuse a call whose router weight has other options than those in the graph.

    Raises:
        ConfigError: it has.
    """
    if config.per_gate and config_of(config, weight, fallback_name, owners) != used:
        name = _name(weight, fallback_name, owners)
        raise ConfigError(
            f"per_gate gives {name} other options than the gate that this graph was compiled "
            "for, and Dynamo runs one graph for both. Compile the whole model, not layer by layer"
        )


def tell_unknown(config: SereConfig, names: Iterable[str], where: str) -> None:
    """Warn, or raise with strict=True, of patterns that match none of the names.

    Raises:
        ConfigError: with strict=True.
    """
    names = list(names)
    unknown = [p for p, _ in config.gates if not any(fnmatch.fnmatchcase(name, p) for name in names)]
    if not unknown:
        return
    text = f"per_gate: no gate of {where} matches {', '.join(map(repr, unknown))}; gates are named like {names[0]}"
    if config.strict:
        raise ConfigError(text)
    log.warning(text)


# The models that were looked through for each set of patterns.
_told: weakref.WeakKeyDictionary[nn.Module, set[object]] = weakref.WeakKeyDictionary()


def tell_unknown_of_model(config: SereConfig, owner: Owner | None, num_experts: int) -> None:
    """`tell_unknown` once for each model, as soon as one of its gates is seen: others may run in later graphs.

    Its matrices with a row or column for each of `num_experts` experts stand for the gates that are
    not seen yet.
    """
    if owner is None or config.per_gate in _told.setdefault(owner.root, set()):
        return
    _told[owner.root].add(config.per_gate)
    routers = [n for n, p in owner.root.named_parameters() if p.ndim == 2 and num_experts in p.shape]
    names = [n.replace("_orig_mod.", "") for n in routers]
    tell_unknown(config, [owner.name, *names], type(owner.root).__name__)


def _name(weight: torch.Tensor, fallback_name: str, owners: Owners) -> str:
    entry = binding.lookup(weight)
    if entry is None:
        owner = owners.find(weight)
        entry = binding.name(weight, fallback_name if owner is None else owner.name)
    return entry.name
