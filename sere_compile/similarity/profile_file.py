"""The file of a similarity profile: safetensors, with a header that says what it is and who wrote it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from ..errors import ProfileError
from ..whole_file import write_whole

FORMAT = "sere_compile.similarity"
# 2: with projections. A profile without any is written as 1, which earlier versions of this library
# read.
FORMAT_VERSION = 2
_PROJECTION = "projection/"

# `write_profile` writes these keys itself; a caller's entry of the same name would be lost or would
# spoil the file.
RESERVED_METADATA = ("format", "format_version", "library_version")


def write_profile(
    path: Path,
    matrices: dict[str, torch.Tensor],
    metadata: Mapping[str, str],
    projections: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write matrices [E, E] by gate name, all of them or nothing.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """
    number = "1" if projections is None else "2"
    version = {"format": FORMAT, "format_version": number, "library_version": library_version()}
    tensors = matrices | {_PROJECTION + name: matrix for name, matrix in (projections or {}).items()}
    write_whole(path, safetensors_bytes(tensors, metadata={**metadata, **version}))


def read_profile(
    path: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, torch.Tensor] | None]:
    """Read what `write_profile` wrote: matrices by gate name, unchecked, metadata, and projections.

    Raises:
        ProfileError: no such file, another kind of file, or a format newer than this library's.
    """
    if is_torch_file(path):
        raise ProfileError(
            f"{path} is a torch.save file, not a similarity profile; read the reference implementation's "
            "files with SimilarityProfile.from_reference(path)"
        )
    with open_safetensors(path) as file:
        header, names = dict(file.metadata() or {}), list(file.keys())
        _check_header(path, header, names)
        tensors = {name: file.get_tensor(name) for name in names}
    metadata = {key: value for key, value in header.items() if key not in RESERVED_METADATA}
    if header["format_version"] == "1":
        return tensors, metadata, None
    matrices = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PROJECTION)}
    projections = {
        name.removeprefix(_PROJECTION): tensor for name, tensor in tensors.items() if name.startswith(_PROJECTION)
    }
    return matrices, metadata, projections


def _check_header(path: Path, header: Mapping[str, str], tensors: list[str]) -> None:
    if header.get("format") != FORMAT:
        raise ProfileError(
            f"{path} is a safetensors file but not a similarity profile (no {FORMAT!r} mark); it holds the "
            f"tensors {some(tensors)}. A checkpoint calibrated by the reference implementation is read with "
            "SimilarityProfile.from_reference(path), a profile is made by sere_compile.calibrate"
        )
    version = header.get("format_version", "")
    if not version.isdecimal():
        raise ProfileError(f"{path}: the format version {version!r} is not a number; the file is damaged")
    if int(version) > FORMAT_VERSION:
        raise ProfileError(
            f"{path} has format version {version}, written by sere-compile "
            f"{header.get('library_version', 'unknown')}; this one ({library_version()}) reads up to "
            f"{FORMAT_VERSION}: upgrade sere-compile"
        )


def is_torch_file(path: Path) -> bool:
    """Whether torch.save or pickle wrote a file, going by its first bytes; else it should be safetensors.

    Raises:
        ProfileError: no such file, or a folder.
    """
    if path.is_dir():
        raise ProfileError(
            f"{path} is a folder; a calibrated checkpoint is read with SimilarityProfile.from_reference(path)"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise ProfileError(f"there is no file {path}") from None
    # A safetensors file opens with the length of its JSON header in 8 bytes, which may look like a
    # pickle's.
    if head[8:] == b"{":
        return False
    return head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in (".pt", ".pth", ".bin")


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file on the CPU; whatever is wrong with it, also later, is a ProfileError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ProfileError(f"{path} is not a readable safetensors file: {error}") from error


def some(names: Iterable[Any], limit: int = 5) -> str:
    """The first few of `names` and how many there are, for a message."""
    listed = [str(name) for name in names]
    more = f", ... ({len(listed)} in all)" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more


def library_version() -> str:
    """Of sere-compile, as installed."""
    try:
        return importlib.metadata.version("sere-compile")
    except importlib.metadata.PackageNotFoundError:
        # Run from a checkout that was never installed.
        return "unknown"
