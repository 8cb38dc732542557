"""Runs tests on changed code, without importing torch or collecting the tests for each change.

One process imports what the package depends on. It forks one that imports the package, collects files of tests and
stops where pytest would begin to run them. Each change is a fork of that one: it puts the changed code into the
functions that are there already, and runs tests until one fails.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from .draw import ROOT, Mutant, compiled

_LIBRARIES = (
    *("numpy", "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.export", "safetensors.torch", "triton"),
    *("hypothesis", "expecttest", "transformers", "transformers.models.qwen2_moe.modeling_qwen2_moe"),
    *("onnx", "onnxruntime", "onnxscript", "matplotlib.pyplot"),
)
_NOT_REACHED = "no function holds it"
_MARKERS = "not (slow or zoo or wide or vllm or generated or tensorrt or gpu)"


@dataclass(frozen=True)
class Verdict:
    """What tests make of a mutant.

    Attributes:
        killed: One of them fails, or takes too long.
        seconds: How long they took, of wall time.
        by: The test that failed, or why there is none.
        tests: How many tests were to run.
    """

    killed: bool
    seconds: float
    by: str
    tests: int


@dataclass
class Measured:
    """Tests on the code as they are: seconds of each, which fail, and the lines that each runs of each module."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, list[int]]]
    failed: list[str]

    def covering(self, mutant: Mutant) -> list[str]:
        """Tests that run a line of the mutant, the fastest first; all of them for what only an import runs."""
        changed = set(range(mutant.line, mutant.end + 1))
        tests = [test for test in self.seconds if not changed.isdisjoint(self.lines[test].get(mutant.path, ()))]
        return sorted(set(tests or self.seconds).difference(self.failed), key=self.seconds.__getitem__)


def prepare() -> None:
    """Imports what every run needs."""
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    for name in _LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()


@contextlib.contextmanager
def collected(files: Iterable[str], modules: Iterable[str]) -> Iterator[Tests]:
    """The tests of files, collected in a process of its own that ends with the block."""
    (here, there), (answers, replies) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(there)
        os.close(answers)
        _serve(list(files), list(modules), os.fdopen(here, "rb"), os.fdopen(replies, "wb"))
    os.close(here)
    os.close(replies)
    with os.fdopen(there, "wb") as requests, os.fdopen(answers, "rb") as results:
        yield Tests(requests, results)
    os.waitpid(child, 0)


class Tests:
    """Asks the process that has collected tests."""

    def __init__(self, requests: BinaryIO, results: BinaryIO):
        self._requests, self._results = requests, results

    def of(self, file: str) -> list[str]:
        """The tests of a file, in order."""
        return self._ask({"list": file})["tests"]

    def measure(self, tests: list[str]) -> Measured:
        """Seconds and lines of tests, on the code as it is."""
        return Measured(**self._ask({"measure": tests}))

    def judge(self, mutant: Mutant, tests: list[str], seconds: float) -> Verdict:
        """Runs tests in this order on a mutant; they take so many seconds on the code as it is."""
        return Verdict(**self._ask({"mutant": vars(mutant), "tests": tests, "seconds": seconds}))

    def _ask(self, question: dict) -> dict:
        self._requests.write(json.dumps(question).encode() + b"\n")
        self._requests.flush()
        answer = self._results.readline()
        if not answer:
            raise RuntimeError("the tests cannot be collected: run pytest on them")
        return json.loads(answer)


def _serve(files: list[str], modules: list[str], requests: BinaryIO, results: BinaryIO) -> None:
    """What the process that collects tests does; it never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        options = ["-p", "no:cacheprovider", "-n", "0", "-q", "--tb=line", "-m", _MARKERS, "--capture=fd"]
        pytest.main([*options, *files], plugins=[_Server(modules, requests, results)])
    finally:
        os._exit(0)


class _Server:
    """Instead of running the tests, answers questions about them, each in a fork."""

    def __init__(self, modules: list[str], requests: BinaryIO, results: BinaryIO):
        self._modules, self._requests, self._results = modules, requests, results

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        functions = _functions_of(self._modules)
        for line in self._requests:
            question = json.loads(line)
            if "list" in question:
                answer = {"tests": [i.nodeid for i in session.items if i.nodeid.partition("::")[0] == question["list"]]}
            elif "measure" in question:
                answer = _measure(session, self._modules, question["measure"])
            else:
                answer = vars(_judge(session, functions, question))
            self._results.write(json.dumps(answer).encode() + b"\n")
            self._results.flush()
        return True


def _functions_of(modules: Iterable[str]) -> dict[tuple[str, str], list[types.FunctionType]]:
    """The functions that hold the code of each module, by module and dotted name."""
    files = {os.path.realpath(ROOT / module): module for module in modules}
    for module in files.values():  # also what is imported only where it is used
        parts = Path(module).with_suffix("").parts
        importlib.import_module(".".join(parts if parts[0] == "sere_compile" else ("sere_compile", *parts)))
    found = defaultdict(list)
    gc.unfreeze()
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and (file := files.get(os.path.realpath(thing.__code__.co_filename))):
            found[file, thing.__code__.co_qualname].append(thing)
    gc.freeze()
    return found


def _judge(session: pytest.Session, functions: dict, question: dict) -> Verdict:
    mutant, tests, seconds = Mutant(**question["mutant"]), question["tests"], question["seconds"]

    def work(out: Path) -> None:
        if not _replace(functions, mutant):
            out.write_text(f"{_NOT_REACHED}: {mutant.function}", encoding="utf-8")
            return
        watch = _Watch([])
        _run(session, tests, watch, until_failure=True)
        out.write_text("".join(watch.failed), encoding="utf-8")

    started = time.monotonic()
    said = _in_child(work, wall=600 + 20 * seconds, cpu=20 + 4 * seconds)
    killed = said is None or (bool(said) and not said.startswith(_NOT_REACHED))
    by = "its process ended, or took too long" if said is None else said
    return Verdict(killed, time.monotonic() - started, by, len(tests))


def _replace(functions: dict, mutant: Mutant) -> bool:
    """Puts the mutant's code into the functions of its module. False where no function holds it."""
    codes = {code.co_qualname: code for code in _codes(compiled(mutant))}
    parts = mutant.function.split(".")
    for length in range(1, len(parts) + 1):  # the outermost function holds the code of those inside it
        name = ".".join(parts[:length])
        if holders := functions.get((mutant.path, name)):
            for function in holders:
                function.__code__ = codes[name]
            return True
    return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _measure(session: pytest.Session, modules: list[str], tests: list[str]) -> dict:
    def work(out: Path) -> None:
        watch = _Watch(modules)
        _run(session, tests, watch, until_failure=False)
        lines = {test: {module: sorted(of) for module, of in by.items()} for test, by in watch.lines.items()}
        out.write_text(json.dumps({"seconds": watch.seconds, "lines": lines, "failed": watch.failed}), encoding="utf-8")

    said = _in_child(work, wall=1800, cpu=1200)
    if said is None:
        raise RuntimeError("the tests do not end on the code as it is")
    return json.loads(said)


def _run(session: pytest.Session, tests: Iterable[str], watch: _Watch, *, until_failure: bool) -> None:
    by_name = {item.nodeid: item for item in session.items}
    items = [by_name[test] for test in tests]
    session.config.pluginmanager.register(watch)
    for item, after in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if until_failure and watch.failed:
            return


def _in_child(work: Callable[[Path], None], *, wall: float, cpu: float) -> str | None:
    """What a fork wrote to its file, None if it took longer than this or died."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu), int(cpu) + 5))
                work(out)
                status = 0
            finally:
                os._exit(status)
        ended = _wait(child, time.monotonic() + wall)
        return out.read_text(encoding="utf-8") if ended else None


def _wait(child: int, until: float) -> bool:
    """Waits for a process, and ends it and what it has started. True if it ended by itself, well."""
    pause = 0.005
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < until:
        time.sleep(pause)
        pause = min(0.1, pause * 1.2)
        done, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not done:
        os.waitpid(child, 0)
    return bool(done) and status == 0


class _Watch:
    """Notes for each test how long it takes, whether it fails, and which lines of the modules it runs."""

    def __init__(self, modules: list[str]):
        self._modules = {os.path.realpath(ROOT / module): module for module in modules}
        self.seconds: dict[str, float] = defaultdict(float)
        self.lines: dict[str, dict[str, set[int]]] = {}
        self.failed: list[str] = []
        self._now: dict[str, set[int]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._now = self.lines.setdefault(item.nodeid, {})
        started = time.process_time()
        if self._modules:
            sys.settrace(self._called)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] += time.process_time() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def _called(self, frame: types.FrameType, event: str, argument: object):
        module = self._modules.get(frame.f_code.co_filename)
        if module is None:
            return None
        lines = self._now.setdefault(module, set())
        lines.add(frame.f_lineno)

        def line(frame: types.FrameType, event: str, argument: object):
            lines.add(frame.f_lineno)
            return line

        return line
