"""Text files as token windows, for evaluation and calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import EvaluationError
from ..extras import require


def read_texts(path: str | Path, field: str = "text") -> list[str]:
    """The documents of a .jsonl or .parquet file by `field`, or any other file as one text.

    Raises:
        EvaluationError: no such file, not the format that its name says, no such field, or no text.
        MissingExtraError: a .parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"no such file: {path}")
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    texts = list(readers[path.suffix](path, field)) if path.suffix in readers else [_plain(path)]
    texts = [text for text in texts if text]
    if not texts:
        raise EvaluationError(f"{path} holds no text")
    return texts


def token_windows(tokenizer: Any, texts: list[str], length: int, count: int | None = None) -> torch.Tensor:
    """Windows [N, length] of the texts' tokens: documents one after the other, separated by the end-of-text token.

    Args:
        tokenizer: of transformers.
        texts: documents.
        length: tokens in a window.
        count: take this many windows, spread evenly over all of them; None: all.

    Raises:
        EvaluationError: no tokens, or fewer than one window or than `count` windows hold.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    require_tokens(tokenizer, rows)
    tokens = torch.tensor([token for row in rows for token in (*row, *end)], dtype=torch.int64)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    wanted = 1 if count is None else count
    if len(windows) < wanted:
        fewer = f", fewer --sequences (at most {len(windows)} from this)" if len(windows) else ""
        raise EvaluationError(
            f"{len(tokens)} tokens are too few for {wanted} windows of {length}: give more text{fewer} or a smaller "
            "--length"
        )
    if count is None:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def require_tokens(tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:
    """Raise EvaluationError if the tokenizer is empty: transformers makes such a one for a folder without tokenizer."""
    if not any(rows):
        raise EvaluationError(
            f"the tokenizer of {tokenizer.name_or_path!r} makes no tokens of the text; are its files, such as "
            "tokenizer.json, in the model's folder?"
        )


def mixed_windows(tokenizer: Any, paths: Sequence[str], field: str, length: int, count: int) -> torch.Tensor:
    """Windows [count, length], those of several files alternating, so that sequences that decode together are mixed.

    Raises:
        EvaluationError: `count` is no multiple of the number of files, or what the functions above raise.
    """
    share, left = divmod(count, len(paths))
    if left:
        raise EvaluationError(f"{count} sequences cannot be shared evenly by {len(paths)} files")
    rows = [token_windows(tokenizer, read_texts(path, field), length, share) for path in paths]
    return torch.stack(rows, 1).flatten(0, 1)


def _plain(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_plain(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            known = ", ".join(record) if isinstance(record, dict) and record else "none"
            raise EvaluationError(
                f"{path}:{number} has no text in the field {field!r}; its fields are {known}: --field names the one"
            )
        yield record[field]


def _parquet(path: Path, field: str) -> list[str]:
    pyarrow, parquet = require("parquet", "pyarrow", "pyarrow.parquet", needed_for="reading .parquet needs")
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise EvaluationError(f"{path} is not a parquet file: {error}") from error
    if field not in table.column_names:
        raise EvaluationError(
            f"{path} has no column {field!r}; it has {', '.join(table.column_names)}: --field names the one"
        )
    return [str(text) for text in table.column(field).to_pylist() if text is not None]
