"""docs/support.md has a row for everything in the registry; the lane of the zoo compares what the rows say."""

from .registry import ENTRIES, implementations
from .survey import Survey
from .table import cell, read


def test_rows_are_those_of_the_registry():
    """A new architecture needs a row: python -m tests.zoo.table NAME."""
    _, rows = read()
    wanted = {(name, experts) for name in ENTRIES for experts in implementations(name)}
    assert set(rows) == wanted


def test_cell_says_what_is_wrong():
    survey = Survey(run=3, error=1.0)
    assert cell(survey) == "0/3; differs from the oracle"
    assert cell(Survey(failed="TypeError: something")) == "does not trace: TypeError"
