"""The file that an interrupted calibration goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from ..errors import CalibrationError
from ..similarity.profile_file import open_safetensors
from ..whole_file import write_whole
from .batches import Batch

_FORMAT = "sere_compile.calibration"


@dataclass(frozen=True)
class Progress:
    """What a calibration has done after some whole batches.

    Attributes:
        batches: how many.
        tokens: how many tokens counted.
        data: what tells these batches from others, see `Fingerprint`.
        sums: for each gate and accumulator its sums and number of tokens; tensors that nobody
            writes to.
    """

    batches: int = 0
    tokens: int = 0
    data: str = ""
    sums: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What has to be the same for a calibration to go on."""

    method: str
    chunk: int
    seed: int
    model: str

    @classmethod
    def of(cls, method: str, chunk: int, seed: int, model: nn.Module) -> Identity:
        """Of a calibration: the model is identified by names, shapes and the numbers in its smallest matrices."""
        digest = hashlib.sha256()
        for name, parameter in sorted(model.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            if parameter.ndim == 2 and parameter.shape[0] <= 1024 and not parameter.is_meta:
                digest.update(str(parameter.detach().double().sum().item()).encode())
        return cls(method, chunk, seed, digest.hexdigest())


class Fingerprint:
    """Of the batches so far, in their order: another text, tokenizer, window or batch size gives another one."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, batch: Batch) -> None:
        """Take in the arguments of a call: tensors by their content, other objects by what they are."""
        for name, value in (*((str(i), value) for i, value in enumerate(batch.args)), *sorted(batch.kwargs.items())):
            self._digest.update(f"{name}={_described(value)};".encode())
            if isinstance(value, torch.Tensor):
                self._digest.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    # What other objects print may be their address, which is another one in the next process.
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def save(path: Path, identity: Identity, progress: Progress) -> None:
    """Write the file, all of it or nothing."""
    header = {**asdict(identity), "batches": progress.batches, "tokens": progress.tokens, "data": progress.data}
    header["counts"] = {name: count for name, (_, count) in progress.sums.items()}
    tensors = {name: sums.detach().to("cpu").contiguous() for name, (sums, _) in progress.sums.items()}
    write_whole(path, safetensors_bytes(tensors, metadata={"format": _FORMAT, "progress": json.dumps(header)}))


def load(path: Path, identity: Identity) -> Progress | None:
    """What was done by a calibration with the same identity; None, where there is no file.

    Raises:
        CalibrationError: another kind of file, or of another model, method, chunk or seed.
    """
    if not path.exists():
        return None
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CalibrationError(f"{path} is no file of an interrupted calibration")
        header = json.loads(metadata["progress"])
        if "data" not in header:
            raise CalibrationError(
                f"{path} was written by an earlier version, which did not record what data it is of; remove it to "
                "begin anew"
            )
        for name, wanted in asdict(identity).items():
            if header[name] != wanted:
                other = "" if name == "model" else f" ({header[name]}, not {wanted})"
                raise CalibrationError(f"{path} is of another {name}{other}; remove it to begin anew")
        sums = {name: (file.get_tensor(name), header["counts"][name]) for name in file.keys()}  # noqa: SIM118
    return Progress(header["batches"], header["tokens"], header["data"], sums)


def check_data(path: Path, progress: Progress, given: str) -> None:
    """Raise CalibrationError unless the batches given now are those that the file is of.

    Args:
        path: the file.
        progress: what it holds.
        given: the fingerprint of as many batches, of the data given now.
    """
    if given != progress.data:
        differ = "differs" if progress.batches == 1 else "differ"
        raise CalibrationError(
            f"{path} is of other data: the {some_batches(progress.batches)} in it {differ} from what is given now in "
            "text, tokenizer, length, number or batch size. Give the same data, or remove the file to begin anew"
        )


def some_batches(number: int) -> str:
    """`1 batch`, `2 batches`."""
    return f"{number} batch{'es' * (number != 1)}"
