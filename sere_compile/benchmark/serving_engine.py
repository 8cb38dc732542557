"""What is measured inside an engine's process: milliseconds per output token, and active experts before and after.

python -m sere_compile.benchmark.serving_engine CASE OUT

Started by `sere serve-bench`. CASE is a file of JSON, see `Case`; what is found is written to OUT as soon as a batch
size is done, so that an engine that fails at the next one has not run for nothing.
"""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import ConfigError
from ..whole_file import write_whole
from .turns import Place, Turns

# Tokens of the run that is taken off: prompts and the first tokens, in which graphs are looked up and batches fill.
SHORT = 9
RUNS = 3
# Tokens that each request makes while experts are counted.
COUNTED_TOKENS = 33


class Case(TypedDict):
    """What one engine is told.

    Attributes:
        name: of the engine, for the log.
        kind: "time" or "count".
        model: a folder, or a name on a hub.
        sere: options of `additional_config["sere"]`; None: vLLM alone.
        profile: of similarities, added to `sere`.
        batches: requests at a time.
        input_len, output_len: tokens of a prompt, and of its continuation.
        prompts: token ids, at least as many as the largest batch; random ones without.
        engine: keyword arguments of `vllm.LLM`.
        options: the same as on the command line of `vllm serve`.
        profile_batches: batch sizes whose kernels are listed, by `layers`.
        turns: this engine's place among those that are timed in turn, on the same device at the same time.
    """

    name: str
    kind: str
    model: str
    sere: dict[str, Any] | None
    batches: list[int]
    input_len: int
    output_len: int
    profile: NotRequired[str | None]
    prompts: NotRequired[list[list[int]] | None]
    engine: NotRequired[dict[str, Any]]
    options: NotRequired[list[str]]
    profile_batches: NotRequired[list[int]]
    layers: NotRequired[int]
    turns: NotRequired[Place | None]


Keep = Callable[[dict[str, Any]], None]
# A kernel's name, start and end.
Interval = tuple[str, float, float]


def additional(case: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an engine that switch SERE on, or none."""
    sere = case["sere"]
    if sere is None:
        return {}
    profile = {"profile": case["profile"]} if case.get("profile") else {}
    return {"additional_config": {"sere": {**sere, **profile}}}


def given(options: list[str]) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` from a command line, by vLLM's own parser, which ends the process if wrong."""
    import argparse

    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    for action in parser._actions:  # so that what was not given is not among what is returned
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(options))


def start(case: Case, **changes: Any) -> Any:
    """The engine: options of the command line go before `case["engine"]`, and these before what suits a measurement.

    Raises:
        ConfigError: an engine without SERE is given options that switch it on, or one has no room for a batch.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    from ..integrations.vllm import read_options

    options = given(case.get("options", []))
    known: dict[str, Any] = {
        "max_model_len": case["input_len"] + case["output_len"], "max_num_seqs": max(case["batches"]), "seed": 0,
        "disable_log_stats": True, "skip_tokenizer_init": True, "enable_prefix_caching": False,
    }  # fmt: skip
    if current_platform.is_cpu():
        known["enforce_eager"] = True
    elif "compilation_config" not in options:
        # Each batch size is a graph of its own: none is padded.
        known["cudagraph_capture_sizes"] = sorted({1, 2, 4, 8, *case["batches"]})
    config = {**options.get("additional_config", {}), **additional(case).get("additional_config", {})}
    arguments = {**known, **case.get("engine", {}), **options, **changes}
    llm = LLM(**{**arguments, "model": case["model"], "additional_config": config})
    if case["sere"] is None and read_options(llm.llm_engine.vllm_config) is not None:
        raise ConfigError("the engine without SERE was given options that switch SERE on; give them to --sere")
    check_room(case, llm.llm_engine.vllm_config)
    return llm


def check_room(case: Case, vllm_config: Any) -> None:
    """That a whole batch is computed at a time, and to its end: figures of anything else are of something else.

    Raises:
        ConfigError: it is not.
    """
    most, batch = int(vllm_config.scheduler_config.max_num_seqs), max(case["batches"])
    longest, tokens = int(vllm_config.model_config.max_model_len), case["input_len"] + case["output_len"]
    if most < batch:
        raise ConfigError(f"--max-num-seqs {most} is less than the largest batch, {batch}")
    if longest < tokens:
        raise ConfigError(
            f"the engine takes sequences of {longest} tokens, and prompt and output have {tokens}: give a larger "
            "--max-model-len, or a smaller --input-len or --output-len"
        )


def prompts_of(case: Case, llm: Any, batch: int, rng: random.Random) -> list[dict[str, list[int]]]:
    """As many prompts as a batch has requests: the first of those that were given, or random ones."""
    if rows := case.get("prompts"):
        return [{"prompt_token_ids": ids} for ids in rows[:batch]]
    words = min(30000, int(llm.llm_engine.model_config.get_vocab_size()))
    first = min(100, words // 2)  # what stands for something else than text is mostly below
    return [{"prompt_token_ids": [rng.randrange(first, words) for _ in range(case["input_len"])]} for _ in range(batch)]


def time_engine(case: Case, keep: Keep = lambda result: None) -> dict[str, Any]:
    """Milliseconds per output token by batch: the median of three, after one run to warm up.

    Each is the time of `output_len` tokens less that of `SHORT`, over the difference, so that prompts do not count. In
    tokens per second they do: requests that are sent together and answered together.

    Returns:
        "ms": by batch, the lowest, the median and the highest; "tokens_per_s": by batch; "start_s"; and of `about`.
    """
    from vllm import SamplingParams

    started, long = time.perf_counter(), case["output_len"]
    llm = start(case)
    result: dict[str, Any] = {
        "start_s": round(time.perf_counter() - started, 1), **about(llm), "ms": {}, "tokens_per_s": {}
    }  # fmt: skip
    rng = random.Random(int(os.environ.get("VLLM_DP_RANK", 0)))
    turn = Turns(case.get("turns"))
    turn.ready()

    def seconds(batch: int, tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False)
        prompts = prompts_of(case, llm, batch, rng)
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begun
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return took

    for batch in case["batches"]:
        with turn():
            seconds(batch, SHORT - 1)
        pairs = []
        for _ in range(RUNS):
            with turn():
                pairs.append((seconds(batch, long), seconds(batch, SHORT)))
        times = sorted((all_of_it - less) / (long - SHORT) * 1e3 for all_of_it, less in pairs)
        result["ms"][batch] = [round(t, 3) for t in times]
        result["tokens_per_s"][batch] = round(batch * long / statistics.median(whole for whole, _ in pairs), 1)
        print("MS", case["name"], batch, result["ms"][batch], flush=True)
        keep(result)
    for batch in case.get("profile_batches", []):
        with turn():
            profiled = profile_of_a_step(functools.partial(seconds, batch), case["layers"])
        result.setdefault("profile", {})[batch] = profiled
    return result


def about(llm: Any) -> dict[str, Any]:
    """The machine with the versions, in words, and the type of the activations."""
    import torch
    import vllm

    from .timing import machine_name

    ranks = int(llm.llm_engine.vllm_config.parallel_config.world_size)
    machine = f"{ranks} x {machine_name()}" if ranks > 1 else machine_name()
    return {
        "machine": f"{machine}, vLLM {vllm.__version__}, torch {torch.__version__}",
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
    }


def count_engine(case: Case, keep: Keep = lambda result: None) -> dict[str, Any]:
    """Active experts by batch, means over layers and re-routed forwards: "active", [before, after].

    In an engine without graphs, which starts sooner, and which computes the same: times are another engine's.
    """
    from vllm import SamplingParams

    from ..integrations.vllm import stats

    assert case["sere"] is not None
    sere = {**case["sere"], "collect_stats": True}
    llm = start({**case, "sere": sere}, enforce_eager=True, cudagraph_capture_sizes=None)
    result: dict[str, Any] = {"active": {}}
    rng = random.Random(0)
    params = SamplingParams(
        max_tokens=min(COUNTED_TOKENS, case["output_len"]), temperature=1.0, ignore_eos=True, detokenize=False
    )
    before: dict[str, Any] = {}
    for batch in case["batches"]:
        llm.generate(prompts_of(case, llm, batch, rng), params, use_tqdm=False)
        after = stats(llm)
        result["active"][batch] = mean_active(before, after)
        before = after
        keep(result)
    return result


def mean_active(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[float] | None:
    """Of the forwards between two readings of the counters, over layers; None where none was re-routed."""
    names, means = ("calls", "active_before", "active_after"), []
    for gate, now in after.items():
        calls, *active = (getattr(now, name) - getattr(before.get(gate), name, 0) for name in names)
        if calls:
            means.append([number / calls for number in active])
    return [round(statistics.fmean(column), 2) for column in zip(*means, strict=True)] if means else None


def profile_of_a_step(run: Callable[[int], object], layers: int) -> dict[str, Any]:
    """What the device does in a decode step, per layer: 33 tokens less 9.

    Returns:
        "busy_us": while a kernel runs, which the host and the graph's gaps are no part of; "kernels": us, launches and
        name of each. Kernels that begin while the one before still runs count twice among these.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    def ran(tokens: int) -> list[Interval]:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(tokens)
        events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
        return [(event.name, event.time_range.start, event.time_range.end) for event in events]

    return of_a_step(ran(33), ran(9), share=1 / 24 / layers)


def of_a_step(long: Sequence[Interval], short: Sequence[Interval], share: float) -> dict[str, Any]:
    """`profile_of_a_step` of what ran in both, as (name, start, end) in us; `share` of the difference."""
    sums: dict[str, list[float]] = {}
    for intervals, sign in ((long, share), (short, -share)):
        for name, start, end in intervals:
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += sign * (end - start)
            entry[1] += sign
    rows = [(round(us, 2), round(launches, 2), name[:100]) for name, (us, launches) in sums.items()]
    kernels = [list(row) for row in sorted((row for row in rows if row[0] >= 0.05), reverse=True)]
    return {"busy_us": round(share * (covered(long) - covered(short)), 2), "kernels": kernels}


def covered(intervals: Sequence[Interval]) -> float:
    """How long at least one of them lasts."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main() -> None:
    """One engine."""
    told, out = map(Path, sys.argv[1:])
    case = json.loads(told.read_text(encoding="utf-8"))

    def keep(result: dict[str, Any]) -> None:
        write_whole(out, json.dumps(result).encode())

    keep({"time": time_engine, "count": count_engine}[case["kind"]](case, keep))


if __name__ == "__main__":
    main()
