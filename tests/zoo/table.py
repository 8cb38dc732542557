"""Writes docs/support.md: what is found and done in every architecture, tracer and experts implementation.

python -m tests.zoo.table            every cell, 15 minutes of one core
python -m tests.zoo.table --missing  only cells that are not measured yet
python -m tests.zoo.table dbrx doge  only the rows of these architectures

SERE_ZOO_ACCEPT=1 pytest -n 0 -m "zoo or not zoo" tests/zoo/test_zoo.py writes what the tests measure.
"""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import os
import sys
from pathlib import Path

import torch
import transformers

from .registry import ENTRIES, implementations
from .survey import Survey, survey_dynamo, survey_export

FILE = Path(__file__).parents[2] / "docs" / "support.md"
_HEADER = """\
# Supported architectures

What `sere-compile` makes of every Mixture-of-Experts architecture of transformers {transformers}, with torch {torch}:
small models with random weights, on a CPU. `n/m` are gates found of selections that ran in eager mode. A rewritten
gate was compared: S = K changes no bit, S = 1 equals an eager oracle. "own" experts have no implementation to choose.
`--missing` measures what is not measured yet. Written by `python -m tests.zoo.table`.

Matching, on one core of a 2-core x86 machine (`python -m tests.zoo.match_time`): `find_gates` takes 5.1 ms for 1,000
nodes in the median over these architectures and 30.6 ms in the worst (zaya); all that the backend does to a graph
before it hands it over takes 96 ms in the median and 181 ms in the worst (longcat_flash).

| architecture | experts | Dynamo | graphs | torch.export |
| --- | --- | --- | --- | --- |
"""

UNMEASURED = "not measured"
# Columns of a row.
DYNAMO, GRAPHS, EXPORT = 2, 3, 4
ACCEPT = "SERE_ZOO_ACCEPT"

Row = tuple[str, str, str, str, str]


def cell(survey: Survey) -> str:
    """What one tracer gave, in words."""
    if survey.failed:
        return f"does not trace: {survey.failed.partition(':')[0]}"
    found = f"{len(survey.gates)}/{survey.run}"
    fates = [f"{survey.count(fate)} {fate}" for fate in ("rewritten", "identity", "skipped") if survey.count(fate)]
    if len(fates) == 1:
        fates = [fates[0].split()[1]]
    reasons = {_reason(row.reason) for row in survey.gates if row.status == "skipped"}
    if len(survey.gates) < survey.run:
        reasons |= {_reason(row.reason) for row in survey.rows if row.num_experts is None}
    wrong = [] if _is_right(survey) else ["differs from the oracle"]
    return "; ".join([" ".join([found, ", ".join(fates)]).strip(), *sorted(reasons), *wrong])


def _reason(text: str) -> str:
    """The kind of a refusal, without what was met in this model."""
    return text.partition(" (")[0]


def _is_right(survey: Survey) -> bool:
    return not (survey.identity_differs or survey.ids_differ or survey.notes or (survey.error or 0.0) > 1e-5)


def measure(name: str, experts: str, known: Row) -> Row:
    """One line of the table: what is known of it, and what is not measured yet."""
    cells = list(known)
    if cells[DYNAMO] == UNMEASURED:
        dynamo = survey_dynamo(name, experts)
        cells[DYNAMO], cells[GRAPHS] = cell(dynamo), str(dynamo.graphs)
    if cells[EXPORT] == UNMEASURED:
        cells[EXPORT] = cell(survey_export(name, experts))
    return tuple(cells)  # type: ignore[return-value]


def unmeasured(name: str, experts: str) -> Row:
    """A line before anything is known."""
    return name, experts, UNMEASURED, "", UNMEASURED


def accept(name: str, experts: str, column: int, survey: Survey) -> bool:
    """Write a cell that a test measured, where the environment asks for it."""
    if not os.environ.get(ACCEPT):
        return False
    _, rows = read()
    cells = list(rows.get((name, experts), unmeasured(name, experts)))
    cells[column] = cell(survey)
    if column == DYNAMO:
        cells[GRAPHS] = str(survey.graphs)
    rows[name, experts] = tuple(cells)  # type: ignore[assignment]
    write(rows)
    return True


def read() -> tuple[str, dict[tuple[str, str], Row]]:
    """The header and the rows of the checked-in table, by architecture and experts implementation."""
    if not FILE.exists():
        return "", {}
    lines = FILE.read_text().splitlines()
    cells = [tuple(part.strip() for part in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    rows = {(line[0], line[1]): line for line in cells[2:]}
    return "\n".join(line for line in lines if not line.startswith("| ")), rows  # type: ignore[return-value]


def write(rows: dict[tuple[str, str], Row]) -> None:
    """The table in order of architectures, of this machine's versions."""
    header = _HEADER.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    keys = [(name, experts) for name in sorted(ENTRIES) for experts in implementations(name)]
    lines = [rows.get(key, unmeasured(*key)) for key in keys]
    FILE.write_text(header + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _prepare() -> None:
    """Finding a weight's owner scans the heap: what the imports made need not be scanned again and again."""
    gc.collect()
    gc.freeze()


def _job(known: Row) -> Row:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return measure(known[0], known[1], known)


def main(names: list[str]) -> None:
    """Survey and write; rows of other architectures are kept."""
    _, rows = read()
    missing = names == ["--missing"]
    chosen = sorted(ENTRIES) if missing or not names else names
    keys = [(name, experts) for name in chosen for experts in implementations(name)]
    known = [rows[key] if missing and key in rows else unmeasured(*key) for key in keys]
    todo = sorted((row for row in known if UNMEASURED in row), key=lambda row: row[1] == "eager")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, initializer=_prepare) as pool:
        for made in pool.map(_job, todo):
            print(" | ".join(made), flush=True)
            _, rows = read()  # tests may write it meanwhile
            rows[made[0], made[1]] = made
            write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
