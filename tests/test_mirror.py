"""Tests mirror the code: every module has a test file of its name, but for a list that can only shrink."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]

# Module, and what tests it instead. A new module has its own test file: this list can only shrink.
ELSEWHERE = {
    "benchmarks/calibration.py": "a command: tests/pages/test_commands.py",
    "benchmarks/cpu_experts.py": "a command: tests/pages/test_commands.py",
    "benchmarks/match_time.py": "a command: tests/pages/test_commands.py; growth: tests/passes/test_match_time.py",
    "benchmarks/onnx_experts.py": "a command: tests/pages/test_commands.py; tests/lowering/test_conditional_experts.py",
    "benchmarks/ops/bench_expert_mlp.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/ops/bench_fill.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/ops/bench_reroute.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/ops/bench_route.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/ops/bench_stream.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/ops/sanitize_expert_mlp.py": "a command for a GPU: tests/pages/test_commands.py, .ci/gpu",
    "benchmarks/quality.py": "a command: tests/pages/test_commands.py; the page: tests/pages/test_quality_page.py",
    "benchmarks/quality_fine.py": "a command: tests/pages/test_commands.py; the page: tests/pages/test_quality_page.py",
    "benchmarks/survey.py": "tests/zoo/test_zoo.py, with every architecture",
    "benchmarks/tensorrt_page.py": "a command: tests/pages/test_commands.py; tests/lowering/test_engine.py",
    "benchmarks/vllm_measured.py": "tests/integrations/vllm/test_models.py, with a real engine",
    "benchmarks/vllm_page.py": "tests/integrations/vllm/test_models.py, with a real engine",
    "ops/launching.py": "with each kernel: tests/ops/test_reroute.py, tests/ops/test_expert_mlp.py",
    "sere_compile/cli.py": "tests/test_packaging.py runs the command",
    "sere_compile/experts/counterfactual.py": "tests/calibration/test_observed_model.py",
    "sere_compile/extras.py": "each missing extra where it is needed: tests/evaluation/test_text.py",
    "sere_compile/gate_stats.py": "tests/test_statistics.py",
    "sere_compile/integrations/vllm/engine.py": "tests/integrations/vllm/test_serving.py, with a real engine",
    "sere_compile/integrations/vllm/layers.py": "tests/integrations/vllm/test_serving.py, with a real engine",
    "sere_compile/lowering/archive_file.py": "tests/commands/test_output_file.py",
    "sere_compile/lowering/decode_step.py": "tests/lowering/test_onnx.py",
    "sere_compile/lowering/export.py": "tests/lowering/test_options.py",
    "sere_compile/lowering/standard_operators.py": "tests/lowering/test_options.py",
    "sere_compile/similarity/fit.py": "tests/similarity/test_attach.py",
    "sere_compile/testing.py": "an oracle: tests/evaluation/test_rules.py, tests/ops/test_reroute.py",
}


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
