"""`extract_dispatch`: the dispatch as a function of (ids, weights, ...) that anyone can call."""

import dataclasses
import types

import pytest
import torch
from torch import nn

from sere_compile.passes import DispatchRegion, Skip, SkipReason, UseKind, extract_dispatch, find_gates
from sere_compile.passes.extract_dispatch import (
    _closure,
    _is_size_of_input,
    _one_row_per_token,
    _role,
    _varies_by_token,
    find_exit,
)
from sere_compile.passes.graph import nodes

from .graph.written import Written
from .moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    SUMS_DUPLICATES,
    TOKENS,
    TOP_K,
    TRACERS,
    Block,
    Grouped,
    Indexed,
    from_dynamo,
    from_export,
    one_gate,
    rows,
    weighted_sum,
)

# The loop over `where(ids == e)` has sizes that only a run knows; it is tried on its own below.
BLOCKS = [block for block in (*SUMS_DUPLICATES, *DUPLICATE_UNSAFE) if block.__name__ != "IndexPut"]


class InsideModel(nn.Module):
    """A block between other layers, so that its hidden states are computed and its output goes on."""

    def __init__(self, block):
        super().__init__()
        self.before, self.block, self.after = nn.Linear(HIDDEN, HIDDEN), block, nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        hidden = self.before(x)
        return self.after(hidden + self.block(hidden))


def region_of(graph):
    region = extract_dispatch(one_gate(graph))
    assert isinstance(region, DispatchRegion), region
    return region


def state(graph, node):
    """The model's tensor behind a node of the graph."""
    if node.op == "get_attr":
        owner, _, name = node.target.rpartition(".")
        return getattr(graph.get_submodule(owner), name)
    return graph.captured_inputs[list(graph.graph.find_nodes(op="placeholder")).index(node)]


def call(graph, region, ids, weights, x):
    """Run a region on hidden states x; slot rows, where it reads such, are repeated tokens."""
    activations = []
    for node in region.activations:
        repeats = nodes.shape(node)[0] // x.shape[0]
        activations.append(x.repeat_interleave(repeats, 0))
    with torch.no_grad():
        return region.module(ids, weights, *(state(graph, node) for node in region.inputs), *activations)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
class TestRegion:
    def test_is_the_dispatch(self, block, tracer):
        """On ids, weights and hidden states of one's own the region gives what the block's dispatch does."""
        module = block()
        graph = TRACERS[tracer](InsideModel(module), rows())
        region = region_of(graph)
        assert len(region.activations) == 1
        x = rows(seed=5)
        ids, weights = module.route(x)
        torch.testing.assert_close(call(graph, region, ids, weights, x), module.dispatch(x, ids, weights))

    def test_counterfactual_routing(self, block, tracer):
        """All weight on one slot shows that slot's expert, for every expert."""
        module = block()
        graph = TRACERS[tracer](InsideModel(module), rows())
        region, x = region_of(graph), rows(seed=6)
        weights = torch.tensor([[1.0, 0.0, 0.0]]).expand(x.shape[0], -1).contiguous()
        for number in range(EXPERTS):
            ids = (torch.arange(TOP_K) + number).remainder(EXPERTS).expand(x.shape[0], -1).contiguous()
            torch.testing.assert_close(call(graph, region, ids, weights, x), module.expert(number, x))

    def test_leaves_the_graph_alone(self, block, tracer):
        """The region is a copy."""
        graph = TRACERS[tracer](InsideModel(block()), rows())
        before = str(graph.graph)
        region = region_of(graph)
        region.module.graph.lint()
        assert str(graph.graph) == before
        gate = one_gate(graph)
        assert (region.ids, region.weights) == (gate.ids, gate.weights)


class TestInputs:
    @pytest.mark.parametrize("tracer", TRACERS)
    def test_hidden_states_as_graph_input(self, tracer):
        """A block traced alone: its input is an activation, its weights are inputs."""
        region = region_of(TRACERS[tracer](Indexed(), rows()))
        assert [nodes.shape(node) for node in region.inputs] == [(EXPERTS, HIDDEN, HIDDEN)]
        assert len(region.activations) == 1

    def test_dynamic_batch(self):
        """Tokens may be a symbol."""
        module = Indexed()
        graph = from_export(module, rows(), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
        region, x = region_of(graph), rows(4, seed=7)
        ids, weights = module.route(x)
        with torch.no_grad():
            got = region.module(ids, weights, *(state(graph, node) for node in region.inputs), x)
        torch.testing.assert_close(got, module.dispatch(x, ids, weights))

    @pytest.mark.parametrize("trace", [from_dynamo, from_export])
    def test_writes_through_views_belong_to_it(self, trace):
        """An output that is filled through a view is filled in the region too."""

        class Filled(Block):
            def dispatch(self, x, ids, weights):
                out = torch.zeros(x.shape[0], HIDDEN)
                for slot in range(self.top_k):
                    y = torch.tanh(torch.bmm(x[:, None], self.experts[ids[:, slot]])).squeeze(1)
                    out.view(-1, HIDDEN).add_(weights[:, slot, None] * y)
                return out * 1.0

        module, x = Filled(), rows(seed=8)
        graph = trace(InsideModel(module), rows())
        ids, weights = module.route(x)
        torch.testing.assert_close(
            call(graph, region_of(graph), ids, weights, x), weighted_sum(module, x, ids, weights)
        )


class TestCannot:
    def test_ids_leave_the_graph(self):
        """Code behind a graph break cannot be cut out."""

        class Router(Block):
            def forward(self, x):
                return self.route(x)

        graph = from_dynamo(Router(), rows())
        gate = find_gates(graph, lambda weight, experts: True).gates[0]
        assert str(extract_dispatch(gate)).startswith("its dispatch is outside the graph (ids at moe_modules.py:")

    def test_weights_unknown(self):
        """The reason is that of the weights."""

        class Unweighted(Grouped):
            def route(self, x):
                ids = torch.topk(self.scores(x), self.top_k)[1]
                return ids, torch.full(ids.shape, 0.5)

        reason = str(extract_dispatch(one_gate(from_export(Unweighted(), rows()))))
        assert reason.startswith("its routing weights could not be determined (its dispatch needs merged duplicates")

    def test_nothing_with_a_row_for_each_token(self):
        """A dispatch that ends in one number for the batch."""

        class Summed(Indexed):
            def dispatch(self, x, ids, weights):
                y = torch.tanh(x)[:, None, None, :] @ self.experts[ids]
                return (y.squeeze(2) * weights[..., None]).sum((0, 1))

        reason = str(extract_dispatch(one_gate(from_export(Summed(), rows()))))
        assert (
            reason
            == "no single tensor with one row per token follows from its dispatch (its dispatch: indexed weights)"
        )

    def test_reads_computed_integers(self):
        """Integers that only a run knows, such as positions, cannot be made up."""

        class Shifted(Indexed):
            def forward(self, x):
                hidden = x * 2
                ids, weights = self.route(hidden)
                y = hidden[:, None, None, :] @ self.experts[(ids + x.argmax(-1, keepdim=True)) % EXPERTS]
                return (y.squeeze(2) * weights[..., None]).sum(1)

        reason = str(extract_dispatch(one_gate(from_export(Shifted(), rows()))))
        assert reason == (
            "its dispatch reads other tensors than ids, weights and hidden states (argmax, which is not floating-point)"
        )


class SlicedLoop(Indexed):
    """A loop that takes each expert's part of the stack."""

    def of(self, number):
        return self.experts[number]

    def dispatch(self, x, ids, weights):
        y = torch.zeros_like(x)
        for number in range(EXPERTS):
            mine = ids == number
            weight = weights.gather(1, mine.int().argmax(-1, keepdim=True))
            y = y + torch.where(mine.any(-1, keepdim=True), weight * torch.tanh(x @ self.of(number)), 0.0)
        return y


class LoopOnBase(SlicedLoop):
    """Experts that differ from a common base."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(8)))

    def of(self, number):
        return self.base + self.experts[number]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("module", [SlicedLoop, LoopOnBase], ids=lambda m: m.__name__)
def test_what_is_computed_of_parameters_alone_is_no_activation(module, tracer):
    """`w[e]` and `base + w` are part of the dispatch: made up, they would be other experts' weights."""
    region = extract_dispatch(one_gate(TRACERS[tracer](module(), rows())))
    assert not isinstance(region, Skip), region
    sizes = {tuple(node.meta.get("example_value", node.meta.get("val")).shape) for node in region.activations}
    assert sizes == {(TOKENS, HIDDEN)}


class Numbered(Grouped):
    """Slots are numbered by arithmetic with the number of tokens."""

    def dispatch(self, x, ids, weights):
        slots = torch.arange(x.shape[0] * self.top_k * 2)[::2]
        return super().dispatch(x, ids, weights * (slots.view(weights.shape) >= 0))


def test_arithmetic_with_a_free_size_is_part_of_the_region():
    """What reads a size off a graph input comes from outside, and what is computed of sizes does not."""
    graph = from_dynamo(Numbered(), rows(), dynamic=True)
    region = region_of(graph)
    assert any(isinstance(nodes.value(node), torch.SymInt) for node in region.inputs)
    assert {node.op for node in region.inputs} <= {"placeholder", "get_attr"}


class TestByHand:
    @pytest.mark.parametrize(
        ("sizes", "ids", "one"),
        [
            ((4, 6), (4, 3), True),
            ((4, 1), (4, 3), True),
            ((4,), (4, 3), False),
            ((5, 6), (4, 3), False),
            ((6, 4), (4, 6), False),
            ((2, 2, 6), (4, 3), False),
            ((2, 2, 6), (2, 2, 3), True),
            ((2, 3, 6), (2, 2, 3), False),
        ],
    )
    def test_one_row_per_token(self, sizes, ids, one):
        w = Written()
        read = w.input(torch.zeros(ids).long())
        assert _one_row_per_token(w.given(*sizes), read) is one
        assert not _one_row_per_token(w.input(torch.zeros(sizes).long()), read)
        assert not _one_row_per_token(w.graph.placeholder("unknown"), read)
        assert not _one_row_per_token(w.given(*sizes), w.graph.placeholder("unknown"))

    def test_what_is_computed_up_to_a_node(self):
        w = Written()
        first = w.call(torch.exp, w.given(2))
        memory = w.call(torch.zeros, 2)
        write = w.call("add_", memory, first)
        read, late = w.call(torch.neg, memory), w.call(torch.neg, first)
        assert _closure([first], read) == {first, write, read}
        assert _closure([first], late) == {first, write, read, late}

    def test_inputs_with_rows_for_tokens(self):
        """No parameter, no whole numbers, and as many rows as there are tokens in all."""
        w = Written()
        ids = w.input(torch.zeros(4, 2).long())
        assert _varies_by_token(w.given(4, 6), ids)
        assert _varies_by_token(w.given(2, 2, 6), ids)
        assert not _varies_by_token(w.given(5, 6), ids)
        assert not _varies_by_token(w.weight(4, 6), ids)
        assert not _varies_by_token(w.input(torch.zeros(4, 6).long()), ids)
        assert not _varies_by_token(w.input(7), ids)

    def test_roles(self):
        """What is behind the ids is computed, with what rearranges rows and what is made of nothing or of weights."""
        w = Written()
        x, ids, weight = w.given(4, 6), w.input(torch.zeros(4, 2).long()), w.weight(8, 6)
        gate = types.SimpleNamespace(ids=ids)
        behind, beside = w.call(torch.exp, x), w.call(torch.sin, x)
        roles = {
            x: "activation",
            weight: "input",
            w.input(3): "input",
            behind: "inside",
            beside: "activation",
            w.call("view", beside, 2, 2, 6): "inside",
            w.call("repeat_interleave", beside, 2, 0): "inside",
            w.call(torch.arange, 4): "inside",
            w.call(torch.exp, weight): "inside",
            w.mul(weight, w.given(6)): "activation",
            w.call("size", x, 0): "inside",
        }
        assert {node: _role(node, gate, {behind}) for node in roles} == roles

    def test_free_sizes(self):
        """Read off an input that is no weight."""
        graph = from_dynamo(Numbered(), rows(), dynamic=True).graph
        inputs = [node for node in graph.find_nodes(op="placeholder") if nodes.is_tensor(node)]
        [x] = [node for node in inputs if isinstance(nodes.value(node).shape[0], torch.SymInt)]
        with graph.inserting_before(graph.output_node()):
            read, fixed = (graph.call_method("size", (x, dim)) for dim in (0, 1))
            behind = graph.call_method("size", (graph.call_function(torch.exp, (x,)), 0))
        value = nodes.value(x)
        read.meta["example_value"], fixed.meta["example_value"] = value.shape[0], int(value.shape[1])
        behind.meta["example_value"] = value.shape[0]
        assert _is_size_of_input(read)
        assert not _is_size_of_input(fixed)
        assert not _is_size_of_input(behind)
        assert not _is_size_of_input(x)
        w = Written()
        weight = w.weight(2, 3)
        size = w.graph.call_method("size", (weight, 0))
        size.meta["example_value"] = value.shape[0]
        assert not _is_size_of_input(size)

    def test_without_weights_or_a_dispatch_there_is_no_exit(self):
        gate = one_gate(from_export(Indexed(), rows()))
        assert find_exit(gate) is not None
        assert find_exit(dataclasses.replace(gate, weights=None)) is None
        leaving = tuple(dataclasses.replace(use, kind=UseKind.LEAVES) for use in gate.uses)
        gate = dataclasses.replace(gate, uses=leaving)
        assert find_exit(gate) is None
        assert extract_dispatch(gate).reason is SkipReason.DISPATCH_OUTSIDE
