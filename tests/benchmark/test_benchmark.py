"""`sere bench` without a GPU: tiny model, real variants and comparison of outputs, no clock and no CUDA graph."""

import functools
import sys
import types

import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.exc import BackendCompilerFailed

from sere_compile import OutputError, SereError
from sere_compile.benchmark import decode_step, gating, moe_layer, run, variant
from sere_compile.benchmark.geometries import GEOMETRIES, Geometry
from sere_compile.benchmark.result import Results
from sere_compile.benchmark.subject import random_model
from sere_compile.benchmark.timing import Timing, summarize, time_in_turn
from sere_compile.cli import main
from sere_compile.passes import Skip, SkipReason
from sere_compile.testing import oracle_routing

TINY = Geometry(
    "qwen3_moe", 16, 4, 32, 16,
    {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 16,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
)  # fmt: skip


# Its top-k is unsorted, and it has shared experts.
UNSORTED = Geometry(
    "deepseek_v2", 16, 4, 96, 16,
    {
        **{k: v for k, v in GEOMETRIES["deepseek-v2-lite"].options.items() if k != "hidden_size"},
        "hidden_size": 96, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
)  # fmt: skip


def tiny(geometry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GEOMETRIES, "tiny", geometry)
        torch.manual_seed(0)
        return random_model("tiny", 2, torch.float32, "cpu")


@pytest.fixture(scope="module")
def subject():
    return tiny(TINY)


@pytest.fixture(scope="module")
def unsorted():
    return tiny(UNSORTED)


@pytest.fixture
def without_gpu(monkeypatch):
    """Graphs are plain calls; every variant takes 10 us, ours 5."""

    def capture(function, inputs, outputs=None):
        def replay():
            results = [function(x) for x in inputs]
            if outputs is not None:
                outputs[:] = results

        return types.SimpleNamespace(replay=replay)

    def time_in_turn(runs, calls, rounds, warmup=3):
        for call in runs.values():
            getattr(call, "replay", call)()
        return {name: Timing(5.0 if "sere" in name else 10.0, 1.0, 20.0) for name in runs}

    monkeypatch.setattr(variant, "INNER", "eager")
    for module in (variant, decode_step):
        monkeypatch.setattr(module, "capture", capture)
    for module in (gating, moe_layer, decode_step):
        monkeypatch.setattr(module, "time_in_turn", time_in_turn)
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def bench(subject, without_gpu):
    """Run some kinds with batch 5 and S = 1."""

    def run_kinds(kinds, stock):
        results = results_of([])
        run.run_bench(results, subject, kinds, [5], [1], stock, lambda _: None)
        return results

    return run_kinds


def results_of(rows):
    return Results("tiny", "no machine", 1e12, "random", rows)


@pytest.mark.parametrize("kind", ["layer", "decode"])
def test_every_variant_agrees_and_fewer_experts_are_active(subject, without_gpu, kind):
    """S=2 and S=1 agree with the eager oracle, and S=K with the eager model; the fewest experts are active at S=1."""
    bench = {"layer": moe_layer.bench_moe_layer, "decode": decode_step.bench_decode_step}[kind]
    kwargs = {} if kind == "layer" else {"prompt": 6, "steps": 4}
    rows = bench(subject, 5, [10**6, 2, 1], ["grouped_mm", "batched_mm"], 1e12, **kwargs)
    names = ["eager", "inductor grouped_mm", "inductor batched_mm", "sere S=K", "sere S=2", "sere S=1"]
    names += ["sere, re-routes nothing"] if kind == "layer" else []
    assert [row.variant for row in rows] == names
    assert all(row.error < 1e-4 for row in rows)
    active = [row.active for row in rows[3:6]]
    assert active[0] > active[1] > active[2]
    assert {row.active for row in (rows[0], *rows[6:])} == {active[0]}
    results = results_of(rows)
    assert [results.speedup(row) for row in rows] == [None] * 3 + [2.0] * (len(rows) - 3)
    if kind == "layer":
        # 5 us at 1 TB/s are 5 MB; an expert has 3 projections of 32 x 16 in fp32, the router 16 x 32.
        assert rows[3].bandwidth_share == pytest.approx((active[0] * 3 + 1) * 32 * 16 * 4 / 5e6)


@pytest.mark.parametrize("bench", [gating.bench_gating, moe_layer.bench_moe_layer])
def test_an_unsorted_router(unsorted, without_gpu, bench):
    """The reference ranks by score where the router does not; shared experts are read in every call."""
    rows = bench(unsorted, 5, [4, 2, 1], ["grouped_mm"], 1e12)
    assert all(row.error is None or row.error < 1e-4 for row in rows)
    if rows[0].what == "MoE layer":
        active = [row.active for row in rows if row.ours][2]
        # Of 3 projections of 96 x 16: experts, two shared ones, and a router of 16 x 96.
        assert rows[4].bytes_read == pytest.approx((3 * (active + 2) + 1) * 96 * 16 * 4)


def test_active_experts_are_those_of_all_steps(subject, without_gpu, monkeypatch):
    """Later tokens are others than the first, and what is timed is all of them."""
    counts = []
    decoder = decode_step.Decoder(subject, 3, prompt=6, steps=4)
    _, active = decode_step._references(subject, decoder, [1], 4)
    monkeypatch.setattr(decoder, "steps", 1)
    _, first = decode_step._references(subject, decoder, [1], 4)
    monkeypatch.setattr(decoder, "steps", 4)
    decoder.reset()
    with oracle_routing(subject.model, subject.matrices, 4, active=(calls := {})):
        for _ in range(4):
            decoder.step(decoder.forward)
    counts = [after for gate in calls.values() for _, after in gate]
    assert len(counts) == 2 * 4
    assert active[4] == pytest.approx(sum(counts) / len(counts))
    assert active != first


def test_a_variant_without_memory_is_left_out(subject, without_gpu, bench, monkeypatch):
    """The others are measured, the results say which is missing, and the command's status is 1."""
    compiled = variant.Variant.compiled

    def too_large(self, function):
        if self.experts == "batched_mm":
            raise torch.OutOfMemoryError("tried to allocate 30 GiB\nfurther lines")
        return compiled(self, function)

    monkeypatch.setattr(variant.Variant, "compiled", too_large)
    results = bench(["layer"], ["grouped_mm", "batched_mm"])
    assert [row.variant for row in results.rows][:3] == ["eager", "inductor grouped_mm", "sere S=1"]
    assert results.failures == [
        "inductor batched_mm is not measured: the device is out of memory (tried to allocate 30 GiB)"
    ]
    assert not results.is_sound
    assert results.speedup(results.rows[2]) == 2.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_measured_costs_nothing_else(subject, without_gpu, bench, monkeypatch, wrapped):
    """A kind that the model does not allow is told, also where a compiler wrapped our refusal; the others are there."""

    def refuses(*_):
        error = SereError("no cache of ours")
        raise BackendCompilerFailed(lambda: None, error, None) if wrapped else error

    monkeypatch.setitem(run.KINDS, "decode", refuses)
    results = bench(["decode", "gating"], ["grouped_mm"])
    assert {row.what for row in results.rows} == {"gating", "without gating"}
    [failure] = results.failures
    assert failure.startswith("decode, batch 5: ")
    assert "no cache of ours" in failure
    assert f"\nNot measured: {failure}\n" in results.table()


def test_other_errors_leave_what_was_measured(subject, without_gpu, monkeypatch):
    """An error that is none of ours is not hidden, and the rows before it stand in the results."""
    results = results_of([])
    monkeypatch.setitem(run.KINDS, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.run_bench(results, subject, ["gating", "decode"], [5], [1], ["grouped_mm"], lambda _: None)
    assert results.rows[0].what == "gating"


def test_a_comparison_that_cannot_tell_is_noted(subject, without_gpu, bench, monkeypatch):
    """Where the outputs of S = 1 and S = K are nearer than the tolerance, re-routing nothing would pass."""
    monkeypatch.setattr(moe_layer, "TOLERANCE", 10.0)
    results = bench(["layer"], ["grouped_mm"])
    assert [note for note in results.notes if "MoE layer, batch 5: the reference of S=1 is" in note]


def test_experts_that_cannot_be_chosen(subject, monkeypatch):
    """transformers' refusal becomes one of ours, which names the model."""

    def refuse(implementation):
        raise ValueError("no such thing")

    monkeypatch.setattr(subject.model, "set_experts_implementation", refuse)
    with pytest.raises(SereError, match="Qwen3MoeForCausalLM cannot run its experts by grouped_mm: no such thing"):
        variant.use_experts(subject.model, "grouped_mm")


@pytest.mark.parametrize("bench", [gating.bench_gating, moe_layer.bench_moe_layer])
def test_a_router_without_ids(subject, without_gpu, bench, monkeypatch):
    """Its experts choose by themselves: nothing to compare with, and the user is told so."""
    router = subject.blocks[-1].module.get_submodule("gate")
    monkeypatch.setattr(router, "forward", lambda hidden: (hidden,))
    with pytest.raises(SereError, match="Qwen3MoeTopKRouter, returns no expert ids"):
        bench(subject, 5, [1], ["grouped_mm"], 1e12)


def test_a_cache_with_other_state(subject, monkeypatch):
    """Linear attention has state that a static cache of keys and values would lose."""
    layer = type("LinearAttentionLayer", (), {})
    monkeypatch.setattr("transformers.StaticCache", lambda **_: types.SimpleNamespace(layers=[layer()]))
    with pytest.raises(SereError, match="with a cache of LinearAttentionLayer cannot be timed"):
        decode_step.Decoder(subject, 3, prompt=6, steps=4)


def test_gating_is_compared_over_the_router_alone(subject, without_gpu):
    """Experts of 8 x 8 are enough for the pass to see a gate; strict=True would raise."""
    rows = gating.bench_gating(subject, 5, [4, 1], ["grouped_mm", "batched_mm"], 1e12)
    names = ["eager", "inductor", "sere S=K", "sere S=1", "inductor, all but the gating"]
    assert [row.variant for row in rows] == names
    assert max(row.error for row in rows[:-1]) < 1e-5
    assert rows[-1].error is None
    assert [results_of(rows).speedup(row) for row in rows] == [None, None, 2.0, 2.0, None]


def test_no_speed_up_while_an_output_disagrees(subject, without_gpu, monkeypatch):
    """One wrong variant, stock or ours, withholds all speed-ups of its batch size, and the table says so."""
    compiled = variant.Variant.compiled

    def wrong(self, function):
        function = compiled(self, function)
        return (lambda x: function(x) * 1.2) if self.name == "sere S=2" else function

    monkeypatch.setattr(variant.Variant, "compiled", wrong)
    rows = moe_layer.bench_moe_layer(subject, 5, [4, 2], ["grouped_mm"], 1e12)
    results = results_of(rows)
    assert {results.speedup(row) for row in rows} == {None}
    lines = [line for line in results.table().splitlines() if "DISAGREES" in line]
    assert len(lines) == 1
    assert "sere S=2" in lines[0]


def test_the_decoder_is_set_back_before_each_run(subject, without_gpu):
    """A second run repeats the first, token by token."""
    decoder = decode_step.Decoder(subject, 3, prompt=6, steps=4)
    runs = []
    for _ in range(2):
        decoder.reset()
        runs.append([])
        for _ in range(4):
            decoder.step(decoder.forward)
            runs[-1].append(decoder.logits.clone())
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)


def test_token_error_is_not_moved_by_one_token_and_never_passes_nan():
    want = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    one_off = want.clone()
    one_off[3] = 100
    assert variant.token_error(one_off, want) == 0
    assert variant.token_error(want * 1.1, want) == pytest.approx(0.1, rel=1e-3)
    nan = torch.full_like(want, torch.nan)
    row = results_row(error=variant.token_error(nan, want))
    assert not row.agrees


def test_gates_that_keep_their_experts_are_noted(subject, bench, monkeypatch):
    """What the passes refuse appears under the table, with the reason and how often."""
    refuse = lambda gate, *_: Skip(SkipReason.NOT_BATCHED, gate.ids, "too odd")  # noqa: E731
    monkeypatch.setattr("sere_compile.passes.pipeline.fuse_experts", refuse)
    options = variant.sere_backend.with_options(lower_experts="always")
    monkeypatch.setattr(variant, "sere_backend", options)
    results = bench(["layer"], ["grouped_mm"])
    reason = f"{SkipReason.NOT_BATCHED.value} (too odd)"
    assert results.notes == [f"3 compiled gates keep their experts: {reason}"]
    assert results.table().endswith("\nNote: " + results.notes[0])


@pytest.mark.parametrize("agrees", [True, False])
def test_the_command_on_a_checkpoint(subject, without_gpu, monkeypatch, tmp_path, agrees):
    """--model: table, JSON and plot; exit status 1 and no speed-up anywhere when an output of ours is wrong."""
    pytest.importorskip("matplotlib")
    from sere_compile.benchmark import subject as subjects

    subject.model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(subjects, "loaded_model", functools.partial(subjects.loaded_model, device="cpu"))
    monkeypatch.setattr(run, "require_device", lambda: None)
    monkeypatch.setattr(run, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(run, "cache_bytes", lambda: 60_000_000)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda: "no machine")
    compiled = variant.Variant.compiled

    def perhaps_wrong(self, function):
        function = compiled(self, function)
        return function if agrees or self.name != "sere S=1" else lambda x: function(x) * 1.2

    monkeypatch.setattr(variant.Variant, "compiled", perhaps_wrong)
    paths = [str(tmp_path / name) for name in ("bench.json", "bench.png")]
    options = ["--what", "layer", "--batch", "5", "--select-top-k", "K,1", "--stock", "grouped_mm"]
    options += ["--model", str(tmp_path / "model"), "--json", paths[0], "--plot", paths[1]]
    done = CliRunner().invoke(main, ["bench", *options])
    assert done.exit_code == (0 if agrees else 1), done.output
    results = Results.load(paths[0])
    speedups = {results.speedup(row) for row in results.rows if row.ours}
    assert speedups == ({2.0} if agrees else {None})
    assert ("| 2.00 |" in done.output, "DISAGREES" in done.output) == (agrees, not agrees)
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_nothing_is_measured_twice(subject, monkeypatch):
    """However often it is asked for; without --layers a geometry has twelve."""
    given = []
    monkeypatch.setattr(run, "require_device", lambda: None)
    monkeypatch.setattr(run, "begin", lambda _: results_of([results_row()]))
    monkeypatch.setattr(run, "run_bench", lambda *arguments: given.extend(arguments[2:5]))
    monkeypatch.setattr("sere_compile.benchmark.subject.random_model", lambda *arguments: given.append(arguments))
    options = ["--what", "layer,gating,layer", "--batch", "3,5,3", "--select-top-k", "K,1,1"]
    done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b", *options])
    assert done.exit_code == 0, done.output
    assert given == [("mixtral-8x7b", 12), ["layer", "gating"], [3, 5], [10**6, 1]]


def test_the_table_is_printed_though_a_file_fails(subject, monkeypatch, tmp_path, no_room):
    """A disk that is full when the work is done."""
    monkeypatch.setattr(run, "require_device", lambda: None)
    monkeypatch.setattr(run, "begin", lambda _: results_of([results_row()]))
    monkeypatch.setattr(run, "run_bench", lambda *_: None)
    monkeypatch.setattr("sere_compile.benchmark.subject.random_model", lambda *_: subject)
    out = tmp_path / "bench.json"
    with no_room():
        done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b", "--json", str(out)])
    assert done.exit_code == 1
    assert "| 8 | sere S=2 |" in done.output
    assert f"Error: {out} could not be written: File too large" in done.output


def results_row(**changes):
    from sere_compile.benchmark.result import Row

    fields = {
        "what": "MoE layer", "batch": 8, "variant": "sere S=2", "ours": True, "timing": Timing(2.0, 1.0, 3.0),
        "error": 0.001, "tolerance": 0.01,
    }  # fmt: skip
    return Row(**fields | changes)


def test_the_table_has_the_floor():
    """Bytes at the copy bandwidth of the same run."""
    table = results_of([results_row(active=3.5, bytes_read=2e9, bandwidth_share=0.5)]).table()
    assert "| 3.5 | 2000 | 2000 | 50% |" in table


def test_results_survive_json(tmp_path):
    results = results_of([results_row(), results_row(ours=False, variant="eager", active=3.5)])
    results.save(tmp_path / "bench.json")
    assert Results.load(tmp_path / "bench.json") == results


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from sere_compile.benchmark.plot import plot

    plot(
        results_of([results_row(batch=b, what=w) for b in (8, 32) for w in ("MoE layer", "gating")]), tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_full_disk_leaves_the_earlier_results(tmp_path, no_room):
    pytest.importorskip("matplotlib")
    from sere_compile.benchmark.plot import plot

    results = results_of([results_row()])
    for write in (results.save, functools.partial(plot, results)):
        out = tmp_path / "bench.png"
        out.write_bytes(b"old")
        with no_room(), pytest.raises(OutputError, match=r"bench.png could not be written: File too large"):
            write(out)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"bench.png": b"old"}


def test_summary_is_median_and_spread():
    assert summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, pytest.approx(1.2), pytest.approx(4.8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --geometry or --model"),
        (["--geometry", "mixtral-8x7b", "--model", "x"], "give either --geometry or --model"),
        (["--geometry", "mixtral-8x7b", "--batch", "8,x"], "'8,x' is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "²"], "'²' is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "9" * 5000], "is not a list of positive whole numbers"),
        (["--geometry", "mixtral-8x7b", "--batch", "K"], "'K' is not a list of positive whole numbers"),
        (["--model", "x", "--layers", "40"], "--layers is for --geometry"),
        (["--geometry", "mixtral-8x7b", "--what", "layers"], "'layers' is none of"),
        (["--geometry", "mixtral-8x7b", "--profile", __file__], "--profile is for --model"),
        (["--geometry", "mixtral-8x7b", "--stock", "grouped_mm, batched"], "--stock: 'batched' is none of eager, "),
    ],
)
def test_wrong_options(arguments, message):
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.output


def test_without_transformers_the_command_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b"])
    assert done.exit_code == 1
    assert "pip install 'sere-compile[hf]'" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_command_says_so():
    done = CliRunner().invoke(main, ["bench", "--geometry", "mixtral-8x7b"])
    assert done.exit_code == 1
    assert "needs a CUDA device" in done.output


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_geometries_are_what_transformers_builds(name):
    """The layer shapes that bytes are counted with are those of the model, on no device."""
    from transformers import AutoModelForCausalLM

    from sere_compile.benchmark.subject import find_blocks

    geometry = GEOMETRIES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry.config(2), dtype=torch.bfloat16)
    block = list(find_blocks(model))[-1]
    assert (block.experts, block.top_k) == (geometry.experts, geometry.top_k)
    assert block.expert_bytes == geometry.expert_elements * 2
    (gate_up,) = (p for n, p in block.module.named_parameters() if n.endswith("gate_up_proj"))
    wide, deep = 2 * geometry.inner, geometry.hidden
    assert gate_up.shape == (geometry.experts, *((deep, wide) if geometry.transposed else (wide, deep)))


def test_no_variant_twice():
    """Where S exceeds K it is K, once: Mixtral's K is 2."""
    names = [v.name for v in variant.all_variants((8, 2, 1), 2, ("grouped_mm",))]
    assert names == ["eager", "inductor grouped_mm", "sere S=K", "sere S=1"]


def test_the_launch_of_a_graph_is_not_timed(monkeypatch):
    """The device waits before the first event of a graph; a function is timed with what the host does."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.02

    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("wait"), raising=False)
    times = time_in_turn({"graph": Graph(), "eager": lambda: log.append("call")}, calls=2, rounds=2, warmup=0)
    assert log == ["wait", "event", "replay", "event", "event", "call", "event"] * 2
    assert times["graph"].median == pytest.approx(10.0)
