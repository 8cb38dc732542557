"""The lines that load a file are Python and call it; that they run is in tests/commands/test_export.py."""

from __future__ import annotations

import ast

import pytest
import torch

from sere_compile.lowering.loading import TARGETS, imports_of, load, snippet

STEP = (torch.zeros(2, 1, dtype=torch.int64), torch.tensor(0), [torch.zeros(2, 4, 6, 8, dtype=torch.float16)])


@pytest.mark.parametrize("target", TARGETS)
def test_lines(target):
    lines = snippet(target, 'a "b".pt2', STEP, ["input_ids", "position", "past_key_values.0.key"])
    constants = [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]
    assert 'a "b".pt2' in constants
    assert "torch.zeros(2, 4, 6, 8, dtype=torch.float16)" in lines
    assert ("past_key_values.0.key" in constants) == (target == "onnx")
    assert ("import sere_compile.ops" in lines) == (target == "exported")


def test_a_program_is_loaded(tmp_path):
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    [out] = load("exported", str(tmp_path / "m.pt2"))(torch.ones(1, 3))
    torch.testing.assert_close(out, program.module()(torch.ones(1, 3)).detach())
    assert not out.requires_grad


class _Grouped(torch.nn.Module):
    def forward(self, x, weight, ends):
        return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


@pytest.mark.parametrize("target", ["aot", "exported"])
def test_what_a_file_calls_and_does_not_hold_is_imported(target):
    """The name alone is needed: without it torch.export.load and aoti_load_package find no such operator."""
    pytest.importorskip("transformers.integrations.moe")
    args = torch.ones(4, 3), torch.ones(2, 3, 5), torch.tensor([1, 4], dtype=torch.int32)
    needed = imports_of(torch.export.export(_Grouped(), args))
    lines = snippet(target, "m.pt2", args[:1], ["x"], needed)
    [at] = [number for number, line in enumerate(lines.splitlines()) if "load" in line]
    assert any(line.startswith("import transformers.integrations.moe") for line in lines.splitlines()[:at])
    assert not imports_of(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)))
