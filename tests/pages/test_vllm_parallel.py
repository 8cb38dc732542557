"""What `benchmarks/vllm_parallel.py` makes of ranks' results; the engines run on two GPUs, or by `check --cpu`."""

from __future__ import annotations

import json

import pytest

from benchmarks import vllm_parallel as parallel

PROMPTS = [[i] * 3 for i in range(8)]
ONE = {"tokens": [[[i] * n for i, n in enumerate(parallel.LENGTHS)], [[9] * 8] * 5, [[7] * 4] * 3]}


def rank(tokens, ids="a", matrices="m", counts=1):
    layer = {"calls": counts, "tokens": 8, "slots": 32, "slots_changed": 9, "active_before": 12, "active_after": 4}
    return {"tokens": [tokens], "start_s": 1.0, "ids": [ids, ids], "matrices": [matrices], "active": [12.0, 4.0],
            "counts": [[layer], [layer]]}  # fmt: skip


def test_requests_are_divided_among_the_engines_of_a_layout():
    (whole,) = parallel.batches_of("one", PROMPTS)
    assert [len(batch) for batch in whole] == [8, 5, 3]
    parts = parallel.batches_of("dp+ep", PROMPTS)
    assert [len(rank) for rank in parts] == [1, 1]
    assert parts[0][0] + parts[1][0] == whole[0]
    assert [len(batch) for (batch,) in [parallel.batches_of("tp", PROMPTS)[0]]] == [8]


def test_ranks_that_decide_together_are_held_to_one_rank_with_all_requests():
    ranks = [rank(ONE["tokens"][0][:5]), rank(ONE["tokens"][0][5:])]
    row = parallel.judge("dp+ep", "S = 1, all_ranks", ranks, ONE, "float32")
    assert row["good"]
    assert row["active"] == [12.0, 4.0]
    assert not parallel.judge("dp+ep", "S = 1", ranks, ONE, "float32")["good"]


def test_ranks_on_their_own_are_held_to_one_rank_with_their_requests():
    ranks = [rank(ONE["tokens"][1]), rank(ONE["tokens"][2])]
    assert parallel.judge("dp+ep", "S = 1", ranks, ONE, "float32")["good"]


@pytest.mark.parametrize("wrong", ["ids", "matrices", "counts", "tokens"])
def test_ranks_that_differ_are_found(wrong):
    right = rank(ONE["tokens"][0])
    assert parallel.judge("tp", "S = 1", [right], ONE, "float32")["good"]
    if wrong == "tokens":
        right["tokens"] = [[[0] * n for n in parallel.LENGTHS]]
    elif wrong == "counts":
        right["counts"][1] = [{**right["counts"][1][0], "active_after": 5}]
    else:
        right[wrong] = ["a", "b"]
    assert not parallel.judge("tp", "S = 1", [right], ONE, "float32")["good"]


def test_workers_of_a_sequence_parallel_engine_have_rows_of_their_own():
    """And count the same active experts."""
    ranks = [rank(ONE["tokens"][0][:5]), rank(ONE["tokens"][0][5:])]
    ranks[0]["counts"][1] = [{**ranks[0]["counts"][1][0], "tokens": 3}]
    assert parallel.judge("dp+tp+ep", "S = 1, all_ranks", ranks, ONE, "float32")["good"]
    ranks[0]["counts"][1] = [{**ranks[0]["counts"][1][0], "active_after": 5}]
    assert not parallel.judge("dp+tp+ep", "S = 1, all_ranks", ranks, ONE, "float32")["good"]


def test_processes_of_an_engine_find_each_other():
    setting = parallel.Setting(None, 0.0, 1.0, cpu=False)
    first, second = setting.variables(2)
    assert (first["VLLM_DP_RANK"], second["VLLM_DP_RANK"]) == ("0", "1")
    assert first["VLLM_DP_MASTER_PORT"] == second["VLLM_DP_MASTER_PORT"]
    assert first["NCCL_NVLS_ENABLE"] == "0"
    assert "VLLM_DP_SIZE" not in setting.variables(1)[0]


def test_rows_are_written_as_they_come(tmp_path):
    setting = parallel.Setting(None, 0.0, 1.0, cpu=False, to=tmp_path / "out.json")
    setting.keep("tp", "S = 1", {"good": True})
    assert json.loads(setting.to.read_text()) == {"tp, S = 1": {"good": True}}


def test_an_engine_is_left_out_when_time_is_over(capsys):
    setting = parallel.Setting(None, 0.0, 100.0, cpu=False)
    assert setting.engine("tp", "stock", {"kind": "time"}) is None
    assert setting.cut_off
    assert "tp, stock: left out, no time" in capsys.readouterr().out
