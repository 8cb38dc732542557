"""Similarity profiles: one expert-similarity matrix per MoE gate, on disk and attached to a model.

A matrix belongs to the *weight of a router*, not to a graph: a compiled graph is re-used for every layer with
the same code, so the backend finds the matrix of a call from the identity of the router weight it is given.
`attach` records that relation; `SimilarityProfile` is what travels between calibration, disk and `attach`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import re
import uuid
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from .errors import ProfileError

FORMAT = "sere_compile.similarity"
FORMAT_VERSION = 1

# `save` writes these keys itself; a caller's entry of the same name would be lost or would spoil `load`.
_RESERVED_METADATA = ("format", "format_version", "library_version")
# Relative to the largest entry: the rounding of a float32 product, far below a matrix that is not symmetric.
_SYMMETRY_TOLERANCE = 1e-4
_REFERENCE_BUFFER = "similarity_matrix"
_DEFAULT_NAME = "model.layers.{layer}.mlp.gate.weight"


class SimilarityProfile(Mapping[str, torch.Tensor]):
    """A read-only mapping from the name of a router's weight to its expert-similarity matrix.

    Keys are fully qualified parameter names (`model.layers.3.mlp.gate.weight`), iterated in natural order
    (layer 2 before layer 10). Values are `[E, E]` float32 CPU tensors, E being the number of experts.

    The profile owns copies of what it is given, and every access hands out a *fresh copy*: writing into a
    tensor that came from a profile changes that tensor only. Two profiles are equal when they hold the same
    gates with bitwise the same matrices; metadata says where the numbers came from and does not take part.
    Profiles are not hashable, since a hash by value would read every matrix.

    Args:
        matrices: for each gate a symmetric, finite, floating-point `[E, E]` tensor of any device and dtype.
        metadata: strings about the origin; `method`, `tokens` and `model_type` are the usual keys.

    Raises:
        ProfileError: a matrix is not a tensor, not square, not floating point, not finite or not symmetric;
            there is no matrix at all; a name or the metadata is not made of strings.
    """

    def __init__(
        self, matrices: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        _check_gate_names(matrices)
        names = sorted(matrices, key=_natural)
        self._matrices = {name: _checked_copy(name, matrices[name]) for name in names}
        self._metadata = _checked_metadata(metadata or {})

    @property
    def metadata(self) -> Mapping[str, str]:
        """Where the matrices came from; a read-only view."""
        return MappingProxyType(self._metadata)

    def __getitem__(self, name: str) -> torch.Tensor:
        return _copy(self._matrices[name])

    def __contains__(self, name: object) -> bool:
        return name in self._matrices

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SimilarityProfile):
            return NotImplemented
        return self.keys() == other.keys() and all(
            _same_bits(matrix, other._matrices[name]) for name, matrix in self._matrices.items()
        )

    def __repr__(self) -> str:
        sizes = sorted({matrix.shape[0] for matrix in self._matrices.values()})
        parts = [
            f"{len(self)} gate{'s' if len(self) > 1 else ''}",
            f"{'/'.join(map(str, sizes))} expert{'s' if sizes != [1] else ''}",
            self._origin(),
        ]
        return f"<SimilarityProfile: {', '.join(filter(None, parts))}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` as safetensors, all of it or nothing.

        The file is written beside its destination and renamed, so an interrupted save leaves an earlier file
        as it was. Its header holds the format, the library's version and `metadata`.

        Raises:
            OSError: the folder is missing or not writable.
        """
        header = {
            **self._metadata,
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "library_version": _library_version(),
        }
        _write_atomically(Path(path), safetensors_bytes(self._matrices, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SimilarityProfile:
        """Read a profile that `save` wrote; matrices and metadata come back bit for bit.

        Raises:
            ProfileError: no such file, not safetensors, safetensors of another kind (a model, say), a format
                newer than this library's, or contents that are not valid matrices.
        """
        path = Path(path)
        kind = _file_kind(path)
        if kind == "torch":
            raise ProfileError(
                f"{path} is a torch.save file, not a similarity profile; read the reference implementation's "
                "files with SimilarityProfile.from_reference(path)"
            )
        with _open_safetensors(path) as file:
            header = dict(file.metadata() or {})
            _check_header(path, header, list(file.keys()))
            matrices = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return cls(matrices, {key: value for key, value in header.items() if key not in _RESERVED_METADATA})

    @classmethod
    def from_reference(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module | None = None,
        name: str = _DEFAULT_NAME,
    ) -> SimilarityProfile:
        """Read matrices that the SERE authors' calibration wrote.

        `path` is their `similarity_matrices.pt` (`{layer index: [E, E] tensor}`), or a calibrated checkpoint
        whose MoE modules hold a `similarity_matrix` buffer: a safetensors file, a `.pt`/`.bin` state dict, or
        a folder of either, sharded or not. In a folder a `similarity_matrices.pt` wins, being the unrounded
        original. Pickled files are read with `torch.load(weights_only=True)` only.

        Args:
            path: file or folder.
            model: the model the matrices are for. With it every router is looked up in the model, so models
                with other names than `name` work as well.
            name: the name of a router's weight with `{layer}` for the layer index; it is tried first.

        Raises:
            ProfileError: unreadable or unsafe file, no matrices in it, an identity matrix (what a calibration
                that failed leaves behind), or a layer whose router cannot be told for certain. No layer is
                ever left out.
        """
        path = Path(path)
        _check_template(name)
        entries = _read_reference(path)
        routers = _RouterNames(model, name)
        matrices: dict[str, torch.Tensor] = {}
        owner: dict[str, int | str] = {}
        for where, matrix in entries.items():
            gate = routers.find(where, _num_experts(path, where, matrix))
            if gate in owner:
                raise ProfileError(f"{path}: {owner[gate]!r} and {where!r} both map to the router {gate}")
            matrices[gate], owner[gate] = matrix, where
        profile = cls(matrices, {"source": path.name})
        for gate, matrix in profile._matrices.items():
            _check_not_identity(path, gate, matrix)
        return profile

    def _origin(self) -> str:
        """`frobenius, 51200 tokens`, from whatever the metadata holds."""
        made_by = self._metadata.get("method") or self._metadata.get("source")
        tokens = self._metadata.get("tokens")
        return ", ".join(filter(None, [made_by, f"{tokens} tokens" if tokens else None]))


def attach(model: torch.nn.Module, profile: SimilarityProfile) -> None:
    """Give every router of `model` its matrix of `profile`, for `torch.compile(model, backend="sere")`.

    All or nothing: the profile is checked against the whole model before anything is recorded. The model
    itself is not changed; it may be on any device (meta included) and compiled already. Attaching again
    replaces.

    Raises:
        ProfileError: `profile` is not a `SimilarityProfile`; a gate the model does not have; a router weight
            that is not 2-D with a dimension of E; a router like the profile's that has no matrix; two gates
            that are one parameter.
    """
    from . import binding

    if not isinstance(profile, SimilarityProfile):
        raise ProfileError(
            f"attach needs a SimilarityProfile, got {type(profile).__name__}; "
            "wrap a dict as SimilarityProfile({name: matrix})"
        )
    parameters = _parameters(model)
    gates = {gate: _plain_name(gate) for gate in profile}
    _check_known(gates.values(), parameters)
    _check_distinct(gates.values(), parameters)
    for gate, name in gates.items():
        _check_router_shape(name, parameters[name], profile._matrices[gate])
    _check_complete(gates.values(), parameters)
    origin = profile._origin()
    source = f"profile ({origin})" if origin else "profile"
    for gate, name in gates.items():
        binding.assign(parameters[name], name, profile[gate], source)


def detach(model: torch.nn.Module) -> None:
    """Forget the matrices of all of `model`'s routers; a model without any is left as it is."""
    from . import binding

    for parameter in model.parameters():
        # `forget` makes compiled graphs ask for their matrices again; spare them that for nothing.
        if binding.lookup(parameter) is not None:
            binding.forget(parameter)


def _copy(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 CPU copy of `matrix`."""
    # Calibration and serving often run in inference mode; an inference tensor made there could not be used
    # by a compiled graph outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return matrix.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _check_gate_names(matrices: object) -> None:
    if not isinstance(matrices, Mapping):
        raise ProfileError(f"expected a mapping of gate name to matrix, got {type(matrices).__name__}")
    if not matrices:
        raise ProfileError("a similarity profile needs at least one gate, got no matrices")
    for name in matrices:
        if not isinstance(name, str) or not name:
            raise ProfileError(
                f"a gate is named by its router's weight (model.layers.3.mlp.gate.weight), got {name!r}; "
                "a file keyed by layer index is read with SimilarityProfile.from_reference"
            )


def _checked_copy(name: str, matrix: object) -> torch.Tensor:
    if not isinstance(matrix, torch.Tensor):
        raise ProfileError(f"{name}: expected a tensor of shape [E, E], got {type(matrix).__name__}")
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ProfileError(f"{name}: a similarity matrix is square, [E, E] with E >= 1; got shape {shape}")
    if not matrix.is_floating_point():
        raise ProfileError(f"{name}: expected a floating-point matrix, got {matrix.dtype} of shape {shape}")
    if matrix.is_meta or matrix.layout != torch.strided:
        kind = "on the meta device" if matrix.is_meta else f"of layout {matrix.layout}"
        raise ProfileError(f"{name}: expected a dense matrix with data, got shape {shape} {kind}")
    copy = _copy(matrix)
    _check_finite(name, copy)
    _check_symmetric(name, copy)
    return copy


def _check_finite(name: str, matrix: torch.Tensor) -> None:
    bad = (~matrix.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ProfileError(
            f"{name}: matrix of shape {tuple(matrix.shape)} has {len(bad)} entries that are not finite in "
            f"float32, the first is [{row}, {column}] = {matrix[row, column].item()}"
        )


def _check_symmetric(name: str, matrix: torch.Tensor) -> None:
    gap = (matrix - matrix.T).abs()
    if gap.max() <= _SYMMETRY_TOLERANCE * matrix.abs().max():
        return
    row, column = divmod(int(gap.argmax()), matrix.shape[0])
    raise ProfileError(
        f"{name}: matrix of shape {tuple(matrix.shape)} is not symmetric: [{row}, {column}] = "
        f"{matrix[row, column].item():.6g} but [{column}, {row}] = {matrix[column, row].item():.6g}"
    )


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ProfileError(f"metadata maps strings to strings, got {key!r}: {value!r}")
        if key in _RESERVED_METADATA:
            raise ProfileError(f"the metadata key {key!r} is reserved: save() writes it")
    return dict(metadata)


def _library_version() -> str:
    try:
        return importlib.metadata.version("sere-compile")
    except importlib.metadata.PackageNotFoundError:
        # Run from a checkout that was never installed.
        return "unknown"


def _write_atomically(path: Path, data: bytes) -> None:
    # A rename replaces a link, not what it points to; and only within one folder is it atomic for certain.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _file_kind(path: Path) -> str:
    """`torch` for what torch.save or pickle wrote, else `safetensors`, going by the first bytes."""
    if path.is_dir():
        raise ProfileError(
            f"{path} is a folder; a calibrated checkpoint is read with SimilarityProfile.from_reference(path)"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise ProfileError(f"there is no file {path}") from None
    # A safetensors file opens with the length of its JSON header in 8 bytes, which may look like a pickle's.
    if head[8:] == b"{":
        return "safetensors"
    pickled = head.startswith((b"PK\x03\x04", b"\x80"))
    return "torch" if pickled or path.suffix in (".pt", ".pth", ".bin") else "safetensors"


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ProfileError(f"{path} is not a readable safetensors file: {error}") from error


def _some(names: Iterable[Any], limit: int = 5) -> str:
    """The first few of `names` and how many there are, for a message."""
    listed = [str(name) for name in names]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more


def _check_header(path: Path, header: Mapping[str, str], tensors: list[str]) -> None:
    if header.get("format") != FORMAT:
        raise ProfileError(
            f"{path} is a safetensors file but not a similarity profile (no {FORMAT!r} mark); it holds the "
            f"tensors {_some(tensors)}. A checkpoint calibrated by the reference implementation is read with "
            "SimilarityProfile.from_reference(path), a profile is made by sere_compile.calibrate"
        )
    version = header.get("format_version", "")
    if not version.isdecimal():
        raise ProfileError(f"{path}: the format version {version!r} is not a number; the file is damaged")
    if int(version) > FORMAT_VERSION:
        raise ProfileError(
            f"{path} has format version {version}, written by sere-compile "
            f"{header.get('library_version', 'unknown')}; this one ({_library_version()}) reads up to "
            f"{FORMAT_VERSION}: upgrade sere-compile"
        )


def _check_template(name: str) -> None:
    try:
        usable = name.format(layer=1) != name.format(layer=2)
    except (LookupError, ValueError) as error:
        raise ProfileError(f"name={name!r} is not a template with {{layer}}: {error!r}") from error
    if not usable:
        raise ProfileError(f"name={name!r} needs {{layer}}, the place of the layer index")


def _num_experts(path: Path, where: int | str, matrix: object) -> int:
    """E of an `[E, E]` tensor; the rest is checked when the gate's name is known."""
    if isinstance(matrix, torch.Tensor) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]:
        return matrix.shape[0]
    got = f"shape {tuple(matrix.shape)}" if isinstance(matrix, torch.Tensor) else type(matrix).__name__
    place = f"layer {where}" if isinstance(where, int) else where
    raise ProfileError(f"{path}, {place}: expected a square matrix, [E, E], got {got}")


def _check_not_identity(path: Path, gate: str, matrix: torch.Tensor) -> None:
    # With two experts the only distance is the largest one, and the identity is the right answer.
    if len(matrix) > 2 and torch.equal(matrix, torch.eye(len(matrix), device="cpu")):
        raise ProfileError(
            f"{path}: the matrix of {gate} is the identity, every two experts equally unlike: what a "
            "calibration that failed leaves behind"
        )


def _read_reference(path: Path) -> dict[int | str, Any]:
    """The matrices in a file or folder, by layer index or by the name of the module that held them."""
    if not path.is_dir():
        return _read_reference_file(path)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not (path / "similarity_matrices.pt").exists() and (path / index).exists():
            return _read_sharded(path / index)
    files = ("similarity_matrices.pt", "model.safetensors", "pytorch_model.bin")
    for file in files:
        if (path / file).exists():
            return _read_reference_file(path / file)
    raise ProfileError(f"{path} holds none of {', '.join(files)} and no index of shards")


def _read_sharded(index: Path) -> dict[int | str, Any]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{index} is not an index of shards: {error!r}") from error
    shards = sorted({shard for name, shard in weight_map.items() if _buffer_owner(name) is not None})
    if not shards:
        raise ProfileError(f"{index} names no {_REFERENCE_BUFFER}; it lists {_some(weight_map)}")
    entries: dict[int | str, Any] = {}
    for shard in shards:
        entries.update(_read_reference_file(index.parent / shard))
    owners = {name: _buffer_owner(name) for name in weight_map}
    missing = [name for name, owner in owners.items() if owner is not None and owner not in entries]
    if missing:
        raise ProfileError(f"{index} promises {_some(missing)}, which the shards do not hold")
    return entries


def _read_reference_file(path: Path) -> dict[int | str, Any]:
    if _file_kind(path) == "torch":
        return _by_place(path, _load_weights_only(path))
    with _open_safetensors(path) as file:
        if (file.metadata() or {}).get("format") == FORMAT:
            raise ProfileError(f"{path} is a sere_compile profile; read it with SimilarityProfile.load(path)")
        names = list(file.keys())
        wanted = [name for name in names if _buffer_owner(name) is not None]
        # A checkpoint is large; only its matrices are read, and with none the names alone tell what it is.
        return _by_place(path, {name: file.get_tensor(name) for name in wanted} or dict.fromkeys(names))


def _load_weights_only(path: Path) -> Any:
    try:
        # Mapped, so that the weights around the matrices of a whole checkpoint are not read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged file makes torch raise nearly anything: struct.error, KeyError, AssertionError, ...
    except Exception as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for the Python object {blocked[1]}" if blocked else f"{type(error).__name__}"
        raise ProfileError(
            f"{path} is not a plain file of tensors ({what}). Nothing but tensors is loaded, because "
            "unpickling can run any code; save it again as a dict of layer index to tensor"
        ) from error


def _by_place(path: Path, content: Any) -> dict[int | str, Any]:
    """Entries of a loaded dict by layer index, or, for a state dict, those of its similarity buffers."""
    if not isinstance(content, Mapping):
        raise ProfileError(f"{path}: expected a dict of layer index to matrix, got {type(content).__name__}")
    buffers: dict[int | str, Any] = {
        owner: content[name] for name in content if (owner := _buffer_owner(name)) is not None
    }
    if buffers:
        return buffers
    layers = [_layer_index(key) for key in content]
    if not layers or None in layers:
        raise ProfileError(
            f"{path}: expected layer indices, or tensors named ...{_REFERENCE_BUFFER}; "
            f"it holds {_some(content)}"
        )
    if len(set(layers)) < len(layers):
        raise ProfileError(f"{path}: a layer index occurs twice among {_some(map(repr, content))}")
    return dict(zip(layers, content.values(), strict=True))  # type: ignore[arg-type]


def _layer_index(key: object) -> int | None:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    return key if isinstance(key, int) and not isinstance(key, bool) and key >= 0 else None


def _buffer_owner(key: object) -> str | None:
    """`model.layers.3.mlp` for `model.layers.3.mlp.similarity_matrix`, None for anything else."""
    owner, _, leaf = key.rpartition(".") if isinstance(key, str) else ("", "", "")
    return owner if leaf == _REFERENCE_BUFFER and owner else None


class _RouterNames:
    """Tells which router a matrix of a reference file belongs to; one `find` per matrix."""

    def __init__(self, model: torch.nn.Module | None, template: str) -> None:
        self.template = template
        self.shapes = None if model is None else {name: p.shape for name, p in _parameters(model).items()}

    def find(self, where: int | str, num_experts: int) -> str:
        """The name of the router's weight for layer `where`, or for the MoE module called `where`."""
        if isinstance(where, int):
            return self._of_layer(where, num_experts)
        return self._of_module(_plain_name(where), num_experts)

    def _of_layer(self, layer: int, num_experts: int) -> str:
        name = self.template.format(layer=layer)
        if self.shapes is None or name in self.shapes:
            return name
        found = _layer_routers(self.shapes, layer, num_experts)
        return _the_one(found, f"layer {layer} ({num_experts} experts)", f"{name} is not in the model")

    def _of_module(self, module: str, num_experts: int) -> str:
        layers = [part for part in module.split(".") if part.isdecimal()]
        name = self.template.format(layer=layers[0]) if len(layers) == 1 else ""
        if name.startswith(module + ".") and (self.shapes is None or name in self.shapes):
            return name
        if self.shapes is None:
            raise ProfileError(
                f"name={self.template!r} gives no router weight inside {module}; pass the model, or a name= "
                "with {layer} that matches the model's router weights"
            )
        found = _routers_under(self.shapes, module, num_experts)
        named = [name for name in found if _has_router_name(name, module)]
        why = "the names of its parameters do not tell" if found else "the model has no such weight under it"
        return _the_one(named or found, f"{module} ({num_experts} experts)", why)


def _the_one(found: list[str], what: str, why: str) -> str:
    if len(found) == 1:
        return found[0]
    raise ProfileError(
        f"cannot tell the router of {what}: {why}, and {len(found)} parameters could be it: "
        f"{_some(found, limit=8)}. Pass name= with {{layer}} for the layer index"
    )


def _has_router_name(name: str, module: str) -> bool:
    parts = name.removeprefix(module + ".").split(".")
    return any(part in ("gate", "gating", "wg", "classifier") or "router" in part for part in parts)


def _routers_under(shapes: Mapping[str, torch.Size], module: str, num_experts: int) -> list[str]:
    """2-D parameters below `module` with a row per expert, minus those of the experts themselves."""
    found = []
    for name, shape in shapes.items():
        inner = name.removeprefix(module + ".")
        if inner == name or len(shape) != 2 or shape[0] != num_experts:
            continue
        if "expert" in inner or inner.split(".")[0].isdecimal():
            continue
        # gpt-oss keeps a bias per expert, quantised models a scale: [E, N] beside the stacked weights.
        if not re.search("bias|scale", inner.rpartition(".")[2]):
            found.append(name)
    return found


def _layer_routers(shapes: Mapping[str, torch.Size], layer: int, num_experts: int) -> list[str]:
    """Candidates for the router of decoder layer `layer`, nearest to its experts and best named first.

    Going up from the experts to the layer finds `mlp.gate` beside `mlp.experts` before it meets an attention
    projection that happens to have E rows.
    """
    found: dict[str, None] = {}
    for holder in _expert_holders(shapes, num_experts):
        parts = holder.split(".")
        if str(layer) not in parts:
            continue
        stack = parts.index(str(layer)) + 1
        levels = [".".join(parts[:depth]) for depth in range(len(parts), stack - 1, -1)]
        groups = [(level, _routers_under(shapes, level, num_experts)) for level in levels]
        named = [[n for n in group if _has_router_name(n, level)] for level, group in groups]
        unnamed = [group for _, group in groups]
        found |= dict.fromkeys(next(filter(None, named + unnamed), []))
    return list(found)


def _expert_holders(shapes: Mapping[str, torch.Size], num_experts: int) -> list[str]:
    """Modules that hold E experts: as parameters `[E, ..., ...]`, or as children numbered 0 to E - 1."""
    holders: dict[str, None] = {}
    numbered: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(shape) >= 3 and shape[0] == num_experts:
            holders[".".join(parts[:-1])] = None
        for depth, part in enumerate(parts):
            if match := re.fullmatch(r"(.*?)([0-9]+)", part):
                numbered[".".join(parts[:depth]), match[1]].add(int(match[2]))
    full = set(range(num_experts))
    holders |= {parent: None for (parent, _), seen in numbered.items() if seen == full}
    return list(holders)


def _plain_name(name: str) -> str:
    """`name` without the `_orig_mod` that torch.compile puts around a module it wraps."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters by plain name; a tied one under each of its names."""
    return {_plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _check_known(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    unknown = [gate for gate in gates if gate not in parameters]
    if not unknown:
        return
    routers = [name for name, parameter in parameters.items() if parameter.ndim == 2]
    near = difflib.get_close_matches(unknown[0], routers, n=3, cutoff=0.0)
    raise ProfileError(
        f"the profile's gate {unknown[0]} is not a parameter of the model ({len(unknown)} unknown: "
        f"{_some(unknown)}); the nearest names in the model are {_some(near)}"
    )


def _check_distinct(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for gate in gates:
        other = seen.setdefault(id(parameters[gate]), gate)
        if other != gate:
            raise ProfileError(f"{other} and {gate} are one parameter; it can have one matrix only")


def _check_router_shape(name: str, weight: torch.nn.Parameter, matrix: torch.Tensor) -> None:
    if weight.ndim == 2 and len(matrix) in weight.shape:
        return
    raise ProfileError(
        f"{name}: the similarity matrix of shape {tuple(matrix.shape)} does not fit the router weight of "
        f"shape {tuple(weight.shape)}, which must be 2-D with one row (or column) for each of {len(matrix)} "
        "experts; the profile was made for another model, or the router scores more than real experts"
    )


def _check_complete(gates: Iterable[str], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Every parameter that is a profile's gate but for the layer index must have a matrix of its own."""
    gates = list(gates)
    kinds = {(_any_layer(gate), parameters[gate].shape) for gate in gates}
    covered = {id(parameters[gate]) for gate in gates}
    missing = [
        name
        for name, parameter in parameters.items()
        if id(parameter) not in covered and (_any_layer(name), parameter.shape) in kinds
    ]
    if missing:
        raise ProfileError(
            f"the model's router {missing[0]} has no matrix in the profile ({len(missing)} without: "
            f"{_some(missing)}); the profile's gates are {_some(gates)}. Calibrate this model anew"
        )


def _any_layer(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
