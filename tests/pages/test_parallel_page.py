"""The table of layouts in docs/parallel.md: what its writer makes of two files, and that the page has every row."""

from __future__ import annotations

import shutil

from benchmarks import parallel_page as page

CHECK = {
    "dp+ep, S = 1": {"starts": True, "tokens": "8 of 8 requests, 52 of 52 tokens before the first other one",
                     "matrices_agree": True, "ids_agree": None, "counts_agree": True, "active": [14.0, 4.9]},
    "tp, S = 1": {"starts": True, "tokens": "7 of 8 requests, 50 of 52 tokens before the first other one",
                  "matrices_agree": True, "ids_agree": False, "counts_agree": True, "active": [14.0, 4.5]},
    "eplb, S = 1": {"starts": False, "good": False},
}  # fmt: skip
TIME = {"dp+ep, stock": {"ms": [4.0, 4.2, 4.3]}, "dp+ep, S = 1": {"ms": [2.0, 2.1, 2.2]}}


def test_a_row_says_what_ran():
    assert page.cells("dp+ep, S = 1", "e", CHECK, TIME) == (
        "dp+ep, S = 1", "e", "yes", "yes", "8 of 8 requests (52 of 52 tokens)", "14.0 -> 4.9", "2.10 (2.00x)",
    )  # fmt: skip
    assert page.cells("tp, S = 1", "e", CHECK, {})[2:] == (
        "yes", "NO", "7 of 8 requests (50 of 52 tokens)", "14.0 -> 4.5", "not run",
    )  # fmt: skip
    assert page.cells("eplb, S = 1", "e", CHECK, {})[2:] == ("NO", "-", "not run", "-", "not run")
    assert page.cells("tp+ep, S = 1", "e", CHECK, TIME)[2:] == ("not run",) * 5


def test_rows_of_an_engine_are_replaced_and_others_stay(tmp_path):
    copy = shutil.copy(page.PAGE, tmp_path / "page.md")
    before = copy.read_text()
    page.write([page.cells(name, "another engine", CHECK, TIME) for name in page.names()], copy)
    page.write([page.cells(name, "another engine", {}, {}) for name in page.names()], copy)
    rows = [text for text in copy.read_text().splitlines() if "| another engine |" in text]
    assert len(rows) == len(page.names())
    assert all("not run" in row for row in rows)
    assert [text for text in copy.read_text().splitlines() if text not in rows] == before.splitlines()


def test_every_layout_stands_in_the_page():
    text = page.PAGE.read_text(encoding="utf-8")
    assert [name for name in page.names() if f"\n| {name} |" not in text] == []
