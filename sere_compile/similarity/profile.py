"""Similarity profiles: one expert-similarity matrix per MoE gate, in memory and on disk.

A profile is what travels between calibration, disk and a model, see `attach`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import ProfileError, expect
from .profile_file import RESERVED_METADATA, read_profile, some, write_profile
from .reference_import import DEFAULT_NAME, read_reference

# Relative to the largest entry: the rounding of a float32 product, far below a matrix that is not
# symmetric.
_SYMMETRY_TOLERANCE = 1e-4


class SimilarityProfile(Mapping[str, torch.Tensor]):
    """A read-only mapping from the name of a router's weight to its expert-similarity matrix.

    Keys are fully qualified parameter names (`model.layers.3.mlp.gate.weight`), iterated in natural
    order (layer 2 before layer 10). Values are `[E, E]` float32 CPU tensors, E being the number of
    experts.

    The profile owns copies of what it is given, and every access hands out a *fresh copy*: writing
    into a tensor that came from a profile changes that tensor only. Two profiles are equal when
    they hold the same gates with bitwise the same matrices; metadata says where the numbers came
    from and does not take part. Profiles are not hashable, since a hash by value would read every
    matrix.

    Args:
        matrices: for each gate a symmetric, finite, floating-point `[E, E]` tensor of any device
            and dtype.
        metadata: strings about the origin; `method`, `tokens` and `model_type` are the usual keys.
        projections: None, or for each gate a finite, floating-point `[E, E]` tensor a with
            `a[u, v] = <A_u, A_v> / <A_v, A_v>`, for `substitution="projection"`.

    Raises:
        ProfileError: a matrix is not a tensor, not square, not floating point, not finite or not
            symmetric; there is no matrix at all; a name or the metadata is not made of strings;
            projections of other gates or sizes.
    """

    def __init__(
        self,
        matrices: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        projections: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        _check_gate_names(matrices)
        names = sorted(matrices, key=_natural)
        self._matrices = {name: _checked_copy(name, matrices[name]) for name in names}
        self._metadata = _checked_metadata(metadata or {})
        self._projections = None if projections is None else _checked_projections(self._matrices, projections)

    @property
    def projections(self) -> Mapping[str, torch.Tensor] | None:
        """For each gate a copy of its projection coefficients `[E, E]`, or None where the profile has none."""
        if self._projections is None:
            return None
        return MappingProxyType({name: _copy(matrix) for name, matrix in self._projections.items()})

    def projection(self, name: str) -> torch.Tensor | None:
        """A copy of one gate's projection coefficients `[E, E]`, or None where the profile has none."""
        return None if self._projections is None else _copy(self._projections[name])

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
        mine, theirs = self._projections or {}, other._projections or {}
        return _same(self._matrices, other._matrices) and _same(mine, theirs)

    def __repr__(self) -> str:
        sizes = sorted({matrix.shape[0] for matrix in self._matrices.values()})
        parts = [
            f"{len(self)} gate{'s' if len(self) > 1 else ''}",
            f"{'/'.join(map(str, sizes))} expert{'s' if sizes != [1] else ''}",
            self._origin(),
            "with projections" if self._projections is not None else "",
        ]
        return f"<SimilarityProfile: {', '.join(filter(None, parts))}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` as safetensors, all of it or nothing.

        The file is written beside its destination and renamed, so an interrupted save leaves an
        earlier file as it was. Its header holds the format, the library's version and `metadata`.

        Raises:
            OutputError: the folder is missing or not writable, or the disk is full.
        """
        expect(path, (str, os.PathLike), "SimilarityProfile.save takes the path of a file")
        write_profile(Path(path), self._matrices, self._metadata, self._projections)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SimilarityProfile:
        """Read a profile that `save` wrote; matrices and metadata come back bit for bit.

        Raises:
            ArgumentError: no path.
            ProfileError: no such file, not safetensors, safetensors of another kind (a model, say),
                a format newer than this library's, or contents that are not valid matrices.
        """
        expect(path, (str, os.PathLike), "SimilarityProfile.load takes the path of a file")
        return cls(*read_profile(Path(path)))

    @classmethod
    def from_reference(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module | None = None,
        name: str = DEFAULT_NAME,
    ) -> SimilarityProfile:
        """Read matrices that the SERE authors' calibration wrote.

        `path` is their `similarity_matrices.pt` (`{layer index: [E, E] tensor}`), or a calibrated
        checkpoint whose MoE modules hold a `similarity_matrix` buffer: a safetensors file, a
        `.pt`/`.bin` state dict, or a folder of either, sharded or not. In a folder a
        `similarity_matrices.pt` wins, being the unrounded original. Pickled files are read with
        `torch.load(weights_only=True)` only.

        Args:
            path: file or folder.
            model: the model the matrices are for. With it every router is looked up in the model,
                so models with other names than `name` work as well.
            name: the name of a router's weight with `{layer}` for the layer index; it is tried
                first.

        Raises:
            ProfileError: unreadable or unsafe file, no matrices in it, an identity matrix (what a
                calibration that failed leaves behind), or a layer whose router cannot be determined
                for certain. No layer is ever left out.
        """
        expect(path, (str, os.PathLike), "SimilarityProfile.from_reference takes the path of a file or folder")
        path = Path(path)
        profile = cls(read_reference(path, model, name), {"source": path.name})
        for gate, matrix in profile._matrices.items():
            # With two experts the only distance is the largest one, and the identity is the right
            # answer.
            if len(matrix) > 2 and torch.equal(matrix, torch.eye(len(matrix), device="cpu")):
                raise ProfileError(
                    f"{path}: the matrix of {gate} is the identity, every two experts equally unlike: what a "
                    "calibration that failed leaves behind"
                )
        return profile

    def _origin(self) -> str:
        """`frobenius, 51200 tokens`, from whatever the metadata holds."""
        made_by = self._metadata.get("method") or self._metadata.get("source")
        tokens = self._metadata.get("tokens")
        return ", ".join(filter(None, [made_by, f"{tokens} tokens" if tokens else None]))

    @property
    def source(self) -> str:
        """What a report says of a matrix from this profile: `profile (frobenius, 51200 tokens)`."""
        origin = self._origin()
        return f"profile ({origin})" if origin else "profile"


def _copy(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 CPU copy of `matrix`."""
    # Calibration and serving often run in inference mode; an inference tensor made there could not
    # be used by a compiled graph outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return matrix.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


def _same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(matrix.view(torch.int32), right[name].view(torch.int32)) for name, matrix in left.items()
    )


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
    copy = _checked_square(name, matrix)
    _check_symmetric(name, copy)
    return copy


def _checked_projections(
    matrices: Mapping[str, torch.Tensor], projections: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if not isinstance(projections, Mapping):
        raise ProfileError(f"projections map gate names to matrices, got {type(projections).__name__}")
    if projections.keys() != matrices.keys():
        odd = sorted(map(str, matrices.keys() ^ projections.keys()))
        raise ProfileError(f"projections and matrices are of different gates: {some(odd)}")
    checked = {name: _checked_square(f"{name} (projection)", projections[name]) for name in matrices}
    for name, matrix in checked.items():
        if matrix.shape != matrices[name].shape:
            raise ProfileError(
                f"{name}: projections of shape {tuple(matrix.shape)} beside a matrix of shape "
                f"{tuple(matrices[name].shape)}"
            )
    return checked


def _checked_square(name: str, matrix: object) -> torch.Tensor:
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
        if key in RESERVED_METADATA:
            raise ProfileError(f"the metadata key {key!r} is reserved: save() writes it")
    return dict(metadata)
