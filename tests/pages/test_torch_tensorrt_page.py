"""What torch_tensorrt makes of every model, as docs/lowering_tensorrt.md says; in a process of its own (.ci/tensorrt).

TensorRT has one logger a process, and torch_tensorrt's would be that of tests/lowering/test_engine.py.
"""

from __future__ import annotations

import importlib.util
import re

import pytest

from benchmarks import tensorrt_page
from benchmarks.tensorrt_page import PAGE
from benchmarks.torch_tensorrt_page import (
    BEGIN,
    END,
    EXPERTS,
    GRAPHS,
    HEADER,
    MODELS,
    TITLES,
    divide,
    program_of,
    row,
    table_of,
)

CASES = [(experts, name, graph) for experts in EXPERTS for name in MODELS for graph in GRAPHS]
needs_torch_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None, reason="needs torch-tensorrt-rtx"
)


@pytest.mark.tensorrt
@needs_torch_tensorrt
@pytest.mark.parametrize(("experts", "name", "graph"), CASES)
def test_row(experts, name, graph):
    """Operators converted, engines built, what is left to PyTorch; and what is divided computes what it did."""
    assert row(experts, name, graph) in table_of(PAGE)


def test_the_page_has_these_rows():
    """`batched_mm` gives one engine with nothing left beside it, `grouped_mm` never does."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(PAGE)]
    assert [line[:3] for line in cells] == [[f"`{experts}`", TITLES[name], graph] for experts, name, graph in CASES]
    for experts, _, _, *sizes, left in cells:
        whole = [re.fullmatch(r"(\d+) of \1; 1", cell) is not None for cell in sizes]
        assert whole == [experts == "`batched_mm`"] * 2
        assert (left == "nothing") == (experts == "`batched_mm`")


def test_writing_replaces_the_table_alone(tmp_path, monkeypatch):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tensorrt_page, "PAGE", copy)
    tensorrt_page.write_table(BEGIN, HEADER, ["| none |"], END)
    assert table_of(copy) == ["| none |"]
    tensorrt_page.write_table(BEGIN, HEADER, table_of(PAGE), END)
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


@pytest.mark.tensorrt
@needs_torch_tensorrt
def test_an_engine_that_is_not_built_is_told(monkeypatch):
    """Without our form of it DeepSeek's mask of groups is a scatter that TensorRT does not take."""
    from sere_compile.lowering import tensorrt

    kept = {op: body for op, body in tensorrt._OF_MODELS.items() if "scatter.value" not in str(op)}
    monkeypatch.setattr(tensorrt, "_OF_MODELS", kept)
    division = divide(program_of("deepseek_v3", "prefill", "batched_mm", free=False))
    assert division.built == []
    assert [part for part in division.parts if "scatter" in str(part)]
