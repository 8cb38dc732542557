"""Fixtures of every test in this folder; `subject` and `without_gpu` are for `sere bench`."""

from ..benchmark.fixtures import subject, without_gpu
from .checkpoint import checkpoint

__all__ = ["checkpoint", "subject", "without_gpu"]
