"""Warnings of other libraries about their own code, of which the user of a command can do nothing."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

# What each begins with. Dynamo's is about a cache in transformers, torch's about a deprecated check within torch.
WARNINGS = (
    r"Dynamo detected a call to a `functools\.lru_cache`-wrapped function",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
# The ONNX exporter lists operators of torchvision that it will not need.
LOGGED = {"torch.onnx._internal.exporter._registration": "torchvision is not installed"}


class _Without(logging.Filter):
    """Drops records that begin with a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record stays."""
        return not record.getMessage().startswith(self._text)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Within the block these are not shown; `python -W` and `PYTHONWARNINGS` decide where they are given."""
    filters = {logging.getLogger(name): _Without(text) for name, text in LOGGED.items()}
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message)
        for log, rule in filters.items():
            log.addFilter(rule)
        try:
            yield
        finally:
            for log, rule in filters.items():
                log.removeFilter(rule)
