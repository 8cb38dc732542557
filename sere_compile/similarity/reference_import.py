"""Read the files that the SERE authors' calibration writes, and find the router of each of their matrices.

Those files know layers and modules, not router weights:

    similarity_matrices.pt                                     {3: [E, E], ...}
    a calibrated checkpoint, in one file or in shards          model.layers.3.mlp.similarity_matrix:
    [E, E]

The router's weight comes from a template of its name, or from the shapes and names of a model's
parameters.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ProfileError
from .profile_file import FORMAT, is_torch_file, open_safetensors, some

DEFAULT_NAME = "model.layers.{layer}.mlp.gate.weight"

_BUFFER = "similarity_matrix"
_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")

# A layer's index, or the name of the module that holds the matrix as a buffer.
Place = int | str
Shapes = Mapping[str, torch.Size]


def read_reference(path: Path, model: torch.nn.Module | None, name: str) -> dict[str, torch.Tensor]:
    """Read the matrices in a file or folder of the reference implementation.

    Args:
        path: `similarity_matrices.pt`, a checkpoint in a file, or a folder with either.
        model: where to look the routers up; without it `name` alone gives them.
        name: name of a router's weight with `{layer}` for the layer index; it is tried first.

    Returns:
        Each matrix [E, E] as it is in the file, by the name of its router's weight. Only that it is
        square has been checked.

    Raises:
        ProfileError: `name` is no template, the file is unreadable, unsafe or holds no matrices, or
            the router of a matrix cannot be determined for certain. None is ever left out.
    """
    _check_template(name)
    shapes = None if model is None else {key: p.shape for key, p in parameters_by_plain_name(model).items()}
    matrices: dict[str, torch.Tensor] = {}
    owner: dict[str, Place] = {}
    for place, matrix in _read(path).items():
        experts = _num_experts(path, place, matrix)
        if isinstance(place, int):
            gate = _router_of_layer(place, experts, name, shapes)
        else:
            gate = _router_of_module(plain_name(place), experts, name, shapes)
        if gate in owner:
            raise ProfileError(f"{path}: {owner[gate]!r} and {place!r} both map to the router {gate}")
        matrices[gate], owner[gate] = matrix, place
    return matrices


def plain_name(name: str) -> str:
    """`name` without the `_orig_mod` that torch.compile puts around a module it wraps."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def parameters_by_plain_name(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters of a model; a tied one under each of its names."""
    return {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _check_template(name: str) -> None:
    try:
        usable = name.format(layer=1) != name.format(layer=2)
    except (LookupError, ValueError):
        usable = False
    if not usable:
        raise ProfileError(f"name={name!r} is not a template with {{layer}}, the place of the layer index")


def _num_experts(path: Path, place: Place, matrix: object) -> int:
    if isinstance(matrix, torch.Tensor) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        return matrix.shape[0]
    got = f"shape {tuple(matrix.shape)}" if isinstance(matrix, torch.Tensor) else type(matrix).__name__
    where = f"layer {place}" if isinstance(place, int) else place
    raise ProfileError(f"{path}, {where}: expected a square matrix, [E, E], got {got}")


# Files


def _read(path: Path) -> dict[Place, Any]:
    if not path.is_dir():
        return _read_file(path)
    # The first is the unrounded original of what a checkpoint beside it holds.
    names = ("similarity_matrices.pt", *(f"{file}.index.json" for file in _CHECKPOINTS), *_CHECKPOINTS)
    for file in (path / name for name in names):
        if file.exists():
            return _read_sharded(file) if file.suffix == ".json" else _read_file(file)
    raise ProfileError(f"{path} holds none of {names[0]}, {', '.join(_CHECKPOINTS)} and no index of shards")


def _read_sharded(index: Path) -> dict[Place, Any]:
    try:
        shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{index} is not an index of shards: {error!r}") from error
    wanted = {name: shard for name, shard in shards.items() if _buffer_owner(name)}
    if not wanted:
        raise ProfileError(f"{index} names no {_BUFFER}; it lists {some(shards)}")
    entries: dict[Place, Any] = {}
    for shard in sorted(set(wanted.values())):
        entries |= _read_file(index.parent / shard)
    if missing := [name for name in wanted if _buffer_owner(name) not in entries]:
        raise ProfileError(f"{index} promises {some(missing)}, which the shards do not hold")
    return entries


def _read_file(path: Path) -> dict[Place, Any]:
    if is_torch_file(path):
        return _by_place(path, _load_weights_only(path))
    with open_safetensors(path) as file:
        if (file.metadata() or {}).get("format") == FORMAT:
            raise ProfileError(f"{path} is a sere_compile profile; read it with SimilarityProfile.load(path)")
        names = list(file.keys())
        # A checkpoint is large; only its matrices are read, and with none the names alone say what
        # it is.
        return _by_place(path, {n: file.get_tensor(n) for n in names if _buffer_owner(n)} or dict.fromkeys(names))


def _load_weights_only(path: Path) -> Any:
    try:
        # Mapped, so that the weights around the matrices of a whole checkpoint are not read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged file makes torch raise nearly anything: struct.error, KeyError, AssertionError, ...
    except Exception as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for the Python object {blocked[1]}" if blocked else type(error).__name__
        raise ProfileError(
            f"{path} is not a plain file of tensors ({what}). Nothing but tensors is loaded, because "
            "unpickling can run any code; save it again as a dict of layer index to tensor"
        ) from error


def _by_place(path: Path, content: Any) -> dict[Place, Any]:
    """The entries of a dict keyed by layer index, or the similarity buffers of a state dict."""
    if not isinstance(content, Mapping):
        raise ProfileError(f"{path}: expected a dict of layer index to matrix, got {type(content).__name__}")
    buffers: dict[Place, Any] = {owner: content[name] for name in content if (owner := _buffer_owner(name))}
    if buffers:
        return buffers
    layers = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in content]
    if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ProfileError(f"{path}: expected layer indices, or tensors named ...{_BUFFER}; it holds {some(content)}")
    if len(set(layers)) < len(layers):
        raise ProfileError(f"{path}: a layer index occurs twice among {some(map(repr, content))}")
    return dict(zip(layers, content.values(), strict=True))


def _buffer_owner(key: object) -> str:
    """`model.layers.3.mlp` for `model.layers.3.mlp.similarity_matrix`, nothing for any other key."""
    owner, _, leaf = key.rpartition(".") if isinstance(key, str) else ("", "", "")
    return owner if leaf == _BUFFER else ""


# Routers


def _router_of_layer(layer: int, num_experts: int, template: str, shapes: Shapes | None) -> str:
    name = template.format(layer=layer)
    if shapes is None or name in shapes:
        return name
    found = _layer_routers(shapes, layer, num_experts)
    return _the_one(found, f"layer {layer} ({num_experts} experts)", f"{name} is not in the model")


def _router_of_module(module: str, num_experts: int, template: str, shapes: Shapes | None) -> str:
    """The router inside a module; a template that leads elsewhere is not followed."""
    layers = [part for part in module.split(".") if part.isdecimal()]
    name = template.format(layer=layers[0]) if len(layers) == 1 else ""
    if name.startswith(module + ".") and (shapes is None or name in shapes):
        return name
    if shapes is None:
        raise ProfileError(
            f"name={template!r} gives no router weight inside {module}; pass the model, or a name= "
            "with {layer} that matches the model's router weights"
        )
    found = _routers_under(shapes, module, num_experts)
    why = "the names of its parameters do not show it" if found else "the model has no such weight under it"
    return _the_one(_well_named(found, module) or found, f"{module} ({num_experts} experts)", why)


def _the_one(found: list[str], what: str, why: str) -> str:
    if len(found) == 1:
        return found[0]
    raise ProfileError(
        f"the router of {what} cannot be determined: {why}, and {len(found)} parameters could be it: "
        f"{some(found, limit=8)}. Pass name= with {{layer}} for the layer index"
    )


def _layer_routers(shapes: Shapes, layer: int, num_experts: int) -> list[str]:
    """Candidates for the router of a decoder layer: of each stack of experts in it, the nearest and best named.

    Going up from the experts to the layer finds `mlp.gate` beside `mlp.experts` before it meets an
    attention projection that happens to have E rows.
    """
    found: dict[str, None] = {}
    for holder in _expert_holders(shapes, num_experts):
        parts = holder.split(".")
        if str(layer) not in parts:
            continue
        top = parts.index(str(layer)) + 1
        levels = [".".join(parts[:depth]) for depth in range(len(parts), top - 1, -1)]
        groups = [_routers_under(shapes, level, num_experts) for level in levels]
        named = [_well_named(group, level) for group, level in zip(groups, levels, strict=True)]
        found |= dict.fromkeys(next(filter(None, named + groups), []))
    return list(found)


def _expert_holders(shapes: Shapes, num_experts: int) -> Iterable[str]:
    """Modules that hold E experts: as parameters [E, ..., ...], or as children numbered 0 to E - 1."""
    holders: dict[str, None] = {}
    numbered: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(shape) >= 3 and shape[0] == num_experts:
            holders[".".join(parts[:-1])] = None
        for depth, part in enumerate(parts):
            if match := re.fullmatch(r"(.*?)([0-9]+)", part):
                numbered[".".join(parts[:depth]), match[1]].add(int(match[2]))
    every = set(range(num_experts))
    return holders | {parent: None for (parent, _), seen in numbered.items() if seen == every}


def _routers_under(shapes: Shapes, module: str, num_experts: int) -> list[str]:
    """2-D parameters below a module with a row per expert, minus those of the experts themselves."""
    found = []
    for name, shape in shapes.items():
        inner = name.removeprefix(module + ".")
        if inner == name or len(shape) != 2 or shape[0] != num_experts:
            continue
        of_experts = "expert" in inner or inner.split(".")[0].isdecimal()
        # gpt-oss keeps a bias per expert, quantised models a scale: [E, N] beside the stacked
        # weights.
        if not of_experts and not re.search("bias|scale", inner.rpartition(".")[2]):
            found.append(name)
    return found


def _well_named(names: list[str], module: str) -> list[str]:
    """Those of `names` that, below a module, are called what routers are called."""
    usual = ("gate", "gating", "wg", "classifier")
    paths = {name: name.removeprefix(module + ".").split(".") for name in names}
    return [name for name, path in paths.items() if any(part in usual or "router" in part for part in path)]
