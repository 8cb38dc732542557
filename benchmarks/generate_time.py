r"""What a token takes in `model.generate`: by default, with a static cache, and with `sere_compile.generate_config`.

\b
python -m benchmarks.generate_time                                        # the table of docs/transformers.md
python -m benchmarks.generate_time --variants "S = 1" --host              # and what the host does in a step

Random weights and similarities. Milliseconds are those of 73 tokens less those of 9, over 64; median of so many rounds.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable
from typing import Any

import click
import torch

import sere_compile
from sere_compile.benchmark.subject import random_model
from sere_compile.benchmark.timing import machine_name

PROMPT, LONG, SHORT = 128, 73, 9


def _static() -> dict[str, Any]:
    from transformers import CompileConfig

    return {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}


def _sere(**options: Any) -> dict[str, Any]:
    return {"cache_implementation": "static", "compile_config": sere_compile.generate_config(**options)}


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "static cache": _static,
    "S = 2": lambda: _sere(select_top_k=2),
    "S = 1": lambda: _sere(select_top_k=1),
    "S = 1, no guards on modules": lambda: _sere(
        select_top_k=1, guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe
    ),
}


def named(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    """The names in an option's text."""
    names = [name.replace(";", ",") for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise click.BadParameter(f"no variant {name!r}; there are {', '.join(map(repr, VARIANTS))}")
    return names


@click.command(help=__doc__)
@click.option("--geometry", default="qwen3-30b-a3b", show_default=True)
@click.option("--layers", default=12, show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--variants", default="default,S = 1,S = 1; no guards on modules", show_default=True,
              callback=named, help="With a semicolon where a name has a comma.")  # fmt: skip
@click.option("--rounds", default=3, show_default=True)
@click.option("--host", is_flag=True, help="Print what takes the host's time, by cProfile.")
def main(geometry: str, layers: int, batch: int, variants: list[str], rounds: int, host: bool) -> None:
    """A table."""
    subject = random_model(geometry, layers)
    model = subject.model
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
    click.echo(f"{machine_name()}, torch {torch.__version__}; {subject.name}, batch {batch}, {PROMPT} tokens in")
    click.echo("| variant | ms per token, median [least .. most] | over the first |\n| --- | --- | --- |")
    first = None
    for name in variants:
        torch.compiler.reset()
        options = VARIANTS[name]()

        def generated(tokens: int, options: dict[str, Any] = options) -> float:
            begun = time.perf_counter()
            length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
            model.generate(ids, do_sample=False, pad_token_id=0, **length, **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        generated(LONG), generated(SHORT)
        times = sorted((generated(LONG) - generated(SHORT)) / (LONG - SHORT) * 1e3 for _ in range(rounds))
        middle = times[rounds // 2]
        first = first or middle
        click.echo(f"| {name} | {middle:.2f} [{times[0]:.2f} .. {times[-1]:.2f}] | {first / middle:.2f} |")
        if host:
            click.echo(of_host(lambda: generated(LONG)))


def of_host(call: Callable[[], Any]) -> str:
    """The functions that take most of the host's time in a call, without what they call."""
    with cProfile.Profile() as profile:
        call()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(20)
    return text.getvalue()


if __name__ == "__main__":
    main()
