"""`sere export --check` says yes to a right file and no to a wrong one."""

from __future__ import annotations

import pytest
import torch

from sere_compile import SereConfig, attach
from sere_compile.errors import LoweringError
from sere_compile.lowering.check import largest_difference
from sere_compile.lowering.export import export_rewritten
from sere_compile.lowering.prefill import Prefill

from .test_onnx import real_model


class Wrong(torch.nn.Module):
    """A program that is not the one the file was made of."""

    def __init__(self, program):
        super().__init__()
        self.inner = program.module()

    def forward(self, *inputs):
        return self.inner(*inputs) * 1.01


def test_a_difference_is_seen():
    model, matrices = real_model("mixtral")
    attach(model, matrices)
    module = Prefill(model).eval()
    program = export_rewritten(
        module, module.example_inputs(), config=SereConfig(select_top_k=1), dynamic_shapes="auto", experts="batched_mm"
    )
    wrong = torch.export.export(Wrong(program), module.example_inputs(), dynamic_shapes=((module.dynamic_shapes()),))

    def run(*inputs):
        return [program.module()(*inputs)]

    assert largest_difference(program, run, module) == 0
    with pytest.raises(LoweringError, match=r"does not compute what the model computes: a logit of 1 rows differs by"):
        largest_difference(wrong, run, module)
    with pytest.raises(LoweringError, match=r"\d+ logits are not finite"):
        largest_difference(program, lambda *inputs: [run(*inputs)[0] / 0], module)
