"""What `benchmarks/vllm_models.py` asks engines for, and makes of their numbers."""

import pytest
from click.testing import CliRunner

from benchmarks import vllm_models
from benchmarks.engines import Run


@pytest.mark.parametrize(("name", "quantised", "at_start", "layers"), [
    ("qwen3-30b-a3b/int4 AWQ", '"quant_method": "awq"', None, 48),
    ("qwen3-30b-a3b/FP8 in blocks online@1", "", "fp8_per_block", 1),
    ("gpt-oss-20b@3", '"quant_method": "mxfp4"', None, 3), ("mixtral-8x7b", "", None, 8),
])  # fmt: skip
def test_weights_are_those_of_a_checkpoint_or_made_at_start(name, quantised, at_start, layers, tmp_path):
    """Four engines each, of which the last counts."""
    cases = vllm_models.of_model(tmp_path / "m", name, [1, 32])
    config = (tmp_path / "m" / "model" / "config.json").read_text()
    assert quantised in config
    assert ("quantization_config" in config) == bool(quantised)
    assert f'"num_hidden_layers": {layers}' in config
    assert {case["engine"].get("quantization") for case in cases} == {at_start}
    assert [case["sere"] and case["sere"]["select_top_k"] for case in cases] == [None, 2, 1, 1]
    assert [case["kind"] for case in cases] == ["time"] * 3 + ["count"]
    assert len({case["name"] for case in cases}) == 4
    (counted,) = vllm_models.of_model(tmp_path / "n", name, [1, 32], times=False)
    assert (counted["kind"], counted["name"]) == ("count", cases[3]["name"])


def test_a_row_of_a_model_has_what_ran():
    timed = [{"ms": {"32": [ms - 0.1, ms, ms + 0.1]}} for ms in (2.0, 1.6, 1.0)]
    counted = {"active": {"32": [110.0, 28.04]}}
    row = vllm_models.model_row("m", 32, "MARLIN", [*timed, counted])
    assert row == "| m | 32 | MARLIN | 110.0 -> 28.0 | 2.00 | 1.60 (1.25x) | 1.00 (2.00x) |"
    assert (
        vllm_models.model_row("m", 32, "", [timed[0], None, timed[2], None])
        == "| m | 32 |  | - | 2.00 | - | 1.00 (2.00x) |"
    )
    assert (
        vllm_models.model_row("m", 32, "", [None, *timed[1:], None])
        == "| m | 32 |  | - | - | 1.60 (nanx) | 1.00 (nanx) |"
    )
    assert vllm_models.model_row("m", 32, "MARLIN", [counted]) == "| m | 32 | MARLIN | 110.0 -> 28.0 | - | - | - |"


@pytest.mark.parametrize(("option", "each"), [("--timed", 4), ("--no-timed", 1)])
def test_layers_are_of_models_that_say_none(option, each, monkeypatch):
    asked = []

    def of_model(folder, name, sizes, times):
        asked.append(name)
        return [{"name": f"{name}, {i}"} for i in range(4 if times else 1)]

    monkeypatch.setattr(vllm_models, "of_model", of_model)
    monkeypatch.setattr(vllm_models, "run_together", lambda cases, seconds, log: [Run(None)] * len(cases))
    run = CliRunner().invoke(
        vllm_models.main, ["--of", "mixtral-8x7b,gpt-oss-20b@3", "--layers", "4", "--together", "2", option]
    )
    assert asked == ["mixtral-8x7b@4", "gpt-oss-20b@3"]
    assert run.exit_code == 1
    assert "| mixtral-8x7b@4 | 32 |  | - | - | - | - |" in run.output
    assert run.output.count("gpt-oss-20b@3, ") == each
