"""Every lowering of every model gives the oracle's ids exactly and its logits to 1e-4, as docs/lowering.md says.

What costs an AOTInductor package or minutes of ONNX translation runs in the lane `wide`.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.torch_version import TorchVersion

from benchmarks.lowering_page import (
    GRAPHS,
    PAGE,
    TOLERANCE,
    Case,
    aot_package,
    exported_program,
    onnx_file,
    table_of,
    tensorrt_program,
)

from ..tiny_models import MODELS

# One of the six runs by default.
CASES = [
    pytest.param(model, graph, marks=() if (model, graph) == ("mixtral", "prefill") else pytest.mark.wide)
    for model in MODELS
    for graph in GRAPHS
]
every_case = pytest.mark.parametrize(("model", "graph"), CASES)


# "Constraints violated (length)" for these models; with Dim.DYNAMIC, as `sere export` has it, they trace.
NAMED_LENGTHS = TorchVersion(torch.__version__) >= "2.13"


@functools.cache
def case(model, graph):
    if graph == "prefill" and not NAMED_LENGTHS:
        pytest.skip("torch.export before 2.13 refuses a length between bounds")
    return Case(model, graph)


def check(rows):
    """Each row agrees with the oracle, and stands in the page but for the last digits of its difference."""
    for row in rows:
        assert row.ids_equal
        assert row.difference <= TOLERANCE
        *cells, _, added = [cell.strip() for cell in str(row).strip("|").split("|")]
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(PAGE)]
        [documented] = [line for line in lines if line[:3] == cells[:3]]
        assert documented[:-2] == cells
        assert documented[-1] == added
        assert float(documented[-2]) <= TOLERANCE


@every_case
def test_exported_program(model, graph):
    """The program of `rewrite`."""
    check(exported_program(case(model, graph)))


@pytest.mark.wide
@every_case
def test_tensorrt_program(model, graph):
    """The program that torch_tensorrt would be given, whose operators all have a converter."""
    check(tensorrt_program(case(model, graph)))


@pytest.mark.wide
@every_case
def test_onnx_file(model, graph, tmp_path):
    """onnxruntime, for batch sizes that were not traced; every operator in it is on TensorRT's list."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    check(onnx_file(case(model, graph), tmp_path))


@pytest.mark.wide
@every_case
def test_aot_package(model, graph, tmp_path):
    """AOTInductor, from Python and from C++."""
    check(aot_package(case(model, graph), tmp_path))


def test_every_row_is_measured():
    """The page has no line that nothing measures."""
    assert len(table_of(PAGE)) == len(MODELS) * len(GRAPHS) * 5
