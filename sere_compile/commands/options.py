"""Options that several sub-commands share, and what they load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch

from ..evaluation.text import read_texts, token_windows
from ..integrations.transformers import load_causal_lm
from ..similarity import SimilarityProfile, attach


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: Callable[[str], float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """`"1,2"` as [1, 2]."""
        if not isinstance(value, str):
            return value
        try:
            return [self.kind(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2", param, ctx)


_DATA_OPTIONS = [
    click.option("--model", "name", required=True, help="Folder or Hugging Face name of a causal language model."),
    click.option("--profile", required=True, type=click.Path(dir_okay=False), help="Similarity profile."),
    click.option("--data", required=True, type=click.Path(dir_okay=False), help="Text: .txt, .jsonl, .parquet."),
    click.option("--field", default="text", show_default=True, help="Field or column that holds the text."),
    click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens a sequence."),
    click.option("--sequences", type=click.IntRange(min=1), default=64, show_default=True, help="How many."),
    click.option("--dtype", default="float32", show_default=True, help="Of the weights; auto keeps the checkpoint's."),
    click.option("--min-active", type=click.IntRange(min=0), help="Least number of primary experts; K by default."),
]  # fmt: skip


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Model, profile and text."""
    for option in reversed(_DATA_OPTIONS):
        command = option(command)
    return command


def load_subject(
    name: str, profile: str, data: str, field: str, length: int, sequences: int, dtype: str
) -> tuple[Any, SimilarityProfile, torch.Tensor]:
    """The model with its profile attached, the profile, and tokens [sequences, length]."""
    matrices = SimilarityProfile.load(profile)
    texts = read_texts(data, field)
    model, tokenizer = load_causal_lm(name, dtype=dtype)
    attach(model, matrices)
    return model, matrices, token_windows(tokenizer, texts, length, sequences)
