"""`sere demo`: re-routing in a small trained model that comes with the package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import click
import torch

from ..benchmark.timing import Run, Timing, machine_name, time_in_turn
from ..errors import SereError
from ..integrations.generate import generate_config
from ..integrations.transformers import KINDS, load_causal_lm, shipped_folder
from ..statistics import stats

# Generations with each configuration that are timed.
ROUNDS = 5
# Of what the models were trained on: Python's standard library, and novels of Jane Austen.
PROMPTS = (
    "def __init__(self,",
    "She had been",
    "for name in",
    "Mr. Elliot was",
    "import os\nimport",
    "The captain",
    "    if not isinstance(",
    "It was a",
)


@click.command("demo")
@click.option(
    "--model",
    "--kind",
    "kind",
    type=click.Choice(KINDS),
    default="qwen3",
    show_default=True,
    help=f"Which trained model; all but {KINDS[0]} need a clone of the repository.",
)
@click.option("--select-top-k", type=int, default=1, show_default=True, help="S.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=16, show_default=True, help="Tokens to decode.")
def demo_command(kind: str, select_top_k: int, new_tokens: int) -> None:
    """Decode a batch of prompts with a small trained model, unchanged and re-routed; count experts, time both.

    \b
    sere demo --select-top-k 2
    """  # noqa: D301
    try:
        # The graph is small: on a CPU, compiling it would take longer than the demo.
        inner = "inductor" if torch.cuda.is_available() else "eager"
        sere = generate_config(select_top_k=select_top_k, collect_stats=True, inner=inner)
        alike = {
            "unchanged": _without_re_routing(generate_config(inner=inner)),
            "re-routed": generate_config(select_top_k=select_top_k, inner=inner),
        }
        model, tokenizer = load_causal_lm(str(shipped_folder(kind)), dtype=torch.float32)
        original = _continuations(model, tokenizer, new_tokens, None)
        rerouted = _continuations(model, tokenizer, new_tokens, sere)
        top_k = model.config.num_experts_per_tok
        counted = stats(model) if select_top_k < top_k else {}
        times = _time(model, tokenizer, new_tokens, alike) if counted else {}
    except SereError as error:
        raise click.ClickException(str(error)) from error
    for prompt, before, after in zip(PROMPTS, original, rerouted, strict=True):
        click.echo(f"{prompt!r}\n    unchanged  {before!r}\n    re-routed  {after!r}")
    if not counted:
        click.echo(
            f"\nnothing was re-routed: S = {select_top_k} keeps all K = {top_k} experts of a token; give "
            f"--select-top-k 1 to {top_k - 1}"
        )
        return
    click.echo(f"\nactive experts per step, decode batch {len(PROMPTS)}, S = {select_top_k}")
    for name, gate in counted.items():
        click.echo(f"{name}: {gate.mean_active_before:.1f} -> {gate.mean_active_after:.1f}")
    each = {name: timing.median * 1e-3 for name, timing in times.items()}
    click.echo(
        f"\nms per step, {machine_name()}, in turn, medians of {ROUNDS}: unchanged {each['unchanged']:.1f}, re-routed "
        f"{each['re-routed']:.1f} ({each['unchanged'] / each['re-routed']:.2f}x), both compiled, inner={inner!r}.\n"
        "These experts are small enough for a cache; sere bench times larger ones, and your model."
    )


def _without_re_routing(config: Any) -> Any:
    """The same configuration with the inner compiler alone."""
    options = {name: value for name, value in config.options.items() if name != "inner"}
    changed = dataclasses.replace(config, backend=config.options["inner"], options=options or None)
    changed._compile_all_devices = True
    return changed


def _time(model: Any, tokenizer: Any, new_tokens: int, configs: Mapping[str, Any]) -> dict[str, Timing]:
    """Microseconds per step of a generation with each configuration; the first, which compiles, is not counted."""
    runs: dict[str, Run] = {
        name: functools.partial(_continuations, model, tokenizer, new_tokens, config)
        for name, config in configs.items()
    }
    return time_in_turn(runs, new_tokens, ROUNDS, warmup=1)


def _continuations(model: Any, tokenizer: Any, new_tokens: int, compile_config: Any) -> list[str]:
    """Greedy continuations of the prompts; `compile_config` says how decoding is compiled, None leaves it eager."""
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
        disable_compile=compile_config is None,
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
