"""`sere eval`, `sere sweep` and `sere plot` on a checkpoint."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sere_compile import EvaluationError, MissingExtraError
from sere_compile.cli import main
from sere_compile.evaluation.plots import pareto_front
from sere_compile.evaluation.sweep import SweepRow, read_csv, recommend
from sere_compile.evaluation.text import read_texts, token_windows

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
    random_profile(model).save(folder / "profile.safetensors")
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


def test_sweep_writes_a_table_and_recommends(subject, tmp_path):
    out = tmp_path / "sweep.csv"
    result = sere(subject, "sweep", "--batch", "2,4", "--select-top-k", "1,4", "--budget", 0.5, "--csv", out)
    assert result.exit_code == 0, result.output
    rows = read_csv(out)
    assert [(row.decode_batch, row.select_top_k) for row in rows] == [(2, 1), (2, 4), (4, 1), (4, 4)]
    same = rows[1]
    assert (same.perplexity_change, same.kl) == (0, 0)
    assert "decode batch 2: options={'select_top_k': " in result.output


def test_per_layer_spends_no_more_than_the_budget(subject):
    """With no budget but for what costs nothing, and with all the budget there is."""
    everything = sere(subject, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1,2", "--budget", 1e9)
    assert everything.exit_code == 0, everything.output
    settings = json.loads(everything.stdout[everything.stdout.index("{") :])
    assert settings == {gate: {"select_top_k": 1} for gate in gate_names()}
    nothing = sere(subject, "sweep", "--per-layer", "--batch", 4, "--select-top-k", "1", "--budget", -99)
    assert f"left as they are: {', '.join(gate_names())}" in nothing.output


def test_plots_are_written(subject, tmp_path):
    pytest.importorskip("matplotlib")
    heat = tmp_path / "heat.png"
    arguments = ["plot", subject / "profile.safetensors", "-o", heat, "--threshold", 0.8]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert heat.read_bytes().startswith(b"\x89PNG")


def row(batch, active, change):
    return SweepRow("sere", 1, "0.0", batch, 1.0, change, 0.0, 1.0, 9.0, active)


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


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"sere-compile\[parquet\]"):
        read_texts(path)
