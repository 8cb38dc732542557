"""Devices for every test.

Without CUDA the Triton kernels run under Triton's interpreter, on CPU tensors. It has to be switched on before
anything imports triton (importing torch does not), hence here. It leaves torch.compile for CPU alone, but a
test that needs real Triton compilation on such a machine must start a process without the variable.
"""

import contextlib
import gc
import os
import resource

import pytest
import torch

from . import heap, interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.quicken()

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Workers share the cores: more threads than that wait for each other. Processes that tests start keep to it too.
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    """Workers collect the same names. Tests marked `gpu` skip, with a reason, where there is no CUDA device."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, set | frozenset) and len(value) > 1 and str(value) in item.name for value in values):
            raise pytest.UsageError(f"{item.nodeid}: a set prints in any order; use a list, or an id")
        if " at 0x" in item.name:
            raise pytest.UsageError(f"{item.nodeid}: an address is another one in each process; use an id")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    """What imports made is never collected nor scanned again.

    Finding a weight's owner scans the heap, and Dynamo's reset collects it. A model has to be made after this, in a
    test or a fixture, to be found.
    """
    if session.items:
        import torch._dynamo.guards  # most tests need it

        # Dynamo times the guards of every graph after emptying the cache: 20 ms for a line in a log.
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
        gc.collect()
        gc.freeze()
        # Tracing makes many objects that live: with Python's own thresholds collecting takes a twelfth of all time.
        gc.set_threshold(20_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Between two files: no fixture that holds a model may live longer than its file."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        heap.set_aside()


def pytest_sessionfinish():
    """Libraries clean up what they hold at exit."""
    gc.unfreeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device in turn."""
    return request.param


@pytest.fixture
def kernel_device():
    """Where a Triton kernel runs here: on the GPU, or on CPU tensors under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before is found, nothing compiled here is left."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_room():
    """A context in which no file can grow beyond a few bytes, as on a full disk."""

    @contextlib.contextmanager
    def limited(size=16):
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)

    return limited
