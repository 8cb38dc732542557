"""The file that an interrupted calibration goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ..errors import CalibrationError
from ..similarity.profile_file import open_safetensors
from ..whole_file import write_whole

_FORMAT = "sere_compile.calibration"


@dataclass(frozen=True)
class Progress:
    """What a calibration has done after some whole batches.

    Attributes:
        batches: how many.
        tokens: how many tokens counted.
        sums: for each gate and accumulator its sums and number of tokens; tensors that nobody
            writes to.
    """

    batches: int = 0
    tokens: int = 0
    sums: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What has to be the same for a calibration to go on."""

    method: str
    chunk: int
    model: str

    @classmethod
    def of(cls, method: str, chunk: int, model: nn.Module) -> Identity:
        """Of a calibration: the model is identified by names, shapes and the numbers in its smallest matrices."""
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            if parameter.ndim == 2 and parameter.shape[0] <= 1024 and not parameter.is_meta:
                digest.update(str(parameter.detach().double().sum().item()).encode())
        return cls(method, chunk, digest.hexdigest())


def save(path: Path, identity: Identity, progress: Progress) -> None:
    """Write the file, all of it or nothing."""
    header = {**asdict(identity), "batches": progress.batches, "tokens": progress.tokens}
    header["counts"] = {name: count for name, (_, count) in progress.sums.items()}
    tensors = {name: sums.detach().to("cpu").contiguous() for name, (sums, _) in progress.sums.items()}
    write_whole(path, safetensors_bytes(tensors, metadata={"format": _FORMAT, "progress": json.dumps(header)}))


def load(path: Path, identity: Identity) -> Progress:
    """What was done by a calibration with the same identity; nothing, where there is no file.

    Raises:
        CalibrationError: another kind of file, or of another model, method or chunk.
    """
    if not path.exists():
        return Progress()
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CalibrationError(f"{path} is no file of an interrupted calibration")
        header = json.loads(metadata["progress"])
        for name, wanted in asdict(identity).items():
            if header[name] != wanted:
                other = "" if name == "model" else f" ({header[name]}, not {wanted})"
                raise CalibrationError(f"{path} is of another {name}{other}; remove it to begin anew")
        sums = {name: (file.get_tensor(name), header["counts"][name]) for name in file.keys()}  # noqa: SIM118
    return Progress(header["batches"], header["tokens"], sums)
