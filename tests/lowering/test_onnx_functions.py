"""Functions of the domain `sere` in ONNX files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from sere_compile import SereConfig, SimilarityProfile

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
%1 = Transpose(%0, perm=[1, 0])
%2 = Slice(%1, [0], [1], [0], [1])
%3 = Unsqueeze(%2, [1])
%4 = Equal(%3, [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9], [10], [11]])
%5 = Cast(%4, to=6)
%6 = ReduceMax(%5, [2], keepdims=0)
%7 = ReduceMax(%6, [0], keepdims=0)
%8 = Greater(%7, 0)
%9 = Greater(similarity, -inf)
%10 = And(%8, %9)
%11 = Where(%10, similarity, -inf)
%12 = ReduceMax(%11, [1], keepdims=0)
%13 = ArgMax(%11, axis=1, keepdims=0, select_last_index=0)
%14 = Equal(%12, -inf)
%15 = Or(%8, %14)
%16 = Where(%15, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], %13)
%17 = GreaterOrEqual(%0, 0)
%18 = Less(%0, 12)
%19 = And(%17, %18)
%20 = Where(%19, %0, 0)
%21 = Unsqueeze(%20, [-1])
%22 = GatherND(%16, %21, batch_dims=0)
new_ids = Where(%19, %22, %0)
""",
    )
    assert done.operators_in_functions == sum(node.op_type != "Constant" for node in function.node)


class Padded(nn.Module):
    """Calls the operator itself, with padding."""

    def forward(self, ids, similarity, real):
        return torch.ops.sere.reroute(ids, similarity, 1, 0.0, 0, real)


@pytest.mark.slow
def test_token_mask(tmp_path):
    """An operator that marks padding, written out and as a function."""
    ids, real = torch.tensor([[0, 1], [2, 3], [1, 4]]), torch.tensor([True, False, True])
    inputs = (ids, small_profile()["gate.weight"], real)
    program = torch.export.export(Padded(), inputs)
    wanted = Padded()(*inputs)
    assert not torch.equal(wanted, torch.ops.sere.reroute(*inputs[:2], 1))
    for as_function in (False, True):
        done = lowering.export(program, None, tmp_path / "m.onnx", as_function=as_function)
        np.testing.assert_array_equal(run(done.path, *inputs)[0], wanted.numpy())


@pytest.mark.slow
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
