"""What a step is expected to take: lines through measurements, refusals of files that have none, and bytes."""

from __future__ import annotations

import json

import pytest

from sere_compile import EvaluationError
from sere_compile.benchmark.expected_speed import StepTimes, speedup_by_bytes
from sere_compile.benchmark.timing import Timing

from ..evaluation.rows import row
from ..tiny_models import build
from .made import results_of, results_row


def step(active, microseconds, batch=16, **others):
    timing = Timing(microseconds, 0.0, 0.0)
    return results_row(what="decode step", batch=batch, timing=timing, active=active, **others)


def stock(microseconds, name="inductor grouped_mm", **others):
    return step(20.0, microseconds, variant=name, ours=False, **others)


# 1 ms and 0.1 ms per expert, exactly.
LINE = [step(20.0, 3000.0), step(10.0, 2000.0), step(5.0, 1500.0)]


@pytest.fixture
def read(tmp_path):
    """The times of rows, through a file."""

    def from_rows(rows, sizes=(16,), gates=()):
        results = results_of(list(rows))
        results.gates = [list(gate) for gate in gates]
        results.save(tmp_path / "bench.json")
        return StepTimes.read(tmp_path / "bench.json", sizes)

    return from_rows


def test_a_row_is_expected_on_the_line(read):
    """At its own active experts, which no run of `sere bench` need have had; stock is the fastest that was measured."""
    times = read([*LINE, stock(4200.0), stock(9000.0, "eager"), step(7.0, 1.0, batch=8), results_row(batch=16)])
    found = times.of(row(16, 8.0, 0.01, active_before=16.0))
    assert found.step_ms == pytest.approx(1.8)
    assert found.speedup == pytest.approx(2.6 / 1.8)
    assert found.over_stock == pytest.approx(4.2 / 1.8)
    assert read(LINE).of(row(16, 8.0, 0.01)).over_stock is None


def test_where_times_come_from_is_said(read):
    rows = [row(16, 8.0, 0.01, active_before=16.0)]
    said = read([*LINE, stock(4200.0)]).said("folder/tiny", rows)
    assert said == [
        "expected time: decode steps of tiny with re-routing, whatever the rule, measured by sere bench on no machine "
        "(bench.json)",
        "decode batch 16: 1 ms + 0.1 ms per active expert (measured with 5.0, 10.0, 20.0; off by at most 0%); "
        "stock (inductor grouped_mm): 4.2 ms",
    ]
    assert read(LINE).said("another", rows)[1].startswith("that is tiny, not another: ")


def test_what_was_not_measured_is_said_to_be_extrapolated(read):
    few = read(LINE).said("tiny", [row(16, 4.0, 0.01, active_before=20.1), row(16, 4.95, 0.0, active_before=20.1)])
    assert few[-1] == "decode batch 16: times with 4.0 active experts are extrapolated"


def test_the_line_is_as_near_as_it_can_be(read):
    """Least squares, and how far off it is."""
    line = read([step(1.0, 1000.0), step(2.0, 2600.0), step(3.0, 3000.0)]).lines[16]
    assert (line.per_expert, line.fixed) == (pytest.approx(1.0), pytest.approx(0.2))
    assert line.deviation == pytest.approx(0.2)
    assert "off by at most 20%), too far: measure again on a quiet machine" in str(line)


def test_two_dispatches_are_two_lines(read):
    """On a CPU `sere bench` times ours twice: expected is what default options give, and the other line is said."""
    own = [step(count, 500.0 + 50 * count, variant=f"sere S={count:.0f}, lower_experts") for count in (20.0, 5.0)]
    times = read([*LINE, *own])
    assert times.lines[16].time(8.0) == pytest.approx(1.8)
    assert times.lines[16].own.time(8.0) == pytest.approx(0.9)
    assert times.said("tiny", [])[-1] == (
        'decode batch 16 with lower_experts="always", which is no default: 0.5 ms + 0.05 ms per active expert '
        "(measured with 5.0, 20.0; off by at most 0%)"
    )


def test_experts_that_cost_no_time_gain_none(read):
    """Rather than that more of them were faster, which is noise."""
    times = read([step(20.0, 2000.0), step(5.0, 3000.0)])
    assert (times.lines[16].fixed, times.lines[16].per_expert) == (2.5, 0.0)
    assert times.of(row(16, 8.0, 0.01)).speedup == 1.0
    assert "so re-routing gains no time here" in str(times.lines[16])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([results_row(batch=16)], r"bench\.json has no decode steps: sere bench --what decode --json measures them"),
        (
            [step(20.0, 3.0, batch=8), step(5.0, 3.0, batch=32)],
            r"has decode steps at batch 8, 32, but not at 16: sere ",
        ),
        (LINE[:1], r"with 20\.0 active experts only, and a line needs two numbers of .* --select-top-k K,2,1 --json"),
        ([step(20.0, 3.0), step(20.1, 9.0)], "active experts only, and a line needs two numbers"),
        ([stock(3.0), stock(4.0, "eager")], "at batch 16, re-routing was timed with no S, and a line needs two"),
        ([*LINE, stock(3.0, error=0.5)], "at batch 16 the output of inductor grouped_mm was wrong"),
    ],
)
def test_measurements_that_give_no_line(read, rows, message):
    with pytest.raises(EvaluationError, match=message):
        read(rows)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"rows": [{}]}', b'{"rows": []}', b'{"rows": 3}'])
def test_another_file(tmp_path, content):
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"b\.json is not a file that `sere bench --json` wrote: "):
        StepTimes.read(tmp_path / "b.json", [16])


def test_another_model(read):
    """As many layers, E and K as were measured."""
    model = build("qwen3_moe")
    e, k = model.config.num_experts, model.config.num_experts_per_tok
    read(LINE, gates=[(e, k)] * 2).check(model)
    for gates, said in (
        ([(e, k)] * 3, f"3 layers of {e} experts, top-{k}"),
        ([(e, k), (e, k + 1)], f"1 layers of {e} experts, top-{k}, 1 layers of {e} experts, top-{k + 1}"),
    ):
        with pytest.raises(EvaluationError, match=f"another model, tiny, with {said}; this one has 2 layers of {e}"):
            read(LINE, gates=gates).check(model)
    del model.model.layers
    with pytest.raises(EvaluationError, match="this one has no experts that sere bench finds"):
        read(LINE, gates=[(e, k)]).check(model)


def test_files_of_an_earlier_version_are_read(read, tmp_path):
    """They do not say of which experts they are, so that no times follow."""
    read(LINE)
    data = json.loads((tmp_path / "bench.json").read_text())
    del data["gates"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match=r"old\.json does not say what experts its model has"):
        StepTimes.read(tmp_path / "old.json", [16]).check(build("qwen3_moe"))


def test_bytes_that_are_read():
    """Half of the experts' bytes are a part of all; models whose experts are apart have none."""
    model = build("qwen3_moe")
    speedup = speedup_by_bytes(model)
    experts = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
    rest = sum(p.nbytes for n, p in model.named_parameters() if "experts" not in n)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        rest -= model.get_input_embeddings().weight.nbytes
    count = model.config.num_experts
    made = row(4, count / 2, 0.0, active_before=float(count))
    assert speedup(made) == pytest.approx((rest + experts) / (rest + experts / 2))
    del model.model.layers
    assert speedup_by_bytes(model) is None
