"""Fixtures of every test in this folder."""

from __future__ import annotations

import pytest
import torch

from ..tiny_models import build


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def qwen():
    return build("qwen3_moe")
