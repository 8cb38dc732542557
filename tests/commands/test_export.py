"""`sere export`, on a checkpoint as `save_pretrained` writes it."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sere_compile.commands.export import export_command
from sere_compile.integrations.transformers import load_causal_lm
from sere_compile.lowering.standard_operators import sere_nodes
from sere_compile.similarity.threshold import RANKED_THRESHOLD
from sere_compile.testing import oracle_routing

from .. import tiny_models
from ..lowering.test_onnx import TOLERANCE, real_model, run
from .test_explain import save, save_dense

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")

KINDS_OF_BUFFERS = ("similarity", "projection")


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
    assert "no --profile" not in result.output
    ids = torch.randint(0, 90, (3, 4))
    with torch.no_grad(), oracle_routing(model, matrices, 1, min_active=0):
        want = model(ids, use_cache=False).logits
    np.testing.assert_allclose(run(out, ids, torch.ones_like(ids))[0], want.numpy(), rtol=0, atol=TOLERANCE)
    graph = onnx.load(out).graph
    shapes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in [*graph.input, *graph.output]}  # fmt: skip
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", tiny_models.VOCABULARY],
    }


@pytest.mark.parametrize(
    ("target", "options"),
    [
        pytest.param("exported", [], marks=pytest.mark.slow),
        pytest.param("exported", ["--experts", "grouped_mm"], marks=pytest.mark.slow),
        pytest.param("onnx", ["--decode", 6], marks=pytest.mark.slow),
        pytest.param("onnx", [], marks=pytest.mark.slow),
        pytest.param("onnx", ["--as-function"], marks=pytest.mark.slow),
        pytest.param("exported", ["--decode", 6], marks=pytest.mark.slow),
        pytest.param("aot", [], marks=pytest.mark.wide),
        pytest.param("aot", ["--experts", "grouped_mm"], marks=pytest.mark.wide),
        pytest.param("aot", ["--decode", 6], marks=pytest.mark.wide),
    ],
)
def test_what_is_printed_loads_the_file(checkpoint, tmp_path, target, options):
    """The very lines, in a fresh process; and --check has run the file. Padding and all, as --check gives it."""
    _, folder, _, profile = checkpoint
    out = tmp_path / ("m.onnx" if target == "onnx" else "m.pt2")
    result = export(
        "--to", target, "--model", folder, "--out", out, "--profile", profile, "--select-top-k", 1, "--min-active", 0,
        "--check", *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary, _, lines = result.stdout.partition("\n\n")
    assert "1 gates re-routed" in summary
    assert float(re.search(r"logits within (\S+)", summary)[1]) < TOLERANCE
    printed = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip() == str((2, tiny_models.VOCABULARY) if options[:1] == ["--decode"] else
                                         (2, 8, tiny_models.VOCABULARY))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["conditional", "onnxruntime_moe"])
def test_experts_and_nothing_to_reroute(checkpoint, tmp_path, experts):
    """S = K: the file computes the model itself, and is not re-routed by the defaults when it is written."""
    _, folder, _, profile = checkpoint
    arguments = ("--to", "onnx", "--model", folder, "--profile", profile, "--select-top-k", 2, "--experts", experts)
    result = export(*arguments, "--out", tmp_path / "m.onnx", "--check")
    assert result.exit_code == 0, result.output
    assert "0 gates re-routed" in result.output
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert ("If" if experts == "conditional" else "MoE") in operators
    assert "ArgMax" not in operators
    result = export("--to", "aot", "--model", folder, "--experts", experts, "--out", tmp_path / "m.pt2")
    assert f"--experts {experts} is for --to onnx" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts(checkpoint, tmp_path, bits):
    """--check says by how much they differ and of how many bits they are, and does not take that for a fault."""
    _, folder, _, profile = checkpoint
    result = export(
        "--to", "onnx", "--model", folder, "--profile", profile, "--select-top-k", 1, "--out", tmp_path / "m.onnx",
        "--experts", f"onnxruntime_qmoe{bits}", "--check",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f", weights of experts having {bits} bits" in result.output
    assert float(re.search(r"logits within (\S+),", result.output)[1]) > TOLERANCE


@pytest.mark.slow
def test_model_of_the_package(tmp_path):
    """Without --model the trained one, in float32; with a projection and a share for rho it equals the oracle."""
    out = tmp_path / "model.pt2"
    result = export("--to", "exported", "--out", out, "--select-top-k", 1, "--min-active", 0, "--threshold", "q0.25",
                    "--substitution", "projection")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 gates re-routed" in result.output
    program = torch.export.load(out)
    model, tokenizer = load_causal_lm("qwen3", dtype=torch.float32, device="cpu")
    names = [f"model.layers.{i}.mlp.gate.weight" for i in range(4)]
    buffers = [{n: program.state_dict[f"sere_{kind}_{i}"] for i, n in enumerate(names)} for kind in KINDS_OF_BUFFERS]
    ids = tokenizer("def __init__(self, name):", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with oracle_routing(model, buffers[0], 1, RANKED_THRESHOLD, min_active=0, projections=buffers[1]):
            expected = model(ids, use_cache=False).logits
    got = program.module()(ids, torch.ones_like(ids))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(got, plain, atol=0.1)


def test_exported_decode_step(checkpoint, tmp_path):
    """A program that another process loads with the operators alone; without a profile the experts are probed."""
    _, folder, _, _ = checkpoint
    out = tmp_path / "model.pt2"
    result = export("--to", "exported", "--model", folder, "--out", out, "--decode", 8)
    assert result.exit_code == 0, result.output
    assert "no --profile: similarity is that of the experts on random" in result.stderr
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

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
    out = tmp_path / "model.pt2"
    result = export(
        "--to", "aot", "--model", folder, "--out", out, "--profile", profile, "--select-top-k", 1, "--threshold", 0.25,
        "--min-active", 3, "--experts", "batched_mm",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{out}: 1 gates re-routed, AOTInductor package" in result.output
    [program] = programs
    [node] = sere_nodes(program)
    assert node.args[2:5] == (1, 0.25, 3)
    assert "grouped_mm" not in str(program.graph)


@pytest.mark.parametrize("target", ["exported", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_earlier_file(checkpoint, tmp_path, no_room, target):
    """One line of ours; torch's own writer of programs would end the process."""
    _, folder, _, profile = checkpoint
    out = tmp_path / ("model.onnx" if target == "onnx" else "model.pt2")
    out.write_bytes(b"old")
    with no_room():
        result = export("--to", target, "--model", folder, "--out", out, "--profile", profile)
    assert result.exit_code == 1
    assert f"{out} could not be written: File too large" in result.output
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {out.name: b"old"}


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
    assert f"Invalid value for '--out': there is no folder {tmp_path / 'missing'}" in nowhere.output
    unknown = export("--to", "onnx", "--model", tmp_path / "nothing", "--out", tmp_path / "m")
    assert unknown.exit_code == 1
    assert "no causal language model could be loaded from" in unknown.output
    assert "--as-function is for --to onnx" in export("--to", "aot", *out, "--as-function").output
    for target, name in (("aot", "m"), ("aot", "m.onnx"), ("onnx", "m.pt2"), ("exported", "m.onnx")):
        told = export("--to", target, "--model", folder, "--out", tmp_path / name).output
        assert f"{name}: --to {target} writes a" in told
    assert "ONNX has no operator for it" in export("--to", "onnx", *out, "--experts", "grouped_mm").output


@pytest.mark.slow
def test_options_by_gate(checkpoint, tmp_path):
    """A budget for all, numbers for one gate: what reaches the operator is the gate's own."""
    _, folder, _, profile = checkpoint
    out = tmp_path / "m.pt2"
    command = ["--to", "exported", "--model", folder, "--out", out, "--profile", profile]
    budget = ["--select-top-k", "auto", "--max-active", 5]
    assert export(*command, *budget).exit_code == 0
    [node] = sere_nodes(torch.export.load(out))
    assert node.kwargs.keys() == {"max_active", "token_mask"}
    assert node.kwargs["max_active"] == 5
    assert export(*command, *budget, "--per-gate", '{"*.0.*": {"select_top_k": 1, "threshold": 0.25}}').exit_code == 0
    [node] = sere_nodes(torch.export.load(out))
    assert node.args[2:4] == (1, 0.25)
    assert node.kwargs.keys() == {"token_mask"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--threshold", "qq"], "threshold must be a finite number, or a share of a gate's experts"),
        (["--threshold", "low"], "Invalid value for '--threshold'"),
        (["--select-top-k", "most"], "Invalid value for '--select-top-k'"),
        (["--select-top-k", "auto"], "max_active go together"),
        (["--per-gate", "{"], "Invalid value for '--per-gate'"),
        (["--per-gate", '{"*": {"inner": "eager"}}'], "'inner' is no option of a gate"),
        (["--max-tokens", "8"], "No such option"),
        (["--decode", 0], "Invalid value for '--decode'"),
        (["--dtype", "bfloat"], "floating-point type of torch of 16 bits or more such as bfloat16, got 'bfloat'"),
        (["--dtype", "float8_e4m3fn"], "of 16 bits or more such as bfloat16, got 'float8_e4m3fn'"),
        (["--dtype", "int8"], "dtype must be auto or a floating-point type of torch"),
        (["--substitution", "projection"], "needs projection coefficients, and this profile has none"),
    ],
)
def test_options_out_of_range(checkpoint, tmp_path, options, told):
    _, folder, _, profile = checkpoint
    command = ["--to", "exported", "--model", folder, "--out", tmp_path / "m.pt2", "--profile", profile]
    result = export(*command, *options)
    assert result.exit_code != 0
    assert told in result.output
    assert not (tmp_path / "m.pt2").exists()
