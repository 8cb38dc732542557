"""`generate_config`: what `model.generate` of transformers is told, so that it decodes with re-routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import SereConfig, split_options
from ..errors import ConfigError
from ..extras import require


def generate_config(
    *,
    mode: str | None = "auto",
    fullgraph: bool = False,
    dynamic: bool | None = None,
    guard_filter_fn: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """The `compile_config` for `model.generate` that decodes with re-routing, on a GPU and on a CPU.

    `generate` compiles the decode step, not the prefill, and only with a cache of fixed size
    (`cache_implementation="static"`). On a CPU it compiles nothing unless it is told to, which this does.

    Example:
        >>> sere = sere_compile.generate_config(select_top_k=2)
        >>> model.generate(**inputs, cache_implementation="static", compile_config=sere)

    Args:
        mode: as torch.compile takes it, of Inductor. "auto": "reduce-overhead", CUDA graphs on a GPU, as
            transformers compiles; none where `inner` is another backend.
        fullgraph: as torch.compile takes it.
        dynamic: as torch.compile takes it.
        guard_filter_fn: as torch.compile takes it among its options: which of Dynamo's guards are kept. Checking
            those on modules is part of every step's time on the host; without them (one of the functions of
            torch.compiler whose names end in `_unsafe`) a change of the model after its first step is not seen. A
            `GenerationConfig` with a function cannot be saved.
        **options: of `SereConfig`, and of Inductor.

    Returns:
        A `transformers.CompileConfig` of plain values, which `GenerationConfig` can save.

    Raises:
        ConfigError: an unknown mode or option, a bad value, or an option that `generate` cannot follow.
        MissingExtraError: transformers is not installed.
    """
    config, _ = split_options(SereConfig(), options)
    if config.capture == "auto":
        raise ConfigError(
            'capture="auto" acts where a model is compiled, and generate does that by itself: compile the model with '
            "sere_compile.compile(model, ...) and call its forward"
        )
    (transformers,) = require("hf", "transformers", needed_for="generate_config needs")
    if mode == "auto":
        mode = "reduce-overhead" if config.inner == "inductor" else None
    if mode is not None and config.inner != "inductor":
        raise ConfigError(f'mode={mode!r} is for inner="inductor"; inner={config.inner!r} takes no mode')
    # torch.compile takes mode or options, not both. A mode is nothing but options of Inductor.
    made = transformers.CompileConfig(
        backend="sere", mode=None, options={**_options_of(mode), **options}, fullgraph=fullgraph, dynamic=dynamic
    )
    if guard_filter_fn is not None:  # torch.compile takes it out of the options before a backend sees them
        made.options["guard_filter_fn"] = guard_filter_fn
    made._compile_all_devices = True  # else transformers leaves the decode step of a model on a CPU as it is
    return made


def _options_of(mode: str | None) -> dict[str, Any]:
    """The options of Inductor that a mode stands for."""
    if mode is None:
        return {}
    from torch._inductor import list_mode_options  # here, because it imports the compiler

    known = list_mode_options()
    if mode not in known:
        raise ConfigError(f"unknown mode {mode!r}; torch.compile has {', '.join(known)}")
    return dict(known[mode])
