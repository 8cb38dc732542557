"""`count_routing` and `add_counts`: the numbers equal a count by hand, inside the graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sere_compile.passes import COUNTED, count_routing
from sere_compile.passes.count_routing import add_counts
from sere_compile.passes.graph import nodes
from sere_compile.testing import reroute_oracle

from .moe_modules import EXPERTS, TOP_K, TRACERS, Indexed, ScatterCombine, from_export, reroute, rows, run, similarity


def counted(before, after, num_experts=EXPERTS):
    counts = torch.zeros(len(COUNTED), dtype=torch.int64)
    add_counts(before, after, num_experts, counts)
    return dict(zip(COUNTED, counts.tolist(), strict=True))


def by_hand(before, after, num_experts=EXPERTS):
    pairs = list(zip(before.flatten().tolist(), after.flatten().tolist(), strict=True))
    return {
        "calls": 1,
        "tokens": before.shape[:-1].numel(),
        "slots": len(pairs),
        "slots_changed": sum(old != new for old, new in pairs),
        "active_before": len({old for old, _ in pairs if 0 <= old < num_experts}),
        "active_after": len({new for _, new in pairs if 0 <= new < num_experts}),
    }


class TestCount:
    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_equals_a_count_by_hand(self, data):
        """Any ids, sentinels included, any number of tokens, also none."""
        tokens = data.draw(st.integers(0, 6))
        number = st.integers(-1, EXPERTS)
        draw = lambda: torch.tensor(  # noqa: E731
            data.draw(st.lists(number, min_size=tokens * TOP_K, max_size=tokens * TOP_K)), dtype=torch.int64
        ).view(tokens, TOP_K)
        before, after = draw(), draw()
        assert counted(before, after) == by_hand(before, after)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_leading_shape_and_dtype(self, dtype):
        """Tokens are all leading dimensions; int32 ids count the same."""
        before = torch.arange(24, dtype=dtype).remainder(EXPERTS).view(2, 4, 3)
        after = before.clamp(max=3)
        assert counted(before, after) == by_hand(before, after)

    def test_rows_that_are_padding(self):
        """They are no tokens, no slots and no changes, and activate no expert."""
        before = torch.tensor([[0, 1], [2, 3], [4, 5]])
        after = torch.tensor([[0, 0], [2, 0], [4, 0]])
        counts = torch.zeros(len(COUNTED), dtype=torch.int64)
        real = torch.tensor([True, False, True])
        add_counts(before, after, EXPERTS, counts, real)
        assert dict(zip(COUNTED, counts.tolist(), strict=True)) == by_hand(before[real], after[real])

    def test_adds_up_in_place(self):
        """Counts of several calls are summed in the same memory."""
        counts = torch.zeros(len(COUNTED), dtype=torch.int64)
        address = counts.data_ptr()
        ids = torch.tensor([[0, 1, 2]])
        for _ in range(3):
            add_counts(ids, ids, EXPERTS, counts)
        assert counts.tolist() == [3, 3, 9, 0, 9, 9]
        assert counts.data_ptr() == address


def insert(graph, done, counts):
    graph.register_buffer("counts", counts)
    first = next(node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.graph.inserting_before(first):
        buffer = graph.graph.get_attr("counts")
    node = count_routing(done, buffer)
    graph.graph.lint()
    graph.recompile()
    return node


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("block", [Indexed, ScatterCombine], ids=lambda block: block.__name__)
class TestInsert:
    def test_counts_what_is_dispatched(self, block, tracer):
        """Each run of the graph adds one call, its tokens, and the changes of the ids that it dispatched."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph)
        counts = torch.zeros(len(COUNTED), dtype=torch.int64)
        insert(graph, done, counts)
        run(graph, x)
        run(graph, x)
        ids, _ = module.route(x)
        wanted = by_hand(ids, reroute_oracle(ids, similarity(), 1))
        if done.merged:
            # Freed slots name other active experts: the changed slots differ, the active experts do not.
            wanted["slots_changed"] = int(counts[3]) // 2
        assert counts.tolist() == [2 * wanted[name] for name in COUNTED]
        assert 0 < counts[3] < counts[2]

    def test_node(self, block, tracer):
        """The call stands behind the new ids, says where it comes from, and changes no output."""
        module, x = block(), rows()
        graph = TRACERS[tracer](module, x)
        done = reroute(graph)
        before = run(graph, x)
        node = insert(graph, done, torch.zeros(len(COUNTED), dtype=torch.int64))
        assert torch.equal(run(graph, x), before)
        assert node.prev is done.new_ids
        assert nodes.source_line(node) == nodes.source_line(done.gate.ids)


def test_counts_survive_dead_code_elimination_of_the_inner_compiler():
    """The call has no users and still runs when AOTAutograd compiles the graph: it writes to its buffer."""
    module, x = Indexed(), rows()
    graph = from_export(module, x)
    done = reroute(graph)
    counts = torch.zeros(len(COUNTED), dtype=torch.int64)
    insert(graph, done, counts)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(graph, backend="aot_eager")(x)
    torch._dynamo.reset()
    assert counts[0] == 1
