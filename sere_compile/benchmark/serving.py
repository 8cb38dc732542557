"""What SERE gives and costs in a vLLM engine: settings, measured one engine after the other, and the table."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.sweep import SweepRow
from ..integrations.vllm.processes import USAGE, Ended, run_processes, said
from ..whole_file import write_whole

ENGINE = "sere_compile.benchmark.serving_engine"
QUALITY = "sere_compile.benchmark.serving_quality"
ALONE = "vLLM"
# S for "K": more than any model has.
ALL = 1_000_000
# Runs that are farther apart than this share of their median are said to be.
FAR = 0.25
# With fewer seconds left nothing is started.
LEAST_SECONDS = 30.0
# Of each engine's process: its workers end with it, and on a CPU vLLM would ask for nearly all memory.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_KVCACHE_SPACE": "4"}


@dataclass(frozen=True)
class Setting:
    """One engine: vLLM alone, or with these options of SERE."""

    name: str
    sere: dict[str, Any] | None = None

    @property
    def reroutes(self) -> bool:
        """Whether any expert may change."""
        return self.sere is not None and self.sere["select_top_k"] != ALL

    @property
    def key(self) -> tuple[str, str]:
        """Rule and S, as a row of a sweep names them."""
        sere = self.sere or {}
        return str(sere.get("substitution", "reroute")), str(sere.get("select_top_k", ""))


def settings_of(select_top_k: Iterable[int], rules: Sequence[str], more: Mapping[str, Any]) -> list[Setting]:
    """An engine without SERE, then every S with every rule; without re-routing (S = K) there is one rule.

    Args:
        select_top_k: values of S; `ALL` stands for K.
        rules: of `SereConfig.substitution`.
        more: further options of `additional_config["sere"]`.
    """
    found = [Setting(ALONE)]
    for size in select_top_k:
        if size == ALL:
            found.append(Setting("S = K", {**more, "select_top_k": ALL}))
            continue
        for rule in rules:
            found.append(Setting(f"S = {size}, {rule}", {**more, "select_top_k": size, "substitution": rule}))
    return found


@dataclass(frozen=True)
class ServingRow:
    """One engine at one batch size.

    Attributes:
        batch: requests at a time.
        variant: the setting's name.
        sere: its options; None: vLLM alone.
        ms: milliseconds per output token, the lowest, the median and the highest of the runs.
        tokens_per_s: output tokens per second, prompts included.
        active: active experts before and after, means over layers and re-routed forwards; None where not counted.
        loss: what the same setting costs in quality at this batch; None where it was not measured.
    """

    batch: int
    variant: str
    sere: dict[str, Any] | None
    ms: tuple[float, float, float]
    tokens_per_s: float
    active: tuple[float, float] | None = None
    loss: SweepRow | None = None

    @property
    def time(self) -> str:
        """In words."""
        low, median, high = self.ms
        return f"{median:.2f} [{low:.2f} .. {high:.2f}]"


@dataclass
class ServingResults:
    """Everything one run of `sere serve-bench` found.

    Attributes:
        model: its name.
        machine: device and versions, as an engine said them; empty where none started.
        engine: the options that every engine was given, as on a command line.
        prompts: what requests are, in words.
        quality: the text that losses are of, or why there are none.
        dtype: of activations, as an engine said it.
        rows: by batch, then setting.
        left_out: what was asked for and not measured, and why.
        notes: what else a reader of the figures has to know.
    """

    model: str
    machine: str
    engine: list[str]
    prompts: str
    quality: str
    dtype: str = ""
    rows: list[ServingRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def speedup(self, row: ServingRow) -> float | None:
        """Over vLLM alone at the same batch size; None where that was not measured, or is noise, and for itself."""
        alone = [r for r in self.rows if r.variant == ALONE and r.batch == row.batch]
        if not alone or row.variant == ALONE or min(alone[0].ms[1], row.ms[1]) <= 0:
            return None
        return alone[0].ms[1] / row.ms[1]

    def said_speedup(self, row: ServingRow) -> str:
        """The speed-up in words: where runs of both overlap, it says that it is none that was shown."""
        speedup = self.speedup(row)
        if speedup is None:
            return ""
        (alone,) = (r for r in self.rows if r.variant == ALONE and r.batch == row.batch)
        overlap = row.ms[0] <= alone.ms[2] and alone.ms[0] <= row.ms[2]
        return f"{speedup:.2f}x" + (" (runs overlap)" if overlap else "")

    def noisy(self) -> list[str]:
        """What to say of rows whose runs lie so far apart that their median says little."""
        wide = [f"{row.variant} at batch {row.batch}" for row in self.rows
                if row.ms[0] <= 0 or row.ms[2] - row.ms[0] > FAR * row.ms[1]]  # fmt: skip
        if not wide:
            return []
        return [
            f"runs of {', '.join(wide)} are more than {FAR:.0%} of their median apart: measure again on a quiet "
            "machine, or with a larger --output-len"
        ]

    @property
    def has_losses(self) -> bool:
        """Whether any row says what it costs."""
        return any(row.loss is not None for row in self.rows)

    def lines(self) -> list[str]:
        """What belongs above a table."""
        options = " ".join(self.engine)
        return [
            f"model: {self.model}; {self.machine or 'no engine started'}",
            f"engine: {options or 'no options given'}{self.dtype and f' ({self.dtype})'}; {self.prompts}",
            f"quality: {self.quality}",
        ]

    def cells(self, row: ServingRow) -> list[str]:
        """A row of the table, by `HEADINGS`."""
        loss = row.loss
        return [
            str(row.batch), row.variant, row.time, self.said_speedup(row),
            f"{row.tokens_per_s:.0f}", "" if row.active is None else f"{row.active[0]:.1f} -> {row.active[1]:.1f}",
            "" if loss is None else loss.change, "" if loss is None else f"{loss.top1_agreement:.1%}",
        ]  # fmt: skip

    def table(self) -> str:
        """Markdown, with what was left out below."""
        shown = [[*HEADINGS], *(self.cells(row) for row in self.rows)]
        kept = [i for i in range(len(HEADINGS)) if i < 6 or self.has_losses]
        lines = ["| " + " | ".join(cells[i] for i in kept) + " |" for cells in shown]
        lines.insert(1, "|" + " --- |" * len(kept))
        below = [*(f"Left out: {text}" for text in self.left_out), *(f"Note: {text}" for text in self.notes)]
        return "\n".join([*self.lines(), "", *lines, *(["", *below] if below else [])])

    def save(self, path: str | Path) -> None:
        """Write JSON: the fields of this object and of its rows, and each row's speed-up.

        Raises:
            OutputError: the file cannot be written.
        """
        data = dataclasses.asdict(self)
        for row, made in zip(self.rows, data["rows"], strict=True):
            made["speedup"] = self.speedup(row)
        # JSON has no NaN: what an error of one decoding batch is.
        text = json.dumps(_without_nan(data), indent=1, allow_nan=False)
        write_whole(path, (text + "\n").encode())


HEADINGS = (
    "batch", "variant", "ms per output token, median [least .. most]", "speed-up", "output tokens/s, with prompts",
    "active experts", "perplexity", "top-1 same",
)  # fmt: skip


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class Job:
    """What is the same for every engine of a run.

    Attributes:
        case: of `serving_engine.Case`, without name, kind and options of SERE.
        quality: of `serving_quality`, without the settings; None: quality is not measured.
        settings: of `settings_of`.
        count: whether active experts are counted.
        ends: of `time.monotonic`, when all has to be over.
        log: what engines print.
    """

    case: Mapping[str, Any]
    quality: Mapping[str, Any] | None
    settings: Sequence[Setting]
    count: bool
    ends: float
    log: Path


def measure(job: Job, results: ServingResults, tell: Callable[[str], None]) -> None:
    """Run every engine, one after the other, and add to `results` what each found.

    Raises:
        ConfigError: vLLM does not know an option of the command line.
    """
    found: dict[str, dict[str, Any]] = {}
    for setting in job.settings:
        found[setting.name] = _engine(job, setting, "time", results, tell)
        results.machine = results.machine or found[setting.name].get("machine", "")
        results.dtype = results.dtype or found[setting.name].get("dtype", "")
    counted = {
        setting.name: _engine(job, setting, "count", results, tell).get("active", {})
        for setting in job.settings
        if job.count and setting.reroutes and found[setting.name].get("ms")
    }
    losses = _losses(job, results, tell)
    results.rows = [
        ServingRow(
            batch, setting.name, setting.sere, tuple(found[setting.name]["ms"][str(batch)]),
            found[setting.name]["tokens_per_s"][str(batch)], _pair(counted.get(setting.name, {}).get(str(batch))),
            losses.get((batch, *setting.key)) if setting.reroutes else None,
        )
        for batch in job.case["batches"]
        for setting in job.settings
        if str(batch) in found[setting.name].get("ms", {})
    ]  # fmt: skip
    results.notes = [*results.noisy(), *results.notes]


def _pair(numbers: Sequence[float] | None) -> tuple[float, float] | None:
    return None if numbers is None else (numbers[0], numbers[1])


def _engine(
    job: Job, setting: Setting, kind: str, results: ServingResults, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What one engine found; a part of it, or nothing, where it failed, which is noted."""
    name = f"{setting.name}, active experts" if kind == "count" else setting.name
    case = {**job.case, "name": name, "kind": kind, "sere": setting.sere}
    ended = _process(job, ENGINE, case, results, tell)
    if ended is None:
        return {}
    if ended.status == USAGE:
        raise ConfigError(
            f"neither sere serve-bench nor vLLM's engine takes what it was given: {ended.reason}. `sere serve-bench "
            "--help` and `vllm serve --help=all` list what there is"
        )
    found = ended.results[0] or {}
    done = found.get("ms" if kind == "time" else "active", {})
    missing = [str(batch) for batch in job.case["batches"] if str(batch) not in done]
    if ended.status != 0:
        part = f" at batch {', '.join(missing)}" if done else ""
        _leave_out(results, f"{name}{part}: {ended.reason}", tell)
    if kind == "time":
        for text in said(job.log):
            if text not in results.notes:
                results.notes.append(text)
    return found


def _process(
    job: Job, module: str, case: Mapping[str, Any], results: ServingResults, tell: Callable[[str], None]
) -> Ended | None:
    """How one process ended; None where there was no time for it, which is noted."""
    left = job.ends - time.monotonic()
    if left < LEAST_SECONDS:
        _leave_out(results, f"{case['name']}: no time left", tell)
        return None
    tell(f"{case['name']} ...")
    begun = time.monotonic()
    ended = run_processes(module, case, left, job.log)
    tell(f"{case['name']}: {time.monotonic() - begun:.0f} s")
    return ended


def _leave_out(results: ServingResults, text: str, tell: Callable[[str], None]) -> None:
    results.left_out.append(text)
    tell(f"left out: {text}")


def _losses(job: Job, results: ServingResults, tell: Callable[[str], None]) -> dict[tuple[int, str, str], SweepRow]:
    """By batch, rule and S; nothing where quality is not measured, for the reason that `results` has."""
    wanted = [setting for setting in job.settings if setting.reroutes]
    if job.quality is None or not wanted:
        return {}
    case = {**job.quality, "name": "quality", "settings": [setting.sere for setting in wanted]}
    case["dtype"] = results.dtype or "auto"
    ended = _process(job, QUALITY, case, results, tell)
    if ended is None or ended.status != 0:
        reason = "no time left" if ended is None else ended.reason
        if ended is not None:
            _leave_out(results, f"quality: {reason}", tell)
        results.quality = f"not measured: {reason}"
        return {}
    found = ended.results[0] or {}
    results.quality = found["about"]
    rows = [SweepRow(**{**row, "losses": tuple(row["losses"])}) for row in found["rows"]]
    return {(row.decode_batch, row.rule, row.select_top_k): row for row in rows}
