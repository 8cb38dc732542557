"""`sere serve-bench`: what re-routing gives and costs in a vLLM engine."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..benchmark.serving import ALL, ENVIRONMENT, Job, ServingResults, measure, settings_of
from ..benchmark.serving_engine import SHORT
from ..benchmark.serving_page import plot_serving, write_page
from ..config import SUBSTITUTIONS
from ..errors import MissingExtraError, SereError
from ..evaluation.charts import plotly_javascript
from ..evaluation.text import mixed_windows
from ..integrations.transformers import is_shipped, load_tokenizer, shipped_folder
from ..integrations.vllm.options import checked
from .options import MODEL_HELP, Numbers, counts, min_active_option, number_or_share, positive
from .output_file import OutputFile, Picture

_OURS = ("select_top_k", "substitution", "profile", "collect_stats")


def _size_or_k(text: str) -> int:
    """K stands for a number that no model's K exceeds."""
    return ALL if text == "K" else positive(text)


def _rule(text: str) -> str:
    if text not in SUBSTITUTIONS:
        raise ValueError(text)
    return text


def _options(text: str) -> Any:
    """`--sere`; the plug-in says what may be in it."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r} is not a dict of options")
    return found


@click.command("serve-bench", context_settings={"ignore_unknown_options": True})
@click.option("--model", "name", required=True, help=MODEL_HELP)
@click.option(
    "--batch", "--batch-size", "batches", type=counts, default="8,32", show_default=True, help="Requests at a time."
)
@click.option(
    "--select-top-k", type=Numbers(_size_or_k, "positive whole numbers, or K"), default="2,1", show_default=True,
    help="Values of S; K: nothing is re-routed, which shows what our kernels alone give.",
)  # fmt: skip
@click.option(
    "--substitution", type=Numbers(_rule, f"rules, of {', '.join(SUBSTITUTIONS)}"), default="reroute",
    show_default=True, help="Rules, each with every S.",
)  # fmt: skip
@click.option("--profile", type=click.Path(exists=True), help="Similarity profile; experts are probed without.")
@click.option("--threshold", type=number_or_share, help="rho, or a share such as q0.2.")
@min_active_option
@click.option("--sere", "more", type=_options, default="{}", help="JSON: further options of the plug-in.")
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--output-len", type=click.IntRange(min=SHORT + 1), default=73, show_default=True, help="Tokens that are generated."
)
@click.option(
    "--text", "--data", "text", multiple=True, type=click.Path(dir_okay=False),
    help="Text: .txt, .jsonl, .parquet; prompts are from it, and losses are of it. Random prompts and no loss without.",
)  # fmt: skip
@click.option("--field", default="text", show_default=True, help="Field or column that holds the text.")
@click.option("--length", type=click.IntRange(min=2), default=128, show_default=True, help="Loss: tokens per sequence.")
@click.option(
    "--sequences", type=click.IntRange(min=1), help="Loss: number of sequences; four decoding batches by default."
)
@click.option("--loss/--no-loss", default=True, show_default=True, help="Measure the loss on --text.")
@click.option(
    "--active/--no-active", default=True, show_default=True,
    help="Count active experts, in a further engine of each setting, for counting takes time.",
)  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=1), default=120, show_default=True, help="For all of it.")
@click.option("--log", type=OutputFile(), default="serve-bench.log", show_default=True, help="What engines print.")
@click.option("--json", "json_path", type=OutputFile(), help="File for the results.")
@click.option("--plot", "plot_path", type=Picture(), help="File for a plot: .png, .svg, .pdf.")
@click.option("--html", "page_path", type=OutputFile(), help="Page with table, charts and losses.")
@click.argument("engine", nargs=-1, type=click.UNPROCESSED)
def serve_bench_command(
    name: str, batches: list[int], select_top_k: list[int], substitution: list[str], profile: str | None,
    threshold: float | str | None, min_active: int | None, more: dict[str, Any], input_len: int, output_len: int,
    text: tuple[str, ...], field: str, length: int, sequences: int | None, loss: bool, active: bool, minutes: float,
    log: str, json_path: str | None, plot_path: str | None, page_path: str | None, engine: tuple[str, ...],
) -> None:  # fmt: skip
    """Time per output token in vLLM with and without re-routing, active experts, and the loss on your text.

    Each setting is an engine in a process of its own, one after the other, as `vllm bench latency` measures one: a
    batch of requests sent together, no HTTP. Printed is the median of three runs after one to warm up. Whatever is no
    option of this command goes to every engine, as on the command line of `vllm serve`. An engine that fails or is not
    done in time is left out, with the reason, and the exit status is 1.

    \b
    sere serve-bench --model Qwen/Qwen3-30B-A3B --batch 8,32 --text text.jsonl --html serving.html
    sere serve-bench --model qwen3 --substitution reroute,fill --dtype float32 --max-model-len 256
    sere serve-bench --model M --select-top-k K,2,1 --load-format dummy --quantization fp8 --json fp8.json
    """  # noqa: D301
    chosen = {"threshold": threshold, "min_active": min_active, "profile": profile}
    common = {**more, **{option: value for option, value in chosen.items() if value is not None}}
    if wrong := [option for option in _OURS if option in more]:
        raise click.UsageError(f"--sere: {wrong[0]} is what this command sets; it has options for what can be chosen")
    try:
        if page_path is not None:
            plotly_javascript()  # raises before hours of work
        settings = settings_of(select_top_k, substitution, common)
        for setting in settings[1:]:
            checked(setting.sere or {})
        _require_vllm()
        model = str(shipped_folder(name)) if is_shipped(name) else name
        prompts = _prompts(model, text, field, input_len, max(batches)) if text else None
    except SereError as error:
        raise click.ClickException(str(error)) from error
    case = {
        "model": model, "batches": batches, "input_len": input_len, "output_len": output_len,
        "prompts": prompts, "options": list(engine),
    }  # fmt: skip
    reason = _no_loss(text, loss, engine)
    quality = {
        "model": model, "profile": profile, "batches": batches, "text": list(text), "field": field, "length": length,
        "sequences": sequences or _sequences(batches, len(text)),
    }  # fmt: skip
    results = ServingResults(
        name, "", list(engine), _about_prompts(text, input_len, output_len), f"not measured: {reason}" if reason else ""
    )
    results.notes += _notes(engine, quality=not reason)
    job = Job(case, None if reason else quality, settings, active, time.monotonic() + 60 * minutes, Path(log))
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    Path(log).write_text("", encoding="utf-8")
    try:
        measure(job, results, lambda line: click.echo(line, err=True))
        click.echo(results.table())  # first: a file can still fail, on a full disk
        _write(results, json_path, plot_path, page_path)
    except SereError as error:
        raise click.ClickException(str(error)) from error
    if results.left_out:
        click.echo(f"what engines printed: {log}", err=True)
        raise SystemExit(1)


def _write(results: ServingResults, json_path: str | None, plot_path: str | None, page_path: str | None) -> None:
    if json_path is not None:
        results.save(json_path)
    if plot_path is not None and results.rows:
        plot_serving(results, plot_path)
    if page_path is not None:
        write_page(results, page_path)


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("sere serve-bench needs vllm: pip install 'sere-compile[vllm]'")


def _prompts(model: str, text: Sequence[str], field: str, length: int, number: int) -> list[list[int]]:
    """Windows of the text, as many as the largest batch has requests; of several files in turn."""
    windows = mixed_windows(load_tokenizer(model), text, field, length, -(-number // len(text)) * len(text))
    return windows[:number].tolist()


def _sequences(batches: Sequence[int], files: int) -> int:
    """Four decoding batches of the largest size, a multiple of the number of files."""
    files = max(files, 1)
    return -(-4 * max(batches) // files) * files


def engine_option(engine: Sequence[str], name: str) -> str | None:
    """The value of an option among those of the engine; vLLM takes - and _ alike."""
    for index, word in enumerate(engine):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:
            return value if equals else next(iter(engine[index + 1 :]), "")
    return None


def _no_loss(text: Sequence[str], loss: bool, engine: Sequence[str]) -> str:
    """Why the loss is not measured; empty where it is."""
    if not loss:
        return "--no-loss"
    if not text:
        return "without --text there is nothing to measure it on"
    if engine_option(engine, "--load-format") == "dummy":
        return "--load-format dummy makes up the weights, and these know no text"
    return ""


def _notes(engine: Sequence[str], quality: bool) -> list[str]:
    notes = []
    if quality and (kind := engine_option(engine, "--quantization")):
        notes.append(f"losses are of the weights as they are stored, and engines quantise them: {kind}")
    if engine_option(engine, "--load-format") == "dummy":
        notes.append("weights are made up: a real model's routers may choose other numbers of active experts")
    return notes


def _about_prompts(text: Sequence[str], input_len: int, output_len: int) -> str:
    source = f"from {', '.join(Path(path).name for path in text)}" if text else "of random tokens"
    return f"prompts of {input_len} tokens {source}, {output_len} generated"
