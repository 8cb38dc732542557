"""Writes docs/packages.md: what becomes of every gate of public packages' models, and of other public code.

python -m benchmarks.packages_page                     # in the environment that .ci/packages makes; minutes on one core
SERE_CHECKOUTS=FOLDER python -m benchmarks.packages_page --only checkouts     # the code that is no package
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from pathlib import Path

import torch

from tests.packages.checkouts import CHECKOUTS, Checkout
from tests.packages.judge import Outcome, judge
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
_OTHERS = """
## Code that is not a package

The same of MoE layers that stand in repositories on GitHub and neither in transformers nor in a
package above: the files of a checkout, unchanged, two layers on top of each other where not said
otherwise. Loads, losses, logits and ids that they return are compared as well. Of {gates} gates in
{repositories} repositories {rewritten} are re-routed. None of that code is in this repository:
`.ci/checkouts FOLDER` takes checkouts of the commits below and compares every row.

| repository | commit | file | model | gates | re-routed | why not the others |
| --- | --- | --- | --- | --- | --- | --- |
"""
# Package, version, model, gates, re-routed gates, why not.
Row = tuple[str, str, str, int, int, str]
# Repository, commit, file, model, gates, re-routed gates, why not.
OtherRow = tuple[str, str, str, str, int, int, str]


def measure(model: Model) -> Row:
    """The row of one model.

    Raises:
        AssertionError: it is not as the oracle says, or refused for another reason than is known.
    """
    gated = model.make()
    outcome = judge(gated, model.tolerance)
    why = _why(model, outcome, f"{model.package}, {model.name}")
    version = importlib.metadata.version(model.package)
    return model.package, version, model.name, len(gated.layers), len(outcome.rewritten), why


def measure_other(model: Checkout) -> OtherRow:
    """The row of one model of a checkout, see `measure`."""
    gated = model.make()
    outcome = judge(gated, model.tolerance)
    why = _why(model, outcome, f"{model.repository}, {model.name}")
    counts = len(gated.layers), len(outcome.rewritten)
    return model.repository, model.commit, model.file, model.name, *counts, why


def _why(model: Model | Checkout, outcome: Outcome, name: str) -> str:
    assert not outcome.wrong, f"{name}: {outcome.wrong}"
    unknown = {name: reason for name, reason in outcome.refused.items() if model.refused not in reason or not model.why}
    assert not unknown, f"{name} is refused for another reason: {unknown}"
    return model.why if outcome.refused else ""


def page(rows: list[Row], others: list[OtherRow]) -> str:
    """The whole page."""
    total, done = sum(row[3] for row in rows), sum(row[4] for row in rows)
    version = torch.__version__.partition("+")[0]
    head = _HEADER.format(torch=version, rewritten=done, gates=total)
    gates, rewritten = sum(row[4] for row in others), sum(row[5] for row in others)
    counts = {"gates": gates, "rewritten": rewritten, "repositories": len({row[0] for row in others})}
    return head + _lines(rows) + _OTHERS.format(**counts) + _lines(others)


def _lines(rows: list[Row] | list[OtherRow]) -> str:
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def read() -> list[Row]:
    """The rows of packages as they are on the page."""
    return [
        (package, version, model, int(gates), int(done), why)
        for package, version, model, gates, done, why in _cells(r"(.*?) \| (.*?) \| (.*?) \| (\d+) \| (\d+)", 0)
    ]


def read_others() -> list[OtherRow]:
    """The rows of other code as they are on the page."""
    pattern = r"(.*?) \| (.*?) \| (.*?) \| (.*?) \| (\d+) \| (\d+)"
    return [
        (repository, commit, file, model, int(gates), int(done), why)
        for repository, commit, file, model, gates, done, why in _cells(pattern, 1)
    ]


def _cells(pattern: str, part: int) -> list[tuple[str, ...]]:
    text = FILE.read_text("utf-8").split("\n## ")[part]
    return re.findall(rf"^\| {pattern} \| ?(.*?) ?\|$", text, re.M)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("packages", "checkouts"), default="packages", help="what to measure anew")
    only = parser.parse_args().only
    rows = [measure(model) for model in MODELS] if only == "packages" else read()
    others = [measure_other(model) for model in CHECKOUTS] if only == "checkouts" else read_others()
    FILE.write_text(page(rows, others), encoding="utf-8")


if __name__ == "__main__":
    main()
