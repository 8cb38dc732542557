"""Fixtures of every test in this folder; `subject` and `without_gpu` are for `sere bench`."""

import pytest
import torch

from ..benchmark.fixtures import subject, without_gpu
from .checkpoint import checkpoint

__all__ = ["checkpoint", "subject", "without_gpu"]


@pytest.fixture(autouse=True, scope="module")
def process_of_its_own():
    """A command starts with a Dynamo that has compiled nothing: code that models share may be compiled a few times."""
    torch._dynamo.reset()
