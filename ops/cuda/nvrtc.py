"""CUDA C++ compiled at first use and launched on PyTorch's stream: NVRTC and the driver, both as torch loads them.

For what Triton cannot express. No CUDA toolkit, no headers and no compiler on the user's machine are needed.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with ints as its value."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 3), ("rest", ctypes.c_char * 52)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """NVRTC and the driver in one: torch's own stub links both, with the path to the NVRTC that torch came with."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))


def available() -> bool:
    """Whether this build of torch brings NVRTC."""
    try:
        return hasattr(_library(), "nvrtcCreateProgram") and hasattr(_library(), "cuLaunchKernelEx")
    except OSError:
        return False


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether a device is Hopper or later, for which the kernels are written, and they can be compiled."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and available()


def read(folder: Path, names: Sequence[str]) -> str:
    """Files of CUDA C++, one after the other."""
    return "\n".join((folder / name).read_text() for name in names)


def _check(result: int, call: str) -> None:
    if result != 0:
        raise RuntimeError(f"{call}: error {result}")


def shared_memory(device: int) -> int:
    """Bytes of shared memory that one block may have."""
    handle, size = ctypes.c_int(), ctypes.c_int()
    _check(_library().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    attribute = _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    _check(_library().cuDeviceGetAttribute(ctypes.byref(size), attribute, handle), "cuDeviceGetAttribute")
    return size.value


def compile_source(
    source: str, macros: Sequence[tuple[str, int]], capability: tuple[int, int], own: bool = False
) -> bytes:
    """Machine code of CUDA C++ for a GPU of this compute capability; `own`: with what no later one has.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's log.
    """
    nvrtc, program = _library(), ctypes.c_void_p()
    options = [f"-D{name}={value}" for name, value in macros]
    options += [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{'a' if own else ''}", "--std=c++17"]
    argv = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"stream.cu", 0, None, None), "nvrtc")
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), argv)
        size = ctypes.c_size_t()
        if result != 0:
            _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
            log = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
            raise RuntimeError(f"NVRTC, error {result}: {log.value.decode()}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def load_functions(code: bytes, names: Sequence[str], shared_bytes: int) -> list[ctypes.c_void_p]:
    """Kernels of machine code in the current device's context, each allowed this much dynamic shared memory."""
    driver, module = _library(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    functions = []
    for name in names:
        function = ctypes.c_void_p()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
        # Kernels overlap only where none of them has asked for a larger L1 cache at the cost of shared memory.
        wanted = {_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_bytes, _PREFERRED_SHARED_MEMORY_CARVEOUT: 100}
        for attribute, value in wanted.items():
            _check(driver.cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute")
        functions.append(function)
    return functions


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Tensor | int | float | None],
    early: bool,
    cluster: int = 0,
) -> None:
    """Launch on the current stream.

    Args:
        function: of `load_functions`.
        grid: blocks.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: the kernel's: pointers, ints and floats.
        early: before the kernel ahead of it is done (programmatic dependent launch).
        cluster: so many neighbouring blocks are a cluster; 0: none are.
    """
    values = [_value(a) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    wanted = [(_PROGRAMMATIC_STREAM_SERIALIZATION, (1, 0, 0))] * early + [(_CLUSTER_DIMENSION, (cluster, 1, 1))] * (
        cluster > 0
    )
    attributes = (_Attribute * 2)(*(_Attribute(name, 0, (ctypes.c_int * 3)(*value)) for name, value in wanted))
    config = _LaunchConfig(
        (ctypes.c_uint * 3)(*grid, 1), (ctypes.c_uint * 3)(threads, 1, 1), shared_bytes,
        torch.cuda.current_stream().cuda_stream, attributes, len(wanted),
    )  # fmt: skip
    _check(_library().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), "cuLaunchKernelEx")


def _value(argument: Tensor | int | float | None) -> ctypes._SimpleCData:
    """As a kernel takes it."""
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())
