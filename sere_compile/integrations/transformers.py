"""Hugging Face models: loading checkpoints for the command line and the examples, and what differs between versions."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelNotFoundError
from ..extras import require

# Small trained models (models/README.md); their weights are bfloat16. The first comes with the package, the others only
# with a clone of its repository.
SHIPPED = Path(__file__).resolve().parent.parent / "models"
KINDS = ("qwen3", "mixtral", "upcycled")


def load_causal_lm(name_or_path: str, dtype: str | torch.dtype = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model with its tokenizer, ready for batched generation.

    Args:
        name_or_path: a folder written by `save_pretrained`, a name on the Hugging Face hub, or one of `KINDS`.
        dtype: as transformers takes it; "auto" keeps the checkpoint's.
        device: "cuda" where there is one, else "cpu".

    Returns:
        The model in eval mode, and its tokenizer, which pads on the left.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: there is no such dtype.
        ModelNotFoundError: transformers cannot load what is under that name; its own error is the cause.
    """
    kind = getattr(torch, str(dtype).removeprefix("torch."), None)
    # Smaller types are for storing weights; torch hardly computes in them.
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point and kind.itemsize > 1):
        raise ConfigError(
            f"dtype must be auto or a floating-point type of torch of 16 bits or more such as bfloat16, got {dtype!r}"
        )
    (transformers,) = require("hf", "transformers", needed_for="loading a checkpoint needs")
    tokenizer = load_tokenizer(name_or_path)
    if is_shipped(name_or_path):
        name_or_path = str(shipped_folder(name_or_path))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _errors_name("causal language model", name_or_path):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a causal language model, which pads on the left.

    Args:
        name_or_path: see `load_causal_lm`.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelNotFoundError: transformers cannot load what is under that name; its own error is the cause.
    """
    (transformers,) = require("hf", "transformers", needed_for="loading a checkpoint needs")
    if is_shipped(name_or_path):
        name_or_path = str(shipped_folder(name_or_path))
    _check_name(name_or_path)
    with _errors_name("tokenizer", name_or_path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_name(name_or_path: str) -> None:
    """Raise ModelNotFoundError for what is neither a folder nor a name that the hub could have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    failed = f"no causal language model could be loaded from {name_or_path!r}"
    if os.path.isdir(name_or_path):
        if not any(Path(name_or_path).glob("*config.json")):  # an adapter's has a longer name
            raise ModelNotFoundError(f"{failed}: there is no config.json in it")
        return
    if os.path.exists(name_or_path):
        raise ModelNotFoundError(f"{failed}: it is a file; give the folder that save_pretrained wrote")
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{failed}: there is no such folder, and names on the Hugging Face hub look like Qwen/Qwen1.5-MoE-A2.7B"
        ) from error


@contextlib.contextmanager
def _errors_name(what: str, name_or_path: str) -> Iterator[None]:
    """Whatever transformers raises becomes ours.

    Damaged files have no common class of error: tokenizers raises Exception, safetensors its own, and transformers a
    KeyError, TypeError or ZeroDivisionError as it comes.
    """
    try:
        yield
    except Exception as error:
        # A misspelt name of one of ours is looked for on the hub.
        is_other = "/" in name_or_path or os.path.isdir(name_or_path)
        ours = "" if is_other else f" (the package's own models are {', '.join(KINDS)})"
        raise ModelNotFoundError(
            f"no {what} could be loaded from {name_or_path!r}{ours}: {type(error).__name__}: {error}"
        ) from error


def is_shipped(name_or_path: str) -> bool:
    """Whether it is the name of one of `KINDS`; a folder of the same name goes first."""
    return name_or_path in KINDS and not Path(name_or_path).is_dir()


def shipped_folder(kind: str) -> Path:
    """The folder of one of `KINDS`.

    Raises:
        ModelNotFoundError: the package was installed without it.
    """
    folder = SHIPPED / kind
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{kind!r} is not in the installed package, which holds {KINDS[0]!r} alone: in a clone of sere-compile's "
            f"repository it is the folder sere_compile/models/{kind}, which can be given instead, and `pip install -e "
            "<clone>` brings all of them"
        )
    return folder


def cache_argument(model: Any) -> str:
    """What a model's forward calls its key-value cache: `cache`, or `past_key_values` in older transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
