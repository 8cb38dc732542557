r"""SERE in vLLM on a GPU for other models and kinds of weights: whether they are served, active experts, ms per token.

\b
python -m benchmarks.vllm_models                                        # Qwen3-30B-A3B's shape in every kind of weights
python -m benchmarks.vllm_models --layers 4 --no-timed --together 8     # served or not, and active experts
python -m benchmarks.vllm_models --of gpt-oss-20b,deepseek-v2-lite --batches 8,32,64

Dummy weights. Four engines each, side by side and timed in turn, of which one counts; with `--no-timed` that one alone.
With few layers the host is what takes the time.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from .engines import run_together
from .vllm_gpu import CASES, SHAPE, parts, save_model, timed

# The models' own but Mixtral's, 32 of which are 93 GB.
LAYERS = {
    SHAPE: 48, "qwen1.5-moe-a2.7b": 24, "mixtral-8x7b": 8, "deepseek-v2-lite": 27, "gpt-oss-20b": 24,
}  # fmt: skip
HEAD = "| model | batch | experts | active, S = 1 | vLLM | S = 2 | S = 1 |\n| --- | --- | --- | --- | --- | --- | --- |"
# As `quantization_config` of published checkpoints says it, or for vLLM to do at start (a name).
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group"}


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


WEIGHTS: dict[str, dict[str, Any] | str] = {
    "bfloat16": {},
    "FP8 per tensor online": "fp8",
    "FP8 in blocks online": "fp8_per_block",
    "FP8 in blocks": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    },
    "int4 GPTQ": {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
        "dynamic": {r"-:.*mlp\.gate$": {}},
    },
    "int4 AWQ": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    },
    "int4 compressed-tensors": _compressed("pack-quantized", {**_INT4, "actorder": None}, None),
    "NVFP4 compressed-tensors": _compressed(
        "nvfp4-pack-quantized", {**_NVFP4, "dynamic": False}, {**_NVFP4, "dynamic": "local"}
    ),
}  # fmt: skip


@click.command(help=__doc__)
@click.option("--of", default=",".join(f"{SHAPE}/{name}" for name in WEIGHTS), show_default=True,
              help="SHAPE or SHAPE/WEIGHTS; with @N of so many layers instead of the model's own.")  # fmt: skip
@click.option("--batches", default="32", show_default=True)
@click.option("--layers", type=int, default=None, help="Where --of says no number.")
@click.option("--timed/--no-timed", "times", default=True, show_default=True, help="Engines whose time counts.")
@click.option("--together", default=1, show_default=True, help="Models side by side, with all their engines.")
@click.option("--minutes", default=8.0, show_default=True)
@click.option("--log", type=Path, default=Path("vllm_models.log"), show_default=True)
def main(
    of: str, batches: str, layers: int | None, times: bool, together: int, minutes: float, log: Path
) -> None:  # fmt: skip
    """All models, a table."""
    ends, complete = time.monotonic() + 60 * minutes, True
    sizes = [int(batch) for batch in batches.split(",")]
    click.echo(HEAD)
    names = [name if layers is None or "@" in name else f"{name}@{layers}" for name in of.split(",")]
    for group in parts(names, together):
        with tempfile.TemporaryDirectory() as folder:
            cases = [
                case
                for name in group
                for case in of_model(Path(folder) / name.translate(str.maketrans("/@ .", "----")), name, sizes, times)
            ]
            each = len(cases) // len(group)
            runs = run_together(cases, max(1.0, ends - time.monotonic()), log)
        for index, name in enumerate(group):
            mine = runs[each * index : each * (index + 1)]
            complete &= all(one.result for one in mine)
            backends = " / ".join(dict.fromkeys(one.backend for one in mine if one.backend))
            for size in sizes:
                click.echo(model_row(name, size, backends, [one.result for one in mine]))
            for one, case in zip(mine, cases[each * index :], strict=False):
                if one.result is None:
                    one.say(case["name"])
    raise SystemExit(0 if complete else 1)


def of_model(folder: Path, name: str, batches: list[int], times: bool = True) -> list[dict[str, Any]]:
    """Four engines on a model: vLLM alone, S = 2, S = 1, and one that counts, which is the only one without `times`."""
    folder.mkdir(parents=True)
    name, _, given = name.partition("@")
    shape, _, kind = name.partition("/")
    weights = WEIGHTS[kind or "bfloat16"]
    layers = int(given or LAYERS[shape])
    model, profile = save_model(folder, layers, shape, weights if isinstance(weights, dict) else None)
    case = timed(model, profile, batches, layers, weights if isinstance(weights, str) else None)
    rules = {"vLLM": (None, "time"), "S = 2": ("s2", "time"), "S = 1": ("s1", "time")} if times else {}
    rules |= {"counted": ("s1", "count")}
    return [
        {**case, "name": f"{name}, {what}", "sere": CASES[sere] if sere else None, "kind": kind}
        for what, (sere, kind) in rules.items()
    ]


def model_row(name: str, batch: int, backends: str, results: list[dict[str, Any] | None]) -> str:
    """Of the table: "-" for what an engine that failed would have said."""
    *timed_ones, counted = results
    times = [result["ms"][str(batch)][1] if result else math.nan for result in timed_ones] or 3 * [math.nan]
    active = counted["active"][str(batch)] if counted else None
    cells = ["-" if math.isnan(ms) else f"{ms:.2f}" + (f" ({times[0] / ms:.2f}x)" if i else "")
             for i, ms in enumerate(times)]  # fmt: skip
    text = f"{active[0]:.1f} -> {active[1]:.1f}" if active else "-"
    return f"| {' | '.join([name, str(batch), backends, text, *cells])} |"


if __name__ == "__main__":
    main()
