"""What `benchmarks/vllm_gpu.py` makes of an engine's numbers; the engine runs in the lanes `engine` of .ci/gpu."""

import math
from types import SimpleNamespace

import pytest

from benchmarks import vllm_gpu
from sere_compile.benchmark import serving_engine as timing
from sere_compile.integrations.vllm import processes, read_options


def test_error_is_the_root_of_the_mean_square():
    assert vllm_gpu.error([[0.0, 3.0], [1.0]], [[0.0, 0.0], [1.0]]) == pytest.approx(math.sqrt(3))


def test_agreement_stops_at_the_first_other_token():
    assert vllm_gpu.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == (
        "1 of 2 requests, 4 of 6 tokens before the first other one"
    )


@pytest.mark.parametrize("name", [name for name, sere in vllm_gpu.CASES.items() if sere is not None])
def test_cases_are_options_that_the_engine_takes(name):
    """And the profile goes with them."""
    given = vllm_gpu.additional({"sere": vllm_gpu.CASES[name], "profile": "p"})["additional_config"]
    config = SimpleNamespace(additional_config=given, model_config=SimpleNamespace(hf_overrides={}))
    assert read_options(config).profile == "p"
    assert vllm_gpu.additional({"sere": None}) == {}


def test_a_row_says_how_much_faster_and_what_is_added_to_a_layer(capsys):
    results = {
        "stock": {"ms": {"8": [9.0, 9.0, 9.1]}},
        "s1": {"ms": {"8": [4.4, 4.5, 4.6]}, "kernels": [[12.5, 2.0, "gate_up"]]},
    }
    vllm_gpu.show(results, [8], 48, "s1")
    out = capsys.readouterr().out
    assert "| s1 | 4.50 [4.40 .. 4.60] 2.00x -93.8 us/layer |" in out
    assert "12.50 us   2.00 x  gate_up" in out


def test_the_model_is_saved_with_a_profile_of_its_layers(tmp_path):
    from sere_compile import SimilarityProfile

    model, profile = vllm_gpu.save_model(tmp_path, 2)
    assert "Qwen3MoeForCausalLM" in (model / "config.json").read_text()
    assert list(SimilarityProfile.load(profile)) == [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]


def test_times_are_those_of_docs_vllm(tmp_path):
    """73 tokens less 9 of made-up weights, by what `sere serve-bench` times with."""
    case = vllm_gpu.timed(tmp_path / "m", tmp_path / "p", [8], 48, "fp8")
    assert (case["input_len"], case["output_len"] - timing.SHORT) == (128, 64)
    assert case["engine"] == {
        "load_format": "dummy", "max_model_len": 512, "gpu_memory_utilization": 0.9, "quantization": "fp8"
    }  # fmt: skip
    assert set(case) | {"name", "sere", "profile_batch"} <= set(timing.Case.__annotations__)


def test_an_engine_that_fails_or_takes_too_long_is_left_out(tmp_path, capsys, monkeypatch):
    """With what it printed last; the others go on."""
    log = tmp_path / "log"
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    assert vllm_gpu.run({"name": "broken"}, 5, log) is None
    assert "broken: FAILED (1)" in capsys.readouterr().out
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(slow))
    assert vllm_gpu.run({"name": "slow"}, 0.2, log) is None
    assert "slow: FAILED (out of time)" in capsys.readouterr().out
