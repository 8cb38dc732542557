"""The exceptions that sere-compile raises: one class per kind of mistake, all subclasses of `SereError`."""

from __future__ import annotations

from typing import Any


class SereError(Exception):
    """Base class of every error that sere-compile raises on purpose."""


class ConfigError(SereError, ValueError):
    """An option is unknown, misspelt, of the wrong type or out of range."""


class ArgumentError(SereError, TypeError):
    """An argument is something else than what a function takes: no model, no traced graph, no path."""


class ProfileError(SereError, ValueError):
    """A similarity profile is malformed, or does not fit the model it is attached to."""


class GateNotFoundError(SereError, RuntimeError):
    """`strict=True` and nothing was re-routed where a gate was expected."""


class ProbeError(SereError, RuntimeError):
    """The experts behind a gate could not be run to measure their similarity."""


class CalibrationError(SereError, RuntimeError):
    """Similarity cannot be measured: wrong data, no gate, or experts that cannot be run or return NaN or infinity."""


class MissingExtraError(SereError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""


class LoweringError(SereError, RuntimeError):
    """A model cannot be exported or lowered to the target that was asked for."""


class ModelNotFoundError(SereError, OSError):
    """A checkpoint cannot be loaded: no such folder or name, files missing, or no connection."""


class EvaluationError(SereError, ValueError):
    """A model or its tokens cannot be evaluated."""


def expect(value: object, kind: Any, wanted: str) -> None:
    """Check the type of an argument.

    Args:
        value: that was given.
        kind: of which it has to be, as `isinstance` takes it.
        wanted: who takes what, the beginning of the message.

    Raises:
        ArgumentError: it is of another.
    """
    if not isinstance(value, kind):
        raise ArgumentError(f"{wanted}, got {type(value).__name__}")


class OutputError(SereError, OSError):
    """A file cannot be written; a file that was there under its name is unchanged."""
