"""Windows of tokens from files."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, processors
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


def test_documents_stand_as_they_are():
    """A tokenizer that opens each text with a token of its own does not put it into the windows."""
    tokenizer = word_tokenizer()
    opening = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    tokenizer.backend_tokenizer.post_processor = opening
    assert token_windows(tokenizer, ["a b c", "d e"], length=7).tolist() == [[2, 3, 4, 0, 5, 6, 0]]


def test_a_tokenizer_without_an_end_of_texts():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer().backend_tokenizer, unk_token="<unk>")
    assert token_windows(tokenizer, ["a b c", "d e"], length=2).tolist() == [[2, 3], [4, 5]]


def test_every_window_and_as_many_as_there_are():
    """In order, and none of fewer tokens."""
    texts, windows = ["a b c", "d e f"], [[2, 3, 4], [0, 5, 6]]
    assert token_windows(word_tokenizer(), texts, length=3).tolist() == windows
    assert token_windows(word_tokenizer(), texts, length=3, count=2).tolist() == windows
    assert token_windows(word_tokenizer(), texts, length=8).tolist() == [[2, 3, 4, 0, 5, 6, 7, 0]]
    with pytest.raises(EvaluationError, match="8 tokens are too few for 1 windows of 9"):
        token_windows(word_tokenizer(), texts, length=9)
    with pytest.raises(EvaluationError, match=r"3 windows of 3: .* \(at most 2 from this\)"):
        token_windows(word_tokenizer(), texts, length=3, count=3)


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


def test_texts_of_a_file(tmp_path):
    """Lines of JSON by a field, without those that are blank or hold an empty text; any other file as a whole."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n  \n{"text": "", "body": "c"}\n{"text": "d", "body": "e"}\n')
    assert read_texts(path) == ["a", "d"]
    assert read_texts(str(path), "body") == ["b", "c", "e"]
    plain = tmp_path / "x.txt"
    plain.write_text("a\n\nb\n")
    assert read_texts(plain) == ["a\n\nb\n"]
    path.write_text('{"text": ""}\n')
    with pytest.raises(EvaluationError, match=r"x\.jsonl holds no text"):
        read_texts(path)


@pytest.mark.parametrize(
    ("line", "fields"),
    [('{"n": 1, "body": "b"}', "n, body"), ('{"text": 3}', "text"), ("{}", "none"), ("[1]", "none"), ("[]", "none")],
)
def test_a_line_without_text_names_its_fields(tmp_path, line, fields):
    """By the number of its line, blank ones counted."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(EvaluationError, match=rf"x.jsonl:3 has no text in the field 'text'; its fields are {fields}:"):
        read_texts(path)


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
