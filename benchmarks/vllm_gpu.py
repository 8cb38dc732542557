r"""SERE in vLLM on a GPU: whether the engine computes what it should, and milliseconds per token with and without.

\b
python -m benchmarks.vllm_gpu check                        # small: what .ci/gpu calls the engine's tests
python -m benchmarks.vllm_gpu time --batches 1,8,16,32,64  # 48 layers of Qwen3-30B-A3B's shape, dummy weights
python -m benchmarks.vllm_gpu time --cases stock,s1 --batches 32 --profile s1
python -m benchmarks.vllm_gpu time --cases stock,s1 --batches 8,32 --shape gpt-oss-20b --layers 12

Each engine is a process of its own, for it does not give its memory back. An engine that is not done when the minutes
are over is left out, and said to be. In the environment of vLLM; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch

from sere_compile.benchmark.serving_engine import additional, count_engine, time_engine

from .engines import Run, run, run_together

SHAPE, LAYERS = "qwen3-30b-a3b", 48
# Tokens: milliseconds are those of 73 less those of 9, over 64.
PROMPT, OUTPUT = 128, 73
# By name: the options of SERE, or none. "nothing" does all of re-routing's work, and no expert is similar enough.
CASES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "s1": {"select_top_k": 1, "min_active": 0},
    "sK": {"select_top_k": 99},
    "nothing": {"select_top_k": 1, "min_active": 0, "threshold": 2.0, "experts": "vllm"},
    "nothing-hook": {"select_top_k": 1, "min_active": 0, "threshold": 2.0, "experts": "vllm", "router": "vllm"},
    "s2": {"select_top_k": 2, "min_active": 0},
    "nothing-ours": {"select_top_k": 1, "min_active": 0, "threshold": 2.0},
    "s1-sere": {"select_top_k": 1, "min_active": 0, "router": "sere"},
    "s2-sere": {"select_top_k": 2, "min_active": 0, "router": "sere"},
    "fill1": {"select_top_k": 1, "min_active": 0, "substitution": "fill"},
    "fill1-hook": {"select_top_k": 1, "min_active": 0, "substitution": "fill", "router": "vllm"},
    "s1-hook": {"select_top_k": 1, "min_active": 0, "experts": "vllm", "router": "vllm"},
    "s1-forced": {"select_top_k": 1, "min_active": 0, "experts": "sere"},
    "s2-forced": {"select_top_k": 2, "min_active": 0, "experts": "sere"},
    "sK-forced": {"select_top_k": 99, "experts": "sere"},
}
DEFAULT_CASES = "stock,s1,sK,nothing,s2"


def save_model(
    folder: Path, layers: int, shape: str = SHAPE, quantization_config: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """The configuration of a published model with some layers, and a profile of random similarities for it."""
    from transformers import AutoModelForCausalLM

    from sere_compile.benchmark.geometries import GEOMETRIES
    from sere_compile.benchmark.subject import find_blocks, random_profile

    config = GEOMETRIES[shape].config(layers)
    config.dtype, config.tie_word_embeddings, config.max_position_embeddings = "bfloat16", False, 4096
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    if shape.startswith("gpt-oss"):  # as it is published
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    if quantization_config:
        config.quantization_config = quantization_config
    config.save_pretrained(folder / "model")
    profile = folder / "profile.safetensors"
    random_profile(tuple(find_blocks(model))).save(profile)
    return folder / "model", profile


# One engine, in a process of its own


def tokens_of_engine(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, log-probabilities of the prompts' tokens, and what SERE counted."""
    from vllm import LLM, SamplingParams

    import sere_compile

    options = {"max_model_len": 64, "max_num_seqs": 8, "gpu_memory_utilization": 0.3, "seed": 0, **case["engine"]}
    llm = LLM(model=case["model"], skip_tokenizer_init=True, enable_prefix_caching=False, **options, **additional(case))
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    params = SamplingParams(max_tokens=case["tokens"], temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if case["sere"] and case["sere"].get("collect_stats"):
        counted = sere_compile.stats(llm).values()
        result["active"] = [round(sum(getattr(gate, name) for gate in counted) / len(counted), 2)
                            for name in ("mean_active_before", "mean_active_after")]  # fmt: skip
        result["calls"] = [gate.calls for gate in counted]
    if case.get("score"):
        # One request at a time: few tokens, as in a small batch.
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
        result["logprobs"] = [
            [given[token].logprob for token, given in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(case["prompts"], outputs, strict=True)
        ]
    return result


# What is compared


def reference_logprobs(model: str, prompts: list[list[int]]) -> list[list[float]]:
    """Of each prompt's tokens after the first, by transformers in fp32."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    with torch.no_grad():
        for ids in prompts:
            logprobs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def error(logprobs: list[list[float]], exact: list[list[float]]) -> float:
    """Root of the mean square of differences."""
    pairs = zip(chain.from_iterable(logprobs), chain.from_iterable(exact), strict=True)
    return statistics.fmean((a - b) ** 2 for a, b in pairs) ** 0.5


def agreement(a: list[list[int]], b: list[list[int]]) -> str:
    """How many requests have the same tokens, and how many tokens are the same before the first other one."""
    pairs = list(zip(a, b, strict=True))
    same = sum(x == y for x, y in pairs)
    before = sum(next((i for i, (u, v) in enumerate(zip(x, y, strict=True)) if u != v), len(x)) for x, y in pairs)
    return f"{same} of {len(a)} requests, {before} of {sum(map(len, a))} tokens before the first other one"


def agree(others: list[list[int]] | None, most: int, one: dict[str, Any]) -> bool:
    """Whether at most so many requests have other tokens than those."""
    return others is not None and sum(x != y for x, y in zip(one["tokens"], others, strict=True)) <= most


def execution(eager: bool, compiled: bool) -> dict[str, Any]:
    """Arguments of an engine: eager, with CUDA graphs, or with these of a compiled model.

    Compiling takes a third of an engine's start, and routing and experts are no part of what is compiled.
    """
    if eager:
        return {"enforce_eager": True}
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    return {"compilation_config": graphs if compiled else {**graphs, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def checked(model: str, prompts: list[list[int]], profile: str, eager: bool, compiled: bool) -> dict[str, Any]:
    """By name: the engines of `check`."""
    known = {"model": model, "kind": "tokens", "prompts": prompts, "tokens": 8}
    engine = {"dtype": "bfloat16", **execution(eager, compiled)}
    one = {"select_top_k": 1, "min_active": 0}
    # Without counting, sere::route selects.
    routed = {**one, "experts": "vllm" if eager else "sere"}
    own: dict[str, dict[str, Any]] = {
        "stock": {"sere": None, "score": True},
        "S = K, vLLM's kernels": {"sere": {"select_top_k": 99, "experts": "vllm"}, "score": True},
        "S = K, our kernels": {"sere": {"select_top_k": 99, "experts": "sere", "strict": True}, "score": True},
        "S = 1": {"sere": {**routed, "collect_stats": True}, "profile": profile},
        "S = 1, selected by sere::route": {"sere": {**routed, "router": "sere", "strict": not eager}},
        "S = 1, with logits of sere::route": {"sere": {**routed, "router": "gate", "strict": not eager}},
        "S = 1, float32": {"sere": {**one, "collect_stats": True}, "engine": {**engine, "dtype": "float32"}},
    }
    return {
        name: {**known, "name": name, "engine": engine, "profile": profile if "S = 1" in name else None, **case}
        for name, case in own.items()
    }  # fmt: skip


def check_all(seconds: float, log: Path, eager: bool, compiled: bool, together: int) -> bool:
    """The shipped trained model in engines. Prints what was found; whether all of it is right."""
    from tests.integrations.vllm import models
    from tests.integrations.vllm.lockstep import in_transformers

    ends = time.monotonic() + seconds
    runs: dict[str, Run] = {}
    model = str(models.SHIPPED / "qwen3")
    prompts = models.texts(Path(model))[1]
    with tempfile.TemporaryDirectory() as folder:
        profile = models.calibrated(Path(model), Path(folder))
        cases = checked(model, prompts, profile, eager, compiled)
        for group in parts(list(cases), together):
            found = run_together([cases[name] for name in group], max(1.0, ends - time.monotonic()), log)
            runs.update(zip(group, found, strict=True))
        expected = in_transformers(Path(model), prompts, profile, select_top_k=1, min_active=0)
    for name, one in runs.items():
        one.say(name)
    return judge({name: one.result for name, one in runs.items()}, reference_logprobs(model, prompts), expected)


def judge(found: dict[str, Any], exact: list[list[float]], expected: list[list[int]]) -> bool:
    """Print what was found by name; whether all of it is right.

    Args:
        found: of each of `checked`; None: it failed.
        exact: log-probabilities of the prompts' tokens in fp32.
        expected: tokens of transformers with the backend, S = 1, in fp32.
    """
    verdicts = []
    stock, ours, hooked = found["stock"], found["S = K, our kernels"], found["S = 1"]
    own = stock and stock["tokens"]
    errors = [error(one["logprobs"], exact) if one else math.nan for one in (stock, ours)]

    def say(name: str, text: str, right: Callable[[Any], bool]) -> None:
        good = bool(found[name]) and right(found[name])
        verdicts.append(good)
        click.echo(f"{'ok    ' if good else 'WRONG '} {name}: {text}")

    def same(name: str, others: list[list[int]] | None) -> str:
        one = found[name]
        return agreement(one["tokens"], others) if one and others else "nothing to compare"

    say("S = K, vLLM's kernels", "vLLM's tokens", lambda one: one["tokens"] == own)
    name = "S = K, our kernels"
    say(name, f"error of log-probabilities {errors[1]:.2e}, vLLM's {errors[0]:.2e}; tokens of both: {same(name, own)}",
        lambda _: errors[1] <= 1.25 * errors[0])  # fmt: skip
    counted = f"{hooked['calls']} calls, active experts {hooked['active']}" if hooked else "no result"
    say("S = 1", f"every step but the prompts' counted, {counted}; in bf16, tokens of transformers in fp32: "
        f"{same('S = 1', expected)}", lambda one: set(one["calls"]) == {7})  # fmt: skip
    # Weights may differ in the last bit; with logits of its own, two experts that are nearly tied may change places.
    for name, most in (("S = 1, selected by sere::route", 1), ("S = 1, with logits of sere::route", 3)):
        others = hooked["tokens"] if hooked else None
        say(name, f"tokens of the hook: {same(name, others)}", functools.partial(agree, others, most))
    name = "S = 1, float32"
    say(name, f"tokens of transformers with the backend: {same(name, expected)}", lambda one: one["tokens"] == expected)
    return all(verdicts)


@click.group(help=__doc__)
def main() -> None:
    """Commands."""


@main.command()
@click.argument("case", type=Path)
@click.argument("out", type=Path)
def one(case: Path, out: Path) -> None:
    """One engine; what the other commands start."""
    told = json.loads(case.read_text())
    kinds: dict[str, Callable[[Any], Any]]
    kinds = {"time": time_engine, "count": count_engine, "tokens": tokens_of_engine}
    out.write_text(json.dumps(kinds[told["kind"]](told)))


@main.command()
@click.option("--minutes", default=4.0, show_default=True)
@click.option("--log", type=Path, default=Path("vllm_gpu.log"), show_default=True)
@click.option("--eager", is_flag=True, help="Without graphs: also where there is no GPU.")
@click.option("--compiled", is_flag=True, help="With vLLM's compilation too, which makes engines start later.")
@click.option("--together", default=7, show_default=True, help="Engines side by side.")
def check(minutes: float, log: Path, eager: bool, compiled: bool, together: int) -> None:
    """Tokens, log-probabilities and counts of a small trained model."""
    raise SystemExit(0 if check_all(60 * minutes, log, eager, compiled, together) else 1)


@main.command("time")
@click.option("--cases", default=DEFAULT_CASES, show_default=True, help=f"Of {', '.join(CASES)}.")
@click.option("--batches", default="1,8,16,32,64", show_default=True)
@click.option("--shape", default=SHAPE, show_default=True, help="Of a published model, as `sere bench --geometry`.")
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--quantization", default=None, help="As vLLM's: fp8 quantises the dummy weights.")
@click.option("--profile", "profiled", default="", help="Cases of which a decode step's kernels are shown; or all.")
@click.option("--profile-batches", default="32", show_default=True)
@click.option(
    "--together", default=1, show_default=True, help="Engines side by side, timed in turn; memory has to hold them."
)
@click.option("--minutes", default=8.0, show_default=True)
@click.option("--log", type=Path, default=Path("vllm_gpu.log"), show_default=True)
@click.option("--json", "to", type=Path, default=None, help="Where to write all results.")
def time_all(
    cases: str, batches: str, shape: str, layers: int, quantization: str | None, profiled: str, profile_batches: str,
    together: int, minutes: float, log: Path, to: Path | None,
) -> None:  # fmt: skip
    """Milliseconds per output token, and over the first case, which is in every group of engines that are together."""
    ends, groups = time.monotonic() + 60 * minutes, []
    sizes = [int(batch) for batch in batches.split(",")]
    complete = True
    with tempfile.TemporaryDirectory() as folder:
        model, profile = save_model(Path(folder), layers, shape)
        for names in grouped(cases.split(","), together):
            told = []
            for name in names:
                case = timed(model, profile, sizes, layers, quantization) | {"name": name, "sere": CASES[name]}
                shown = profile_batches if profiled == "all" or name in profiled.split(",") else ""
                told.append(case | {"profile_batches": [int(batch) for batch in shown.split(",") if batch]})
            left, begun = ends - time.monotonic(), time.monotonic()
            if left < 30:
                click.echo(f"{', '.join(names)}: left out, no time")
                complete = False
                continue
            runs = run_together(told, left, log) if together > 1 else [run(told[0], left, log)]
            click.echo(f"{', '.join(names)}: {time.monotonic() - begun:.0f} s in all")
            results = {name: one.result for name, one in zip(names, runs, strict=True) if one.result}
            groups.append(results)
            for name, one in zip(names, runs, strict=True):
                one.say(name)
            complete &= len(results) == len(names)
            base = results if together > 1 else groups[0]
            for name in results:
                show({**base, **results}, sizes, layers, name)
            if to is not None:
                to.write_text(json.dumps(groups))
    raise SystemExit(0 if complete else 1)


def grouped(names: list[str], together: int) -> list[list[str]]:
    """The first one in each group of as many, or all of them alone."""
    if together < 2:
        return [[name] for name in names]
    return [[names[0], *rest] for rest in parts(names[1:], together - 1)] or [names]


def parts(names: list[str], size: int) -> list[list[str]]:
    """Of at most `size` each."""
    return [names[start : start + size] for start in range(0, len(names), size)]


def timed(
    model: Path, profile: Path, batches: list[int], layers: int, quantization: str | None = None
) -> dict[str, Any]:
    """What an engine on a model of `save_model` is told, without its name and the options of SERE."""
    engine: dict[str, Any] = {"load_format": "dummy", "max_model_len": 512, "gpu_memory_utilization": 0.9}
    if quantization:
        engine["quantization"] = quantization
    return {
        "kind": "time", "model": str(model), "profile": str(profile), "batches": batches, "layers": layers,
        "engine": engine, "input_len": PROMPT, "output_len": OUTPUT,
    }  # fmt: skip


def show(results: dict[str, Any], sizes: list[int], layers: int, name: str) -> None:
    """A row of the table, and the kernels of a layer."""
    first = next(iter(results.values()))["ms"]
    mine = results[name]["ms"]
    cells = []
    for size in map(str, sizes):
        low, middle, high = mine[size]
        added = (middle - first[size][1]) * 1e3 / layers
        cells.append(f"{middle:.2f} [{low:.2f} .. {high:.2f}] {first[size][1] / middle:.2f}x {added:+.1f} us/layer")
    click.echo(f"| {name} | " + " | ".join(cells) + " |")
    for batch, profile in results[name].get("profile", {}).items():
        click.echo(f"    batch {batch}, per layer: {profile['busy_us']:.2f} us the device is busy")
        for us, launches, kernel in profile["kernels"][:24]:
            click.echo(f"    {us:8.2f} us {launches:6.2f} x  {kernel}")


if __name__ == "__main__":
    main()
