"""What is installed under which name, what importing it loads, and which layer may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .thinned import thinned

ROOT = Path(__file__).parents[1]
# A folder of the repository, and the package it installs as.
FOLDERS = {"ops": "sere_compile.ops", "passes": "sere_compile.passes", "sere_compile": "sere_compile"}


def run(command, folder):
    """Run a command in a folder that is not the repository; its output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_python(code, folder):
    return run([sys.executable, "-c", code], folder)


# Imports at run time


def test_import_loads_nothing_heavy(tmp_path):
    """Neither optional dependencies nor the compiler, which is loaded when something is compiled; and the version."""
    heavy = "transformers onnx tensorrt torch_tensorrt matplotlib vllm triton triton.compiler torch._dynamo"
    code = f"import sys, sere_compile; print([name for name in {heavy.split()} if name in sys.modules])"
    loaded, version = run_python(f"{code}; print(sere_compile.__version__)", tmp_path).split("\n")[:2]
    assert loaded == "[]"
    assert version == importlib.metadata.version("sere-compile")


# The backend by name


def test_the_backend_is_an_entry_point():
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert {entry.value for entry in entries if entry.name == "sere"} == {"sere_compile.backend:sere_backend"}


def test_the_backend_compiles_by_name_alone(tmp_path):
    """torch lists `backend="sere"` without importing it, and it needs no import of ours."""
    run_python(
        "import sys, torch._dynamo\n"
        "assert 'sere' in torch._dynamo.list_backends()\n"
        "assert 'sere_compile' not in sys.modules\n"
        "compiled = torch.compile(lambda x: x.sin() + 1, backend='sere', options={'inner': 'aot_eager'})\n"
        "torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3).sin() + 1)",
        tmp_path,
    )


# The command


@pytest.mark.parametrize(
    "command",
    thinned([([str(Path(sys.executable).with_name("sere"))],), ([sys.executable, "-m", "sere_compile"],)], (0,)),
    ids=["sere", "python -m sere_compile"],
)
def test_the_command_lists_its_subcommands(tmp_path, command):
    text = run([*command, "--help"], tmp_path)
    assert text.startswith("Usage: sere ")
    assert "explain" in text


# The wheel


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    """Names in a wheel that is built from a copy: building in place leaves files that get into later wheels."""
    copy, target = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(target), str(copy)]
    # An isolated build downloads setuptools.
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        command += ["--no-build-isolation", "--no-index"]
    run(command, target)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel_files):
    """A package that pyproject.toml does not list is missing from the wheel only, not from an editable install."""
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {"sere_compile/ops/__init__.py", "sere_compile/passes/__init__.py"} < expected
    assert {name for name in wheel_files if name.endswith(".py")} == expected
    assert "sere_compile/py.typed" in wheel_files


def test_the_wheel_holds_one_trained_model_and_all_kernels(wheel_files):
    """The other models, 8 MB each, are told to be in the repository: tests/integrations/test_transformers.py."""
    models = [name for name in wheel_files if name.startswith("sere_compile/models/") and name.count("/") == 3]
    assert {name.split("/")[2] for name in models} == {"qwen3"}
    names = {name.rpartition("/")[2] for name in models}
    assert names > {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "training.json"}
    sources = {path.name for path in (ROOT / "ops").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh")}
    assert {name.rpartition("/")[2] for name in wheel_files} > sources >= {"cpu.cpp", "stream.cu"}


def test_the_wheel_installs_one_top_level_package(wheel_files):
    """`ops` and `passes` would collide with anybody's."""
    top = {name.split("/")[0] for name in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sere_compile"}


# Arrows between the layers


def imports(source, package):
    """Full names of everything a source file of `package` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def test_imports_are_resolved():
    """The helper of the test below."""
    source = "import a.b\nfrom c import d\ndef f():\n  from .e import g\n  from ... import h\n  from ..i import j"
    names = ["a.b", "c.d", "sere_compile.ops.reroute.e.g", "sere_compile.h", "sere_compile.ops.i.j"]
    assert sorted(imports(source, "sere_compile.ops.reroute")) == sorted(names)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("ops", {"sere_compile.ops", "torch", "triton"}),
        ("passes", {"sere_compile.passes", "sere_compile.ops", "torch"}),
    ],
)
def test_arrows_point_one_way(folder, allowed):
    """sere_compile -> passes -> ops; passes know no model and no file format, ops only torch and Triton."""
    wrong, seen = [], set()
    for path in (ROOT / folder).rglob("*.py"):
        package = ".".join([FOLDERS[folder], *path.relative_to(ROOT / folder).parent.parts])
        for name in imports(path.read_text(encoding="utf-8"), package):
            root = ".".join(name.split(".")[: 2 if name.startswith("sere_compile") else 1])
            seen.add(root)
            if root not in allowed and root not in sys.stdlib_module_names:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []
    assert {FOLDERS[folder], "torch"} <= seen


# Each may import those above it. What stands alone is one file of the top level, the others are folders.
ORDER = [
    *("errors", "extras", "report", "gate_stats", "testing", "whole_file", "config", "idle", "rewrite_mark"),
    *("experts", "similarity", "compiler"),
    *("backend", "rewrite", "capture", "explain"),
    *("calibration", "integrations", "statistics", "lowering", "evaluation", "benchmark"),
    *("commands", "cli", "__main__", "__init__"),
]


def inner_imports():
    """(file, name) of every import within sere_compile, of the library's own modules."""
    for path in sorted((ROOT / "sere_compile").rglob("*.py")):
        file = path.relative_to(ROOT / "sere_compile")
        package = ".".join(["sere_compile", *file.parent.parts])
        for name in imports(path.read_text(encoding="utf-8"), package):
            if name.startswith("sere_compile."):
                yield file, name.removeprefix("sere_compile.")


def test_arrows_between_the_folders_point_one_way():
    """From the commands down to the ground; the order says which may use which."""
    wrong, seen = [], set()
    for file, name in inner_imports():
        user, used = file.parts[0].removesuffix(".py"), name.partition(".")[0]
        if used in ("ops", "passes"):
            continue
        seen.add((user, used))
        if used not in ORDER or ORDER.index(used) > ORDER.index(user):
            wrong.append(f"{file} imports {name}")
    assert wrong == []
    assert {("compiler", "experts"), ("commands", "lowering"), ("__init__", "backend")} <= seen


def test_only_calibrate_is_taken_from_calibration():
    """Whoever has to run experts finds that in `experts`; from `calibration` others take its function alone."""
    taken = {(file.parts[0], name) for file, name in inner_imports() if name.startswith("calibration")}
    outside = {name for user, name in taken if user != "calibration"}
    assert "calibration.calibrate.calibrate" in outside
    assert {name.rpartition(".")[0] for name in outside} == {"calibration.calibrate"}


def test_the_package_imports_neither_benchmarks_nor_tests():
    """Both use the package and are not installed; benchmarks may use what tests share, an oracle or a model."""
    found = {"benchmarks": set(), "tests": set()}
    for folder in [*FOLDERS, "benchmarks"]:
        for path in (ROOT / folder).rglob("*.py"):
            package = ".".join([FOLDERS.get(folder, folder), *path.relative_to(ROOT / folder).parent.parts])
            for name in imports(path.read_text(encoding="utf-8"), package):
                if name.partition(".")[0] in found:
                    found[name.partition(".")[0]].add(folder)
    assert found == {"benchmarks": {"benchmarks"}, "tests": {"benchmarks"}}
