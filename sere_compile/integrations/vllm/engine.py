"""Which vLLM this plug-in fits, and what of the engine it relies on.

Everything used of vLLM's internals is listed here and checked before a model is loaded: a release
that changed one of them gives one error at start, never an engine that quietly serves without
re-routing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ...errors import ConfigError, SereError

# Releases that were run (docs/vllm.md); others are tried where every internal below is still there.
SUPPORTED = "0.32 and 0.33"

_MOE = "vllm.model_executor.layers.fused_moe"
# (module, attribute, parameters it must take)
INTERNALS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.forward_context", "create_forward_context", ("attn_metadata", "vllm_config", "is_padding")),
    ("vllm.forward_context", "set_forward_context",
     ("attn_metadata", "vllm_config", "num_tokens", "num_tokens_across_dp")),
    ("vllm.v1.worker.worker_base", "WorkerBase.compile_or_warm_up_model", ()),
    ("vllm.v1.worker.worker_base", "WorkerBase.execute_model", ("scheduler_output",)),
    ("vllm.distributed", "tensor_model_parallel_all_reduce", ("input_",)),
    ("vllm.distributed", "get_dp_group", ()),
    ("vllm.distributed", "get_ep_group", ()),
    ("vllm.distributed", "get_tensor_model_parallel_rank", ()),
    (f"{_MOE}.modular_kernel", "FusedMoEActivationFormat.Standard", ()),
    (f"{_MOE}.prepare_finalize.no_dp_ep", "MoEPrepareAndFinalizeNoDPEPModular", ()),
    ("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights", ("model",)),
    (f"{_MOE}.router.base_router", "BaseRouter._compute_routing",
     ("hidden_states", "router_logits", "indices_type", "input_ids")),
    (f"{_MOE}.router.base_router", "BaseRouter._select_experts", ("hidden_states", "router_logits")),
    (f"{_MOE}.router.base_router", "BaseRouter._apply_eplb_mapping", ("topk_ids",)),
    (f"{_MOE}.routed_experts", "RoutedExperts.forward_modular", ("x", "topk_weights", "topk_ids")),
    (f"{_MOE}.runner.moe_runner", "MoERunner._fused_output_is_reduced", ()),
    (f"{_MOE}.runner.moe_runner", "MoERunner.do_naive_dispatch_combine", ()),
)  # fmt: skip
# What a part of vLLM's raises that is tried here and is not as it is known. `ProbeError` is among them.
NOT_AS_KNOWN = (AttributeError, TypeError, ValueError, RuntimeError, AssertionError)


class EngineMismatchError(SereError, RuntimeError):
    """The installed vLLM differs from what this plug-in relies on, or serves this model past its router."""


def version() -> str:
    """The version of the installed vLLM."""
    return str(importlib.import_module("vllm").__version__)


def check_internals() -> None:
    """Raise `EngineMismatchError`, listing everything that is missing or has other parameters."""
    wrong = [text for entry in INTERNALS if (text := _difference(*entry))]
    # Without this call in the middle the hook would be installed and never run.
    source = "" if wrong else inspect.getsource(_resolve(f"{_MOE}.router.base_router", "BaseRouter._select_experts"))
    before, called, after = source.partition("self._compute_routing(")
    if not wrong and (not called or "_apply_eplb_mapping" in before or "_apply_eplb_mapping" not in after):
        wrong = ["BaseRouter._select_experts no longer routes first and maps logical to physical experts after"]
    if wrong:
        raise EngineMismatchError(
            f"vLLM {version()} cannot be re-routed: {'; '.join(wrong)}. This plug-in was run with vLLM "
            f"{SUPPORTED}. Install one of these or a newer sere-compile, or take 'sere' out of additional_config"
        )


def _resolve(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    return found


def _difference(module: str, path: str, parameters: tuple[str, ...]) -> str:
    """What is wrong with one internal, or nothing."""
    try:
        found = _resolve(module, path)
    except (ImportError, AttributeError):
        return f"{module} has no {path}"
    missing = set(parameters) - set(inspect.signature(found).parameters) if parameters else set()
    return f"{path} has no parameter {', '.join(sorted(missing))}" if missing else ""


@contextmanager
def kernels_that_ask_the_router() -> Iterator[None]:
    """While a model is made: of the expert kernels of a backend, none that routes by itself.

    Since 0.33 a router can say that it needs this; in all releases each kernel class is asked whether it
    fits. Where neither is there the engine chooses as it would, and a kernel that routes by itself is
    refused later, by `find_runners`.

    Raises:
        EngineMismatchError: for some weights vLLM has, on this device, only kernels that route by themselves.
    """
    refused: list[str] = []
    try:
        with _modular_kernels(refused):
            yield
    except (NotImplementedError, ValueError) as error:
        if not refused or "MoE backend" not in str(error):
            raise
        raise EngineMismatchError(
            f"vLLM has no expert kernel that asks its router for these weights on this device "
            f"({str(error).strip(' .')}); {', '.join(dict.fromkeys(refused))} routes by itself, which cannot be "
            "re-routed. Choose another --moe-backend or other weights, or take 'sere' out of additional_config"
        ) from error


_ADJUSTED = "routes adjusted after routing"


@contextmanager
def _modular_kernels(refused: list[str]) -> Iterator[None]:
    """Adds to `refused` the kernels that would have fitted."""
    router = found(f"{_MOE}.router.fused_moe_router", "FusedMoERouter")
    experts = found(f"{_MOE}.modular_kernel", "FusedMoEExperts")
    with ExitStack() as changes:
        asks = router is not None and "supports_monolithic_kernels" in vars(router)
        if asks:
            changes.enter_context(replaced(router, "supports_monolithic_kernels", property(lambda self: False)))
        if experts is not None and isinstance(vars(experts).get("is_supported_config"), staticmethod):
            asked = _unless_monolithic(experts.is_supported_config, refused)
            changes.enter_context(replaced(experts, "is_supported_config", staticmethod(asked)))
        yield


def _unless_monolithic(
    original: Callable[..., tuple[bool, str | None]], refused: list[str]
) -> Callable[..., tuple[bool, str | None]]:
    @functools.wraps(original)
    def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        supported, reason = original(cls, *args, **kwargs)
        if not cls.is_monolithic():
            return supported, reason
        if supported or _ADJUSTED in (reason or ""):
            refused.append(cls.__name__)
        return False, f"kernel does not support {_ADJUSTED}, as SERE does"

    return is_supported_config


def found(module: str, name: str) -> Any:
    """What a module of vLLM has by a name; None where the module or the name is not there."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Another value for an attribute of a class or an object. Returns what takes that back."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    return functools.partial(setattr, owner, name, before) if own else functools.partial(delattr, owner, name)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`put`, for as long as the block takes."""
    take_back = put(owner, name, value)
    try:
        yield
    finally:
        take_back()


def fused_experts(method: Any) -> Any:
    """What computes the slots of a layer of vLLM's; None where its method does so itself, as on CPUs."""
    return getattr(getattr(method, "moe_kernel", None), "fused_experts", None)


def after_reload(runner: Any, again: Callable[[], Any], impossible: str = "") -> None:
    """Have something done again each time a layer's weights are loaded anew, which makes its kernel anew as well.

    Args:
        runner: vLLM's layer.
        again: called when the layer has another experts object than before.
        impossible: why weights cannot be loaded anew, if so: trying it raises `ConfigError`.
    """
    method = runner._quant_method
    original = getattr(method, "process_weights_after_loading", None)
    if original is None:
        return

    def process_weights_after_loading(layer: Any) -> Any:
        if impossible:
            raise ConfigError(f"{runner.layer_name}: weights cannot be loaded anew: {impossible}")
        before = fused_experts(method)
        result = original(layer)
        if fused_experts(method) is not before:
            again()
        return result

    put(method, "process_weights_after_loading", process_weights_after_loading)


def check_modes(vllm_config: Any) -> None:
    """Refuse what cannot be combined with batch-aware routing.

    Raises:
        ConfigError: the engine's batch-invariant mode, two micro-batches at once (DBO), or ranks that come and go.
    """
    envs = importlib.import_module("vllm.envs")
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        raise ConfigError(
            "SERE makes a token's experts depend on the batch it is in, and VLLM_BATCH_INVARIANT promises that "
            "nothing does: unset it, or take 'sere' out of additional_config"
        )
    if getattr(vllm_config.parallel_config, "enable_dbo", False):
        raise ConfigError("SERE does not support dual batch overlap (enable_dbo): two batches would share one state")
    if getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        raise ConfigError(
            "SERE does not support elastic expert parallelism (enable_elastic_ep): other ranks mean other kernels, "
            "which would have nothing of it"
        )
