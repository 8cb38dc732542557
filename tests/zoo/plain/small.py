"""A small configuration of any class, by what its fields are called; and a model of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, ResNetConfig


@dataclass(frozen=True)
class Sizes:
    """How small: how many layers, heads, channels and words there are, and how long a sequence is."""

    layers: int
    heads: int
    channels: int
    words: int
    length: int

    def of(self, kind: str) -> int:
        """The value of a kind of field."""
        return {
            "words": self.words,
            "layers": self.layers,
            "head": self.channels // self.heads,
            "heads": self.heads,
            "width": self.channels,
            "inner": 2 * self.channels,
            "positions": 64,
            "images": 64,
        }[kind]


# The first pattern that a field's whole name matches says what it is, where its own value is a positive number.
_FIELDS: tuple[tuple[str, str], ...] = (
    (r".*vocab_size(_per_layer_input)?|num_hash_buckets", "words"),
    (r"num_layers|n_layers?|depth|((num|n)_)?((hidden|encoder|decoder|speech_encoder|t2u)_)+layers", "layers"),
    (r"d_kv|d_head|rotary_dim|.*head_dim|.*head_size", "head"),
    (r"n_heads?|num_heads|.*attention_heads|.*key_value_heads|.*_n_heads", "heads"),
    (r"hidden_size|d_model|dim|n_embd|emb_dim|embed_dim|hidden_dim|embedding_(size|dim)|projection_dim", "width"),
    (r".*_hidden_size|.*hidden_dim|.*_embed_dim|.*emb_size|d_embed", "width"),
    (r".*intermediate_size|.*ffn_dim|.*ffn_hidden_size|d_ff|dff|d_inner|n_inner|.*feedforward_dim", "inner"),
    (r"max_position_embeddings|n_positions|max_.*positions|max_seq_len|seq_length", "positions"),
    (r"image_size", "images"),
)
# What has a value only where the user says so, and is needed.
_UNSET = {"head_dim": "head", "vocab_size": "words"}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}
# Kinds of fields that keep their own values, from one try to the next: sizes have to fit each other.
TRIES: tuple[tuple[str, ...], ...] = (
    (),
    ("images",),
    ("width", "head", "inner"),
    ("width", "head", "inner", "heads"),
    ("layers",),
    ("width", "head", "inner", "heads", "images"),
    ("width", "head", "inner", "heads", "layers"),
    ("width", "head", "inner", "heads", "layers", "images"),
)
# What no rule finds, by the model's type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "hidden_size": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": False},
    "xmod": {"default_language": "en_XX"},
}


def small_config(config_class: type[PreTrainedConfig], sizes: Sizes, kept: tuple[str, ...] = ()) -> Any:
    """A small configuration of a class.

    Args:
        config_class: the class.
        sizes: how small.
        kept: kinds of fields that keep their own values.

    Raises:
        What the class raises where the sizes do not fit each other.
    """
    return config_class(**_fields(config_class(), sizes, kept))


def _fields(own: PreTrainedConfig, sizes: Sizes, kept: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a configuration that are to have other values than it has by itself."""
    found = {
        name: new for name, value in vars(own).items() if (new := _field(own, name, value, sizes, kept)) is not None
    }
    if "use_timm_backbone" in vars(own) or type(own.__dict__.get("backbone_config")).__name__ == "TimmBackboneConfig":
        found |= {"use_timm_backbone": False, "backbone": None, "backbone_config": _resnet()}
        found = {name: value for name, value in found.items() if name in vars(own)}
    return found | _OVERRIDES.get(own.model_type, {})


def _field(own: PreTrainedConfig, name: str, value: Any, sizes: Sizes, kept: tuple[str, ...]) -> Any:
    """A field's new value, None where it keeps its own."""
    if isinstance(value, PreTrainedConfig):
        return type(value)(**_fields(value, sizes, kept))
    if name.endswith(("token_id", "token_index")):
        return _token(name, value, sizes)
    if value is None and name in _UNSET:
        return sizes.of(_UNSET[name])
    if isinstance(value, (list, tuple)):
        return _listed(own, name, list(value), sizes, kept)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return None
    kind = next((kind for pattern, kind in _FIELDS if re.fullmatch(pattern, name)), None)
    return None if kind is None or kind in kept else sizes.of(kind)


def _token(name: str, value: Any, sizes: Sizes) -> int | None:
    if name in _TOKENS:
        return _TOKENS[name]
    return sizes.words - 1 if isinstance(value, int) and value >= sizes.words else None


def _listed(
    own: PreTrainedConfig, name: str, value: list[Any], sizes: Sizes, kept: tuple[str, ...]
) -> list[Any] | None:
    if name == "image_size" and "images" not in kept:
        return [sizes.of("images")] * len(value)
    if "layers" in kept:
        return None
    if name == "depths":
        return [1] * len(value)
    layers = getattr(own, "num_hidden_layers", None)
    return value[: sizes.layers] if value and len(value) == layers and layers > sizes.layers else None


def _resnet() -> ResNetConfig:
    """In place of a backbone of timm, which is another package."""
    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


def scatter_weights(model: nn.Module) -> nn.Module:
    """Random weights that make scores differ from row to row, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)
