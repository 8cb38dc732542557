"""Which architectures of the installed transformers are Mixtures of Experts, told from their modeling files."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import transformers

# What a modeling file with routed experts holds: experts that transformers can run in several ways, or a class that is
# named after experts, a router or a sparse block. A file that only names such a thing is listed in `registry.NO_MOE`.
_SIGNS = re.compile(
    r"^@use_experts_implementation|^class \w*(Experts|MoE|Moe|SparseMoe\w*|SparseMLP|Router|Top[Kk]Gate|MoeBlock)\b",
    re.MULTILINE,
)


@functools.cache
def _found() -> dict[str, tuple[str, bool]]:
    """By the architecture's name: the modeling file's import path, and whether its experts have an interface."""
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for file in sorted(models.glob("*/modeling_*.py")):
        text = file.read_text()
        if _SIGNS.search(text):
            path = f"transformers.models.{file.parent.name}.{file.stem}"
            found[file.stem.removeprefix("modeling_")] = path, "@use_experts_implementation" in text
    return found


@functools.cache
def moe_architectures() -> dict[str, str]:
    """Import path of the modeling file by the architecture's name (`qwen3_moe`), in order of names."""
    return {name: path for name, (path, _) in _found().items()}


def has_experts_interface(name: str) -> bool:
    """Whether transformers can run the experts in several ways; else the architecture has a dispatch of its own.

    An architecture that the installed transformers lacks has none.
    """
    return name in _found() and _found()[name][1]
