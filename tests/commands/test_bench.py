"""`sere bench` without a GPU: options, table, files, exit status."""

import sys
import types

import pytest
import torch
from click.testing import CliRunner

from sere_compile.benchmark import run, variant, vllm_experts
from sere_compile.benchmark.result import Results
from sere_compile.benchmark.timing import machine_name
from sere_compile.cli import main

from ..benchmark.made import results_of, results_row


@pytest.mark.parametrize("agrees", [True, False])
def test_the_command_on_a_checkpoint(subject, without_gpu, monkeypatch, tmp_path, agrees):
    """--model: table, JSON and plot; exit status 1 and no speed-up anywhere when an output of ours is wrong."""
    pytest.importorskip("matplotlib")
    subject.model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(run, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(run, "cache_bytes", lambda: 60_000_000)
    compiled = variant.Variant.compiled

    def perhaps_wrong(self, function):
        function = compiled(self, function)
        return function if agrees or self.name != "sere S=1" else lambda x: function(x) * 1.2

    monkeypatch.setattr(variant.Variant, "compiled", perhaps_wrong)
    paths = [str(tmp_path / name) for name in ("bench.json", "bench.png")]
    options = ["--what", "layer", "--batch", "5", "--select-top-k", "K,1", "--stock", "grouped_mm"]
    options += ["--model", str(tmp_path / "model"), "--json", paths[0], "--plot", paths[1]]
    done = CliRunner().invoke(main, ["bench", *options])
    assert done.exit_code == (0 if agrees else 1), done.output
    results = Results.load(paths[0])
    speedups = {results.speedup(row) for row in results.rows if row.ours}
    assert speedups == ({2.0} if agrees else {None})
    assert ("| 2.00 |" in done.output, "DISAGREES" in done.output) == (agrees, not agrees)
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_nothing_is_measured_twice(subject, monkeypatch):
    """However often it is asked for; without --layers a geometry has twelve, on a CPU two."""
    given = []
    monkeypatch.setattr(run, "begin", lambda _: results_of([results_row()]))
    monkeypatch.setattr(run, "run_bench", lambda *arguments: given.extend(arguments[2:5]))
    monkeypatch.setattr("sere_compile.benchmark.subject.random_model", lambda *arguments: given.append(arguments))
    options = ["--what", "layer,gating,layer", "--batch", "3,5,3", "--select-top-k", "K,1,1"]
    done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b", *options])
    assert done.exit_code == 0, done.output
    assert given == [("mixtral-8x7b", 12 if torch.cuda.is_available() else 2), ["layer", "gating"], [3, 5], [10**6, 1]]


def test_the_table_is_printed_though_a_file_fails(subject, monkeypatch, tmp_path, no_room):
    """A disk that is full when the work is done."""
    monkeypatch.setattr(run, "begin", lambda _: results_of([results_row()]))
    monkeypatch.setattr(run, "run_bench", lambda *_: None)
    monkeypatch.setattr("sere_compile.benchmark.subject.random_model", lambda *_: subject)
    out = tmp_path / "bench.json"
    with no_room():
        done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b", "--json", str(out)])
    assert done.exit_code == 1
    assert "| 8 | sere S=2 |" in done.output
    assert f"Error: {out} could not be written: File too large" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --geometry or --model"),
        (["--geometry", "mixtral-8x7b", "--model", "x"], "give either --geometry or --model"),
        (["--geometry", "mixtral-8x7b", "--batch", "8,x"], "'8,x' is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "²"], "'²' is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "9" * 5000], "is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "K"], "'K' is not a list of positive whole numbers"),
        (["--model", "x", "--layers", "40"], "--layers is for --geometry"),
        (["--geometry", "mixtral-8x7b", "--what", "layers"], "'layers' is none of"),
        (["--geometry", "mixtral-8x7b", "--profile", __file__], "--profile is for --model"),
        (["--geometry", "mixtral-8x7b", "--stock", "grouped_mm, batched"], "--stock: 'batched' is none of eager, "),
    ],
)
def test_wrong_options(arguments, message):
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_without_transformers_the_command_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b"])
    assert done.exit_code == 1
    assert "pip install 'sere-compile[hf]'" in done.output


@pytest.mark.parametrize("asked", [True, False])
def test_where_vllm_is_installed_its_kernel_is_compared_with(subject, monkeypatch, asked):
    """By default where it computes the model's experts, with a note where it does not; an error if it was asked for."""
    given, names = [], []
    monkeypatch.setattr(vllm_experts, "is_at_hand", lambda: True)
    monkeypatch.setattr(vllm_experts, "register", lambda: names.append("vllm"))
    monkeypatch.setattr(
        "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
        types.SimpleNamespace(valid_keys=lambda: ["grouped_mm", "batched_mm", *names]),
    )
    monkeypatch.setattr(run, "begin", lambda _: results_of([results_row()]))
    monkeypatch.setattr(run, "run_bench", lambda results, *rest: given.append((rest[4], results.notes)))
    monkeypatch.setattr("sere_compile.benchmark.subject.random_model", lambda *_: subject)
    options = ["bench", "--geometry", "mixtral-8x7b", *(["--stock", "vllm"] if asked else [])]
    for reason in ("", "of another layout"):
        monkeypatch.setattr(vllm_experts, "cannot_run", lambda _, reason=reason: reason)
        done = CliRunner().invoke(main, options)
        assert done.exit_code == (1 if asked and reason else 0), done.output
        assert ("--stock vllm: of another layout" in done.output) == (asked and bool(reason))
    if asked:
        assert given == [(["vllm"], [])]
    else:
        stock = ["grouped_mm", "batched_mm"]
        assert given == [([*stock, "vllm"], []), (stock, ["without vLLM's kernel: of another layout"])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.slow
def test_a_cpu_is_measured(subject, tmp_path):
    """Real clocks, the eager backend inside: every variant, the machine's name, ratios of one run."""
    subject.model.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "INNER", "eager")
        patch.setattr(run, "copy_bandwidth", lambda: 1e10)
        options = ["--what", "gating,layer,decode", "--batch", "3", "--select-top-k", "1", "--stock", "grouped_mm"]
        out = tmp_path / "bench.json"
        done = CliRunner().invoke(main, ["bench", "--model", str(tmp_path), "--json", str(out), *options])
    torch._dynamo.reset()
    assert done.exit_code == 0, done.output
    results = Results.load(out)
    assert results.machine.startswith(f"{machine_name()}, torch ")
    assert f"{results.machine}, copy 10.0 GB/s" in done.output
    assert {row.what for row in results.rows} == {"gating", "without gating", "MoE layer", "decode step"}
    assert all(row.timing.low > 0 for row in results.rows)
    assert all(results.speedup(row) for row in results.rows if row.ours)
