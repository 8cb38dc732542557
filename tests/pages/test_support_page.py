"""docs/support.md has a row for everything in the registry; the lane of the zoo compares what the rows say."""

import re

import pytest
import torch
import transformers

from benchmarks.support_page import DYNAMO, EXPORT, FURTHER, UNMEASURED, cell, installed, keys, read
from benchmarks.survey import Survey
from sere_compile import GateRow

from ..zoo.test_zoo import checked_in


def test_rows_are_those_of_the_registry():
    """A new architecture needs a row: python -m benchmarks.support_page NAME."""
    header, rows = read()
    # The page names others further down.
    if f"architecture of transformers {transformers.__version__}," not in header:
        pytest.skip("written with another transformers, which has other architectures")
    assert set(rows) == set(keys(installed()))


def test_every_cell_is_measured_and_right():
    """Found, with what became of it, or the reason; never a difference from the oracle."""
    _, rows = read()
    for key, row in rows.items():
        for column in (DYNAMO, EXPORT) if len(key) == 2 else FURTHER.values():
            text = row[column]
            assert "differs" not in text, row
            known = text == UNMEASURED and len(key) == 3  # the second table may wait for a machine with time
            assert known or any(word in text for word in ("rewritten", "identity", "; ", "does not ")), row


def test_a_stale_cell_turns_the_comparison_red(monkeypatch):
    """What the lane of the zoo compares: another number of gates, or of graphs, than the table says."""
    header, rows = read()
    for library in (torch, transformers):  # as if the versions of the table were installed: others are not compared
        version = re.search(rf"{library.__name__} (\d[\d.]*\d)", header)
        monkeypatch.setattr(library, "__version__", version[1])
    graphs = int(rows["olmoe", "grouped_mm"][3])
    gate = GateRow("gate.weight", 12, 3, 1, "softmax", True, "grouped by expert", "rewritten")
    right = Survey(run=3, rows=(gate,) * 3, graphs=graphs)
    checked_in("olmoe", "grouped_mm", DYNAMO, right)
    for wrong in (Survey(run=3, rows=(gate,) * 2, graphs=graphs), Survey(run=3, rows=(gate,) * 3, graphs=graphs + 2)):
        with pytest.raises(AssertionError, match=r"stale: python -m benchmarks.support_page olmoe"):
            checked_in("olmoe", "grouped_mm", DYNAMO, wrong)


def test_cell_says_what_is_wrong():
    survey = Survey(run=3, error=1.0)
    assert cell(survey) == "0/3; differs from the oracle"
    assert cell(Survey(failed="TypeError: something")) == "does not trace: TypeError"
