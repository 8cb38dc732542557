"""Read what `collect_stats=True` counted."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import SereError, expect
from .gate_stats import GateStats
from .passes import COUNTED
from .similarity import binding


def stats(model: Any) -> dict[str, GateStats]:
    """What was counted for each gate of a model, by the name of its router weight. Waits for the device.

    `model` may be a `vllm.LLM` as well, whose gates are named as vLLM names its MoE layers.

    Raises:
        ArgumentError: `model` is neither.
        SereError: nothing was counted, because the model was not compiled with collect_stats=True or did not run.
    """
    if hasattr(model, "llm_engine"):
        from .integrations.vllm import stats as engine_stats

        return engine_stats(model)
    expect(model, nn.Module, "stats takes a torch.nn.Module or a vllm.LLM")
    found: dict[str, GateStats] = {}
    for parameter in model.parameters():
        entry = binding.lookup(parameter)
        if entry is not None and entry.counts is not None:
            found[entry.name] = GateStats(**dict(zip(COUNTED, entry.counts.tolist(), strict=True)))
    idle = {name: why for name, parameter in model.named_parameters() if (why := binding.uncounted(parameter))}
    if not found and idle:
        (name, why), more = next(iter(idle.items())), len(idle) - 1
        others = f" ({more} more gates)" if more else ""
        raise SereError(
            f"the model was compiled with collect_stats=True, and nothing is counted because nothing is re-routed: "
            f"{name}: {why}{others}"
        )
    if not found:
        raise SereError(
            'no routing statistics: compile the model with options={"collect_stats": True} and run it first'
        )
    return found


def reset_stats(model: nn.Module) -> None:
    """Set all counters of a model to zero, in place, so that recorded CUDA graphs go on counting.

    Raises:
        ArgumentError: `model` is no nn.Module.
    """
    expect(model, nn.Module, "reset_stats takes a torch.nn.Module")
    for parameter in model.parameters():
        entry = binding.lookup(parameter)
        if entry is not None and entry.counts is not None:
            entry.counts.zero_()
