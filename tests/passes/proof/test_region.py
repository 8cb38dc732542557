"""The part of a graph that a proof runs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sere_compile.passes import Skip, SkipReason, find_gates
from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.run_part import plain_number
from sere_compile.passes.proof.region import (
    Leaf,
    _closure,
    _described,
    _held,
    _readers_of,
    cut_region,
    distributed_state,
    hidden_root,
    stand_in,
    whole_numbers_alone,
)

from ..graph.written import Written
from ..moe_modules import (
    DUPLICATE_UNSAFE,
    EXPERTS,
    HIDDEN,
    SUMS_DUPLICATES,
    TOKENS,
    TOP_K,
    Indexed,
    ScatterCombine,
    from_dynamo,
    from_export,
    from_make_fx,
    one_gate,
    rows,
)
from ..test_verify_rewrite import Leaving, weights_of
from .regions import Dispatch, kinds_of, leaves_of, region_of


class Normed(Indexed):
    """The router reads a norm, the experts what is normed."""

    def forward(self, x):
        y = x + 1
        return self.dispatch(y, *self.route(y / y.norm(dim=-1, keepdim=True)))


def test_router_and_experts_read_the_same_hidden_states():
    graph = from_make_fx(Normed(), rows())
    gate = one_gate(graph)
    root = hidden_root(gate.router_input)
    assert root.op == "placeholder"
    region = cut_region(gate, weights_of(graph))
    assert kinds_of(region) == ["hidden", "logits", "state"]
    assert region.ends[0].meta["val"].shape[0] == TOKENS


@pytest.mark.parametrize("module", [*SUMS_DUPLICATES, *DUPLICATE_UNSAFE], ids=lambda m: m.__name__)
def test_every_dispatch_has_a_region(module):
    """Logits, hidden states and the experts go in, and what the block returns comes out."""
    if module.__name__ == "IndexPut":
        pytest.skip("its sizes depend on the ids, which make_fx does not trace")
    region = region_of(module())
    of_experts = ["state"] * (EXPERTS if hasattr(module(), "layers") else 1)
    assert kinds_of(region) == ["hidden", "logits", *of_experts]
    assert set(leaves_of(region, "logits").values()) == {(TOKENS, EXPERTS)}
    assert set(leaves_of(region, "hidden").values()) == {(TOKENS, HIDDEN)}
    [tokens] = region.ends
    assert tuple(nodes.shape(tokens)) in ((TOKENS, HIDDEN), (TOKENS, 1, HIDDEN))  # an einsum is a product and a view
    assert region.written == ()
    region.graph.lint()
    inside = set(region.graph.nodes)
    gate = region.gate
    assert {gate.selection, gate.ids, gate.weights, gate.router_weight, *gate.all_ids, *region.readers} <= inside
    assert {node for use in gate.uses for node in (use.consumer, use.read)} <= inside
    assert region.readers
    assert all(gate.weights in reader.all_input_nodes for reader in region.readers)
    copied = inside - set(region.leaves) - {region.graph.output_node()}
    assert all(region.originals[node].name == node.name for node in copied)


class Unordered(Indexed):
    """A selection that promises no order."""

    def route(self, x):
        values, ids = torch.topk(self.scores(x), self.top_k, dim=-1, sorted=False)
        return ids, values / values.sum(-1, keepdim=True)


def test_a_selection_without_an_order_gets_one():
    """In the region, not in the graph."""
    graph = from_make_fx(Unordered(), rows())
    gate = one_gate(graph)
    region = cut_region(gate, weights_of(graph))
    assert nodes.argument(region.gate.selection, 4, "sorted") is True
    assert nodes.argument(gate.selection, 4, "sorted") is False


class Returned(ScatterCombine):
    """Ids and weights leave beside the tokens."""

    def forward(self, x):
        ids, weights = self.route(x)
        return self.dispatch(x, ids, weights), ids, weights


def test_what_leaves_beside_the_tokens_is_an_end():
    """Something stands in for whoever reads it."""
    region = region_of(Returned())
    tokens, *left = region.ends
    assert nodes.count(tokens) == TOKENS * HIDDEN
    stand_ins = [end for end in left if end.target is stand_in]
    assert {node.args[0] for node in stand_ins} == {region.gate.ids, region.gate.weights}
    assert all(tuple(nodes.shape(node)) == (TOKENS, TOP_K) for node in stand_ins)
    assert all(region.originals[node].op == "output" for node in stand_ins)
    assert set(stand_ins) & set(region.readers)
    assert set(stand_ins) & {use.consumer for use in region.gate.uses}
    assert stand_in(7) == 7


class Remembering(Indexed):
    """Keeps the ids of each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(TOKENS, TOP_K, dtype=torch.int64))

    def dispatch(self, x, ids, weights):
        self.last.copy_(ids)
        return super().dispatch(x, ids, weights)


def test_what_a_dispatch_writes_is_an_end():
    region = region_of(Remembering(), from_dynamo)
    [written] = region.written
    assert written in region.ends[1:]
    assert region.leaves[written].kind == "state"
    assert tuple(nodes.shape(written)) == (TOKENS, TOP_K)


class WithInputs(Indexed):
    """What is computed of another input scales the weights; a mask of the caller's drops rows."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.rand(HIDDEN, 1))
        self.base = nn.Parameter(torch.rand(HIDDEN, HIDDEN))

    def forward(self, x, z, keep):
        ids, weights = self.route(x)
        y = torch.tanh(x[:, None, None, :] @ (self.experts[ids] - 2 * self.base)).squeeze(2)
        return ((y * (weights * (z @ self.other))[..., None]).sum(1)) * keep[:, None]


def test_other_inputs_are_made_up_where_they_are_met():
    """Not the matrix that they were projected by; what is computed of the state alone is computed."""
    region = region_of(WithInputs(), from_make_fx, rows(seed=1), torch.ones(TOKENS, dtype=torch.bool))
    assert (TOKENS, 1) in leaves_of(region, "activation").values()
    assert sorted(leaves_of(region, "state").values()) == [(HIDDEN, HIDDEN), (EXPERTS, HIDDEN, HIDDEN)]
    assert all(leaf.held is not None for leaf in region.leaves.values() if leaf.kind == "state")
    assert all(leaf.held is None for leaf in region.leaves.values() if leaf.kind in ("logits", "hidden"))


class Twice(Indexed):
    def dispatch(self, x, ids, weights):
        return super().dispatch(x, ids, weights) + super().dispatch(2 * x, ids.clone(), weights)


def test_an_attribute_that_is_read_twice_is_one_leaf():
    """make_fx reads it anew for each use."""
    graph = from_make_fx(Twice(), rows())
    assert len(graph.graph.find_nodes(op="get_attr")) >= 2
    assert kinds_of(cut_region(one_gate(graph), weights_of(graph))) == ["hidden", "logits", "state"]


def test_sizes_are_numbers():
    """What the caller knows of them is held."""
    region = region_of(ScatterCombine(), lambda module, x: from_dynamo(module, x, dynamic=True))
    numbers = [plain_number(leaf.held) for leaf in region.leaves.values() if leaf.kind == "number"]
    assert TOKENS in numbers


@pytest.mark.parametrize("trace", [from_dynamo, from_export, from_make_fx])
def test_every_tracer(trace):
    assert kinds_of(region_of(Normed(), trace)) == ["hidden", "logits", "state"]


class OfSome(Indexed):
    def forward(self, x, mask):
        return torch.zeros_like(x).index_put((mask,), super().forward(x[mask]))


def test_tokens_that_the_data_count():
    """Nobody knows how many rows to make up."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = from_dynamo(OfSome(), rows(), torch.ones(TOKENS, dtype=torch.bool))
    refusal = cut_region(one_gate(graph), weights_of(graph))
    assert (refusal.reason, refusal.is_refused_gate) == (SkipReason.UNVERIFIED, True)
    assert refusal.detail.startswith("the numbers in a call tell the shape [u0")
    assert refusal.detail.endswith("so that none can be made up: end the graph ahead of it")


def test_tokens_that_do_not_come_together():
    graph = from_make_fx(Leaving(), rows())
    [gate] = find_gates(graph, lambda weight, experts: True).gates
    refusal = cut_region(gate, weights_of(graph))
    assert isinstance(refusal, Skip)
    assert refusal.reason is SkipReason.UNVERIFIED
    assert refusal.detail == "no tensor with one row per token gathers what its experts give"


def test_weights_that_a_call_brings():
    """Nothing is the model's then; that no tensor gathers what experts give would not be so."""

    class Functional(nn.Module):
        def forward(self, x, router, experts):
            weights, ids = (x @ router.T).softmax(-1).topk(2)
            return torch.einsum("th,tkhf,tk->tf", x, experts[ids], weights)

    given = torch.randn(EXPERTS, HIDDEN), torch.randn(EXPERTS, HIDDEN, HIDDEN)
    graph = from_dynamo(Functional(), rows(), *given)
    [gate] = find_gates(graph).gates
    refusal = cut_region(gate, weights_of(graph))
    assert isinstance(refusal, Skip)
    assert " is an argument of the call, and no parameter or buffer of the model" in refusal.detail


def test_a_router_that_cannot_be_traced():
    graph = from_make_fx(Indexed(), rows())
    gate = one_gate(graph)
    gate.selection.replace_input_with(nodes.operand(gate.selection), next(iter(graph.graph.nodes)))
    refusal = cut_region(gate, weights_of(graph))
    assert isinstance(refusal, Skip)
    assert refusal.detail == "its router could not be traced"


# What the router reads, as a function of (module, x, z), and what is its root: "x", or an operation.
ROOTS = {
    "x itself": (lambda m, x, z: x, "x"),
    "a cast and a view": (lambda m, x, z: x.double().view(-1, HIDDEN).float(), "x"),
    "a norm": (lambda m, x, z: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), "x"),
    "a norm with a scale": (lambda m, x, z: m.scale * (x / x.norm(dim=-1, keepdim=True)), "x"),
    "a product": (lambda m, x, z: torch.tanh(x @ m.mixing), "matmul"),
    "a sum of two inputs": (lambda m, x, z: (x + z) * 2, "add"),
    "far away": (lambda m, x, z: [x := x + 1 for _ in range(60)][-1], "add"),
    "near": (lambda m, x, z: [x := x + 1 for _ in range(40)][-1], "x"),
}


class Reads(Indexed):
    def __init__(self, read):
        super().__init__()
        self.read = read
        self.scale = nn.Parameter(torch.rand(HIDDEN))
        self.mixing = nn.Parameter(torch.rand(HIDDEN, HIDDEN))

    def forward(self, x, z):
        return self.dispatch(x, *self.route(self.read(self, x, z)))


@pytest.mark.parametrize("name", ROOTS)
def test_roots(name):
    """The search ends at a product, where two tensors meet, and after some steps."""
    read, expected = ROOTS[name]
    graph = from_make_fx(Reads(read), rows(), rows(seed=1))
    root = hidden_root(one_gate(graph).router_input)
    assert root.op == "placeholder" if expected == "x" else nodes.kind(root) in (expected, "linear", "mm")
    if expected == "x":
        assert root is next(iter(graph.graph.nodes))


class Writes(Indexed):
    """Memory is written before the experts read it: a function of (module, x, z, ids) says which."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("base", torch.zeros(HIDDEN))

    def forward(self, x, z):
        ids, weights = self.route(x)
        return self.dispatch(self.write(self, x, z, ids), ids, weights)


# What is written, and whether the write is part of the region.
WRITES = {
    "the hidden states": (lambda m, x, z, ids: x.mul_(2), True),
    "a copy of them": (lambda m, x, z, ids: x.clone().mul_(2), True),
    "a buffer": (lambda m, x, z, ids: x + m.base.add_(1), True),
    "a buffer, by a view": (lambda m, x, z, ids: [m.base.view(2, 3).add_(1), x + m.base][1], True),
    "fresh memory, made up as a whole": (lambda m, x, z, ids: x + torch.zeros(HIDDEN).add_(1), False),
    "another input": (lambda m, x, z, ids: [z.add_(1), x + z][1], False),
    "another input, by what is routed": (lambda m, x, z, ids: [z.add_(ids[:, :1]), x + z][1], True),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_that_are_part_of_it(name):
    """Those that depend on what is made up, and those to memory that is computed or held."""
    write, inside = WRITES[name]
    region = region_of(Writes(write), from_dynamo, rows(seed=1))
    assert any(nodes.writes(node) for node in region.graph.nodes) is inside


def test_a_write_behind_the_end_is_none_of_it():
    class Later(Indexed):
        def forward(self, x, z):
            y = super().forward(x + z)
            z.add_(1)
            return y + z

    region = region_of(Later(), from_dynamo, rows(seed=1))
    assert not any(nodes.writes(node) for node in region.graph.nodes)


class TestByHand:
    def test_the_closure_of_nodes(self):
        """Up to a last node, also by writes, without the output."""
        w = Written()
        x = w.given(2)
        first = w.call(torch.exp, x)
        memory = w.call(torch.zeros, 2)
        write = w.call("add_", memory, first)
        read = w.call(torch.neg, memory)
        late = w.call(torch.neg, first)
        w.give(read)
        assert _closure({first}, read) == {first, write, read}
        assert _closure({first}, late) == {first, write, read, late}
        assert _closure({x}, first) == {x, first}

    def test_a_rank_s_part_of_a_parameter(self):
        def to_local(x):
            return x

        w = Written()
        weight, other = w.weight(2, 3), w.given(2, 3)
        assert distributed_state(w.call(to_local, weight)) is weight
        assert distributed_state(w.call(to_local, other)) is None
        assert distributed_state(w.call(torch.exp, weight)) is None
        assert distributed_state(weight) is None

    def test_who_reads_hidden_states(self):
        """Once they are complete: what makes them what the router reads is no reader."""
        w = Written()
        x = w.given(4, 6)
        memory = w.call(torch.zeros, 4, 6)
        early = w.call("add_", memory, x)
        projection = w.call(torch.matmul, memory, w.weight(6, 8))
        reader = w.call(torch.exp, memory)
        late = w.call("mul_", memory, 2)
        assert _readers_of(memory, projection) == [projection, reader, late]
        assert _readers_of(x, projection) == [early]

    def test_what_is_held(self):
        fake = torch._subclasses.FakeTensorMode().from_tensor(torch.ones(2))
        value = torch.ones(2)
        assert _held(fake) is None
        assert _held(None) is None
        assert _held(value) is value

    def test_what_a_leaf_yields(self):
        """What was traced; an attribute has what the module holds, whose shape the tracer need not have written."""
        w = Written()
        node = w.given(2, 3)
        leaf = Leaf("hidden", node, None)
        assert _described(node, leaf) == node.meta
        assert _described(node, leaf) is not node.meta
        root = nn.Module()
        root.weight = nn.Parameter(torch.ones(3))
        graph = torch.fx.Graph()
        attribute = graph.get_attr("weight")
        torch.fx.GraphModule(root, graph)
        assert _described(attribute, leaf)["example_value"] is attribute.graph.owning_module.weight

    @pytest.mark.parametrize(
        ("write", "alone"),
        [
            (lambda w, mask: w.call("float", mask), True),
            (lambda w, mask: w.mul(w.call(torch.sub, 1.0, w.call("float", mask)), -1e9), True),
            (lambda w, mask: w.call(torch.where, mask, 0.0, -1e9), True),
            (lambda w, mask: w.mul(w.call("float", mask), w.weight(1)), True),
            (lambda w, mask: w.mul(w.call("float", mask), w.weight(4)), False),
            (lambda w, mask: w.mul(w.call("float", mask), w.given(1)), False),
            (lambda w, mask: w.mul(w.call("float", mask), w.given(4)), False),
            (lambda w, mask: w.mul(w.given(4), 2), False),
            (lambda w, mask: w.weight(1), False),
            (lambda w, mask: w.mul(w.weight(1), 2), False),
            (lambda w, mask: w.given(4), False),
            (lambda w, mask: w.pick(w.given(4), mask), False),
            (lambda w, mask: w.call(torch.nn.functional.embedding, w.call("long", mask), w.weight(2, 3)), False),
            (lambda w, mask: w.call(torch.zeros_like, mask, dtype=torch.float32), False),
            (lambda w, mask: [y := w.call("float", mask), *(y := w.call(torch.neg, y) for _ in range(15))][-1], True),
            (lambda w, mask: [y := w.call("float", mask), *(y := w.call(torch.neg, y) for _ in range(16))][-1], False),
        ],
        ids=[
            "cast", "inverted", "chosen", "times a number", "times a vector", "times an input's number",
            "times an input", "an input doubled",
            "a number", "a number doubled", "an input", "picked", "looked up", "its sizes", "near", "far",
        ],
    )  # fmt: skip
    def test_what_is_computed_of_masks_alone(self, write, alone):
        w = Written()
        assert whole_numbers_alone(write(w, w.input(torch.ones(4) > 0))) is alone

    @pytest.mark.parametrize(
        ("write", "to_x"),
        [
            (lambda w, x: w.call("view", w.call("double", x), -1), True),
            (lambda w, x: w.mul(x, w.call(torch.rsqrt, w.call(torch.mean, w.call(torch.square, x), -1, True))), True),
            (lambda w, x: w.mul(w.weight(6), w.call(torch.div, x, w.call("norm", x, 2, -1, True))), True),
            (lambda w, x: w.mul(x, w.call(torch.exp, w.weight(6))), True),
            (lambda w, x: w.call(torch.add, x, w.given(4, 6)), False),
            (lambda w, x: w.call(torch.matmul, x, w.weight(6, 6)), False),
            (lambda w, x: w.call(torch.nn.functional.linear, x, w.weight(6, 6)), False),
            (lambda w, x: w.call(torch.zeros_like, x), False),
        ],
        ids=["cast", "norm", "scaled norm", "scaled", "a sum", "a product", "a projection", "its sizes"],
    )
    def test_where_hidden_states_come_from(self, write, to_x):
        """The last tensor that all of it goes through; behind it everything is computed."""
        w = Written()
        x = w.given(4, 6)
        made = write(w, x)
        assert hidden_root(made) is (x if to_x else made)
        assert hidden_root(w.call(torch.neg, made)) is (x if to_x else made)

    @pytest.mark.parametrize(("steps", "near"), [(47, True), (48, False)])
    def test_how_far_hidden_states_are_looked_for(self, steps, near):
        w = Written()
        x = made = w.given(4, 6)
        chain = [made := w.call(torch.neg, made) for _ in range(steps)]
        assert hidden_root(made) is (x if near else chain[0])

    def test_hidden_states_that_are_a_part_of_something(self):
        """The search ends there: what gives several tensors is none itself."""
        w = Written()
        x = w.given(4, 12)
        part = w.pick(w.call(torch.chunk, x, 2, -1), 1)
        assert hidden_root(w.call(torch.neg, part)) is part

    def test_writes_between_the_projection_and_what_it_is_made_of(self):
        """Hidden states are complete where the first thing reads them that the projection is made of."""
        w = Written()
        x = w.given(4, 6)
        memory = w.call(torch.zeros, 4, 6)
        w.call("add_", memory, x)
        w.call(torch.exp, memory)
        w.call("add_", memory, x)
        read = w.call(torch.neg, memory)
        late = w.call("mul_", memory, 2)
        projection = w.call(torch.matmul, w.call(torch.exp, read), w.weight(6, 8))
        assert _readers_of(memory, projection) == [read, late]


def held(node):
    return node.meta["example_value"] if nodes.is_model_state(node) else None


def cut(dispatch, *results, **changes):
    return cut_region(replace(dispatch.gate(*results), **changes), held)


def written_in(region):
    """The operations of a region that write, by what they do."""
    return [nodes.raw_name(node) for node in region.graph.nodes if nodes.writes(node)]


class TestCut:
    def test_an_ordinary_dispatch(self):
        w = Dispatch()
        region = cut(w, w.total())
        assert leaves_of(region, "logits") == {region.gate.router_weight: (4, 8)}
        assert list(leaves_of(region, "hidden").values()) == [(4, 6)]
        assert list(leaves_of(region, "state").values()) == [(8, 6, 6)]
        assert region.gate.router_input is region.gate.router_weight
        assert region.originals[region.gate.values] is w.weights
        assert region.originals[region.gate.weights] is w.weights
        assert [region.originals[node] for node in region.gate.all_ids] == [w.ids]
        assert [region.originals[use.consumer] for use in region.gate.uses] == list(w.ids.users)[:1]
        assert [region.originals[reader] for reader in region.readers] == list(w.weights.users)[:1]

    def test_without_values_or_weights(self):
        """None are given, or nothing of the region needs them."""
        for changes in ({"values": None, "weights": None}, {"weights": None}):
            w = Dispatch()
            region = cut(w, w.call(torch.sum, w.slots(), 1), **changes)
            assert (region.gate.values, region.gate.weights, region.readers) == (None, None, ())

    def test_inputs_where_they_are_first_read(self):
        """Equal layers have equal regions, in whatever order the caller gives their state."""
        orders = []
        for early in (False, True):
            w = Dispatch()
            vector = w.weight(6) if early else None
            slots = w.slots()
            vector = vector or w.weight(6)
            region = cut(w, w.call(torch.sum, w.mul(slots, vector), 1))
            orders.append([nodes.shape(node) for node in region.leaves])
        assert orders[0] == orders[1]
        assert orders[0][-1] == (6,)

    def test_an_attribute_is_no_input_of_its_name(self):
        """Attributes that are read anew are one leaf; an input of the same name is another."""
        w = Dispatch()
        values = []
        for _ in range(2):
            values.append(w.graph.get_attr("scale"))
            values[-1].meta["example_value"] = nn.Parameter(torch.rand(6))
        slots = w.slots()
        for value in values:
            slots = w.mul(slots, value)
        given = w.graph.placeholder("scale")
        given.meta["example_value"] = torch.rand(4, 1, 6)
        slots = w.mul(slots, given)
        region = cut_region(w.gate(w.call(torch.sum, slots, 1)), lambda node: None)
        assert sorted(leaves_of(region, "state").values()) == [(6,), (8, 6, 6)]
        assert list(leaves_of(region, "activation").values()) == [(4, 1, 6)]

    def test_a_write_to_state_behind_the_exit(self):
        """It is none of the region; one in front of it is, and so is the last that completes the exit."""
        w = Dispatch()
        scale = w.weight(6)
        w.call("mul_", scale, 2)
        total = w.call(torch.sum, w.mul(w.slots(), scale), 1)
        w.call("add_", scale, 1)
        assert written_in(cut(w, total)) == ["mul_"]

    def test_memory_that_is_complete_with_the_last_write(self):
        w = Dispatch()
        memory = w.call(torch.zeros, 4, 6)
        for number in range(2):
            scale = w.column(w.call(torch.sum, w.mul(w.weights, w.call(torch.eq, w.ids, number)), -1))
            w.call("add_", memory, w.mul(w.call(torch.matmul, w.x, w.pick(w.experts, number)), scale))
        region = cut(w, w.call(torch.exp, memory))
        assert written_in(region) == ["add_", "add_"]
        assert nodes.kind(region.ends[0]) == "zeros"

    def test_what_is_made_of_other_inputs_is_made_up(self):
        """Where it is met; masks, views and what the model's state alone makes are computed."""
        w = Dispatch()
        other = w.given(4, 6)
        bent = w.call(torch.exp, w.call(torch.sin, other))
        turned = w.call("view", bent, 4, 1, 6)
        own = w.call(torch.exp, w.weight(6))
        mask = w.call("float", w.input(torch.ones(4, 1, 1) > 0))
        total = w.call(torch.sum, w.mul(w.mul(w.mul(w.slots(), turned), own), mask), 1)
        region = cut(w, total)
        made_up = leaves_of(region, "activation")
        assert sorted(made_up.values()) == [(4, 1, 1), (4, 6)]
        assert sorted(leaf.source.name for leaf in region.leaves.values() if leaf.kind == "activation") == sorted(
            [bent.name, nodes.operand(mask).name]
        )
        assert (6,) in leaves_of(region, "state").values()
        assert other.name not in {leaf.source.name for leaf in region.leaves.values()}

    def test_numbers(self):
        w = Dispatch()
        number = w.input(3)
        region = cut_region(w.gate(w.call(torch.sum, w.mul(w.slots(), number), 1)), lambda node: 5)
        [leaf] = [leaf for leaf in region.leaves.values() if leaf.kind == "number"]
        assert (leaf.source, leaf.held) == (number, 5)

    @pytest.mark.parametrize("inside", [True, False])
    def test_a_part_of_vmap_cannot_be_run(self, inside):
        """Behind the exit it is none of the region."""
        w = Dispatch()
        slots = w.slots()
        node = w.graph.call_function(torch._C._functorch._add_batch_dim, (slots if inside else w.total(), 0, 1))
        node.meta["example_value"] = slots.meta["example_value"]
        refusal = cut(w, w.call(torch.sum, w.mul(node, w.column(w.weights)), 1))
        assert isinstance(refusal, Skip) is inside
        if inside:
            detail = "_add_batch_dim: a part of what torch.func.vmap does cannot be run by itself"
            assert (refusal.reason, refusal.detail, refusal.node) == (SkipReason.UNVERIFIED, detail, w.ids.args[0])
            assert refusal.is_refused_gate
