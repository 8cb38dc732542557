"""What every test of the zoo needs."""

import gc

import pytest

from .. import heap


@pytest.fixture(autouse=True, scope="session")
def imports_are_not_scanned():
    """Finding a weight's owner scans the heap, for each gate: what imports made need not be scanned again and again."""
    import transformers.modeling_utils  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def other_tests_are_not_scanned():
    """Every test has a model of its own."""
    yield
    heap.set_aside()
