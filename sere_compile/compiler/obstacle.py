"""The line of a model's code that keeps an expert loop out of every graph, and what to change there.

Where Dynamo breaks a graph it says so at one line of many, and not at the one that matters: a loop over
`torch.where(ids == e)` is captured with sizes as symbols (`sere_compile.compile`), an `if` on such a
size is not. So the model is traced once more as one whole graph with such sizes allowed, up to the
first line that does not let it; nothing of it runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import dynamo

log = logging.getLogger(__name__)

_MOVE = "move router and top-k into a function or module of their own, which Dynamo then compiles by itself"
_AHEAD = "Or compile with sere_compile.compile(model, ...), which compiles what is ahead of such a loop."


@dataclass(frozen=True)
class Obstacle:
    """Where tracing ends.

    Attributes:
        place: `file.py:123`, of the user's code; empty where Dynamo names no line.
        code: the line; likewise.
        why: what Dynamo says, one sentence.
    """

    place: str
    code: str
    why: str

    @property
    def remedy(self) -> str:
        """What to change in the line, as a clause."""
        if re.match(r"(if|elif|while|assert)\b", self.code):
            return (
                "drop the condition if it asks whether an expert has tokens, since it computes nothing for none, and "
                f"compile with sere_compile.compile(model, ...); or {_MOVE}"
            )
        if re.search(r"\.(tolist|item|numpy|cpu)\(", self.code):
            return f"loop over range(num_experts) instead of numbers read from a tensor; or {_MOVE}"
        return _MOVE

    def __str__(self) -> str:
        if not self.place:
            return f"Dynamo finds no graph that holds all of it ({self.why}): {self.remedy}."
        return f"{self.place}, `{self.code}`, cannot be part of a graph ({self.why}): {self.remedy}."


def diagnose(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, captured: bool = False) -> str:
    """Why gates of a model run outside every graph, and what to do: the words of every warning, error and report.

    Args:
        model: an nn.Module or a function, as the user wrote it.
        args: of a call.
        kwargs: of a call.
        captured: whether `sere_compile.compile` is what the user has tried already.
    """
    found = find_obstacle(model, args, kwargs)
    if found is not None:
        return str(found) if captured else f"{found} {_AHEAD}"
    if hint := dynamo.recompile_limit_hint():
        return hint
    if captured:
        return f"Dynamic-shape capture does not help here: {_MOVE}."
    return "Compile with sere_compile.compile(model, ...), which captures expert loops."


def no_gate_ran() -> str:
    """Of a model whose graphs hold no gate, and that has none outside either."""
    why = dynamo.recompile_limit_hint() or "see sere_compile.explain(model, ...)"
    return f"no MoE gate ran in a graph of this model: {why}"


def find_obstacle(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Obstacle | None:
    """The first line that keeps a model from being one graph, with sizes that depend on data as symbols, if any."""
    module = getattr(model, "_orig_mod", model)

    def whole(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    own = dynamo.without_own_compile(module)
    # What was skipped before is inlined into a frame of ours all the same, which is forgotten afterwards.
    with own, dynamo.compiling_aside(), dynamo.forgetting_new_codes(), dynamo.dynamic_shape_capture(), torch.no_grad():
        try:
            torch.compile(whole, backend=_never_run, fullgraph=True)(*args, **kwargs)
        except _Captured:
            return None
        except Exception as error:  # what Dynamo raises has no common class
            log.debug("no graph holds all of %s", type(module).__name__, exc_info=True)
            return _of(error)
    return None


class _Captured(BaseException):
    """The model is one graph; raised before it runs."""


def _never_run(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    def end(*_: Any) -> Any:
        raise _Captured

    return end


def _of(error: Exception) -> Obstacle:
    stack = getattr(error, "real_stack", None) or ()
    # Code of torch that the line calls says less than the line.
    own = [frame for frame in stack if "/torch/" not in frame.filename and frame.filename != __file__]
    if not own:
        return Obstacle("", "", _sentence(error))
    line = own[-1]
    return Obstacle(f"{line.filename.rpartition('/')[2]}:{line.lineno}", (line.line or "").strip(), _sentence(error))


def _sentence(error: Exception) -> str:
    """The first of Dynamo's many words that say why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explained = next((n for n, line in enumerate(lines) if line.startswith("Explanation: ")), 0)
    # A line that ends with a colon only leads to the next: "for one of the following reasons:".
    saying = [line.removeprefix("Explanation: ").removeprefix("- ") for line in lines[explained:] if line[-1] != ":"]
    return (saying or [type(error).__name__])[0].partition("  (")[0].rstrip(". ")


def model_of(function: Any) -> nn.Module | None:
    """The module whose call a compiled callable is."""
    owner = getattr(function, "__self__", function)
    owner = getattr(owner, "_orig_mod", owner)
    return owner if isinstance(owner, nn.Module) else None
