"""Options that several sub-commands share, and what they load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ..config import SUBSTITUTIONS
from ..evaluation.text import mixed_windows
from ..integrations.transformers import KINDS, load_causal_lm


def count_or_auto(text: str) -> int | str:
    """`--select-top-k`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a whole number nor auto") from None


def number_or_share(text: str) -> float | str:
    """`--threshold`; `SereConfig` says what a share is."""
    if text.startswith("q"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a number nor a share of experts such as q0.2") from None


def per_gate_options(text: str) -> Any:
    """`--per-gate`; `SereConfig` says what may be in it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{text!r} is not JSON such as {{"model.layers.0.*": {{"select_top_k": 4}}}}: {error}'
        ) from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(f"{text} is less than 1")
    return number


def finite(text: str) -> float:
    """A number, neither inf nor nan."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


class Numbers(click.ParamType):
    """Numbers separated by commas, without duplicates.

    Args:
        kind: converts the text of one number; raises ValueError for anything else.
        what: what they are, for the message.
        none: whether the list may be empty.
    """

    name = "numbers"

    def __init__(self, kind: Callable[[str], Any], what: str = "numbers such as 1,2", none: bool = False) -> None:
        self.kind, self.what, self.none = kind, what, none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """`"1,2"` as [1, 2]."""
        if not isinstance(value, str):
            return value
        if not value and self.none:
            return []
        try:
            return list(dict.fromkeys(self.kind(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.what}", param, ctx)


MODEL_HELP = (
    f"Folder or Hugging Face name of a causal language model, or {KINDS[0]}, which comes with the package, or "
    f"{' or '.join(KINDS[1:])}, which a clone of its repository has."
)

_DATA_OPTIONS = [
    click.option("--model", "name", required=True, help=MODEL_HELP),
    click.option(
        "--data", required=True, multiple=True, type=click.Path(dir_okay=False),
        help="Text: .txt, .jsonl, .parquet; if given several times, decoding batches are mixed.",
    ),
    click.option("--field", default="text", show_default=True, help="Field or column that holds the text."),
    click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per sequence."),
    click.option("--sequences", type=click.IntRange(min=1), default=64, show_default=True, help="Number of sequences."),
    click.option("--dtype", default="float32", show_default=True, help="Dtype of the weights; auto: the checkpoint's."),
]  # fmt: skip


counts = Numbers(positive, "positive whole numbers such as 4,16")
some_numbers = Numbers(finite, none=True)
min_active_option = click.option("--min-active", type=int, help="Minimum number of primary experts; K by default.")
per_gate_option = click.option(
    "--per-gate", type=per_gate_options, default="{}", help="JSON: {pattern: {option: value}}."
)

speed_option = click.option(
    "--speed", type=click.Path(exists=True, dir_okay=False), help="Expect times as in this .json of sere bench."
)

_ROUTING_OPTIONS = [
    click.option("--select-top-k", type=count_or_auto, help="S, or auto; min(2, K-1) by default."),
    click.option("--max-active", type=int, help="With --select-top-k auto: a gate's budget of primary experts."),
    click.option(
        "--threshold", type=number_or_share, default="0", show_default=True, help="rho, or a share such as q0.2."
    ),
    min_active_option,
    click.option("--substitution", type=click.Choice(SUBSTITUTIONS), default="reroute", show_default=True),
    per_gate_option,
]


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Model and text."""
    return _with(_DATA_OPTIONS, command)


def routing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `SereConfig` says about re-routing itself, under the names of its options."""
    return _with(_ROUTING_OPTIONS, command)


def _with(options: list[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def names_of(name: str, data: Sequence[str], sequences: int, length: int) -> dict[str, str]:
    """What titles say: the model, and the text with its amount; of files and folders the last part of the path."""
    files = ", ".join(Path(path).name for path in data)
    return {
        "model": Path(name).resolve().name if Path(name).exists() else name,
        "data": f"{files}, {sequences} x {length} tokens" if data else "without data",
    }


def load_subject(
    name: str, data: Sequence[str], field: str, length: int, sequences: int, dtype: str
) -> tuple[Any, Any, torch.Tensor]:
    """The model, its tokenizer, and tokens [sequences, length]."""
    model, tokenizer = load_causal_lm(name, dtype=dtype)
    return model, tokenizer, mixed_windows(tokenizer, data, field, length, sequences)
