"""Layers as TensorRT's builder lists them; that real engines list ours is in test_engine.py."""

from __future__ import annotations

from sere_compile.lowering.engine_layers import Layer, Value, read_layers

# Of TensorRT for RTX 1.7.1, without strides and formats of all but one tensor.
LOG = """Layers:
Name: __mye1757_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata:
Name: node_linear_myl0_1, LayerType: gemm, Inputs: [ { Name: hidden, Dimensions: [-1,8], Strides: [8,1], StrideOrder: \
[1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: gate, Dimensions: [8,12], \
Datatype: Float }, { Name: alpha, Dimensions: [1], Datatype: Float }], Outputs: [ { Name: out, Dimensions: [-1,12], \
Datatype: Float }], TacticName: stub, Metadata: [ONNX Layer: node_linear][ONNX Layer: mlp.gate/sere/node_eq]
"""


def test_layers():
    shapes, product = read_layers(LOG)
    assert shapes == Layer("__mye1757_0_myl0_0", "shape_call", (), (), (), ())
    assert not shapes.added
    assert product == Layer(
        "node_linear_myl0_1",
        "gemm",
        ("node_linear", "mlp.gate/sere/node_eq"),
        (Value("hidden", (-1, 8)),),
        (Value("gate", (8, 12)), Value("alpha", (1,))),
        (Value("out", (-1, 12)),),
    )
    assert product.added
