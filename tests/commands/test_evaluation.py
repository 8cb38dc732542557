"""`sere eval`, `sere sweep` and `sere plot` on a checkpoint."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sere_compile import EvaluationError, MissingExtraError, OutputError, SereConfig, SimilarityProfile
from sere_compile.cli import main
from sere_compile.evaluation.plots import pareto_front, plot_sweep
from sere_compile.evaluation.sweep import SweepRow, read_csv, recommend, write_csv
from sere_compile.evaluation.text import mixed_windows, read_texts, token_windows

from ..tiny_models import build, gate_names, random_profile


def tokenizer():
    words = {word: i for i, word in enumerate(["<end>", "<unk>", *"abcdefghij"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    model = build("qwen3_moe")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    profile = random_profile(model)
    coefficients = {name: matrix / 2 for name, matrix in profile.items()}
    SimilarityProfile(profile, {"method": "chance"}, coefficients).save(folder / "profile.safetensors")
    lines = [json.dumps({"text": " ".join("abcdefghij"[i % 7 :] * 3)}) for i in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def sere(subject, command, *arguments):
    options = ["--model", subject / "model", "--profile", subject / "profile.safetensors"]
    options += ["--data", subject / "text.jsonl", "--length", 6, "--sequences", 8]
    return CliRunner().invoke(main, [command, *map(str, [*options, *arguments])])


def test_eval_prints_quality_and_active_experts(subject):
    result = sere(subject, "eval", "--batch", 4, "--select-top-k", 1)
    assert result.exit_code == 0, result.output
    assert "at decode batch 4" in result.output
    assert all(f"{gate}: active experts" in result.output for gate in gate_names())


def test_eval_takes_every_option_of_re_routing(subject):
    """A bad one is an error before anything is loaded."""
    first, second = gate_names()
    options = ["--select-top-k", "auto", "--max-active", 6, "--threshold", "q0.4", "--substitution", "projection"]
    options += ["--min-active", 0, "--per-gate", json.dumps({first: {"select_top_k": 4}})]
    result = sere(subject, "eval", "--batch", 4, *options)
    assert result.exit_code == 0, result.output
    changes = dict(line.strip().split(": active experts ") for line in result.stdout.splitlines()[1:])
    before, after = changes[first].split(" -> ")
    assert before == after
    before, after = map(float, changes[second].split(" -> "))
    assert after < before
    for bad, message in ((["--threshold", "q2"], "q2"), (["--select-top-k", "auto"], "max_active go together")):
        refused = sere(subject, "eval", *bad)
        assert refused.exit_code == 1
        assert message in refused.output


def test_decoding_batches_of_several_files_are_mixed(subject):
    """Sequences of the files stand in turn; a share that does not come out is an error."""
    paths = [subject / "text.jsonl", subject / "text.jsonl"]
    both = mixed_windows(tokenizer(), paths, "text", 6, 8)
    assert torch.equal(both[::2], both[1::2])
    assert torch.equal(both[::2], mixed_windows(tokenizer(), paths[:1], "text", 6, 4))
    result = sere(subject, "eval", "--data", paths[0], "--batch", 4, "--sequences", 7)
    assert "7 sequences cannot be shared evenly by 2 files" in result.output


def test_sweep_writes_a_table_and_recommends(subject, tmp_path):
    out = tmp_path / "sweep.csv"
    arguments = ["--select-top-k", "1,4", "--max-active", 6, "--threshold", "0,q0.4", "--substitution", "both"]
    result = sere(subject, "sweep", "--batch", "2,4", "--budget", 1e9, "--csv", out, *arguments)
    assert result.exit_code == 0, result.output
    rows = read_csv(out)
    assert len(rows) == 2 * 2 * 3 * 2
    assert {(row.select_top_k, row.max_active) for row in rows} == {("1", ""), ("4", ""), ("auto", "6")}
    assert {(row.rule, row.similarity) for row in rows} == {("reroute", "chance"), ("projection", "chance")}
    assert {row.threshold for row in rows} == {"0", "q0.4"}
    assert all((row.perplexity_change, row.kl) == (0, 0) for row in rows if row.select_top_k == "4")
    assert "decode batch 2: options={'select_top_k': 1" in result.output
    assert "decode batch 4: options={'select_top_k': 1" in result.output


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_a_table_is_printed_though_its_file_fails(subject, tmp_path, no_room, command):
    """A disk that is full when the work is done; what it gave stands on the screen, the recommendation, too."""
    out = tmp_path / "rows.csv"
    with no_room():
        result = sere(subject, command, "--batch", 4, "--select-top-k", 1, "--csv", out)
    assert result.exit_code == 1
    assert "| reroute |" in result.output
    assert ("decode batch 4: " in result.output) == (command == "sweep")
    assert f"Error: {out} could not be written: File too large" in result.output


def test_compare_runs_every_rule(subject, tmp_path, monkeypatch):
    """Those of docs/quality.md, and one of the user's own; nothing is lost at S = K."""
    (tmp_path / "own.py").write_text(
        "from sere_compile.evaluation import TopS\ndef last_resort(profile, s): return TopS(s)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "rows.csv"
    options = ["--batch", 4, "--select-top-k", "1,4", "--fill", "1", "--csv", out, "--rule", "own:last_resort"]
    result = sere(subject, "compare", *options)
    assert result.exit_code == 0, result.output
    rows = {(row.rule, row.similarity, row.select_top_k): row for row in read_csv(out)}
    assert {"naive top-S", "drop", "drop, renormalised", "fill", "reroute", "projection"} < {
        rule for rule, _, _ in rows
    }
    assert rows["own:last_resort", "profile", "1"].kl == rows["naive top-S", "", "1"].kl > 0
    assert ("reroute", "random 2", "1") in rows
    assert all(row.kl == 0 for (_, _, select), row in rows.items() if select == "4")
    twice = sere(subject, "compare", "--calibrate-on", subject / "text.jsonl")
    assert twice.exit_code == 2
    assert "either --profile or --calibrate-on" in twice.output
    unknown = sere(subject, "compare", "--rule", "nowhere:rule")
    assert "'nowhere:rule' is not MODULE:FUNCTION" in unknown.output


def test_compare_calibrates_by_itself(subject):
    """One command from a model and texts to the whole table."""
    text = subject / "text.jsonl"
    options = ["--model", subject / "model", "--data", text, "--calibrate-on", text, "--calibration-sequences", 2]
    options += ["--length", 6, "--sequences", 4, "--batch", 4, "--select-top-k", 1]
    result = CliRunner().invoke(main, ["compare", *map(str, options)])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ")[:2] for line in result.stdout.splitlines()[2:]]
    for similarity in ("frobenius", "cosine", "cka", "data-free", "random 0"):
        assert ["| reroute", similarity] in rows
        assert ["| projection", similarity] in rows


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {"select_top_k": 1}),
        ({"threshold": "0.5"}, {"select_top_k": 1, "threshold": 0.5}),
        ({"threshold": "q0.2", "rule": "projection"},
         {"select_top_k": 1, "threshold": "q0.2", "substitution": "projection"}),
        ({"select_top_k": "auto", "max_active": "7"}, {"select_top_k": "auto", "max_active": 7}),
    ],
)  # fmt: skip
def test_a_row_says_what_to_give_the_backend(columns, options):
    found = replace(row(4, 5.0, 0.02), **columns).options
    assert found == options
    SereConfig(**found)


def test_per_layer_spends_no_more_than_the_budget(subject):
    """With no budget but for what costs nothing, and with all the budget there is."""
    everything = sere(subject, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1,2", "--budget", 1e9)
    assert everything.exit_code == 0, everything.output
    settings = json.loads(everything.stdout[everything.stdout.index("{") :])
    assert settings["per_gate"] == {gate: {"select_top_k": 1} for gate in gate_names()}
    assert SereConfig(**settings).for_gate("another").resolved_top_k(4) == 4
    nothing = sere(subject, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1", "--budget", -99)
    assert f"left as they are: {', '.join(gate_names())}" in nothing.output


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sweep", ["--batch", "0"], "'0' is not a list of positive whole numbers such as 4,16"),
        ("sweep", ["--batch", "4,-4"], "'4,-4' is not a list of positive whole numbers"),
        ("sweep", ["--batch", ""], "'' is not a list of positive whole numbers"),
        ("sweep", ["--batch", "", "--per-layer"], "'' is not a list of positive whole numbers"),
        ("sweep", ["--threshold", "", "--per-layer"], "'' is not a list of numbers"),
        ("sweep", ["--select-top-k", ""], "--select-top-k is empty, and so is --max-active"),
        ("sweep", ["--select-top-k", "", "--per-layer"], "--select-top-k is empty"),
        ("sweep", ["--budget", "nan"], "--budget is nan"),
        ("compare", ["--batch", "0"], "'0' is not a list of positive whole numbers"),
        ("compare", ["--select-top-k", "0"], "'0' is not a list of positive whole numbers"),
        ("compare", ["--threshold", ""], "'' is not a list of numbers"),
        ("compare", ["--fill", "nan"], "'nan' is not a list of numbers"),
        ("compare", ["--calibration-sequences", "0"], "0 is not in the range x>=1"),
        ("compare", ["--calibration-sequences", "-4"], "-4 is not in the range x>=1"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, command, options, message):
    """Before a model is loaded: there is none."""
    (tmp_path / "model").mkdir()
    result = sere(tmp_path, command, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_threshold_that_is_no_number_is_refused_before_anything_is_loaded(subject, tmp_path):
    """By `plot`, too, whose picture would show nothing of it."""
    out = tmp_path / "heat.png"
    plotted = CliRunner().invoke(
        main, ["plot", str(subject / "profile.safetensors"), "-o", str(out), "--threshold", "nan"]
    )
    (tmp_path / "model").mkdir()
    for result in (plotted, sere(tmp_path, "compare", "--threshold", "nan")):
        assert result.exit_code == 1
        assert "threshold must be a finite number" in result.output
    assert not out.exists()


def test_each_value_is_taken_once(subject):
    result = sere(subject, "sweep", "--batch", "4,4", "--select-top-k", "1,1", "--threshold", "0,0.0")
    assert result.output.count("| reroute |") == 1
    budgets = sere(subject, "sweep", "--batch", 4, "--select-top-k", "", "--max-active", 6)
    assert budgets.exit_code == 0, budgets.output
    assert "| auto, 6 active |" in budgets.output


@pytest.mark.parametrize("content", ["", ",".join(field.name for field in fields(SweepRow)) + "\n"])
def test_a_table_without_rows_is_no_picture(tmp_path, content):
    """And replaces none."""
    pytest.importorskip("matplotlib")
    table, out = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    table.write_text(content)
    out.write_bytes(b"old")
    result = CliRunner().invoke(main, ["plot", str(table), "-o", str(out)])
    assert result.exit_code == 1
    assert f"{table} has no rows" in result.output
    assert out.read_bytes() == b"old"


def test_plots_are_written(subject, tmp_path):
    pytest.importorskip("matplotlib")
    heat = tmp_path / "heat.png"
    arguments = ["plot", subject / "profile.safetensors", "-o", heat, "--threshold", "q0.4"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert heat.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("write", [write_csv, plot_sweep])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, no_room, write):
    if write is plot_sweep:
        pytest.importorskip("matplotlib")
    out = tmp_path / "sweep.png"
    out.write_bytes(b"old")
    with no_room(), pytest.raises(OutputError, match=r"sweep.png could not be written: File too large"):
        write([row(4, 5.0, 0.02)], out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"sweep.png": b"old"}


def row(batch, active, change):
    return SweepRow("reroute", "", "1", "", "0", batch, 1.0, change, 0.0, 0.0, 1.0, 9.0, active)


def test_the_recommendation_is_the_fewest_experts_within_the_budget():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.008), row(4, 7.0, 0.001), row(8, 5.0, 0.5)]
    assert recommend(rows, 0.01) == {4: rows[1], 8: None}


def test_the_front_has_no_beaten_row():
    rows = [row(4, 5.0, 0.02), row(4, 6.0, 0.03), row(4, 7.0, 0.001), row(4, 7.0, 0.002)]
    assert pareto_front(rows) == [rows[0], rows[2]]


def test_windows_are_spread_over_the_text():
    windows = token_windows(tokenizer(), ["a b c", "d e f g h"], length=2, count=2)
    assert windows.tolist() == [[2, 3], [9, 0]]
    with pytest.raises(EvaluationError, match="10 tokens are too few for 6 windows of 2"):
        token_windows(tokenizer(), ["a b c", "d e f g h"], length=2, count=6)


def test_an_empty_tokenizer_is_told():
    """Not that the text is too short, nor windows of nothing but ends of texts."""
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>")
    with pytest.raises(EvaluationError, match=r"makes no tokens of the text; are its files, such as tokenizer.json"):
        token_windows(empty, ["a b c", "d e f g h"], length=2)


def test_texts_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"other": 1}\n')
    with pytest.raises(EvaluationError, match=r"x.jsonl:2 has no text in the field 'text'"):
        read_texts(path)
    path.write_text("nothing")
    with pytest.raises(EvaluationError, match=r"x.jsonl:1 is not JSON"):
        read_texts(path)
    with pytest.raises(EvaluationError, match="no such file"):
        read_texts(tmp_path / "missing.txt")


def test_parquet_columns_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a b", None, "c"], "n": [1, 2, 3]}), path)
    assert read_texts(path) == ["a b", "c"]
    with pytest.raises(EvaluationError, match="no column 'body'; it has text, n"):
        read_texts(path, "body")
    path.write_text("a b")
    with pytest.raises(EvaluationError, match="is not a parquet file"):
        read_texts(path)


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"sere-compile\[parquet\]"):
        read_texts(path)
