"""Build cpp/run_package.cpp against the installed torch, and run packages with it: no Python in that process."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).parent / "cpp" / "run_package.cpp"


_FOLDER = tempfile.TemporaryDirectory(prefix="run_package")


@functools.cache
def build_cpp(device):
    """Build the program, once a process: torch's headers cost half a minute. Skips only where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the C++ program")
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    folders = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    if device == "cuda":
        # Nothing in the program names a symbol of these; they register the CUDA runner when they are loaded.
        libraries += ["-Wl,--no-as-needed,--allow-shlib-undefined", "-ltorch_cuda", "-lc10_cuda"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    output = Path(_FOLDER.name) / f"run_package_{device}"
    command = [compiler, "-std=c++20", abi, str(SOURCE), "-o", str(output), *headers, *folders, *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def run_cpp(folder, package, calls, device="cpu"):
    """The outputs of each call, a list of CPU tensors in the order of the program's tensor inputs."""
    torch.save([list(call) for call in calls], folder / "calls.pt")
    files = [package, folder / "calls.pt", folder / "results.pt"]
    done = subprocess.run([build_cpp(device), *files, device], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [list(result) for result in torch.load(folder / "results.pt")]
