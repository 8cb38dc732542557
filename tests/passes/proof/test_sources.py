"""What the nodes of a region depend on."""

import types

import pytest
import torch
from torch import nn

from sere_compile.passes.graph import nodes
from sere_compile.passes.proof.sources import _contracts, experts_meet_hidden, trace_sources

from ..graph.written import Written
from ..moe_modules import EXPERTS, HIDDEN, TOKENS, TOP_K, BiasCorrected, ColumnLoop, ExpertLoop, Indexed, ScatterCombine
from .regions import leaves_of, region_of, told
from .test_prover import Codebook, Columns, OneOutput, Prompts, Values


class Scaled(Indexed):
    """A number per expert scales the routing weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(EXPERTS))

    def route(self, x):
        ids, weights = super().route(x)
        return ids, weights * self.scale[ids]


def test_the_router_s_state():
    """It is the scale, not the experts."""
    region = region_of(Scaled())
    sources = trace_sources(region)
    assert [tuple(node.meta["example_value"].shape) for node in sources.router] == [(EXPERTS,)]
    assert len(sources.state[region.ends[0]]) == 2
    assert region.ends[0] in sources.hidden


def test_a_bias_of_the_selection_is_the_router_s():
    region = region_of(BiasCorrected())
    [bias] = [node for node, shape in leaves_of(region, "state").items() if shape == (EXPERTS,)]
    assert trace_sources(region).router == {bias}


def test_ids_are_no_scores():
    """What they choose depends on hidden states by the experts alone; weights are scores, and no hidden states."""
    region = region_of(Indexed())
    sources = trace_sources(region)
    gate, exit_node = region.gate, region.ends[0]
    [logits], [hidden], [experts] = (list(leaves_of(region, kind)) for kind in ("logits", "hidden", "state"))
    assert logits in sources.scored - sources.hidden
    assert hidden in sources.hidden - sources.scored
    assert gate.ids not in sources.scored | sources.hidden
    assert gate.weights in sources.scored - sources.hidden
    assert exit_node in sources.scored & sources.hidden
    assert sources.state[experts] == {experts}
    assert sources.state[exit_node] == {experts}
    assert sources.state[gate.weights] == sources.state[logits] == sources.state[hidden] == frozenset()
    picked = next(use.consumer for use in gate.dispatch_uses)
    assert sources.state[picked] == {experts}
    assert picked not in sources.scored | sources.hidden
    assert {logits, gate.weights, exit_node} <= sources.weighed
    assert sources.weighed.isdisjoint({gate.ids, picked, hidden, experts})


class Sparing(Indexed):
    """Slots that weigh little are left out by a mask."""

    def dispatch(self, x, ids, weights):
        return super().dispatch(x, ids, torch.where(weights > 0.2, weights, 0.0))


def test_a_mask_of_weights_is_no_score_but_weighed():
    region = region_of(Sparing())
    sources = trace_sources(region)
    [mask] = [node for node in region.graph.nodes if nodes.kind(node) == "gt"]
    assert mask in sources.weighed
    assert mask not in sources.scored


class IntoAView(ColumnLoop):
    """The table of weights is written through a view of it."""

    def dispatch(self, x, ids, weights):
        table = torch.zeros(TOKENS, EXPERTS)
        table.view(TOKENS, EXPERTS).scatter_(1, ids, weights)
        y = torch.zeros_like(x)
        for number in range(EXPERTS):
            y = y + table[:, number : number + 1] * self.expert(number, x)
        return y


def test_what_is_written_depends_on_what_is_written_to_it():
    region = region_of(IntoAView())
    sources = trace_sources(region)
    made = [node for node in region.graph.nodes if node.op == "call_function" and not node.all_input_nodes]
    [table] = [node for node in made if tuple(nodes.shape(node)) == (TOKENS, EXPERTS)]
    assert table in sources.scored
    assert table not in sources.hidden
    assert sources.state[table] == frozenset()
    assert region.ends[0] in sources.scored & sources.hidden
    assert len(sources.state[region.ends[0]]) == EXPERTS


MEET = (Indexed, ScatterCombine, ExpertLoop, Columns, OneOutput)
ONLY_FETCHED = (Values, Prompts, Codebook)


@pytest.mark.parametrize("module", [*MEET, *ONLY_FETCHED], ids=lambda m: m.__name__)
def test_experts_are_multiplied_with_hidden_states(module):
    """What is fetched, weighted and added, masked or scaled is no expert."""
    region = region_of(module())
    found, sources = told(region)
    assert found
    assert experts_meet_hidden(region, sources, found.tensors) is (module in MEET)
    assert not experts_meet_hidden(region, sources, set())


class Noisy(Indexed):
    """Scores with noise whose size a second weight gives; hidden states with noise as well."""

    def __init__(self):
        super().__init__()
        self.second = nn.Parameter(torch.rand(EXPERTS, HIDDEN))

    def route(self, x):
        logits = torch.nn.functional.linear(x, self.router)
        noisy = logits + torch.randn_like(logits) * torch.nn.functional.linear(x, self.second)
        weights, ids = noisy.softmax(-1).topk(TOP_K)
        return ids, weights

    def forward(self, x):
        return super().forward(x * torch.rand_like(x))


def test_noise_of_the_scores_is_no_hidden_state():
    """And noise of the hidden states leaves them what they are: experts act on them."""
    region = region_of(Noisy())
    sources = trace_sources(region)
    assert region.gate.ids not in sources.hidden
    assert region.gate.weights in sources.scored - sources.hidden
    [experts] = [node for node, shape in leaves_of(region, "state").items() if len(shape) == 3]
    assert experts_meet_hidden(region, sources, {experts})


class TestProducts:
    """Which operations contract a tensor with hidden states."""

    @pytest.mark.parametrize(
        ("write", "contracts"),
        [
            (lambda w, x, e: w.call(torch.matmul, x, w.given(4, 2)), True),
            (lambda w, x, e: w.call(torch.nn.functional.conv1d, w.given(1, 3, 4), w.given(2, 3, 1)), True),
            (lambda w, x, e: w.call(torch.add, x, e), False),
            (lambda w, x, e: w.mul(x, e), False),
            (lambda w, x, e: summed(w, w.mul(x, e), -1), True),
            (lambda w, x, e: summed(w, w.mul(x, e), 2), True),
            (lambda w, x, e: summed(w, w.mul(x, e), [1, 2]), True),
            (lambda w, x, e: summed(w, w.mul(x, e), [1]), False),
            (lambda w, x, e: summed(w, w.mul(x, e), -2), False),
            (lambda w, x, e: summed(w, w.mul(x, e)), False),
            (lambda w, x, e: summed(w, w.call("view", w.call("double", w.mul(x, e)), 5, 3, 4), -1, views=2), True),
            (lambda w, x, e: summed(w, w.mul(x, e), 0, target=torch.mean), True),
            (lambda w, x, e: summed(w, w.mul(x, e), -1, target=torch.amax), False),
            (lambda w, x, e: w.call(torch.ops.sere.reroute.default, w.ids, w.given(8, 8), 1), False),
            (lambda w, x, e: w.call(torch.ops.sere_tests.opaque_product.default, x), True),
        ],
        ids=[
            "matmul", "conv", "sum", "times", "features", "by number", "both", "slots", "slots from behind", "all",
            "through views", "tokens", "largest", "our own", "unknown",
        ],
    )  # fmt: skip
    def test_what_contracts(self, write, contracts):
        w = Written()
        w.ids = w.input(torch.zeros(5, 3, dtype=torch.int64))
        region = types.SimpleNamespace(gate=types.SimpleNamespace(ids=w.ids))
        assert _contracts(write(w, w.given(5, 3, 4), w.given(5, 3, 4)), region) is contracts


@torch.library.custom_op("sere_tests::opaque_product", mutates_args=())
def opaque_product(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody looks into."""
    return x.clone()


def summed(w, product, *dim, target=torch.sum, views=0):
    """A sum over the product, or views of it; gives the product."""
    w.call(target, product, *dim)
    for _ in range(views):
        product = nodes.operand(product)
    return product
