"""`sere export`, on a checkpoint as `save_pretrained` writes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sere_compile.commands.export import export_command
from sere_compile.lowering.standard_operators import sere_nodes
from sere_compile.testing import oracle_routing

from ..test_cli import save, save_dense
from .test_onnx import TOLERANCE, real_model, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A one-layer model, its folder, and its profile with its file."""
    folder = tmp_path_factory.mktemp("export")
    model, profile = real_model("mixtral")
    profile.save(folder / "profile.safetensors")
    return model, save(folder, model), profile, str(folder / "profile.safetensors")


def export(*arguments):
    return CliRunner().invoke(export_command, list(map(str, arguments)))


def test_onnx(checkpoint, tmp_path):
    model, folder, matrices, profile = checkpoint
    out = tmp_path / "model.onnx"
    result = export(
        "--to", "onnx", "--model", folder, "--out", out, "--profile", profile, "--select-top-k", 1, "--min-active", 0
    )
    assert result.exit_code == 0, result.output
    assert "1 gates re-routed, opset 18" in result.output
    ids = torch.randint(0, 90, (3, 4))
    with torch.no_grad(), oracle_routing(model, matrices, 1, min_active=0):
        want = model(ids, use_cache=False).logits
    np.testing.assert_allclose(run(out, ids)[0], want.numpy(), rtol=0, atol=TOLERANCE)


def test_exported_decode_step(checkpoint, tmp_path):
    """A program that another process loads with the operators alone; without a profile the experts are probed."""
    _, folder, _, _ = checkpoint
    out = tmp_path / "model.pt2"
    result = export("--to", "exported", "--model", folder, "--out", out, "--decode", 8)
    assert result.exit_code == 0, result.output
    program = torch.export.load(out)
    assert "torch.ops.sere.reroute.default" in str(program.graph_module.code)
    layer = [torch.zeros(3, 2, 8, 8)]
    logits, (keys,), _ = program.module()(torch.zeros(3, 1, dtype=torch.int64), torch.tensor(0), layer, layer)
    assert logits.shape[0] == 3
    assert keys[:, :, 0].any()
    assert not keys[:, :, 1:].any()


def test_aot_passes_everything_on(checkpoint, tmp_path, monkeypatch):
    """The package is compiled from the re-routed program in the wanted form; compiling has its tests in test_aot."""
    _, folder, _, profile = checkpoint
    programs = []

    def compile_nothing(program, *, package_path, inductor_configs):
        programs.append(program)
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
    out = tmp_path / "model.pt2"
    result = export(
        "--to", "aot", "--model", folder, "--out", out, "--profile", profile, "--select-top-k", 1, "--threshold", 0.25,
        "--min-active", 3, "--experts", "batched_mm",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{out}: AOTInductor package" in result.output
    [program] = programs
    [node] = sere_nodes(program)
    assert node.args[2:5] == (1, 0.25, 3)
    assert "grouped_mm" not in str(program.graph)


def test_no_gates(tmp_path):
    """Exit status 1 for a model without gates, and the model unchanged where that is allowed."""
    command = ["--to", "exported", "--model", save_dense(tmp_path / "dense"), "--out", tmp_path / "model.pt2"]
    refused = export(*command)
    assert refused.exit_code == 1
    assert "no MoE gate" in refused.output
    assert not (tmp_path / "model.pt2").exists()
    assert export(*command, "--allow-no-gates").exit_code == 0
    assert not sere_nodes(torch.export.load(tmp_path / "model.pt2"))


def test_bad_options(checkpoint, tmp_path):
    _, folder, _, _ = checkpoint
    out = ("--model", folder, "--out", tmp_path / "m")
    assert "select_top_k must be" in export("--to", "onnx", *out, "--select-top-k", 0).output
    nowhere = export("--to", "onnx", "--model", folder, "--out", tmp_path / "missing" / "m.onnx")
    assert "--out: there is no folder" in nowhere.output
    unknown = export("--to", "onnx", "--model", tmp_path / "nothing", "--out", tmp_path / "m")
    assert unknown.exit_code == 1
    assert "no causal language model could be loaded from" in unknown.output
    assert "--as-function is for --to onnx" in export("--to", "aot", *out, "--as-function").output
