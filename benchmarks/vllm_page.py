"""Writes the table in docs/vllm.md, in vLLM's environment: what each model gives in the real engine.

python -m benchmarks.vllm_page            # every row, three minutes on two cores
python -m benchmarks.vllm_page mixtral    # only the rows of these models
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "vllm.md"
COLUMNS = (
    "model",
    "router",
    "gates hooked",
    "S = K: tokens of vLLM and transformers alone",
    "S = 1: tokens of transformers with the backend",
    "active experts before",
    "after",
)
RUN = "run `python -m benchmarks.vllm_page`"
# Of columns that are measured: another machine rounds otherwise, and greedy decoding of a random model follows.
TOLERANCE = 0.5


def read() -> dict[str, tuple[str, ...]]:
    """The rows in the page, by the name of the model."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    start = lines.index(_line(COLUMNS)) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        rows[cells[0]] = cells
    return rows


def differs(written: tuple[str, ...], measured: tuple[str, ...]) -> str:
    """What a row of the page says that was not measured, or nothing."""
    for column, old, new in zip(COLUMNS, written, measured, strict=True):
        if column in COLUMNS[-2:] and abs(float(old) - float(new)) <= TOLERANCE:
            continue
        if old != new:
            return f"{written[0]}, {column}: {old!r} in docs/vllm.md, {new!r} measured; {RUN}"
    return ""


def write(rows: dict[str, tuple[str, ...]]) -> None:
    """Replace the table in the page."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    start = lines.index(_line(COLUMNS)) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    lines[start:end] = [_line(row) for row in rows.values()]
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="all of them if none is given")
    wanted = parser.parse_args().names
    # First of all conftest: vLLM reads its environment variables when it is imported.
    from tests.integrations.vllm import conftest  # noqa: F401
    from tests.integrations.vllm import models  # isort: skip
    from .vllm_measured import measure  # isort: skip

    rows = {name: row for name, row in read().items() if name in models.NAMES}
    for name in wanted or models.NAMES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, *models.prepare(name, Path(folder))).row()
        print(_line(rows[name]))
    write({name: rows[name] for name in models.NAMES if name in rows})


if __name__ == "__main__":
    main()
