"""Writes docs/packages.md: what becomes of every gate of public packages' models.

python -m benchmarks.packages_page     # in the environment that .ci/packages makes; minutes on one core
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from pathlib import Path

import torch

from tests.packages.judge import judge
from tests.packages.models import MODELS, Model

FILE = Path(__file__).parents[1] / "docs" / "packages.md"
_HEADER = """\
# Public packages

What `sere_compile.compile(model)` does with MoE layers of packages that know nothing of it: small
models with random weights, on a CPU, with torch {torch}. S = K changes no bit of what a model
returns. S = 1 was compared with the eager model whose experts' parameters are exchanged as
re-routing exchanges ids, in each layer, behind its selection. A model whose gates are refused
returns what it always did.

{rewritten} of {gates} gates are re-routed; the others are refused, with the reason that the report
gives. `.ci/packages` installs the packages and compares every row. Written by
`python -m benchmarks.packages_page`.

| package | version | model | gates | re-routed | why not the others |
| --- | --- | --- | --- | --- | --- |
"""
# Package, version, model, gates, re-routed gates, why not.
Row = tuple[str, str, str, int, int, str]


def measure(model: Model) -> Row:
    """The row of one model.

    Raises:
        AssertionError: it is not as the oracle says, or refused for another reason than is known.
    """
    gated = model.make()
    outcome = judge(gated, model.tolerance)
    assert not outcome.wrong, f"{model.package}, {model.name}: {outcome.wrong}"
    unknown = {name: reason for name, reason in outcome.refused.items() if model.refused not in reason or not model.why}
    assert not unknown, f"{model.package}, {model.name} is refused for another reason: {unknown}"
    version = importlib.metadata.version(model.package)
    why = model.why if outcome.refused else ""
    return model.package, version, model.name, len(gated.layers), len(outcome.rewritten), why


def page(rows: list[Row]) -> str:
    """The whole page."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    total, done = sum(row[3] for row in rows), sum(row[4] for row in rows)
    version = torch.__version__.partition("+")[0]
    return _HEADER.format(torch=version, rewritten=done, gates=total) + "\n".join(lines) + "\n"


def read() -> list[Row]:
    """The rows of the page as it is."""
    cells = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (\d+) \| (\d+) \| ?(.*?) ?\|$", FILE.read_text("utf-8"), re.M)
    return [
        (package, version, model, int(gates), int(done), why) for package, version, model, gates, done, why in cells
    ]


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.write_text(page([measure(model) for model in MODELS]), encoding="utf-8")


if __name__ == "__main__":
    main()
