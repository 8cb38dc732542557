"""Arithmetic of an engine's measurements, with an engine that is made up; real ones: tests/integrations/vllm."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest

from sere_compile import ConfigError
from sere_compile.benchmark import serving_engine as timing
from sere_compile.gate_stats import GateStats


class MadeUp:
    """Takes 100 ms for prompts and 1 ms per token and request; a hiccup of 50 ms in the first long run."""

    def __init__(self):
        self.now, self.asked = 0.0, []
        config = SimpleNamespace(get_vocab_size=lambda: 128, dtype="torch.float32")
        self.llm_engine = SimpleNamespace(
            model_config=config, vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))
        )

    def generate(self, prompts, params, use_tqdm):
        tokens = params.max_tokens
        hiccup = 0.05 if tokens > timing.SHORT and not any(n > timing.SHORT for _, n in self.asked) else 0.0
        self.asked.append((len(prompts), tokens))
        self.now += 0.1 + 0.001 * tokens * len(prompts) + hiccup
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * tokens)]) for _ in prompts]


@pytest.fixture
def engine(monkeypatch):
    made = MadeUp()
    monkeypatch.setattr(timing, "start", lambda case, **_: made)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    vllm = SimpleNamespace(SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return made


CASE = {"name": "x", "kind": "time", "model": "m", "sere": None, "batches": [2, 4], "input_len": 3, "output_len": 73}


def test_prompts_do_not_count_per_token_and_one_hiccup_does_not_either(engine):
    kept = []
    result = timing.time_engine(CASE, lambda found: kept.append(list(found["ms"])))
    assert result["ms"][2] == pytest.approx([2.0, 2.0, 2.0 + 50 / 64], abs=1e-3)
    assert result["ms"][4] == pytest.approx([4.0, 4.0, 4.0])
    # With prompts: 4 requests of 73 tokens in 392 ms.
    assert result["tokens_per_s"][4] == pytest.approx(4 * 73 / 0.392, abs=0.1)
    assert engine.asked[:3] == [(2, 8), (2, 73), (2, 9)], "first a run to warm up"
    assert len(engine.asked) == 14
    assert kept == [[2], [2, 4]], "each batch is kept when it is done"
    assert result["machine"].startswith("2 x ")
    assert "vLLM 0, torch " in result["machine"]
    assert result["dtype"] == "float32"


def test_prompts_are_the_users_or_random_ones_of_the_vocabulary():
    llm = MadeUp()
    assert timing.prompts_of({**CASE, "prompts": [[1], [2], [3]]}, llm, 2, random.Random(0)) == [
        {"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}
    ]  # fmt: skip
    made = timing.prompts_of(CASE, llm, 4, random.Random(0))
    assert [len(prompt["prompt_token_ids"]) for prompt in made] == [3] * 4
    assert all(64 <= token < 128 for prompt in made for token in prompt["prompt_token_ids"])


@pytest.mark.parametrize(("most", "longest", "message"), [
    (4, 76, ""), (3, 76, "--max-num-seqs 3 is less than the largest batch, 4"), (4, 75, "sequences of 75 tokens"),
])  # fmt: skip
def test_an_engine_has_room_for_a_whole_batch(most, longest, message):
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=most), model_config=SimpleNamespace(max_model_len=longest)
    )
    if not message:
        timing.check_room(CASE, config)
        return
    with pytest.raises(ConfigError, match=message):
        timing.check_room(CASE, config)


def test_active_experts_of_a_batch_are_what_was_counted_since_the_last_one():
    first = {"a": GateStats(4, 0, 0, 0, 40, 20), "b": GateStats(4, 0, 0, 0, 80, 20)}
    second = {"a": GateStats(6, 0, 0, 0, 60, 22), "b": GateStats(6, 0, 0, 0, 120, 24)}
    assert timing.mean_active({}, first) == [15.0, 5.0]
    assert timing.mean_active(first, second) == [15.0, 1.5]
    assert timing.mean_active(second, second) is None


def test_options_of_sere_and_the_profile_are_one_argument():
    assert timing.additional({"sere": {"select_top_k": 1}, "profile": "p"}) == {
        "additional_config": {"sere": {"select_top_k": 1, "profile": "p"}}
    }
    assert timing.additional({"sere": None, "profile": "p"}) == {}


def test_the_device_is_busy_while_any_kernel_runs():
    """Per step and layer; what both runs have cancels."""
    prompt = [("prefill", 0.0, 1000.0)]
    step = [("gate_up", 0.0, 10.0), ("down", 8.0, 15.0), ("sum", 20.0, 22.0), ("sum", 21.0, 21.5)]
    steps = [(name, start + 100 * n, end + 100 * n) for n in range(20, 44) for name, start, end in step]
    profile = timing.of_a_step(prompt + steps, prompt, share=1 / 24 / 2)
    assert profile["busy_us"] == pytest.approx(17.0 / 2)
    assert profile["kernels"] == [[5.0, 0.5, "gate_up"], [3.5, 0.5, "down"], [1.25, 1.0, "sum"]]


def test_batches_are_profiled_after_all_were_timed(engine, monkeypatch):
    monkeypatch.setattr(timing, "profile_of_a_step", lambda run, layers: (run(33), {"busy_us": layers})[1])
    result = timing.time_engine({**CASE, "profile_batches": [4], "layers": 48})
    assert result["profile"] == {4: {"busy_us": 48}}
    assert engine.asked[-1] == (4, 33)
