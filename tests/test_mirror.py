"""Tests mirror the code: every module has a test file of its name, but for a list that can only shrink."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]

# Module, and what tests it instead. A new module brings its own test file; nothing is added here.
ELSEWHERE: dict[str, str] = {}


def modules() -> list[str]:
    """Paths of all modules of the repository that are no tests."""
    found = (
        path for folder in ("sere_compile", "passes", "ops", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )
    return sorted(str(path.relative_to(ROOT)) for path in found if not path.name.startswith("__"))


def test_files(module: str) -> list[str]:
    """Where the tests of a module may stand."""
    folder, *rest = Path(module).with_suffix("").parts
    *inner, name = rest
    if folder == "sere_compile":
        inside = ["/".join([*inner, f"test_{name}.py"])]
        if inner == ["integrations", "vllm"]:  # without vLLM, and in its own environment
            inside.append(f"integrations/test_vllm_{name}.py")
        return inside
    if folder == "ops" and inner:  # an operator's roles are tested together
        return [f"ops/test_{inner[0]}.py"]
    if folder == "benchmarks":
        return [f"pages/test_{name}.py"]
    return ["/".join([folder, *inner, f"test_{name}.py"])]


test_files.__test__ = False  # type: ignore[attr-defined]


def test_every_module_has_a_test_file_of_its_name():
    alone = {module for module in modules() if not any((ROOT / "tests" / file).exists() for file in test_files(module))}
    assert alone - set(ELSEWHERE) == set(), "these need a test file of their name"
    assert set(ELSEWHERE) - alone == set(), "these have one now, or are gone: remove them from the list"


def test_what_tests_the_others_exists():
    missing = {
        f"{module}: {word}"
        for module, reason in ELSEWHERE.items()
        for word in reason.split()
        if word.startswith("tests/") and not (ROOT / word.rstrip(",;.")).exists()
    }
    assert missing == set()
    assert all("tests/" in reason or ".ci/" in reason for reason in ELSEWHERE.values())
