"""`calibrate`: similarity and projection coefficients of all experts of a model, in one pass over data."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, ConfigError, ProbeError, expect
from ..experts.metrics import METRICS, CkaAccumulator, FrobeniusAccumulator, SimilarityAccumulator, make_accumulator
from ..similarity.profile import SimilarityProfile
from ..similarity.profile_file import library_version
from ..whole_file import check_writable
from . import resume as resume_file
from .batches import Batch, example_batch, read_batch
from .observed_model import Arrival, ObservedModel
from .resume import Fingerprint, Identity, Progress

log = logging.getLogger(__name__)

# Hidden states that are drawn for each gate where there is no data.
DRAWN_TOKENS = 1024
# What torch's generators take, from 0 up.
MAX_SEED = 2**64 - 1
_SAVE_SECONDS = 60.0


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None,
    *,
    method: str = "frobenius",
    kernel: str = "linear",
    max_tokens: int | None = None,
    chunk: int = 256,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    example: Any = None,
) -> SimilarityProfile:
    """Measure how alike the experts of every gate are: all experts run on the same tokens, all layers in one pass.

    Works for every model whose gates are found (`sere_compile.explain`). Memory does not grow with
    the data: at most the outputs of all experts on `chunk` tokens of one layer are held, and one
    `[E, E]` float64 sum for each gate.

    Example:
        >>> batches = ({"input_ids": rows} for rows in token_ids.split(8))
        >>> sere_compile.calibrate(model, batches, max_tokens=51_200).save("model.safetensors")

    Args:
        model: an nn.Module, compiled or not. It runs in eval mode, without gradients, and computes
            what it always does.
        batches: what to call it with: mappings of keyword arguments, or tensors as its only
            argument. Tokens that an `attention_mask` [batch, length] in a mapping marks with 0 do
            not count. None: data-free, each gate's experts run on `max_tokens` (1024 by default)
            hidden states of mean b and scale abs(g), the bias and gain of the norm in front of the
            gate; standard normal where no norm is found.
        method: "frobenius" (the paper's choice), "cosine" or "cka", see
            `sere_compile.experts.metrics`.
        kernel: of "cka": "linear", "rbf" or "polynomial".
        max_tokens: stop after so many tokens; the last batch counts in part. None: all.
        chunk: tokens that are compared at once; the minibatch of "cka".
        seed: of what is drawn where there are no batches.
        resume: a file that keeps what was done: every minute, when interrupted, and at the end.
            Where it exists already, the calibration goes on behind the batches that it holds; give
            the same batches again, others are refused.
        progress: show a bar.
        example: batches=None: what to call the model with once, to trace it; models of transformers
            need none.

    Returns:
        Matrices and projections by the name of each router's weight. Metadata: method, tokens,
        model_type, seed, sere_compile (version).

    Raises:
        ArgumentError: `model` is no nn.Module.
        ConfigError: an unknown method or kernel, or a number out of range.
        CalibrationError: no gates, no data, fewer tokens than `max_tokens`, a batch of a wrong
            type or shape, experts that cannot be run or give NaN or infinity, or a resume file of another
            calibration.
        OutputError: the resume file cannot be written.
    """
    expect(model, nn.Module, "calibrate takes a torch.nn.Module")
    settings = _method_name(method, kernel)
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be an integer from 0 to {MAX_SEED}, got {seed!r}")
    if batches is None:
        run = _Calibration(model, settings, chunk, max_tokens or DRAWN_TOKENS, drawn=(max_tokens or DRAWN_TOKENS, seed))
        with _in_eval_mode(model):
            run.add(read_batch(example_batch(model, example), model))
    else:
        run = _Calibration(model, settings, chunk, max_tokens, seed=seed)
        with _in_eval_mode(model):
            _consume(run, batches, None if resume is None else Path(resume), progress)
        if max_tokens is not None and run.done.tokens < max_tokens:
            raise CalibrationError(
                f"the batches hold {run.done.tokens} tokens, padding not counted; max_tokens={max_tokens} asks for more"
            )
    return run.profile({"method": settings, "tokens": str(run.done.tokens), "seed": str(seed)})


def _method_name(method: str, kernel: str) -> str:
    """The name of method and kernel in `METRICS`."""
    if kernel not in CkaAccumulator.KERNELS:
        raise ConfigError(f'unknown kernel {kernel!r} of method "cka"; there are {", ".join(CkaAccumulator.KERNELS)}')
    if method != "cka" and kernel != "linear":
        raise ConfigError(f'kernel={kernel!r} is for method="cka", got method={method!r}')
    name = method if kernel == "linear" else f"{method}_{kernel}"
    make_accumulator(name, 1)
    return name


class _in_eval_mode:
    """Dropout and routing noise are off meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            module.training = True


def _consume(run: _Calibration, batches: Iterable[Any], path: Path | None, progress: bool) -> None:
    """Add batches until there are none or enough; what was done is in the file, however this ends."""
    if isinstance(batches, (Mapping, str, bytes, torch.Tensor)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"batches is an iterable of batches, got {type(batches).__name__}; a single batch goes in a list"
        )
    if path is not None:
        check_writable(path)
        run.go_on_from(path)
    bar = _bar(run, progress)
    saved, found = time.monotonic(), run.done
    remaining = iter(batches)
    try:
        if path is not None:
            _skip(run, remaining, path)
        for batch in remaining:
            if run.is_full:
                break
            before = run.done.tokens
            run.add(read_batch(batch, run.model))
            bar.update(run.done.tokens - before)
            if path is not None and time.monotonic() - saved > _SAVE_SECONDS:
                run.save(path)
                saved = time.monotonic()
    except KeyboardInterrupt:
        log.warning("interrupted: %s", _kept(run, path))
        raise
    finally:
        bar.close()
        if path is not None and run.done is not found:
            run.save(path)
    if not run.done.batches:
        raise CalibrationError("the data set is empty: batches gave no batch")
    if not run.done.tokens:
        raise CalibrationError("the data set is empty: all its tokens are padding")


def _skip(run: _Calibration, batches: Iterator[Any], path: Path) -> None:
    """Pass over the batches that the file holds, and see that they are the same."""
    for batch in itertools.islice(batches, run.done.batches):
        run.data.add(read_batch(batch, run.model))
    resume_file.check_data(path, run.done, str(run.data))


def _kept(run: _Calibration, path: Path | None) -> str:
    """What of an interrupted calibration is not lost."""
    done = f"{resume_file.some_batches(run.done.batches)}, {run.done.tokens} tokens"
    if path is None:
        return f"nothing is kept of {done}; resume= (--resume) names a file to go on from"
    if not run.done.batches:
        return f"no batch was done, so that {path} holds nothing new"
    return f"{path} holds {done}; the same call goes on from there"


def _bar(run: _Calibration, progress: bool) -> Any:
    from tqdm.auto import tqdm  # here, because it looks for a notebook

    return tqdm(total=run.max_tokens, initial=run.done.tokens, unit="token", desc="calibrating", disable=not progress)


class _Calibration:
    """The accumulators of all gates, and what the model has been run on.

    A batch counts as a whole or not at all: `done` is what stands after the last whole one.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        chunk: int,
        max_tokens: int | None,
        drawn: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.max_tokens, self.data = model, max_tokens, Fingerprint()
        self.done = Progress(data=str(self.data))
        self._method, self._chunk, self._seed = method, chunk, seed
        self._observed = ObservedModel(model, self._see, drawn)
        self._accumulators: dict[str, SimilarityAccumulator] = {}
        self._batch = Batch((), {})
        self._largest = 0  # tokens of this batch that counted, at the gate with most

    @property
    def is_full(self) -> bool:
        """Whether there are as many tokens as were asked for."""
        return self.max_tokens is not None and self.done.tokens >= self.max_tokens

    def add(self, batch: Batch) -> None:
        """Run the model on a batch."""
        self._batch, self._largest = batch, 0
        for name, (sums, count) in self.done.sums.items():
            self._accumulator(name, sums.shape[0]).restore(sums, count)
        self._observed(*batch.args, **batch.kwargs)
        now = {n: (a.sums(), a.num_tokens) for n, a in self._accumulators.items()}
        known = {name: (value, number) for name, (value, number) in now.items() if value is not None}
        self.data.add(batch)
        self.done = Progress(self.done.batches + 1, self.done.tokens + self._largest, str(self.data), known)

    def profile(self, metadata: Mapping[str, str]) -> SimilarityProfile:
        """What the sums so far come to."""
        names = list(dict.fromkeys(name.partition("/")[2] for name in self.done.sums))
        matrices, projections = {}, {}
        for name in names:
            main, gram = self._of_gate(name, self.done.sums[f"gram/{name}"][0].shape[0])
            for kind, accumulator in (("main", main), ("gram", gram)):
                if f"{kind}/{name}" in self.done.sums:
                    accumulator.restore(*self.done.sums[f"{kind}/{name}"])
            try:
                matrices[name], projections[name] = main.similarity(), gram.projection()
            except ProbeError as error:
                raise CalibrationError(f"{name}: {error}") from error
        config = getattr(self.model, "config", None)
        origin = {
            "model_type": str(getattr(config, "model_type", None) or type(self._observed.model).__name__),
            "sere_compile": library_version(),
        }
        return SimilarityProfile(matrices, {**metadata, **origin}, projections)

    def go_on_from(self, path: Path) -> None:
        """Take up what the file holds, where it is there."""
        found = resume_file.load(path, self._identity())
        if found is None:
            return
        if self.max_tokens is not None and found.tokens > self.max_tokens:
            raise CalibrationError(
                f"{path} holds {found.tokens} tokens already, and {self.max_tokens} are asked for: give it the "
                "data and numbers that it was begun with, or remove it to begin anew"
            )
        self.done = found
        log.info("going on behind %d batches, %d tokens", found.batches, found.tokens)

    def save(self, path: Path) -> None:
        """Write what was done with whole batches."""
        resume_file.save(path, self._identity(), self.done)

    def _identity(self) -> Identity:
        return Identity.of(self._method, self._chunk, self._seed, self._observed.model)

    def _see(self, arrival: Arrival) -> None:
        tokens = self._counted(arrival)
        main, gram = self._of_gate(arrival.name, arrival.num_experts)
        for part in tokens.split(self._chunk):
            if not len(part):
                continue
            outputs = arrival.experts.outputs(part, arrival.num_experts)
            try:
                main.update(outputs)
                if gram is not main:
                    gram.update(outputs)
            except ProbeError as error:
                raise CalibrationError(f"{arrival.name}: {error}") from error
        self._largest = max(self._largest, len(tokens))

    def _counted(self, arrival: Arrival) -> torch.Tensor:
        """The numbers of the tokens that count."""
        if self._observed.drawn is not None:
            return torch.arange(arrival.tokens, device=arrival.device)
        tokens = self._batch.real_tokens(arrival.tokens, arrival.name).to(arrival.device)
        return tokens if self.max_tokens is None else tokens[: self.max_tokens - self.done.tokens]

    def _of_gate(self, name: str, num_experts: int) -> tuple[SimilarityAccumulator, FrobeniusAccumulator]:
        """What a gate's outputs go into; one accumulator does both where it can."""
        gram = self._accumulator(f"gram/{name}", num_experts)
        assert isinstance(gram, FrobeniusAccumulator)
        return gram if self._method == "frobenius" else self._accumulator(f"main/{name}", num_experts), gram

    def _accumulator(self, name: str, num_experts: int) -> SimilarityAccumulator:
        if name not in self._accumulators:
            kind: Callable[[int], SimilarityAccumulator] = (
                FrobeniusAccumulator if name.startswith("gram/") else METRICS[self._method]
            )
            self._accumulators[name] = kind(num_experts)
        return self._accumulators[name]
