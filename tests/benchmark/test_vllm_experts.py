"""vLLM's kernel among the experts that are compared: by a function of its signature that computes the same, on a CPU.

tests/integrations/vllm/test_experts.py looks at the signature of the real one, which runs on a GPU.
"""

import enum
import sys
import types

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sere_compile.benchmark import vllm_experts
from sere_compile.benchmark.geometries import GEOMETRIES
from sere_compile.benchmark.moe_layer import bench_moe_layer
from sere_compile.errors import SereError


class MoEActivation(enum.Enum):
    SILU = "silu"


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, activation=None):
    assert topk_ids.dtype == torch.int32
    assert activation is MoEActivation.SILU
    out = torch.zeros_like(hidden_states)
    for slot in range(topk_ids.shape[1]):
        ids = topk_ids[:, slot].long()
        gate, up = torch.einsum("th,tih->ti", hidden_states, w1[ids]).chunk(2, -1)
        rows = torch.einsum("ti,thi->th", torch.nn.functional.silu(gate) * up, w2[ids])
        out += (rows * topk_weights[:, slot, None]).to(out.dtype)
    return out


@pytest.fixture
def installed(monkeypatch):
    """The two names, where vLLM has them."""
    package = "vllm.model_executor.layers.fused_moe"
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", package, f"{package}.fused_moe"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[package].MoEActivation = MoEActivation
    sys.modules[f"{package}.fused_moe"].fused_experts = fused_experts
    yield
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop(vllm_experts.NAME, None)


def test_it_is_a_variant_whose_output_is_compared(installed, subject, without_gpu):
    assert vllm_experts.cannot_run(subject.model) == ""
    vllm_experts.register()
    rows = bench_moe_layer(subject, 5, [1], ["grouped_mm", "vllm"], 1e12)
    [row] = [row for row in rows if row.variant == "inductor vllm"]
    assert not row.ours
    assert row.error <= row.tolerance


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_transposed": True}, "another layout"),
        ({"has_bias": True}, "another layout"),
        ({"is_concatenated": False}, "another layout"),
        ({"has_gate": False}, "another layout"),
        ({"config": types.SimpleNamespace(hidden_act="relu6")}, "an activation that it does not know"),
    ],
    ids=str,
)
def test_experts_that_it_does_not_compute(subject, monkeypatch, changes, reason):
    experts = subject.blocks[0].module.experts
    for name, value in changes.items():
        monkeypatch.setattr(experts, name, value)
    assert reason in vllm_experts.cannot_run(subject.model)


def test_a_gate_of_their_own():
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(GEOMETRIES["gpt-oss-20b"].config(1))
    assert "a gate of its own" in vllm_experts.cannot_run(model)


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe", None)
    with pytest.raises(SereError, match="which cannot be imported"):
        vllm_experts.register()
    assert not vllm_experts.is_at_hand() or torch.cuda.is_available()
