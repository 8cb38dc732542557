"""Writes docs/support.md: what is found and done in every architecture, tracer and experts implementation.

    python -m benchmarks.support_page            # every cell, 45 minutes of one core
    python -m benchmarks.support_page --missing  # only cells that are not measured yet
    python -m benchmarks.support_page dbrx doge  # only the rows of these architectures

SERE_ZOO_ACCEPT=1 pytest -n 0 -m "zoo or not zoo" tests/zoo/test_zoo.py writes what the tests measure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import logging
import os
from pathlib import Path

import torch
import transformers

from tests.zoo.discover import moe_architectures
from tests.zoo.registry import ENTRIES, implementations

from .survey import EAGER, Survey, survey_ahead, survey_dynamo

FILE = Path(__file__).parents[1] / "docs" / "support.md"
_HEADER = """\
# Supported architectures

What `sere-compile` does with every Mixture-of-Experts architecture of transformers {transformers},
with torch {torch}: small models with random weights, on a CPU. `n/m` are gates found of selections
that ran in eager mode. A rewritten gate was compared: S = K changes no bit, S = 1 equals an eager
oracle. "own" experts have no implementation to choose. `--missing` measures what is not measured
yet. Written by `python -m benchmarks.support_page`.

Matching, on one core of a 2-core x86 machine (`python -m benchmarks.match_time`): `find_gates`
takes 5.1 ms for 1,000 nodes in the median over these architectures and 30.6 ms in the worst (zaya);
all that the backend does to a graph before it hands it over takes 96 ms in the median and 181 ms in
the worst (longcat_flash).

| architecture | experts | Dynamo | graphs | torch.export |
| --- | --- | --- | --- | --- |
"""
_FURTHER_HEADER = """
## Further tracers

The same comparison with the first experts implementation: Dynamo of a model in bfloat16 (ids
exactly, outputs within 5 % of what re-routing changes; where rounding turns a near-tie in a later
layer, the gates up to there), `torch.export(strict=True)`, `run_decompositions()` of a program, and
`make_fx` of the model's call, which asks nothing of its values (`torch.compiler.is_exporting()`),
as for an exporter. `symbolic_trace` takes none of these models: each decides by its arguments what
it runs.

`make_fx` was run with the versions above, and so were the other columns where transformers 5.17.0
lacks or cannot run an architecture; the rest of them with torch 2.11.0 and transformers 5.17.0.
`--missing` measures what is not measured.

| architecture | experts | Dynamo, bfloat16 | strict | decomposed | make_fx |
| --- | --- | --- | --- | --- | --- |
"""

UNMEASURED = "not measured"
# Columns of a row, and of a row of the second table.
DYNAMO, GRAPHS, EXPORT = 2, 3, 4
FURTHER = {"bfloat16": 2, "strict": 3, "decomposed": 4, "make_fx": 5}
ACCEPT = "SERE_ZOO_ACCEPT"
# Largest difference from the oracle.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}

Row = tuple[str, ...]
# Architecture and experts implementation; a third part for the second table.
Key = tuple[str, ...]


def cell(survey: Survey, dtype: torch.dtype = torch.float32) -> str:
    """What one tracer gave, in words."""
    if survey.failed.startswith(EAGER):
        return EAGER
    if survey.failed:
        return f"does not trace: {survey.failed.partition(':')[0]}"
    found = f"{len(survey.gates)}/{survey.run}"
    fates = [f"{survey.count(fate)} {fate}" for fate in ("rewritten", "identity", "skipped") if survey.count(fate)]
    if len(fates) == 1:
        fates = [fates[0].split()[1]]
    reasons = {_reason(row.reason) for row in survey.gates if row.status == "skipped"}
    if len(survey.gates) < survey.run:
        reasons |= {_reason(row.reason) for row in survey.rows if row.num_experts is None}
    wrong = [] if is_right(survey, dtype) else ["differs from the oracle"]
    return "; ".join([" ".join([found, ", ".join(fates)]).strip(), *sorted(reasons), *wrong])


def _reason(text: str) -> str:
    """The kind of a refusal, without what was met in this model."""
    return text.partition(" (")[0]


def is_right(survey: Survey, dtype: torch.dtype) -> bool:
    """Whether everything compared is as it should be."""
    if survey.identity_differs or survey.ids_differ or survey.notes:
        return False
    if survey.turned is not None:  # in low precision a near-tie behind the first gate may turn
        return dtype is not torch.float32 and survey.turned > 0
    scale = 1.0 if dtype is torch.float32 else max(1.0, survey.effect)
    return (survey.error or 0.0) <= TOLERANCE[dtype] * scale


def measure(key: Key, known: Row) -> Row:
    """One line of a table: what is known of it, and what is not measured yet."""
    name, experts = key[:2]
    cells = list(known)
    if len(key) == 3:
        for tracer, column in FURTHER.items():
            if cells[column] == UNMEASURED:
                cells[column] = further_cell(tracer, survey_further(name, experts, tracer))
        return tuple(cells)
    if cells[DYNAMO] == UNMEASURED:
        dynamo = survey_dynamo(name, experts)
        cells[DYNAMO], cells[GRAPHS] = cell(dynamo), str(dynamo.graphs)
    if cells[EXPORT] == UNMEASURED:
        cells[EXPORT] = cell(survey_ahead(name, experts))
    return tuple(cells)


def survey_further(name: str, experts: str, tracer: str) -> Survey:
    """One architecture through a tracer of the second table."""
    if tracer == "bfloat16":
        return survey_dynamo(name, experts, torch.bfloat16)
    return survey_ahead(name, experts, tracer)


def further_cell(tracer: str, survey: Survey) -> str:
    """What a tracer of the second table gave, in words."""
    return cell(survey, torch.bfloat16 if tracer == "bfloat16" else torch.float32)


def installed() -> list[str]:
    """Architectures that the installed transformers has, in order."""
    return sorted(set(ENTRIES) & set(moe_architectures()))


def keys(names: list[str]) -> list[Key]:
    """The lines of both tables for these architectures."""
    first: list[Key] = [(name, experts) for name in names for experts in implementations(name)]
    return first + [(name, implementations(name)[0], "further") for name in names]


def unmeasured(key: Key) -> Row:
    """A line before anything is known."""
    if len(key) == 3:
        return (*key[:2], *[UNMEASURED] * len(FURTHER))
    return (*key, UNMEASURED, "", UNMEASURED)


def accept(key: Key, column: int, text: str, graphs: int | None = None) -> bool:
    """Write a cell that a test measured, where the environment asks for it."""
    if not os.environ.get(ACCEPT):
        return False
    _, rows = read()
    cells = list(rows.get(key, unmeasured(key)))
    cells[column] = text
    if graphs is not None:
        cells[GRAPHS] = str(graphs)
    rows[key] = tuple(cells)
    write(rows)
    return True


def read() -> tuple[str, dict[Key, Row]]:
    """The header and the rows of the checked-in tables, by architecture and experts implementation."""
    if not FILE.exists():
        return "", {}
    lines = FILE.read_text().splitlines()
    cells = [tuple(part.strip() for part in line.strip("|").split("|")) for line in lines if line.startswith("| ")]
    made = [line for line in cells if line[0] in ENTRIES]
    rows = {line[:2] if len(line) == 5 else (*line[:2], "further"): line for line in made}
    return "\n".join(line for line in lines if not line.startswith("| ")), rows


def write(rows: dict[Key, Row]) -> None:
    """The tables in order of architectures, of this machine's versions."""
    header = _HEADER.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    lines: dict[int, list[Row]] = {2: [], 3: []}
    for key in keys(installed()):
        lines[len(key)].append(rows.get(key, unmeasured(key)))
    first, further = ("".join(f"| {' | '.join(line)} |\n" for line in lines[length]) for length in (2, 3))
    FILE.write_text(header + first + _FURTHER_HEADER + further)


def _prepare() -> None:
    """Finding a weight's owner scans the heap: what the imports made need not be scanned again and again."""
    gc.collect()
    gc.freeze()


def _job(key: Key, known: Row) -> tuple[Key, Row]:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return key, measure(key, known)


def main() -> None:
    """Survey and write; rows of other architectures are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="all of them if none is given")
    parser.add_argument("--missing", action="store_true", help="only cells that are not measured yet")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(installed()):
        parser.error(
            f"no architecture of tests/zoo/registry.py and the installed transformers: {', '.join(sorted(unknown))}"
        )
    _, rows = read()
    chosen = keys(arguments.names or installed())
    known = {key: rows[key] if arguments.missing and key in rows else unmeasured(key) for key in chosen}
    todo = sorted((key for key in chosen if UNMEASURED in known[key]), key=lambda key: key[1] == "eager")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, initializer=_prepare) as pool:
        for key, made in pool.map(_job, todo, [known[key] for key in todo]):
            print(" | ".join(made), flush=True)
            _, rows = read()  # tests may write it meanwhile
            rows[key] = made
            write(rows)


if __name__ == "__main__":
    main()
