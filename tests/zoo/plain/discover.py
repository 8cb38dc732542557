"""The model classes of the installed transformers without experts that score a number of labels, by their task."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from ..discover import moe_architectures


@dataclass(frozen=True)
class Task:
    """What models of a task score, and how that number becomes one of the sizes of the model.

    Attributes:
        mapping: transformers' own list of the classes.
        scores: names of the outputs whose last dimension is scored.
        counted: what there are as many of as layers, heads or channels: "labels", "places" in a sequence, "choices",
            "pairs" of a batch or "words" of the vocabulary.
    """

    mapping: str
    scores: tuple[str, ...] = ("logits",)
    counted: str = "labels"


_PAIRS = ("logits_per_image", "logits_per_text", "logits_per_audio", "retrieval_logits", "relevance_score")

TASKS = {
    "sequence classification": Task("SEQUENCE_CLASSIFICATION"),
    "token classification": Task("TOKEN_CLASSIFICATION"),
    "image classification": Task("IMAGE_CLASSIFICATION"),
    "video classification": Task("VIDEO_CLASSIFICATION"),
    "audio classification": Task("AUDIO_CLASSIFICATION"),
    "question answering": Task("QUESTION_ANSWERING", ("start_logits", "end_logits"), "places"),
    "visual question answering": Task("VISUAL_QUESTION_ANSWERING"),
    "multiple choice": Task("MULTIPLE_CHOICE", counted="choices"),
    "detection": Task("OBJECT_DETECTION"),
    "segmentation": Task("SEMANTIC_SEGMENTATION"),
    "retrieval": Task("ZERO_SHOT_IMAGE_CLASSIFICATION", _PAIRS, "pairs"),
    "generation": Task("CAUSAL_LM", counted="words"),
    "generation from a sequence": Task("SEQ_TO_SEQ_CAUSAL_LM", counted="words"),
    "filling in words": Task("MASKED_LM", counted="words"),
}


@dataclass(frozen=True)
class ModelClass:
    """One class of transformers for one task."""

    name: str
    task: str
    model_type: str

    @property
    def model(self) -> type[PreTrainedModel]:
        """The class itself."""
        return getattr(transformers, self.name)

    @property
    def config(self) -> type[PreTrainedConfig]:
        """The class of its configuration."""
        return configuration_auto.CONFIG_MAPPING[self.model_type]


@functools.cache
def model_classes() -> dict[str, ModelClass]:
    """Every class by its name, in order of names; those whose modeling file holds experts are none."""
    found = {}
    for task, description in TASKS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{description.mapping}_MAPPING_NAMES")
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                if not _has_experts(model_type):
                    found[name] = ModelClass(name, task, model_type)
    return dict(sorted(found.items()))


def _has_experts(model_type: str) -> bool:
    module = configuration_auto.model_type_to_module_name(model_type)
    return any(path.split(".")[2] == module for path in moe_architectures().values())
