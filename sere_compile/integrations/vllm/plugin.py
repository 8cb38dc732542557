"""The plug-in: what runs when vLLM starts in a process, when a worker has loaded its model, and before a forward."""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...errors import ConfigError, GateNotFoundError, SereError
from ...gate_stats import GateStats
from ...ops.cuda import nvrtc
from .engine import EngineMismatchError, check_internals, check_modes, kernels_that_ask_the_router
from .experts import replace_experts
from .gates import HeldGate, cannot_hold
from .gates import differs as gate_differs
from .layers import LayerPlan, find_runners, plan_layers
from .options import VllmOptions, read_options
from .packed_weights import keeping_packed_weights
from .ranks import Meeting, part_of_rows, ranks_meet, sum_of_shares
from .repeats import merge_where_needed
from .routers import differs, known_router
from .routing import BatchState, RoutingHook

log = logging.getLogger("vllm.sere_compile")

# Forwards after which a hook that never ran is reported, and seconds between two lines of
# statistics.
FORWARDS_BEFORE_WARNING = 8
LOG_SECONDS = 10.0
# Where `sere::route` is faster than the router and the hook.
SELECTS_ON = ("cuda",)


def register() -> None:
    """Entry point of `vllm.general_plugins`: called in every process of vLLM, possibly several times.

    Engines that do not ask for SERE are left as they are: options are read when a configuration is
    made, and everything else happens when a worker has loaded its model.
    """
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap_once(VllmConfig, "__post_init__", _check_configuration)
    _wrap_once(WorkerBase, "__init__", _prepare_worker)


def _wrap_once(owner: Any, name: str, after: Callable[[Any], None]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise EngineMismatchError(
            f"this vLLM has no {owner.__name__}.{name}; see sere_compile.integrations.vllm.SUPPORTED"
        )
    if getattr(original, "_sere", False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        after(self)

    wrapped._sere = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _check_configuration(vllm_config: Any) -> None:
    """A misspelt option is an error where the engine is made, not in a worker."""
    if read_options(vllm_config) is not None:
        check_modes(vllm_config)


def _prepare_worker(worker: Any) -> None:
    options = read_options(worker.vllm_config)
    if options is None:
        return
    check_modes(worker.vllm_config)
    check_internals()
    _skip_matrices_among_weights()
    load_model, warm_up, execute = worker.load_model, worker.compile_or_warm_up_model, worker.execute_model

    @functools.wraps(load_model)
    def load_and_hook(*args: Any, **kwargs: Any) -> Any:
        with kernels_that_ask_the_router(), keeping_packed_weights(options.experts == "sere"):
            result = load_model(*args, **kwargs)
        worker.sere = WorkerHooks(worker, options)
        # By these names `collective_rpc` reaches them.
        worker.sere_stats = worker.sere.stats
        worker.sere_digest = worker.sere.digest
        return result

    @functools.wraps(warm_up)
    def warm_up_and_reset(*args: Any, **kwargs: Any) -> Any:
        result = warm_up(*args, **kwargs)
        worker.sere.reset()
        return result

    @functools.wraps(execute)
    def execute_and_watch(*args: Any, **kwargs: Any) -> Any:
        result = execute(*args, **kwargs)
        worker.sere.watch()
        return result

    worker.load_model, worker.compile_or_warm_up_model = load_and_hook, warm_up_and_reset
    worker.execute_model = execute_and_watch
    for name in _RELOADS:
        if hasattr(worker, name):
            setattr(worker, name, _unless_kept(worker, getattr(worker, name)))


# Of a worker: what begins to load weights anew. Not all releases have all.
_RELOADS = ("reload_weights", "start_weight_update")


def _unless_kept(worker: Any, reload: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse it before any weight is touched; later a layer could only fail half way."""

    @functools.wraps(reload)
    def reload_or_refuse(*args: Any, **kwargs: Any) -> Any:
        if worker.sere.cannot_reload:
            raise ConfigError(f"weights cannot be loaded anew: {worker.sere.cannot_reload}")
        return reload(*args, **kwargs)

    return reload_or_refuse


def _skip_matrices_among_weights() -> None:
    """A checkpoint that the reference calibrated holds matrices that vLLM's model has no parameters for."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.get_all_weights
    if getattr(original, "_sere", False):
        return

    @functools.wraps(original)
    def get_all_weights(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, w) for name, w in original(*args, **kwargs) if not name.endswith(".similarity_matrix"))

    get_all_weights._sere = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


# Of all engines of this process.
_workers: weakref.WeakSet[WorkerHooks] = weakref.WeakSet()


def _follow_forwards() -> None:
    """Every forward makes its context by this function of the module, whoever imported what calls it."""
    from vllm import forward_context

    original = forward_context.create_forward_context
    if getattr(original, "_sere", False):
        return

    @functools.wraps(original)
    def create_forward_context(*args: Any, **kwargs: Any) -> Any:
        context = original(*args, **kwargs)
        for worker in list(_workers):
            worker.before_forward(context)
        return context

    create_forward_context._sere = True  # type: ignore[attr-defined]
    forward_context.create_forward_context = create_forward_context


class WorkerHooks:
    """The hooks of one worker, by MoE layer.

    Attributes:
        cannot_reload: why the worker's weights cannot be loaded anew, if so.

    Raises:
        EngineMismatchError: a layer is served past its router, or none has one.
        ConfigError, ProfileError, ProbeError: see `matrices`.
    """

    def __init__(self, worker: Any, options: VllmOptions) -> None:
        self.options = options
        config = worker.vllm_config
        device = torch.device(worker.device or config.device_config.device)
        runners = find_runners(config, worker.get_model())
        speculative = config.speculative_config
        decode_tokens = 1 + int(getattr(speculative, "num_speculative_tokens", 0) or 0)
        self.state = BatchState(device, options.phase, options.config.max_tokens, decode_tokens)
        # A later profile run of a hook needs its matrix; probing runs the experts, so it comes
        # before the hooks.
        with torch.inference_mode(False), torch.no_grad():
            plans, source = plan_layers(runners, options, config, device)
            # Filling leaves a token's experts different.
            repeating = {name: plan.runner for name, plan in plans.items() if plan.similarity is not None}
            merge_where_needed(repeating, config, device, options.config.strict)
            self.hooks = {name: _hook(plan, self.state, options.routing_batch) for name, plan in plans.items()}
            replaced = replace_experts(runners, options, config, device)
            routed = select_in_hooks(self.hooks, runners, device) if options.router != "vllm" else 0
            holds = gates_are_held(options.router, self.hooks, device)
            held = hold_gates(self.hooks, runners) if holds else 0
        for hook in self.hooks.values():
            hook.install()
        self.cannot_reload = replaced.cannot_reload if replaced else ""
        self._layers = config.compilation_config.static_forward_context
        modules = set(worker.get_model().modules())
        self._own = {name for name, layer in self._layers.items() if layer in modules}
        if self.hooks:
            _workers.add(self)
            _follow_forwards()
        # Until the worker is warm, batches are made up.
        self._serving = False
        self._steps = 0
        self._checked = not self.hooks
        self._logged = time.monotonic()
        if replaced:
            log.info("SERE: the experts of %d of %d MoE layers run by %s", replaced.layers, len(runners), replaced.text)
        if routed:
            log.info(
                "SERE: sere::route selects experts and re-routes them in %d of %d MoE layers", routed, len(runners)
            )
        if holds:
            log.info("SERE: sere::route makes the logits too in %d of %d MoE layers", held, len(runners))
        if options.router == "gate" and options.config.strict and held < len(self.hooks):
            raise ConfigError(f'router="gate": {len(self.hooks) - held} of {len(self.hooks)} gates are left; see above')
        if not self.hooks:
            log.warning("SERE re-routes none of %d MoE layers: S = K in all of them.", len(runners))
            return
        log.warning(
            "SERE re-routes %d of %d MoE layers (similarity: %s; phase %r). A token's experts now depend on the batch "
            "it is in: outputs are not batch-invariant.",
            len(self.hooks), len(runners), source, options.phase,
        )  # fmt: skip
        if config.parallel_config.world_size_across_dp > 1 or options.routing_batch != "rank":
            meet = any(ranks_meet(runner.moe_config) for runner in runners.values())
            log.info("SERE: %s", whose_batch(options.routing_batch, meet))

    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by layer, as plain numbers that cross process boundaries."""
        if not self.options.config.collect_stats:
            raise SereError('no routing statistics: set additional_config={"sere": {"collect_stats": True, ...}}')
        return {name: vars(hook.stats()) for name, hook in self.hooks.items()}

    def digest(self) -> str:
        """Of all matrices: equal on ranks that agree."""
        held = [m for hook in self.hooks.values() for m in (hook.matrix, hook.projection) if m is not None]
        content = b"".join(matrix.cpu().numpy().tobytes() for matrix in held)
        return hashlib.sha256(content).hexdigest()

    def before_forward(self, context: Any) -> None:
        """Write what the hooks read; called for every forward of this process, also for those of other engines."""
        if context.no_compile_layers is not self._layers:
            return
        metadata = context.attn_metadata
        if isinstance(metadata, dict) and metadata and self._own.isdisjoint(metadata):
            return  # of a draft model
        # An engine that does not skip padding leaves its mask as some earlier batch had it.
        skips = getattr(importlib.import_module("vllm.envs"), "VLLM_MOE_SKIP_PADDING", True)
        self.state.begin(metadata, getattr(context, "is_padding", None) if skips else None)

    def reset(self) -> None:
        """The worker is warm: what was counted so far were warm-up and the recording of graphs."""
        self._serving = True
        self.state.reset()
        for hook in self.hooks.values():
            hook.reset()

    def watch(self) -> None:
        """After each step. Once, whether the hooks run at all; now and then, a line of statistics."""
        if not self._serving:
            return
        self._steps += 1
        if not self._checked and self._steps > FORWARDS_BEFORE_WARNING:
            self._checked = True
            warn_if_idle(self.hooks, self.state, self.options.config.strict)
        if self.hooks and self.options.config.collect_stats and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", summary({name: hook.stats() for name, hook in self.hooks.items()}, self.state))


def _hook(plan: LayerPlan, state: BatchState, routing_batch: str) -> RoutingHook:
    moe = plan.runner.moe_config
    experts = int(moe.num_logical_experts)
    meeting = Meeting(sum_of_shares, experts, routing_batch == "all_ranks") if ranks_meet(moe) else None
    return RoutingHook(
        plan.runner.router, plan.similarity, plan.config, state, plan.projection, experts, part_of_rows(moe), meeting
    )


def whose_batch(routing_batch: str, meet: bool) -> str:
    """Whose tokens decide together which experts are primary; `meet`: whether those of several ranks share experts."""
    if not meet:
        return "all ranks route the same tokens, which are one routing batch"
    if routing_batch == "all_ranks":
        return "the tokens of all ranks are one routing batch, by an all-reduce per layer"
    return 'the tokens of each rank are a routing batch of their own (routing_batch "rank")'


def select_in_hooks(hooks: dict[str, RoutingHook], runners: Mapping[str, Any], device: torch.device) -> int:
    """Let `sere::route` select in the place of routers that are known, on CUDA. Returns in how many layers."""
    if device.type not in SELECTS_ON:
        return 0
    compared: dict[Any, str] = {}
    for name, hook in hooks.items():
        moe = runners[name].moe_config
        dtype = getattr(moe, "router_logits_dtype", None) or moe.in_dtype
        known = known_router(hook.router, dtype) if hook.selects else None
        if known is None:
            continue
        if known.kind not in compared:
            compared[known.kind] = differs(hook.router, known, hook.num_experts, device)
            if compared[known.kind]:
                log.info("SERE: vLLM's router selects experts, sere::route does not as it: %s", compared[known.kind])
        hook.known = None if compared[known.kind] else known
    return sum(hook.known is not None for hook in hooks.values())


def gates_are_held(router: str, hooks: Mapping[str, RoutingHook], device: torch.device) -> bool:
    """Whether gates are to hand on hidden states: by default where one launch multiplies, selects and re-routes.

    By default not where ranks share experts either: which of them has logits on their way is the engine's affair.
    """
    if router == "gate":
        return True
    return router == "auto" and nvrtc.serves(device) and all(hook.meeting is None for hook in hooks.values())


def hold_gates(hooks: dict[str, RoutingHook], runners: Mapping[str, Any]) -> int:
    """Let `sere::route` make the logits, where it selects. Returns in how many layers."""
    compared: dict[Any, str] = {}
    for name, hook in hooks.items():
        if hook.known is None:
            log.info("SERE: %s: vLLM's gate makes the logits: sere::route does not select there", name)
            continue
        runner = runners[name]
        reason = cannot_hold(runner, hook.known)
        if not reason:
            kind = (*hook.known.kind, *runner.gate.weight.shape)
            if kind not in compared:
                compared[kind] = gate_differs(runner.gate, hook.known, hook.matrix, (*hook.options, hook.max_active))
            reason = compared[kind]
        if reason:
            log.info("SERE: %s: vLLM's gate makes the logits: %s", name, reason)
            continue
        hook.gate = HeldGate(runner.gate)
        hook.gate.install()
    return sum(hook.gate is not None for hook in hooks.values())


def warn_if_idle(hooks: dict[str, RoutingHook], state: BatchState, strict: bool) -> None:
    """Say, or with `strict` raise, that something was installed and does nothing."""
    idle = [name for name, hook in hooks.items() if not hook.has_run]
    text = ""
    if idle:
        text = (
            f"SERE is installed and {len(idle)} of {len(hooks)} hooks never ran, first {idle[0]}: the engine routes "
            "this layer without asking the router that was hooked"
        )
    elif state.unknown:
        text = (
            f"SERE re-routes nothing: the attention metadata of this model ({state.unknown}) does not "
            'distinguish decoding from prefill; set "phase": "all"'
        )
    if text and strict:
        raise GateNotFoundError(text)
    if text:
        log.warning("%s", text)


def summary(stats: dict[str, GateStats], state: BatchState) -> str:
    """One line for the log: means over layers."""
    if not state.active_forwards:
        return f"SERE: none of {state.forwards} batches was re-routed so far"
    before = sum(s.mean_active_before for s in stats.values()) / max(1, len(stats))
    after = sum(s.mean_active_after for s in stats.values()) / max(1, len(stats))
    return (
        f"SERE: active experts {before:.1f} -> {after:.1f} per layer and re-routed batch, "
        f"{state.active_forwards} of {state.forwards} batches re-routed"
    )


def stats(llm: Any, rank: int = 0) -> dict[str, GateStats]:
    """What an engine's worker counted, by MoE layer; `llm` is a `vllm.LLM` with collect_stats switched on.

    Raises:
        SereError: statistics are not collected, or SERE is not switched on.
    """
    if not (read_options(llm.llm_engine.vllm_config)):
        raise SereError('no routing statistics: this engine runs without additional_config={"sere": ...}')
    counted = llm.collective_rpc("sere_stats")[rank]
    return {name: GateStats(**numbers) for name, numbers in counted.items()}
