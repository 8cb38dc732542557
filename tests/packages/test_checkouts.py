"""Gates of public code that is no package: re-routed as the oracle says, or refused with the reason of the page."""

import pytest

from benchmarks.packages_page import measure_other, read_others

from .checkouts import CHECKOUTS

pytestmark = [pytest.mark.packages, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize("model", CHECKOUTS, ids=lambda model: f"{model.repository}: {model.name}")
def test_model(model):
    """Its row is what the page says: python -m benchmarks.packages_page --only checkouts writes it anew."""
    if not model.folder.is_dir():
        pytest.skip(f"SERE_CHECKOUTS names no folder with a checkout {model.folder.name}")
    known = {(row[0], row[3]): row for row in read_others()}
    assert measure_other(model) == known.get((model.repository, model.name))
