"""Windows of tokens from files."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sere_compile import EvaluationError, MissingExtraError
from sere_compile.evaluation.text import mixed_windows, read_texts, token_windows

from ..tiny_models import word_tokenizer


def test_windows_are_spread_over_the_text():
    windows = token_windows(word_tokenizer(), ["a b c", "d e f g h"], length=2, count=2)
    assert windows.tolist() == [[2, 3], [9, 0]]
    with pytest.raises(EvaluationError, match=r"10 tokens are too few for 6 windows of 2: .* --sequences .at most 5"):
        token_windows(word_tokenizer(), ["a b c", "d e f g h"], length=2, count=6)
    with pytest.raises(EvaluationError, match=r"too few for 6 windows of 20: give more text or a smaller --length$"):
        token_windows(word_tokenizer(), ["a b c", "d e f g h"], length=20, count=6)


def test_an_empty_tokenizer_is_told():
    """Not that the text is too short, nor windows of nothing but ends of texts."""
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>")
    with pytest.raises(EvaluationError, match=r"makes no tokens of the text; are its files, such as tokenizer.json"):
        token_windows(empty, ["a b c", "d e f g h"], length=2)


def test_texts_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"other": 1}\n')
    with pytest.raises(EvaluationError, match=r"x.jsonl:2 has no text in the field 'text'; its fields are .*: --field"):
        read_texts(path)
    path.write_text("nothing")
    with pytest.raises(EvaluationError, match=r"x.jsonl:1 is not JSON"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match=r"x\.jsonl is not UTF-8 text: .*0xff"):
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
    with pytest.raises(MissingExtraError, match=r"reading \.parquet needs .*sere-compile\[parquet\]"):
        read_texts(path)


def test_files_share_sequences_evenly(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a b c d e f g h " * 4)
    windows = mixed_windows(word_tokenizer(), [str(path), str(path)], "text", 2, 4)
    assert windows.shape == (4, 2)
    assert torch.equal(windows[0], windows[1])
    with pytest.raises(EvaluationError, match="5 sequences cannot be shared evenly by 2 files"):
        mixed_windows(word_tokenizer(), [str(path), str(path)], "text", 2, 5)
