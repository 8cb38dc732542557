"""Attention of one token over copied keys and values reads the keys and values; everything else stays."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from sere_compile.passes import PackedAttention, pack_gqa
from sere_compile.passes.graph.nodes import kind
from sere_compile.passes.pack_gqa import _is_one_token, _leads_to, _may_write, _refusal, _source

from .graph import written

HEADS, GROUPS, WIDTH, LENGTH, BATCH = 8, 2, 4, 6, 3
COPIES = HEADS // GROUPS


def repeated(x):
    """As transformers writes it."""
    batch, heads, length, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, COPIES, length, width).reshape(batch, -1, length, width)


def unsqueezed(x):
    return x.unsqueeze(2).expand(-1, -1, COPIES, -1, -1).contiguous().flatten(1, 2)


def interleaved(x):
    return x.repeat_interleave(COPIES, dim=1)


def counted_from_behind(x):
    return torch.repeat_interleave(x, COPIES, -3)


def along(x):
    """Each key several times, for the same head."""
    return x.repeat_interleave(COPIES, dim=2)


def across(x):
    """The copies of all heads one after another: head h of the queries reads head h % GROUPS of the keys."""
    return x.repeat(1, COPIES, 1, 1)


def expanded_first(x):
    """The same, by an expansion in front of the heads."""
    return x[:, None].expand(-1, COPIES, -1, -1, -1).reshape(len(x), HEADS, *x.shape[2:])


class Attention(nn.Module):
    def __init__(self, copied, value_copied=None, tokens=1, **options):
        super().__init__()
        self.copied, self.value_copied, self.tokens, self.options = copied, value_copied or copied, tokens, options

    def forward(self, q, k, v, mask):
        return attention(q, self.copied(k), self.value_copied(v), attn_mask=mask, **self.options) + 1


def given(tokens=1, groups=GROUPS, mask=(BATCH, 1, 1, LENGTH), batch=BATCH):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, HEADS, tokens, WIDTH, generator=generator)
    k, v = torch.randn(2, batch, groups, LENGTH, WIDTH, generator=generator)
    return q, k, v, None if mask is None else torch.randn(mask, generator=generator)


def graph_of(model, inputs, tracer="dynamo"):
    """The traced graph, and what it is called with."""
    if tracer == "export":
        return torch.export.export(model, inputs).module(), inputs
    seen = []

    def keep(graph, _):
        def run(*arguments):
            seen.append((graph, arguments))
            return graph(*arguments)

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True)(*inputs)
    return seen[0]


def packed(model, inputs, **how):
    """The pass over the graph, which gives what it gave; what the pass did, and the kinds of the graph's nodes."""
    graph, arguments = graph_of(model, inputs, **how)
    before = graph(*arguments)
    done = pack_gqa(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*arguments), before, rtol=1e-5, atol=1e-6)
    return done, [kind(node) for node in graph.graph.nodes]


@pytest.mark.parametrize("tracer", ["dynamo", "export"])
@pytest.mark.parametrize("copied", [repeated, unsqueezed, interleaved, counted_from_behind])
def test_every_way_to_copy_heads(copied, tracer):
    done, kinds = packed(Attention(copied), given(), tracer=tracer)
    assert len(done.packed) == 1
    assert not done.refused
    # Nothing is copied any more.
    assert not {"expand", "repeat_interleave"} & set(kinds)


def graph_with_symbols(model, inputs):
    """As `dynamic=True` makes it, with symbols for all sizes."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True, dynamic=True)(*inputs)
    return graphs[0].graph


@pytest.mark.parametrize("copied", [repeated, unsqueezed, interleaved])
def test_a_number_of_heads_that_is_a_symbol_is_told(copied):
    """The attention stays, and why is said."""
    done = pack_gqa(graph_with_symbols(Attention(copied), given()))
    assert not done.packed
    [reason] = done.refused.values()
    assert "the number of its heads is a symbol" in reason


@pytest.mark.parametrize("copied", [lambda x: x, lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).sum(2)])
def test_attention_without_copies_is_not_talked_of(copied):
    assert pack_gqa(graph_with_symbols(Attention(copied), given(groups=HEADS))).refused == {}


def test_free_sizes():
    """Batch and length are symbols, as of a model that was called with two batches."""
    q, k, v, mask = given()
    for tensor, dims in ((q, [0]), (k, [0, 2]), (v, [0, 2]), (mask, [0, 3])):
        torch._dynamo.mark_dynamic(tensor, dims)
    done, _ = packed(Attention(repeated), (q, k, v, mask))
    sizes = [node for node in done.packed[0].graph.find_nodes(op="placeholder") if "s" in str(node.target)[:1]]
    assert len(done.packed) == 1
    assert sizes


@pytest.mark.parametrize("mask", [None, (1, LENGTH), (1, 1, LENGTH), (1, 1, 1, LENGTH), (BATCH, 1, 1, LENGTH)])
def test_masks_that_are_the_same_for_all_heads(mask):
    done, _ = packed(Attention(repeated, scale=0.3, dropout_p=0.0), given(mask=mask))
    assert len(done.packed) == 1


@pytest.mark.parametrize(
    ("options", "mask", "reason"),
    [
        ({"is_causal": True}, None, "is_causal is True"),
        ({"dropout_p": 0.1}, (BATCH, 1, 1, LENGTH), "dropout_p is 0.1"),
        ({}, (BATCH, HEADS, 1, LENGTH), "differs from head to head"),
        ({}, (HEADS, 1, LENGTH), "differs from head to head"),
    ],
)
def test_what_rows_cannot_stand_for_is_refused(options, mask, reason):
    graph, _ = graph_of(Attention(repeated, **options), given(mask=mask))
    before = graph.code
    [found] = pack_gqa(graph.graph).refused.values()
    graph.recompile()
    assert reason in found
    assert graph.code == before


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Attention(repeated), given(tokens=2, mask=None)),  # a prompt
        (Attention(across), given()),  # other copies
        (Attention(expanded_first), given()),
        (Attention(repeated, interleaved), given()),  # both right: the control of the next
        (Attention(repeated, across), given()),
        (Attention(lambda x: x), given(groups=HEADS)),  # a head each
        (Attention(along), given(groups=HEADS, mask=None)),
    ],
)
def test_only_copies_per_head_are_left_out(model, inputs):
    done, _ = packed(model, inputs)
    assert bool(done.packed) == (model.value_copied is interleaved)
    assert not done.refused


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("copied", [repeated, unsqueezed, interleaved])
def test_other_numbers_of_heads(copied, groups, monkeypatch):
    """Sizes of one leave no doubt about what a view did."""
    monkeypatch.setattr(sys.modules[__name__], "COPIES", HEADS // groups)
    done, _ = packed(Attention(copied), given(groups=groups))
    assert len(done.packed) == 1


def test_without_sizes_nothing_is_known():
    """torch.fx.symbolic_trace records none."""
    graph = torch.fx.symbolic_trace(Attention(unsqueezed))
    before = graph.code
    assert pack_gqa(graph.graph) == PackedAttention((), {})
    graph.recompile()
    assert graph.code == before


class Written(nn.Module):
    """Something is done to keys, values and their copies, between the copying and the attention or before it."""

    def __init__(self, write, late=True):
        super().__init__()
        self.write, self.late = write, late

    def forward(self, q, k, v, mask):
        both = torch.stack([k, v])
        k, v = both.unbind(0)
        if not self.late:
            self.write(both, k, k)
        keys, values = interleaved(k), interleaved(v)
        if self.late:
            self.write(both, k, keys)
        return attention(q, keys, values, attn_mask=mask)


@torch.library.custom_op("sere_tests::scaled", mutates_args=["x"])
def scaled(x: torch.Tensor) -> None:
    x.mul_(3)


# By (keys and values, keys, their copy).
WRITES = {
    "keys": lambda both, k, copy: k.add_(1),
    "a part": lambda both, k, copy: k[:, :, 0].zero_(),
    "an item": lambda both, k, copy: k.__setitem__((slice(None), 0), 0.0),
    "what they are part of": lambda both, k, copy: both.mul_(2),
    "the copy": lambda both, k, copy: copy.mul_(0.125),
    "a narrow part": lambda both, k, copy: k.narrow(1, 0, 1).mul_(2),
    "a list": lambda both, k, copy: torch._foreach_mul_([k], 9.0),
    "an operator": lambda both, k, copy: scaled(k),
}


@pytest.mark.parametrize("name", WRITES)
def test_keys_that_are_written_after_they_were_copied(name):
    done, _ = packed(Written(WRITES[name]), given())
    assert not done.packed
    [reason] = done.refused.values()
    assert "may change what was copied" in reason
    done, _ = packed(Written(WRITES[name], late=False), given())
    assert len(done.packed) == 1


def test_keys_that_are_values_as_well(recwarn):
    class Same(nn.Module):
        def forward(self, q, k, v, mask):
            keys = repeated(k)
            return attention(q, keys, keys, attn_mask=mask)

    done, _ = packed(Same(), given())
    assert len(done.packed) == 1
    assert not [warning for warning in recwarn if "erase_node" in str(warning.message)]


def test_a_copy_that_others_read_stays():
    class Both(nn.Module):
        def forward(self, q, k, v, mask):
            keys = repeated(k)
            return attention(q, keys, repeated(v), attn_mask=mask), keys

    done, kinds = packed(Both(), given())
    assert len(done.packed) == 1
    assert kinds.count("expand") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_less_exact_on_a_gpu(dtype):
    """Other kernels may be chosen for rows than for heads: they round otherwise, and not worse."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, device="cuda", dtype=dtype)

    for batch, heads, groups, length, width in [(32, 32, 4, 160, 128), (1, 16, 8, 2048, 128), (8, 16, 2, 96, 64)]:
        q = random(batch, heads, 1, width)
        k, v = random(batch, groups, length, width), random(batch, groups, length, width)
        seen = torch.arange(length, device="cuda") < torch.randint(1, length, (batch, 1, 1, 1), device="cuda")
        copies = heads // groups
        keys, values = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        rows = attention(q.squeeze(2).unflatten(1, (groups, copies)), k, v, attn_mask=seen)
        exact = attention(q.double(), keys.double(), values.double(), attn_mask=seen)
        errors = [
            (found.double() - exact).norm()
            for found in (rows.flatten(1, 2).unsqueeze(2), attention(q, keys, values, attn_mask=seen))
        ]
        assert errors[0] <= 1.25 * errors[1]


def copies_of(w, keys, copies=COPIES, **changes):
    """Keys [B, G, L, D] in the way that transformers writes; a step may be of other sizes."""
    batch, heads, *rest = keys.meta["example_value"].shape
    inserted = w.call("view", keys, *changes.get("inserted", (batch, heads, 1, *rest)))
    expanded = w.call("expand", inserted, *changes.get("expanded", (batch, heads, copies, *rest)))
    return w.call("reshape", expanded, *changes.get("view", (batch, heads * copies, *rest)))


class TestCopies:
    """Whether a node holds each head several times, side by side, and of what."""

    def test_in_five_dimensions(self):
        w = written.Written()
        keys = w.given(BATCH, GROUPS, LENGTH, WIDTH)
        copy = copies_of(w, keys)
        assert _source(copy) == (keys, COPIES)
        assert _source(w.call("contiguous", w.call("clone", copy))) == (keys, COPIES)
        expanded = w.call("expand", w.call(torch.unsqueeze, keys, 2), -1, -1, COPIES, -1, -1)
        assert _source(w.call("flatten", w.call("contiguous", expanded), 1, 2)) == (keys, COPIES)

    @pytest.mark.parametrize(
        "changes",
        [
            {"copies": 1},
            {"view": (BATCH, GROUPS, COPIES * LENGTH, WIDTH)},
            {"view": (BATCH * GROUPS, COPIES, LENGTH, WIDTH)},
            {"view": (BATCH, GROUPS * COPIES, LENGTH * WIDTH)},
            {"inserted": (BATCH, 1, GROUPS, LENGTH, WIDTH), "expanded": (BATCH, COPIES, GROUPS, LENGTH, WIDTH)},
            {"inserted": (BATCH, GROUPS, LENGTH, WIDTH), "expanded": (COPIES, BATCH, GROUPS, LENGTH, WIDTH)},
            {"inserted": (BATCH, GROUPS, 1, WIDTH, LENGTH), "expanded": (BATCH, GROUPS, COPIES, WIDTH, LENGTH)},
        ],
        ids=["one", "along", "across tokens", "flat", "in front", "of all", "turned"],
    )
    def test_other_copies(self, changes):
        w = written.Written()
        assert _source(copies_of(w, w.given(BATCH, GROUPS, LENGTH, WIDTH), **changes)) is None

    def test_other_operations(self):
        w = written.Written()
        keys = w.given(BATCH, GROUPS, LENGTH, WIDTH)
        inserted = w.call("view", keys, BATCH, GROUPS, 1, LENGTH, WIDTH)
        repeated = w.call("repeat", inserted, 1, 1, COPIES, 1, 1)
        assert _source(w.call("reshape", repeated, BATCH, HEADS, LENGTH, WIDTH)) is None
        assert _source(keys) is None
        assert _source(None) is None
        assert _source(w.call(torch.exp, copies_of(w, keys))) is None

    @pytest.mark.parametrize(
        ("args", "kwargs", "found"),
        [
            ((COPIES, 1), {}, True), ((COPIES,), {"dim": 1}, True), ((), {"repeats": COPIES, "dim": -3}, True),
            ((COPIES, 2), {}, False), ((COPIES, 0), {}, False), ((COPIES,), {}, False), ((1, 1), {}, False),
        ],
    )  # fmt: skip
    def test_repeated(self, args, kwargs, found):
        w = written.Written()
        keys = w.given(BATCH, GROUPS, LENGTH, WIDTH)
        node = w.call("repeat_interleave", keys, *args, **kwargs)
        assert _source(node) == ((keys, COPIES) if found else None)

    def test_repeated_by_numbers_that_are_computed(self):
        w = written.Written()
        keys = w.given(BATCH, GROUPS, LENGTH, WIDTH)
        each = w.input(torch.full((GROUPS,), COPIES))
        assert _source(w.call("repeat_interleave", keys, each, 1)) is None
        assert _source(w.call("repeat_interleave", w.given(BATCH, GROUPS, WIDTH), COPIES, 1)) is None


class TestAttention:
    """What of a call is looked at besides its keys."""

    @staticmethod
    def call(queries=(BATCH, HEADS, 1, WIDTH), mask=None, **options):
        w = written.Written()
        keys, values = (w.given(BATCH, GROUPS, LENGTH, WIDTH) for _ in range(2))
        query = w.given(*queries)
        mask = None if mask is None else w.given(*mask)
        copies = copies_of(w, keys), copies_of(w, values)
        node = w.graph.call_function(attention, (query, *copies, mask), options)
        return w, node, (keys, COPIES), (values, COPIES)

    @pytest.mark.parametrize(
        ("sizes", "one"),
        [((3, 8, 1, 4), True), ((3, 8, 2, 4), False), ((8, 1, 4), False), ((1, 3, 8, 1, 4), False)],
    )
    def test_one_token(self, sizes, one):
        assert _is_one_token(self.call(sizes)[1]) is one

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({}, ""),
            ({"dropout_p": 0.0, "is_causal": False, "enable_gqa": False, "scale": 0.3}, ""),
            ({"dropout_p": 0.1}, "dropout_p is 0.1"),
            ({"is_causal": True}, "is_causal is True"),
            ({"enable_gqa": True}, "enable_gqa is True"),
            ({"queries": (BATCH, HEADS * 2, 1, WIDTH)}, "its queries have other heads than its keys"),
            ({"mask": (BATCH, 1, 1, LENGTH)}, ""),
            ({"mask": (1, LENGTH)}, ""),
            ({"mask": (LENGTH,)}, ""),
            ({"mask": (BATCH, HEADS, 1, LENGTH)}, f"its mask {(BATCH, HEADS, 1, LENGTH)} differs from head to head"),
            ({"mask": (HEADS, 1, LENGTH)}, f"its mask {(HEADS, 1, LENGTH)} differs from head to head"),
            ({"mask": (1, 2, LENGTH)}, f"its mask {(1, 2, LENGTH)} differs from head to head"),
        ],
        ids=str,
    )
    def test_refusals(self, options, reason):
        _, node, key, value = self.call(**options)
        assert _refusal(node, key, value) == reason

    def test_by_position(self):
        _, node, key, value = self.call()
        node.args = (*node.args, 0.0, True)
        assert _refusal(node, key, value) == "is_causal is True"
        node.args = (*node.args, None, True)
        assert _refusal(node, key, value) == "is_causal is True"
        node.args = (*node.args[:5], False, None, True)
        assert _refusal(node, key, value) == "enable_gqa is True"
        node.args = (*node.args[:4], 0.5)
        assert _refusal(node, key, value) == "dropout_p is 0.5"

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_what_stands_in_between(self, name):
        """Whatever could write ends it; what runs before the copying does not."""
        for target, changes in (("contiguous", False), ("add_", True), (opaque, True)):
            w, node, key, value = self.call()
            source = (key if name == "key" else value)[0]
            copy = node.args[1 if name == "key" else 2]
            with w.graph.inserting_after(copy):
                make = w.graph.call_method if isinstance(target, str) else w.graph.call_function
                make(target, (source, 1) if target == "add_" else (source,))
            assert ("may change what was copied" in _refusal(node, key, value)) is changes

    def test_what_may_write(self):
        w = written.Written()
        x = w.given(2)
        assert not _may_write(x)
        assert not _may_write(w.graph.get_attr("weight"))
        assert not _may_write(w.call("view", x, 1, 2))
        assert _may_write(w.call("add_", x, 1))
        assert _may_write(w.call(opaque, x))

    def test_what_leads_to_a_copy(self):
        w = written.Written()
        keys = w.given(BATCH, GROUPS, LENGTH, WIDTH)
        copy = copies_of(w, keys)
        other = w.call(torch.exp, keys)
        assert _leads_to(keys, copy)
        assert _leads_to(copy, copy)
        assert not _leads_to(other, copy)
        assert not _leads_to(copy, keys)


class TestAsAWhole:
    """`pack_gqa` of a graph by hand."""

    @staticmethod
    def graph(mask=(BATCH, 1, 1, LENGTH), queries=(BATCH, HEADS, 1, WIDTH), copies=(COPIES, COPIES), **options):
        w = written.Written()
        w.query, w.keys = w.given(*queries), w.given(BATCH, HEADS // copies[0], LENGTH, WIDTH)
        w.values = w.given(BATCH, HEADS // copies[1], LENGTH, WIDTH)
        w.mask = None if mask is None else w.given(*mask)
        w.copies = [copies_of(w, kept, times) for kept, times in zip((w.keys, w.values), copies, strict=True)]
        w.out = w.call(attention, w.query, *w.copies, w.mask, **options)
        w.give(w.call(torch.neg, w.out))
        return w

    def test_rows_in_the_place_of_heads(self):
        w = self.graph(scale=0.3)
        value = w.out.meta["example_value"]
        done = pack_gqa(w.graph)
        [out] = done.packed
        assert done.refused == {}
        names = ["squeeze", "unflatten", "scaled_dot_product_attention", "flatten", "unsqueeze", "neg"]
        calls = [node for node in w.graph.nodes if node.op == "call_function"]
        assert [node.target.__name__ for node in calls] == names
        squeezed, rows, called, flat, last, _ = calls
        assert (squeezed.args, rows.args) == ((w.query, 2), (squeezed, 1, (GROUPS, COPIES)))
        assert called.args == (rows, w.keys, w.values)
        assert called.kwargs == {"attn_mask": w.mask, "scale": 0.3}
        assert (flat.args, last.args, out) == ((called, 1, 2), (flat, 2), last)
        assert out.meta["example_value"] is value
        assert not [node for node in w.graph.nodes if node.op == "call_method"]
        module = torch.fx.GraphModule(nn.Module(), w.graph)
        inputs = [node.meta["example_value"] for node in w.graph.find_nodes(op="placeholder")]
        torch.testing.assert_close(module(*inputs)[0], -value)

    @pytest.mark.parametrize(
        "options",
        [{"queries": (BATCH, HEADS, 2, WIDTH)}, {"copies": (COPIES, COPIES // 2)}, {"copies": (1, 1)}],
        ids=["two tokens", "other copies of values", "no copies"],
    )
    def test_what_is_not_talked_of(self, options):
        w = self.graph(mask=None, **options)
        before = str(w.graph)
        assert pack_gqa(w.graph) == PackedAttention((), {})
        assert str(w.graph) == before

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_number_of_copies_that_only_a_call_knows(self, which):
        """Of keys or of values."""
        w = written.Written()
        query, kept = w.given(BATCH, HEADS, 1, WIDTH), w.given(BATCH, GROUPS, LENGTH, WIDTH)
        number = w.input(COPIES)
        copies = [w.call("repeat_interleave", kept, number if place == which else COPIES, 1) for place in range(2)]
        out = w.call(attention, query, *copies)
        done = pack_gqa(w.graph)
        assert list(done.refused) == [out.name]
        assert "is a symbol of the graph" in done.refused[out.name]
        assert done.packed == ()

    def test_what_is_refused(self):
        """By the name of its node, beside others that are packed."""
        w = self.graph(mask=(BATCH, HEADS, 1, LENGTH))
        with w.graph.inserting_after(w.out):
            w.graph.call_function(attention, (w.query, *w.copies)).meta = dict(w.out.meta)
        done = pack_gqa(w.graph)
        assert list(done.refused) == [w.out.name]
        assert len(done.packed) == 1

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_copy_that_is_read_elsewhere_stays(self, which):
        """With all that it is made of; the other one goes."""
        w = self.graph()
        with w.graph.inserting_after(w.out):
            w.graph.call_function(torch.exp, (w.copies[which],))
        assert len(pack_gqa(w.graph).packed) == 1
        assert [kind(node) for node in w.graph.nodes].count("expand") == 1
        assert [len(kept.users) for kept in (w.keys, w.values)] == [1 + (which == place) for place in range(2)]


def opaque(x):
    return x * 1
