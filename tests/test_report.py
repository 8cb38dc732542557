"""Reports as text and as data."""

import pytest

from sere_compile.report import IDENTITY, REWRITTEN, SKIPPED, GateReport, GateRow

expecttest = pytest.importorskip("expecttest")

ROWS = (
    GateRow("model.layers.0.mlp.gate.weight", 128, 8, 2, "softmax", True, "grouped by expert", REWRITTEN, "", "probed"),
    GateRow("model.layers.11.mlp.gate.weight", 8, 2, 2, "sigmoid", False, "indexed weights", IDENTITY, "S = 2"),
    GateRow("topk (sampler.py:12)", None, None, None, "", None, "", SKIPPED, "no experts are found behind its indices"),
)


def test_table():
    """Columns are aligned, and a column that nobody fills is left out."""
    expecttest.assert_expected_inline(
        str(GateReport(ROWS)),
        """\
2 MoE gates found, 1 rewritten
gate                             E    K  S  scoring  sorted  dispatch           status     similarity  reason
-------------------------------  ---  -  -  -------  ------  -----------------  ---------  ----------  ---------------------------------------
model.layers.0.mlp.gate.weight   128  8  2  softmax  yes     grouped by expert  rewritten  probed
model.layers.11.mlp.gate.weight  8    2  2  sigmoid  no      indexed weights    identity               S = 2
topk (sampler.py:12)                                                            skipped                no experts are found behind its indices""",
    )


def test_empty_report_says_what_to_do():
    """A report without rows still says something."""
    assert str(GateReport((), "Is it an MoE?")) == "0 MoE gates found, 0 rewritten\nIs it an MoE?"


def test_rows_as_data():
    """Gates and refusals can be told apart without parsing text."""
    report = GateReport(ROWS)
    assert [row.num_experts for row in report.gates] == [128, 8]
    assert [row.name for row in report.rewritten] == ["model.layers.0.mlp.gate.weight"]
    assert (len(report), list(report)) == (3, list(ROWS))
