"""Engines in processes of their own, for one does not give its memory back: what each found, or why nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT_OF_TIME = "out of time"
# How argparse ends a program whose arguments it does not know.
USAGE = 2
# Named by an engine when its workers have said what is wrong.
_CONSEQUENCES = ("initialization failed", "See root cause above", "failed to start", "EngineDeadError", "ChildFailed")


@dataclass(frozen=True)
class Ended:
    """How the processes of one engine ended.

    Attributes:
        results: of each process, what it wrote last; None: nothing. A process that ended badly may have written a part.
        status: 0 where all ended well, else that of the first one that did not, or `OUT_OF_TIME`.
        reason: one line that says why an engine ended badly; empty where it did not.
        lines: what it printed last.
    """

    results: list[dict[str, Any] | None]
    status: int | str
    reason: str
    lines: list[str]


def run_processes(
    module: str,
    case: Mapping[str, Any],
    seconds: float,
    log: Path,
    ranks: Sequence[Mapping[str, str]] = ({},),
    arguments: Sequence[str] = (),
) -> Ended:
    """Run `python -m MODULE [arguments] CASE OUT`, once for each rank, all at the same time.

    Args:
        module: a program that reads `case` from a file of JSON, and writes its result to another one.
        case: has a "name", for the log.
        seconds: after which all are ended.
        log: what they print is added to it.
        ranks: for each process, variables of its environment.
        arguments: of the program, before the two files.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as file:
        told = Path(folder) / "case.json"
        told.write_text(json.dumps(case), encoding="utf-8")
        outs = [Path(folder) / f"{rank}.json" for rank in range(len(ranks))]
        file.write(f"\n=== {case['name']}\n")
        file.flush()
        # In sessions of their own, so that an engine's workers end with it.
        started = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments, str(told), str(out)],
                stdout=file, stderr=file, env={**os.environ, **own}, start_new_session=True,
            )
            for out, own in zip(outs, ranks, strict=True)
        ]  # fmt: skip
        status = _ended(started, seconds)
        results = [json.loads(out.read_text(encoding="utf-8")) if out.exists() else None for out in outs]
    lines = last_lines(log)
    return Ended(results, status, "" if status == 0 else reason_of(status, lines), lines)


def _ended(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> int | str:
    """0 when all ended well; the first other status, or that time is over. Nothing of theirs runs on."""
    ends = time.monotonic() + seconds
    try:
        while True:
            statuses = [process.poll() for process in processes]
            if failed := [status for status in statuses if status]:
                return failed[0]
            if None not in statuses:
                return 0
            if time.monotonic() > ends:
                return OUT_OF_TIME
            time.sleep(0.05)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_lines(log: Path) -> list[str]:
    """What the last engine printed."""
    return log.read_text(encoding="utf-8", errors="replace").rpartition("=== ")[2].splitlines()


def reason_of(status: int | str, lines: Sequence[str]) -> str:
    """The line that says what went wrong: the last error that is no consequence of another one."""
    if status == OUT_OF_TIME:
        return OUT_OF_TIME
    # Without what a logger, or the name of a worker's process, puts before.
    found = (re.search(r"[\w.]*[A-Z]\w*(Error|Exception)\b.*|\berror: .*", line) for line in lines)
    errors = [match[0].strip() for match in found if match]
    causes = [line for line in errors if not any(text in line for text in _CONSEQUENCES)] or errors
    if not causes:
        return f"its process ended with status {status}" + (": " + lines[-1].strip()[:300] if len(lines) > 1 else "")
    return causes[-1][:400]


def said(log: Path) -> list[str]:
    """What SERE wrote into the log of the last engine, without layers that are not re-routed."""
    lines = [line[line.index("SERE") :] for line in last_lines(log) if "SERE" in line]
    return [line for line in dict.fromkeys(lines) if "is not re-routed" not in line]
