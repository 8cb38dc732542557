"""Arguments for a call of a model, by the names of its forward's parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from .discover import TASKS, ModelClass
from .small import Sizes

ROWS = 4  # of a batch
TEXT = ("generation", "filling in words", "sequence classification", "question answering")


def arguments(made: ModelClass, model: PreTrainedModel, sizes: Sizes) -> dict[str, Any]:
    """Keyword arguments: token ids, pixels or sound, whatever the model takes first, and what has to be beside it."""
    generator = torch.Generator().manual_seed(0)
    names = inspect.signature(model.forward).parameters
    counted = TASKS[made.task].counted
    rows = sizes.length if counted == "pairs" else ROWS
    shape = (2, sizes.length, sizes.length) if counted == "choices" else (rows, sizes.length)
    ids = torch.randint(3 if sizes.words > 8 else 0, sizes.words, shape, generator=generator)
    ids[..., -1] = min(2, sizes.words - 1)  # some models look for the end of a sequence

    def image(*leading: int) -> torch.Tensor:
        return torch.randn(*leading, *_image(model), generator=generator)

    makers = {
        "input_ids": lambda: ids,
        "bbox": lambda: torch.ones(*shape, 4, dtype=torch.long),
        "inputs": lambda: ids if made.task in TEXT else image(rows),
        "pixel_values": lambda: image(rows, *_frames(model)) if made.task.startswith("video") else image(rows),
        "pixel_values_videos": lambda: image(rows, *_frames(model)),
        "input_values": lambda: torch.randn(rows, 4000, generator=generator),
        "input_features": lambda: torch.randn(rows, *_features(model), generator=generator),
    }
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main, "bbox"] if counted != "pairs" else ["input_ids", "pixel_values", "pixel_values_videos"]
    wanted += [name for name, p in names.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if made.task.startswith("visual"):
        wanted += ["input_ids", "pixel_values"]
    call = {name: makers[name]() for name in dict.fromkeys(wanted) if name in makers and name in names}
    if "decoder_input_ids" in names:
        call["decoder_input_ids"] = ids
    if "use_cache" in names:
        call["use_cache"] = False
    return call


def _frames(model: PreTrainedModel) -> tuple[int]:
    config = getattr(model.config, "vision_config", model.config)
    return (getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4,)


def _image(model: PreTrainedModel) -> tuple[int, int, int]:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(config, "num_channels", None) or 3, height, width


def _features(model: PreTrainedModel) -> tuple[int, int]:
    """Frames and bands of sound, in the order in which the model takes them."""
    config = (
        getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None) or model.config
    )
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", "feature_size")
    bands = next((value for name in names if (value := getattr(config, name, None))), 80)
    if (positions := getattr(config, "max_source_positions", None)) and getattr(config, "num_mel_bins", None):
        return bands, 2 * positions  # Whisper and what is made after it
    return 64, bands
