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

import json
import os
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch

from sere_compile.benchmark.serving_engine import additional, time_engine
from sere_compile.integrations.vllm.processes import run_processes, said

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
}
DEFAULT_CASES = "stock,s1,sK,nothing,s2"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}


def save_model(folder: Path, layers: int, shape: str = SHAPE) -> tuple[Path, Path]:
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
        config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
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


def run(case: dict[str, Any], seconds: float, log: Path) -> dict[str, Any] | None:
    """The result of one engine in a process of its own; None where it failed or was not done in time."""
    results = run_ranks(case, [{}], seconds, log)
    return results[0] if results else None


def run_ranks(
    case: dict[str, Any], ranks: list[dict[str, str]], seconds: float, log: Path, module: str = "benchmarks.vllm_gpu"
) -> list[dict[str, Any]] | None:
    """The results of engines that work together, each in a process with variables of its own; None where one failed."""
    common = {key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()}
    ptxas = Path("/usr/local/cuda/bin/ptxas")
    if ptxas.exists() and "TRITON_PTXAS_PATH" not in os.environ:
        common["TRITON_PTXAS_PATH"] = str(ptxas)
    ended = run_processes(module, case, seconds, log, [{**common, **own} for own in ranks], ["one"])
    if ended.status == 0:
        return [result or {} for result in ended.results]
    # What went wrong is said last by the worker, before its engine says that it ended.
    lines = [line[:300] for line in ended.lines if "Error" in line or "SERE" in line][-6:] + [
        line[:300] for line in ended.lines[-25:]
    ]
    click.echo(f"{case['name']}: FAILED ({ended.status})\n    " + "\n    ".join(lines))
    return None


def say(log: Path) -> None:
    """What SERE wrote into the log of the last engine."""
    for line in said(log):
        click.echo("    " + line[:200])


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


def execution(eager: bool, compiled: bool) -> dict[str, Any]:
    """Arguments of an engine: eager, with CUDA graphs, or with these of a compiled model.

    Compiling takes a third of an engine's start, and routing and experts are no part of what is compiled.
    """
    if eager:
        return {"enforce_eager": True}
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    return {"compilation_config": graphs if compiled else {**graphs, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def check_all(seconds: float, log: Path, eager: bool, compiled: bool) -> bool:
    """The shipped trained model and a dummy one in the engine. Prints what was found; whether all of it is right."""
    from tests.integrations.vllm import models
    from tests.integrations.vllm.lockstep import in_transformers

    ends, ok = time.monotonic() + seconds, True
    model = str(models.SHIPPED / "qwen3")
    prompts = models.texts(Path(model))[1]
    base = {
        "model": model,
        "kind": "tokens",
        "prompts": prompts,
        "tokens": 8,
        "engine": {"dtype": "bfloat16", **execution(eager, compiled)},
    }

    def engine(name: str, **changes: Any) -> dict[str, Any]:
        case = {**base, "name": name, **changes}
        return run(case, max(1.0, ends - time.monotonic()), log) or {}

    def judge(text: str, good: bool) -> None:
        nonlocal ok
        ok &= good
        click.echo(f"{'ok    ' if good else 'WRONG '} {text}")

    with tempfile.TemporaryDirectory() as folder:
        profile = models.calibrated(Path(model), Path(folder))
        stock = engine("stock", sere=None, score=True)
        identity = engine("S = K, vLLM's kernels", sere={"select_top_k": 99, "experts": "vllm"}, score=True)
        judge("S = K with vLLM's kernels: vLLM's tokens", bool(stock) and identity.get("tokens") == stock["tokens"])
        ours = engine("S = K, our kernels", sere={"select_top_k": 99, "experts": "sere", "strict": True}, score=True)
        say(log)
        if stock and ours:
            exact = reference_logprobs(model, prompts)
            errors = [error(one["logprobs"], exact) for one in (stock, ours)]
            judge(f"S = K with ours: error of log-probabilities {errors[1]:.2e}, vLLM's {errors[0]:.2e}",
                  errors[1] <= 1.25 * errors[0])  # fmt: skip
            click.echo(f"       tokens of both: {agreement(ours['tokens'], stock['tokens'])}")
        sere = {"select_top_k": 1, "min_active": 0, "collect_stats": True}
        exact_engine = {**base["engine"], "dtype": "float32"}
        expected = in_transformers(Path(model), prompts, profile, select_top_k=1, min_active=0)
        got = engine("S = 1", sere={**sere, "experts": "vllm" if eager else "sere"}, profile=profile)
        judge(
            f"S = 1: every step but the prompts' counted, {got.get('calls')} calls, active experts {got.get('active')}",
            bool(got) and set(got["calls"]) == {7},
        )
        if got:
            click.echo(f"       bf16, tokens of transformers in fp32: {agreement(got['tokens'], expected)}")
            # Without counting, sere::route selects; its weights may differ in the last bit, and with its own logits two
            # experts that are nearly tied may change places.
            rest = {key: value for key, value in sere.items() if key != "collect_stats"}
            rest["experts"] = "vllm" if eager else "sere"
            for router, what in (("sere", "selected by sere::route"), ("gate", "with logits of sere::route")):
                routed = engine(f"S = 1, {what}", sere={**rest, "router": router, "strict": not eager}, profile=profile)
                say(log)
                if routed:
                    same = sum(a == b for a, b in zip(routed["tokens"], got["tokens"], strict=True))
                    judge(f"S = 1 {what}: tokens of the hook: {agreement(routed['tokens'], got['tokens'])}",
                          same >= len(prompts) - (1 if router == "sere" else 3))  # fmt: skip
        got = engine("S = 1, float32", sere=sere, profile=profile, engine=exact_engine)
        if got:
            judge(f"S = 1 in float32: tokens of transformers with the backend: {agreement(got['tokens'], expected)}",
                  got["tokens"] == expected)  # fmt: skip
    return ok


@click.group(help=__doc__)
def main() -> None:
    """Commands."""


@main.command()
@click.argument("case", type=Path)
@click.argument("out", type=Path)
def one(case: Path, out: Path) -> None:
    """One engine; what the other commands start."""
    told = json.loads(case.read_text())
    result = time_engine(told) if told["kind"] == "time" else tokens_of_engine(told)
    out.write_text(json.dumps(result))


@main.command()
@click.option("--minutes", default=4.0, show_default=True)
@click.option("--log", type=Path, default=Path("vllm_gpu.log"), show_default=True)
@click.option("--eager", is_flag=True, help="Without graphs: also where there is no GPU.")
@click.option("--compiled", is_flag=True, help="With vLLM's compilation too, which makes engines start later.")
def check(minutes: float, log: Path, eager: bool, compiled: bool) -> None:
    """Tokens, log-probabilities and counts of a small trained model."""
    raise SystemExit(0 if check_all(60 * minutes, log, eager, compiled) else 1)


@main.command("time")
@click.option("--cases", default=DEFAULT_CASES, show_default=True, help=f"Of {', '.join(CASES)}.")
@click.option("--batches", default="1,8,16,32,64", show_default=True)
@click.option("--shape", default=SHAPE, show_default=True, help="Of a published model, as `sere bench --geometry`.")
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--quantization", default=None, help="As vLLM's: fp8 quantises the dummy weights.")
@click.option("--profile", "profiled", default="", help="Cases of which the kernels of a decode step are shown.")
@click.option("--profile-batch", default=32, show_default=True)
@click.option("--minutes", default=8.0, show_default=True)
@click.option("--log", type=Path, default=Path("vllm_gpu.log"), show_default=True)
@click.option("--json", "to", type=Path, default=None, help="Where to write all results.")
def time_all(
    cases: str, batches: str, shape: str, layers: int, quantization: str | None, profiled: str, profile_batch: int,
    minutes: float, log: Path, to: Path | None,
) -> None:  # fmt: skip
    """Milliseconds per output token, and over the first case."""
    ends, results = time.monotonic() + 60 * minutes, {}
    sizes = [int(batch) for batch in batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model, profile = save_model(Path(folder), layers, shape)
        for name in cases.split(","):
            case = timed(model, profile, sizes, layers, quantization)
            case |= {"name": name, "sere": CASES[name]}
            case["profile_batch"] = profile_batch if name in profiled.split(",") else 0
            left = ends - time.monotonic()
            begun = time.monotonic()
            if left < 30:
                click.echo(f"{name}: left out, no time")
                continue
            result = run(case, left, log)
            if result is None:
                continue
            results[name] = result
            click.echo(f"{name}: started in {result['start_s']} s, {time.monotonic() - begun:.0f} s in all")
            say(log)
            show(results, sizes, layers, name)
            if to is not None:
                to.write_text(json.dumps(results))
    raise SystemExit(0 if len(results) == len(cases.split(",")) else 1)


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
    for us, launches, kernel in results[name].get("kernels", [])[:24]:
        click.echo(f"    {us:8.2f} us {launches:6.2f} x  {kernel}")


if __name__ == "__main__":
    main()
