"""Results: speed-ups, table and file."""

import functools

import pytest

from sere_compile import OutputError
from sere_compile.benchmark import moe_layer, variant
from sere_compile.benchmark.result import Results

from .made import results_of, results_row


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


def test_the_table_has_the_floor():
    """Bytes at the copy bandwidth of the same run."""
    table = results_of([results_row(active=3.5, bytes_read=2e9, bandwidth_share=0.5)]).table()
    assert "| 3.5 | 2000 | 2000 | 50% |" in table


def test_results_survive_json(tmp_path):
    results = results_of([results_row(), results_row(ours=False, variant="eager", active=3.5)])
    results.save(tmp_path / "bench.json")
    assert Results.load(tmp_path / "bench.json") == results


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
