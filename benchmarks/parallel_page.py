"""Writes the table of layouts in docs/parallel.md from what `benchmarks.vllm_parallel` wrote.

    python -m benchmarks.parallel_page "two H200, vLLM 0.33.0" --check check.json --time time.json

Rows of the same engine are replaced, those of others stay. A layout that did not run says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .vllm_parallel import CHECKED, LAYOUTS

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
COLUMNS = ("layout", "engine", "starts", "ranks agree", "tokens of one rank", "active experts", "ms per token")
NOT_RUN = "not run"


def cells(name: str, engine: str, check: dict[str, Any], time: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table; `check` and `time` are all rows of the script's two files, by name."""
    row, timed = check.get(name), time.get(name)
    if row is None and timed is None:
        return (name, engine, *[NOT_RUN] * (len(COLUMNS) - 2))
    row = row or {}
    starts = "yes" if row.get("starts", timed is not None) else "NO"
    agreeing = [row[key] for key in ("matrices_agree", "ids_agree", "counts_agree") if row.get(key) is not None]
    agree = ("yes" if all(agreeing) else "NO") if agreeing else "-"
    active = "{} -> {}".format(*row["active"]) if row.get("active") else "-"
    return (name, engine, starts, agree, alike(row.get("tokens", NOT_RUN)), active, milliseconds(name, time))


def alike(tokens: str) -> str:
    """How many requests are the same, and how many tokens before the first other one."""
    requests, _, before = tokens.partition(", ")
    return f"{requests} ({before.partition(' before')[0]})" if before else requests


def milliseconds(name: str, time: dict[str, Any]) -> str:
    """The median, and how often faster than the same layout without us."""
    if name not in time:
        return NOT_RUN
    middle, stock = time[name]["ms"][1], time.get(f"{name.partition(',')[0]}, stock")
    return (
        f"{middle:.2f}" if stock is None or name.endswith("stock") else f"{middle:.2f} ({stock['ms'][1] / middle:.2f}x)"
    )


def names() -> list[str]:
    """Of the rows of an engine."""
    order = list(LAYOUTS)
    rows = sorted(CHECKED, key=lambda row: (order.index(row[0]), "probed" in row[1], row[1]))
    return [f"{layout}, {rule}" for layout, rule in rows if layout != "one"]


def write(rows: list[tuple[str, ...]], page: Path = PAGE) -> None:
    """Put an engine's rows into the table, in the place of those that it had."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = lines.index(line(COLUMNS)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    engine = rows[0][1]
    kept = [text for text in lines[start:end] if text.split("|")[2].strip() != engine]
    lines[start:end] = [*kept, *map(line, rows)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(row)} |"


def main() -> None:
    """Read, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="as the table names it")
    parser.add_argument("--check", type=Path)
    parser.add_argument("--time", type=Path)
    given = parser.parse_args()
    check, time = ({} if path is None else json.loads(path.read_text()) for path in (given.check, given.time))
    write([cells(name, given.engine, check, time) for name in names()])


if __name__ == "__main__":
    main()
