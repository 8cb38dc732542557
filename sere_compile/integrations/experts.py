"""`experts_implementation="sere"`: re-routing inside the experts of transformers, without torch.compile.

transformers calls an experts module's forward through a registry of functions of (module, hidden
states [T, H], ids [T, K], weights [T, K]). `register_experts` puts one there that re-routes the ids of
small batches and hands over to `grouped_mm`, whose cost follows the active experts.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.gate_matrices import warn_of_probing
from ..compiler.gate_options import tell_unknown_of_model
from ..config import SereConfig
from ..errors import ConfigError, ProbeError
from ..experts.counterfactual import of_module
from ..experts.metrics import FrobeniusAccumulator
from ..experts.owner import Owner, Owners, routers_in
from ..experts.probe import PROBE_SEED, PROBE_TOKENS
from ..experts.spread import check_one_rank_can_probe
from ..extras import require
from ..idle import never_reached, tell_once, too_many_primary
from ..ops.expert_mlp.op import MAX_TOKENS
from ..similarity import binding
from ..similarity.attach import attach_from_owner
from ..similarity.threshold import threshold_in_graph

log = logging.getLogger(__name__)

NAME = "sere"
# What computes the experts: reads each active one once.
_STOCK = "grouped_mm"
# Options that act here; the others are about graphs.
_OPTIONS = ("select_top_k", "threshold", "min_active", "max_active", "max_tokens", "per_gate")

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def register_experts(**options: Any) -> None:
    """Register "sere" among the experts implementations of transformers; again, with other options, replaces it.

    Models then take it by name, before or after loading, and run re-routed in eager mode, in `generate` of every kind
    and under torch.compile. Forwards of more than `max_tokens` tokens, 256 by default, are left alone: prefill.

    Example:
        >>> sere_compile.register_experts(select_top_k=2)
        >>> AutoModelForCausalLM.from_pretrained(name, experts_implementation="sere")
        >>> model.set_experts_implementation("sere")

    Args:
        **options: `select_top_k`, `threshold`, `min_active`, `max_active`, `max_tokens` and `per_gate` of `SereConfig`.

    Raises:
        ConfigError: an unknown option, one that acts on graphs only, or a bad value.
        MissingExtraError: transformers is not installed.
    """
    config = SereConfig().replace(**{"max_tokens": MAX_TOKENS, **options})
    graphs = [name for name in options if name not in _OPTIONS]
    if graphs:
        raise ConfigError(
            f"{graphs[0]} acts on graphs, and register_experts makes none: it takes {', '.join(_OPTIONS)}; with "
            'torch.compile(model, backend="sere") all options act'
        )
    moe, fp8 = require(
        "hf", "transformers.integrations.moe", "transformers.integrations.finegrained_fp8", needed_for="this needs"
    )
    for interface in (moe.ALL_EXPERTS_FUNCTIONS, fp8.ALL_FP8_EXPERTS_FUNCTIONS):
        type(interface).register(NAME, _Rerouted(config, interface[_STOCK]))
    _before_ranks_exchange(lambda: moe.ALL_EXPERTS_FUNCTIONS[NAME])


def _before_ranks_exchange(registered: Callable[[], _Rerouted]) -> None:
    """Let each way in which transformers brings tokens to experts of other ranks re-route first.

    Such an implementation is chosen when a model is loaded. It takes ids of all experts; what it calls takes those of
    one rank. Earlier releases of transformers have no such registry.

    Args:
        registered: gives what is registered when a layer runs, which can be with other options than at loading.
    """
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        return
    interface = EPImplementationInterface()
    for name in list(interface):
        chosen = interface[name]
        EPImplementationInterface.register(name, _rerouting(getattr(chosen, "_sere_stock", chosen), registered))


def _rerouting(stock: Any, registered: Callable[[], _Rerouted]) -> type:
    """An implementation that re-routes where the model's experts are ours, and then does what `stock` does."""

    class Rerouting(stock):  # type: ignore[misc]
        _sere_stock = stock

        def __init__(self, experts: nn.Module, *meshes: Any) -> None:
            super().__init__(experts, *meshes)
            self._sere_experts: Any = experts

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if self._sere_experts.config._experts_implementation == NAME:
                top_k_index, top_k_weights = registered().rerouted(self._sere_experts, top_k_index, top_k_weights)
            return super().__call__(hidden_states, top_k_index, top_k_weights)

    Rerouting.__name__ = stock.__name__  # its errors name it
    return Rerouting


def _router_beside(module: Any, owner: Owner) -> Tensor | None:
    """The weight of the router beside an experts module; `owner` is that of one of its parameters."""
    if not module._is_expert_parallel:
        around = [r for r in routers_in(owner.root) if any(inner is module for inner in r.modules[-1].modules())]
        return max(around, key=lambda r: r.name.count(".")).weight if around else None
    # While it runs, what it holds are a rank's experts, and their number is not the router's.
    own, experts = set(module.parameters()), module.config.num_local_experts
    for outer in owner.chain[1:4]:
        found = [p for p in outer.parameters() if p.dim() == 2 and p.shape[0] == experts and p not in own]
        if found:
            return found[0] if len(found) == 1 else None
    return None


@dataclass
class _Routed:
    """What re-routing in one experts module needs."""

    config: SereConfig
    version: int  # of the registry of matrices
    matrix: Tensor


class _Rerouted:
    """An experts function of transformers."""

    def __init__(self, config: SereConfig, stock: ExpertsForward) -> None:
        self._config, self._stock = config, stock
        # Which matrix belongs to which module is no matter of tensors: a graph would have it as a constant.
        self._reroute_outside = torch.compiler.disable(self._reroute)
        self._known: weakref.WeakKeyDictionary[nn.Module, _Routed] = weakref.WeakKeyDictionary()

    def __call__(self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Of a rank's experts, ids are its own numbers: they were re-routed before, by what brings tokens to the ranks.
        if not module._is_expert_parallel:
            top_k_index, top_k_weights = self.rerouted(module, top_k_index, top_k_weights)
        return self._stock(module, hidden_states, top_k_index, top_k_weights)

    def rerouted(self, module: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T, K] and weights [T, K], best first and re-routed; as they are where there are many tokens."""
        if ids.shape[0] > (self._config.max_tokens or MAX_TOKENS):
            return ids, weights
        return self._reroute_outside(module, ids, weights)

    def _reroute(self, module: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [T, K] re-routed, and weights [T, K] in the same order."""
        routed = self._known.get(module)
        if routed is None or routed.version != binding.version():
            routed = self._known[module] = self._find(module, ids.shape[-1])
        config, top_k = routed.config, ids.shape[-1]
        select = config.resolved_top_k(top_k)
        if select >= top_k:
            return ids, weights
        # Best first: not every router sorts what it chose.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        ids, weights = ids.gather(-1, order), weights.gather(-1, order)
        new = torch.ops.sere.reroute(
            ids,
            routed.matrix,
            select,
            threshold_in_graph(config.threshold),
            config.resolved_min_active(top_k),
            None,
            config.max_active or 0,
        )
        return new, weights

    def _find(self, module: nn.Module, top_k: int) -> _Routed:
        """The router beside an experts module, and its matrix, attached or probed; says what cannot act on it."""
        parameter = next(module.parameters())
        owners = Owners()
        owner = owners.find(parameter)
        weight = None if owner is None else _router_beside(module, owner)
        router = None if weight is None else owners.find(weight)
        if weight is None or router is None:
            raise ConfigError(
                f'experts_implementation="sere": no router stands beside {type(module).__name__}, whose matrix this '
                "needs; set another implementation"
            )
        entry = binding.lookup(weight)
        if entry is None or entry.matrix is None:
            attach_from_owner(router)
            entry = binding.lookup(weight)
        if entry is None or entry.matrix is None:
            log.info("no similarity attached for %s: probing its experts on random hidden states", router.name)
            warn_of_probing()
            matrix = self._probe(module, router.name)
            binding.assign(weight, router.name, matrix, "probed", from_profile=False)
            entry = binding.name(weight, router.name)
        config = self._config.for_gate(router.name)
        matrix = entry.matrix_on(parameter.device, config.threshold)
        tell_unknown_of_model(self._config, router, len(matrix))
        tell_once(router.name, too_many_primary(config, top_k) or never_reached(config.threshold, matrix))
        return _Routed(config, binding.version(), matrix)

    def _probe(self, module: Any, name: str) -> Tensor:
        """Similarity [E, E] of a module's experts on normally distributed hidden states."""
        check_one_rank_can_probe(module, name)
        parameter, experts = next(module.parameters()), module.num_experts
        generator = torch.Generator().manual_seed(PROBE_SEED)
        width = module.hidden_dim if hasattr(module, "hidden_dim") else module.hidden_size
        dtype = parameter.dtype if parameter.dtype.itemsize > 1 else torch.bfloat16
        hidden = torch.randn(PROBE_TOKENS, width, generator=generator).to(parameter.device, dtype)
        size = sum(p.numel() * p.element_size() for p in module.parameters()) // experts
        one_slot = of_module(lambda *call: self._stock(module, *call), hidden, 1, size)
        with torch.inference_mode(False), torch.no_grad():
            accumulator = FrobeniusAccumulator(experts)
            try:
                accumulator.update(one_slot.outputs(torch.arange(PROBE_TOKENS, device=parameter.device), experts))
            except RuntimeError as error:
                raise ProbeError(f"the experts of {name} cannot be probed: {error}. Attach a profile") from error
        return accumulator.similarity()
