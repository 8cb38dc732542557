"""Every gate of the packages' models: re-routed as the oracle says, or refused with the reason that the page gives."""

import pytest

from benchmarks.packages_page import measure, read

from .models import MODELS

pytestmark = [pytest.mark.packages, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.package}: {model.name}")
def test_model(model):
    """Its row is what the page says: python -m benchmarks.packages_page writes it anew."""
    row = measure(model)
    known = {(known[0], known[2]): known for known in read()}
    assert row == known.get((model.package, model.name))
