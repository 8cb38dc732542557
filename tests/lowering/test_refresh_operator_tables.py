"""The script that reads torch_tensorrt's and TensorRT's sources, and the tables it wrote."""

import json
import zipfile

import pytest

from sere_compile.lowering import refresh_operator_tables


def test_refresh(tmp_path):
    """The script that writes the tables, on sources of the same form."""
    wheel = tmp_path / "torch_tensorrt-9.8.7-cp311-none-any.whl"
    converters = (
        "@dynamo_tensorrt_converter(torch.ops.aten.one.default, supports_dynamic_shapes=True)\n"
        "@dynamo_tensorrt_converter(torch.ops.aten.two.default, capability_validator=some)\n"
        "def convert(): ...\n"
        "@dynamo_tensorrt_converter(torch.ops.aten.two.default, supports_dynamic_shapes=True)\n"
        "@dynamo_tensorrt_converter(torch.ops.aten.three.default, supports_dynamic_shapes=False)\n"
        "@dynamo_tensorrt_converter(whatever)\n"
        "def convert_more(): ...\n"
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch_tensorrt/dynamo/conversion/aten_ops_converters.py", converters)
        archive.writestr(
            "torch_tensorrt/dynamo/lowering/_decomposition_groups.py",
            "torch_enabled_decompositions: Set = {aten.b, aten.a.default}\n",
        )
        archive.writestr(
            "torch_tensorrt/dynamo/lowering/_decompositions.py",
            "@register_torch_trt_decomposition(torch.ops.aten.c.default, registry=R)\ndef c(): ...\n"
            "def inplace(aten_op):\n  @register_torch_trt_decomposition(aten_op, registry=R)\n  def d(): ...\n",
        )
    assert refresh_operator_tables.read_wheel(wheel) == {
        "version": "9.8.7",
        "converters": {"aten.one.default": True, "aten.three.default": False, "aten.two.default": True},
        "decompositions": ["aten.a.default", "aten.b"],
        "replaced": ["aten.c.default"],
    }
    text = (
        "TensorRT 10.15 supports operators in the inclusive range of opset 9 to opset 24. More\n"
        "| Operator | Supported | Supported Types | Restrictions |\n|---|---|---|---|\n"
        "| Abs | Y | FP32, INT64 |\n| Det | N |\n| Slice | Y | BOOL | `axes` |\n"
    )
    table = refresh_operator_tables.read_operators(text)
    assert table == {
        "version": "10.15",
        "opsets": [9, 24],
        "operators": {"Abs": ["FP32", "INT64"], "Det": None, "Slice": ["BOOL"]},
    }
    with pytest.raises(ValueError, match="which TensorRT release"):
        refresh_operator_tables.read_operators("| Abs | Y | FP32 |")


def test_tables_name_their_sources():
    tables = json.loads(refresh_operator_tables.TABLES.read_text(encoding="utf-8"))
    assert tables["torch_tensorrt"]["version"] == "2.14.0"
    assert tables["onnx"]["version"] == "10.15"
    assert tables["onnx"]["source"].endswith("onnx-tensorrt")
    assert len(tables["torch_tensorrt"]["converters"]) > 200
    assert len(tables["onnx"]["operators"]) == 200
