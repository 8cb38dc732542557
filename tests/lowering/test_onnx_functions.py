"""Functions of the domain `sere` in ONNX files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from sere_compile import SereConfig, SimilarityProfile
from sere_compile.errors import LoweringError

from .models import SmallMoE, hidden_states, small_profile
from .test_onnx import export_small, lowering, onnx, run


def test_function(tmp_path):
    """The re-routing region: what `as_function=True` shows as one node, and what it adds otherwise."""
    done = export_small(tmp_path, config=SereConfig(select_top_k=1, min_active=0), as_function=True)
    (function,) = onnx.load(done.path).functions
    assert function.doc_string == "SERE: select_top_k=1 of 4 slots, threshold=0.0, min_active=0, 12 experts"
    assert_expected_inline(
        node_list(function),
        """\
%0 = Reshape(topk_ids, [-1, 4], allowzero=1)
%1 = Slice(%0, [0], [1], [1], [1])
%2 = GreaterOrEqual(%1, 0)
%3 = Less(%1, 12)
%4 = And(%2, %3)
%5 = Where(%4, %1, 12)
%6 = Transpose(%5, perm=[1, 0])
%7 = Shape(%6, start=0)
%8 = ConstantOfShape(%7)
%9 = ScatterElements([[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], %6, %8, axis=1, reduction=b'none')
%10 = Slice(%9, [0], [12], [1], [1])
%11 = ReduceMax(%10, [0], keepdims=0)
%12 = Greater(%11, 0)
%13 = Greater(similarity, -inf)
%14 = And(%12, %13)
%15 = Where(%14, similarity, -inf)
%16 = ReduceMax(%15, [1], keepdims=0)
%17 = ArgMax(%15, axis=1, keepdims=0, select_last_index=0)
%18 = Equal(%16, -inf)
%19 = Or(%12, %18)
%20 = Where(%19, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], %17)
%21 = GreaterOrEqual(%0, 0)
%22 = Less(%0, 12)
%23 = And(%21, %22)
%24 = Where(%23, %0, 0)
%25 = Unsqueeze(%24, [-1])
%26 = GatherND(%20, %25, batch_dims=0)
new_ids = Where(%23, %26, %0)
""",
    )
    assert done.operators_in_functions == sum(node.op_type != "Constant" for node in function.node)


class Padded(nn.Module):
    """Calls the operator itself, with padding."""

    def forward(self, ids, similarity, real):
        return torch.ops.sere.reroute(ids, similarity, 1, 0.0, 0, real)


def test_token_mask(tmp_path):
    """An operator that marks padding is written out, and refused as a function."""
    ids, real = torch.tensor([[0, 1], [2, 3], [1, 4]]), torch.tensor([True, False, True])
    inputs = (ids, small_profile()["gate.weight"], real)
    program = torch.export.export(Padded(), inputs)
    done = lowering.export(program, None, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(done.path, *inputs)[0], Padded()(*inputs).numpy())
    with pytest.raises(LoweringError, match="takes no token_mask; export without as_function"):
        lowering.export(program, None, tmp_path / "m.onnx", as_function=True)


def test_each_setting_has_its_function(tmp_path):
    """Gates that differ in their number of experts cannot share a body; equal ones do."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = SmallMoE(), SmallMoE(), SmallMoE()
            for name in ("gate.weight", "experts"):
                parameter = self.third.get_parameter(name)
                parameter.data = parameter.data[:9]

        def forward(self, hidden):
            return self.third(self.second(self.first(hidden)))

    matrix = small_profile()["gate.weight"]
    profile = SimilarityProfile(
        {"first.gate.weight": matrix, "second.gate.weight": matrix, "third.gate.weight": matrix[:9, :9]}
    )
    model = Three().eval()
    done = export_small(tmp_path, model, profile=profile, config=SereConfig(select_top_k=1), as_function=True)
    graph = onnx.load(done.path)
    assert [node.op_type for node in graph.graph.node if node.domain == "sere"] == ["reroute", "reroute", "reroute_2"]
    assert {function.name for function in graph.functions} == {"reroute", "reroute_2"}
    run(done.path, hidden_states(3))


def node_list(function):
    """A function's nodes with values numbered anew and constants in place."""
    names = {name: name for name in function.input}
    lines = []
    for node in function.node:
        if node.op_type == "Constant":
            value = onnx.numpy_helper.to_array(node.attribute[0].t)
            names[node.output[0]] = str(value.tolist())
            continue
        for output in node.output:
            names[output] = f"%{len(lines)}" if output not in function.output else output
        inputs = [names[name] for name in node.input if name]
        attributes = [f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in node.attribute if a.type != a.TENSOR]
        lines.append(f"{names[node.output[0]]} = {node.op_type}({', '.join(inputs + sorted(attributes))})")
    return "\n".join(lines) + "\n"
