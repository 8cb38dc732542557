"""Fixtures of every test in this folder."""

from __future__ import annotations

import pytest

from ..tiny_models import build


@pytest.fixture(autouse=True)
def every_test_compiles_anew(fresh_dynamo):
    """Graphs of one test's model do not serve another's."""


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3_moe")
