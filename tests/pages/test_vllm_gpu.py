"""What `benchmarks/vllm_gpu.py` makes of an engine's numbers; the engine runs in the lanes `engine` of .ci/gpu."""

import math
from types import SimpleNamespace

import pytest

from benchmarks import vllm_gpu
from sere_compile.benchmark import serving_engine as timing
from sere_compile.integrations.vllm import read_options


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
        "s1": {"ms": {"8": [4.4, 4.5, 4.6]}, "profile": {"8": {"busy_us": 71.5, "kernels": [[12.5, 2.0, "gate_up"]]}}},
    }
    vllm_gpu.show(results, [8], 48, "s1")
    out = capsys.readouterr().out
    assert "| s1 | 4.50 [4.40 .. 4.60] 2.00x -93.8 us/layer |" in out
    assert "batch 8, per layer: 71.50 us the device is busy" in out
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
    assert set(case) | {"name", "sere", "profile_batches"} <= set(timing.Case.__annotations__)


def test_the_first_engine_is_in_every_group():
    """So that each of the others is timed in turn with it."""
    assert vllm_gpu.grouped(["stock", "s1", "s2", "sK"], 3) == [["stock", "s1", "s2"], ["stock", "sK"]]
    assert vllm_gpu.grouped(["stock", "s1"], 1) == [["stock"], ["s1"]]
    assert vllm_gpu.grouped(["stock"], 2) == [["stock"]]


EXACT, TOKENS = [[-1.0, -2.0], [-3.0, -4.0]], [[1, 2], [3, 4], [5, 6], [7, 8]]


def found(**changes):
    """Of every engine of `check` what is right, but for what `changes` say: by the end of a name."""
    logprobs = [[-1.01, -2.0], [-3.0, -4.01]]
    results = {name: {"tokens": TOKENS} for name in vllm_gpu.checked("m", [], "p", False, False)}
    for name in ("stock", "S = K, vLLM's kernels", "S = K, our kernels"):
        results[name]["logprobs"] = logprobs
    for name in ("S = 1", "S = 1, float32"):
        results[name] |= {"calls": [7, 7], "active": [9.0, 3.0]}
    for name, change in changes.items():
        results[name] = change and {**results[name], **change}
    return results


def test_a_check_is_right_where_everything_is(capsys):
    assert vllm_gpu.judge(found(), EXACT, TOKENS)
    assert "WRONG" not in capsys.readouterr().out


OTHER = [[1, 2], [3, 4], [5, 6], [7, 9]]
WRONG = {
    "S = K, vLLM's kernels": {"tokens": OTHER}, "S = K, our kernels": {"logprobs": [[-1.02, -2.0], [-3.0, -4.02]]},
    "S = 1": {"calls": [7, 6]}, "S = 1, selected by sere::route": {"tokens": [[0, 0], [0, 0], [5, 6], [7, 8]]},
    "S = 1, with logits of sere::route": {"tokens": [[0, 0]] * 4}, "S = 1, float32": {"tokens": OTHER},
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
@pytest.mark.parametrize("failed", [False, True])
def test_what_is_not_right_is_named(name, failed, capsys):
    """Also an engine that failed; the others are judged as they were."""
    assert not vllm_gpu.judge(found(**{name: None if failed else WRONG[name]}), EXACT, TOKENS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    # Without the hook's tokens there is nothing to compare the others of S = 1 with.
    others = 2 if failed and name == "S = 1" else 0
    assert len(lines) == 1 + others
    assert lines[0].startswith(f"WRONG  {name}: ")


def test_without_vllm_alone_nothing_shows_that_ours_is_as_good(capsys):
    assert not vllm_gpu.judge(found(stock=None), EXACT, TOKENS)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert [line.partition(":")[0] for line in wrong] == ["WRONG  S = K, vLLM's kernels", "WRONG  S = K, our kernels"]
