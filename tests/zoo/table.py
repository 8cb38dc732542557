"""Writes docs/support.md: what is found and done in every architecture, tracer and experts implementation.

python -m tests.zoo.table            every row, half an hour on two cores
python -m tests.zoo.table --missing  only rows that are not measured yet
python -m tests.zoo.table dbrx doge  only the rows of these architectures
"""

from __future__ import annotations

import concurrent.futures
import gc
import logging
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

| architecture | experts | Dynamo | graphs | torch.export |
| --- | --- | --- | --- | --- |
"""

UNMEASURED = "not measured"

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


def row(name: str, experts: str) -> Row:
    """One line of the table."""
    dynamo = survey_dynamo(name, experts)
    return name, experts, cell(dynamo), str(dynamo.graphs), cell(survey_export(name, experts))


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
    lines = [rows.get(key, (*key, UNMEASURED, "", UNMEASURED)) for key in keys]
    FILE.write_text(header + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _prepare() -> None:
    """Finding a weight's owner scans the heap: what the imports made need not be scanned again and again."""
    gc.collect()
    gc.freeze()


def _job(key: tuple[str, str]) -> Row:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return row(*key)


def main(names: list[str]) -> None:
    """Survey and write; rows of other architectures are kept."""
    _, rows = read()
    missing = names == ["--missing"]
    chosen = sorted(ENTRIES) if missing or not names else names
    keys = [(name, experts) for name in chosen for experts in implementations(name)]
    keys = sorted(
        (key for key in keys if not missing or rows.get(key, ("", "", UNMEASURED))[2] == UNMEASURED),
        key=lambda key: key[1] == "eager",
    )
    with concurrent.futures.ProcessPoolExecutor(max_workers=2, initializer=_prepare) as pool:
        for key, made in zip(keys, pool.map(_job, keys), strict=True):
            print(" | ".join(made), flush=True)
            rows[key] = made
            write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
