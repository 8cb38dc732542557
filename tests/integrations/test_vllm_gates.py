"""A gate that hands hidden states on to `sere::route`: the same routing, and its own logits where it does not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sere_compile.integrations.vllm import gates, plugin
from sere_compile.integrations.vllm.engine import EngineMismatchError
from sere_compile.integrations.vllm.gates import HeldGate, cannot_hold

from ..ops.cases import exact_product
from .test_vllm_routers import DECODE, EXPERTS, KINDS, PREFILL, FusedTopKRouter, hook, known

HIDDEN = 32


class Gate(nn.Module):
    """As vLLM's: logits, and what else a linear layer returns."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.weight = nn.Parameter(exact_product(1, EXPERTS, HIDDEN, dtype, device)[1], requires_grad=False)
        self.out_dtype, self.products = None, 0

    def forward(self, hidden):
        self.products += 1
        return nn.functional.linear(hidden, self.weight), None


def layer(**changes):
    moe = SimpleNamespace(router_logits_dtype=None, in_dtype=torch.float32)
    return SimpleNamespace(**{"gate": Gate(), "_fse_fuse_gate": False, "moe_config": moe, **changes})


def test_few_tokens_are_held_once():
    gate = Gate()
    held, hidden = HeldGate(gate), torch.randn(3, HIDDEN)
    held.install()
    logits, rest = gate(hidden)
    assert (logits.shape, logits.dtype, rest, gate.products) == ((3, EXPERTS), torch.float32, None, 0)
    assert held.take(logits) is hidden
    assert held.take(logits) is None
    other = gate(hidden)[0].float().clone()
    with pytest.raises(EngineMismatchError, match='"router": "sere"'):
        held.take(other)
    gate.weight = nn.Parameter(gate.weight * 2)
    assert held.weight is gate.weight


def test_other_inputs_are_not_held():
    """Many tokens, none, more dimensions, and where a compiler traces."""
    gate = Gate()
    held = HeldGate(gate)
    held.install()
    for shape in ((33, HIDDEN), (0, HIDDEN), (2, 3, HIDDEN)):
        hidden = torch.randn(shape)
        logits = gate(hidden)[0]
        assert torch.equal(logits, hidden @ gate.weight.T)
        assert held.take(logits) is None
    gate.products = 0
    assert torch.equal(
        torch.compile(gate, backend="eager")(torch.ones(2, HIDDEN))[0], torch.ones(2, HIDDEN) @ gate.weight.T
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"gate": None}, "outside of it"),
        ({"gate": SimpleNamespace(base_layer=Gate(), weight=Gate().weight)}, "LoRA"),
        ({"_fse_fuse_gate": True}, "the shared expert's"),
        ({"gate": SimpleNamespace(weight=None)}, "quantised"),
        ({"gate": nn.Linear(HIDDEN, EXPERTS)}, "has a bias"),
        ({"gate": Gate(torch.bfloat16)}, "weights of torch.bfloat16"),
        ({"gate": SimpleNamespace(weight=torch.ones(2, 2), out_dtype=torch.float16)}, "gives torch.float16"),
    ],
)
def test_which_gates_can_be_held(changes, reason):
    found = cannot_hold(layer(**changes), known(FusedTopKRouter(), "cpu"))
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_routes_hidden_states_as_it_routes_their_logits(kind, device):
    """In decoding and in prefill; the gate makes no product, the router selects nothing."""
    gate, router = Gate(device=device), kind()
    made, before = hook(router, device), hook(kind(), device)
    made.known = before.known = known(router, device)
    assert plugin.hold_gates({"a": made}, {"a": layer(gate=gate)}) == 1
    gate.products = 0
    hidden = exact_product(7, EXPERTS, HIDDEN, torch.float32, device)[0]
    for metadata in (DECODE, PREFILL):
        for one in (made, before):
            one.state.begin(metadata, None)
        weights, ids = router._compute_routing(hidden, gate(hidden)[0])
        wanted = before.router._compute_routing(hidden, hidden @ gate.weight.T)
        assert torch.equal(ids, wanted[1])
        torch.testing.assert_close(weights, wanted[0])
    assert (gate.products, router.asked) == (0, 0)
    many = torch.randn(33, HIDDEN, device=device)
    assert torch.equal(
        router._compute_routing(many, gate(many)[0])[1], before.router._compute_routing(many, many @ gate.weight.T)[1]
    )
    assert gate.products == 1


class Wrong(Gate):
    def forward(self, hidden):
        return (super().forward(hidden)[0] if self.works else hidden).neg(), None


@pytest.mark.parametrize(("works", "reason"), [(True, "other experts for"), (False, "could not be compared")])
def test_a_gate_that_does_something_else_is_left(works, reason, caplog):
    """Each kind of gate is compared once; the log says why it stays."""
    gate = Wrong()
    gate.works = works
    hooks = {name: hook(FusedTopKRouter(), "cpu") for name in ("a", "b", "c")}
    for name in ("a", "b"):
        hooks[name].known = known(FusedTopKRouter(), "cpu")
    with caplog.at_level("INFO", logger="vllm.sere_compile"):
        assert plugin.hold_gates(hooks, {name: layer(gate=gate) for name in hooks}) == 0
    assert gate.products <= 1
    told = [record.getMessage() for record in caplog.records]
    assert [reason in line for line in told] == [True, True, False]
    assert "sere::route does not select there" in told[2]


def test_weights_that_differ_are_told():
    gate = Gate()
    right = known(FusedTopKRouter(), "cpu")

    class Scaled:
        def route(self, logits, matrix, numbers, dtype, real, rerouted, weight=None):
            weights, ids = right.route(logits, matrix, numbers, dtype, real, rerouted, weight)
            return (weights if weight is None else weights * 1.1), ids

    matrix = torch.eye(EXPERTS)
    assert gates.differs(gate, right, matrix, (1, 0.0, 0, 0)) == ""
    assert "apart" in gates.differs(gate, Scaled(), matrix, (1, 0.0, 0, 0))


def test_where_gates_are_held_by_default(monkeypatch):
    """Where the kernel is, and no rank's experts are another's; "gate" asks for it anywhere."""
    cpu, alone = torch.device("cpu"), {"a": SimpleNamespace(meeting=None)}
    assert plugin.gates_are_held("gate", alone, cpu)
    assert not plugin.gates_are_held("auto", alone, cpu)
    monkeypatch.setattr(plugin.nvrtc, "serves", lambda device: True)
    assert plugin.gates_are_held("auto", alone, cpu)
    assert not plugin.gates_are_held("auto", {**alone, "b": SimpleNamespace(meeting=object())}, cpu)
    assert not plugin.gates_are_held("sere", alone, cpu)
    assert not plugin.gates_are_held("vllm", alone, cpu)
