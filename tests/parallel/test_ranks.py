"""Two processes with torchrun and gloo: what each layout gives, against one process and against the same without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..tiny_models import build

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).parents[2]
# Ranks sum in another order than one process: float32, logits of the order of 10.
ROUNDING = 2e-5
ALIKE = ("tp", "tp+ep", "tp+ep, all_reduce")
REROUTED = [
    *(f"{layout}, {how}" for layout in ALIKE for how in ("compiled", "eager")),
    "tp+ep, all_to_all, eager", "ep, eager", "fsdp, compiled", "fsdp, eager", "fully_shard", "block, fully_shard",
    "block, router", "block, output", "tp+ep, compiled, one token", "tp+ep, eager, one token",
    "tp+ep, all_to_all, eager, one token",
]  # fmt: skip
# Ranks that have the same tokens.
SHARED = [name for name in REROUTED if not name.startswith(("ep", "fsdp", "fully"))]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What both ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    build("qwen3_moe").save_pretrained(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.parallel.program", str(folder / "model"), str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", REROUTED)
def test_a_layout_gives_what_one_process_gives(ranks, name):
    """S = K changes no bit of it; S = 1 is one process's, and changes something."""
    for rank in ranks:
        found = rank[name]
        assert "raised" not in found, found
        assert found["identity"], name
        assert found["rerouted"] <= ROUNDING
        assert found["changes"] > 1e-3
        assert found["said"] == []


def test_a_router_that_is_a_distributed_tensor_finds_its_matrix(ranks):
    assert [rank["block, router"]["weight"] for rank in ranks] == ["DTensor"] * 2


@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_tokens_choose_the_same_experts(ranks, name):
    first, second = (rank[name]["ids"] for rank in ranks)
    assert first == second is not None


@pytest.mark.parametrize("name", ["ep, eager", "fsdp, compiled", "fully_shard"])
def test_ranks_with_tokens_of_their_own_choose_for_themselves(ranks, name):
    """Ragged: 6 tokens and 3."""
    first, second = (rank[name]["ids"] for rank in ranks)
    assert None not in (first, second)
    assert first != second


@pytest.mark.parametrize("name", ["tp+ep, all_to_all, compiled", "ep, compiled"])
def test_an_exchange_outside_the_graph_is_refused_in_words(ranks, name):
    """A trial of it would wait for the other rank; the layout runs unchanged."""
    for rank in ranks:
        assert rank[name]["changes"] == 0
        (said,) = rank[name]["said"]
        assert "experts.gate_up_proj is spread over ranks" in said
        assert "register_experts" in said


@pytest.mark.parametrize("name", ["tp", "tp+ep"])
def test_one_rank_does_not_measure_experts_that_it_holds_a_part_of(ranks, name):
    for rank in ranks:
        compiled, eager = rank[f"{name}, compiled, no profile"], rank[f"{name}, eager, no profile"]
        assert compiled["changes"] == 0
        assert all("attach a profile to every rank's model" in said for said in compiled["said"])
        assert len(compiled["said"]) == 2
        assert eager["raised"].startswith("ProbeError: the experts of model.layers.0.mlp.gate.weight cannot be probed")
