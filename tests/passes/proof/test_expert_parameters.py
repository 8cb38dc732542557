"""Which tensors are the experts' parameters."""

import types

import pytest
import torch
from torch import nn

from sere_compile.passes.proof.expert_parameters import ExpertParameters, Stack, Told

from ..graph.written import Written
from ..moe_modules import EXPERTS, HIDDEN, Block, ExpertLoop, Indexed, from_export, from_make_fx
from .regions import leaves_of, region_of, told, values_of
from .test_prover import Columns, FromBase, OneOutput, RouterScale, SharedBeside, Sliced, Values

MAP = torch.tensor([0, 0, 2])


def test_blocks_and_turns():
    """[E * width] with each expert's rows together, or every E-th row an expert's."""
    rows = torch.arange(6)
    assert Stack(0, 3).exchanged(rows, MAP).tolist() == [0, 1, 0, 1, 4, 5]
    assert Stack(0, 3, in_turn=True).exchanged(rows, MAP).tolist() == [0, 0, 2, 3, 3, 5]
    assert Stack(0, 3).rows(6, torch.device("cpu")).tolist() == [0, 0, 1, 1, 2, 2]
    assert Stack(0, 3, in_turn=True).rows(6, torch.device("cpu")).tolist() == [0, 1, 2, 0, 1, 2]


def test_rows_are_where_they_are_asked_for():
    for stack in (Stack(0, 3), Stack(0, 3, in_turn=True)):
        assert stack.rows(6, torch.device("meta")).device.type == "meta"


def test_rows_that_are_no_experts_stay():
    assert Stack(0, 4).exchanged(torch.arange(4), MAP).tolist() == [0, 0, 2, 3]


def test_a_part_of_the_experts():
    """A rank has experts 2 and 3 of 4: what goes to another rank adds nothing here."""
    part, rows = Stack(0, 2, first=2), torch.tensor([20, 21, 30, 31])
    assert part.rows(4, torch.device("cpu")).tolist() == [2, 2, 3, 3]
    assert part.exchanged(rows, torch.tensor([0, 1, 3, 3])).tolist() == [30, 31, 30, 31]
    assert part.exchanged(rows, torch.tensor([2, 1, 2, 0])).tolist() == [20, 21, 0, 0]
    found = ExpertParameters(stacks={"s": part})
    assert found.unknown_moves(4).tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2
    assert ExpertParameters(stacks={"s": Stack(0, 4)}).unknown_moves(4) is None


def test_floats_of_eight_bits():
    """PyTorch moves no rows of them."""
    rows = torch.tensor([[0.5], [1.0], [2.0]]).to(torch.float8_e4m3fn)
    found = Stack(0, 3).exchanged(rows, MAP)
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().flatten().tolist() == [0.5, 0.5, 2.0]
    away = Stack(0, 2, first=2).exchanged(rows[:2], torch.tensor([2, 1, 2, 0]))
    assert away.float().flatten().tolist() == [0.5, 0.0]


def test_lists_exchange_whole_tensors():
    values = {"a": torch.zeros(1), "b": torch.ones(1), "c": torch.full((1,), 2.0)}
    found = ExpertParameters(lists=[{0: "a", 1: "b", 2: "c"}])
    swapped = found.swapped(values, MAP)
    assert [float(swapped[name]) for name in "abc"] == [0.0, 0.0, 2.0]
    assert [float(values[name]) for name in "abc"] == [0.0, 1.0, 2.0]
    assert found
    assert found.tensors == {"a", "b", "c"}


def test_stacks_exchange_along_their_dimension():
    value = torch.arange(6.0).view(2, 3)
    found = ExpertParameters(stacks={"s": Stack(1, 3)})
    assert found.swapped({"s": value, "x": 1}, MAP)["s"].tolist() == [[0, 0, 2], [3, 3, 5]]
    assert found.swapped({"s": value, "x": 1}, MAP)["x"] == 1
    assert found
    assert found.tensors == {"s"}
    assert not ExpertParameters()


class InTurn(Block):
    """Every E-th row is an expert's."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.rows = nn.Parameter(torch.randn(5 * EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)))

    def dispatch(self, x, ids, weights):
        rows = self.rows.view(5, EXPERTS, HIDDEN).transpose(0, 1)[ids]
        y = torch.relu(torch.einsum("th,tkrh->tkr", x, rows))
        return torch.einsum("tkr,tkrh,tk->th", y, rows, weights)


class InBlocks(InTurn):
    """Each expert's rows stand together."""

    def dispatch(self, x, ids, weights):
        rows = self.rows.view(EXPERTS, 5, HIDDEN)[ids]
        y = torch.relu(torch.einsum("th,tkrh->tkr", x, rows))
        return torch.einsum("tkr,tkrh,tk->th", y, rows, weights)


class TwoLayers(ExpertLoop):
    """Two matrices of one shape for each expert."""

    def __init__(self):
        super().__init__()
        self.seconds = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(EXPERTS))

    def expert(self, number, x):
        return self.seconds[number](torch.tanh(self.layers[number](x)))


class Permuted(ExpertLoop):
    """Expert e is the layer of another number: names tell nothing."""

    def expert(self, number, x):
        return torch.tanh(self.layers[3 * number % EXPERTS](x))


class Named(TwoLayers):
    """Experts in a dictionary: their names have no numbers, and each has two matrices of one shape."""

    NAMES = ("red", "green", "blue", "black", "white", "pink", "grey", "brown")

    def __init__(self):
        super().__init__()
        self.by_name = nn.ModuleDict(
            {name: nn.ModuleList(pair) for name, *pair in zip(self.NAMES, self.layers, self.seconds, strict=True)}
        )
        del self.layers, self.seconds

    def expert(self, number, x):
        first, second = self.by_name[self.NAMES[number]]
        return second(torch.tanh(first(x)))


MATRICES = (EXPERTS, HIDDEN, HIDDEN)
# Program -> shapes of the stacks and how they are cut.
STACKS = {
    Indexed: {MATRICES: Stack(0, EXPERTS)},
    Sliced: {MATRICES: Stack(0, EXPERTS)},
    FromBase: {MATRICES: Stack(0, EXPERTS)},
    RouterScale: {MATRICES: Stack(0, EXPERTS)},
    SharedBeside: {MATRICES: Stack(0, EXPERTS)},
    Columns: {MATRICES: Stack(0, EXPERTS), (HIDDEN, EXPERTS): Stack(1, EXPERTS)},
    OneOutput: {(EXPERTS, HIDDEN, 1): Stack(0, EXPERTS), (EXPERTS,): Stack(0, EXPERTS)},
    InBlocks: {(5 * EXPERTS, HIDDEN): Stack(0, EXPERTS)},
    InTurn: {(5 * EXPERTS, HIDDEN): Stack(0, EXPERTS, in_turn=True)},
    Values: {MATRICES: Stack(0, EXPERTS)},
}


@pytest.mark.parametrize("module", STACKS, ids=lambda m: m.__name__)
def test_stacks(module):
    """Told from what is the router's, shared, or a base of all experts."""
    region = region_of(module())
    shapes = leaves_of(region, "state")
    found, _ = told(region)
    assert {shapes[node]: stack for node, stack in found.stacks.items()} == STACKS[module]
    assert found.lists == []


@pytest.mark.parametrize(("module", "roles"), [(ExpertLoop, 1), (TwoLayers, 2)], ids=["one", "two"])
@pytest.mark.parametrize("trace", [from_make_fx, from_export])
def test_lists(module, roles, trace):
    """A role has a tensor for each expert, in the experts' order."""
    region = region_of(module(), trace)
    found, _ = told(region)
    assert found.stacks == {}
    assert [sorted(role) for role in found.lists] == [list(range(EXPERTS))] * roles
    if trace is from_export:
        for role, name in zip(found.lists, ("layers", "seconds"), strict=False):
            assert [region.leaves[role[e]].source.target for e in range(EXPERTS)] == [
                f"{name}.{e}.weight" for e in range(EXPERTS)
            ]


def test_tensors_whose_names_tell_nothing():
    """Each is exchanged alone, and the tokens that change tell whose it is."""
    region = region_of(Permuted(), from_export)
    [role] = told(region)[0].lists
    assert {e: region.leaves[node].source.target for e, node in role.items()} == {
        e: f"layers.{3 * e % EXPERTS}.weight" for e in range(EXPERTS)
    }


@pytest.mark.parametrize("tokens", [2, 3, None])
def test_names_without_numbers(tokens):
    """Two tokens of a draw name few experts, and the same ones often: it takes further draws to tell all apart."""
    region = region_of(Named(), from_export, tokens=tokens)
    roles = told(region)[0].lists
    assert [[region.leaves[role[e]].source.target for e in range(EXPERTS)] for role in roles] == [
        [f"by_name.{name}.{place}.weight" for name in Named.NAMES] for place in range(2)
    ]


class OneRow(Named):
    """A matrix of each has as many rows as there are experts: one expert's own tensor looks like a stack."""

    def __init__(self):
        super().__init__()
        layers = [nn.ModuleList([nn.Linear(HIDDEN, EXPERTS), nn.Linear(EXPERTS, HIDDEN)]) for _ in self.NAMES]
        self.by_name = nn.ModuleDict(dict(zip(self.NAMES, layers, strict=True)))


@pytest.mark.parametrize("tokens", [3, 4, 5, 6, 7])
def test_a_tensor_of_one_expert_is_no_stack(tokens):
    """Few tokens name every expert of the first, or another one beside each of those."""
    found = told(region_of(OneRow(), from_export, tokens=tokens))[0]
    assert not found.stacks
    assert [sorted(role) for role in found.lists] == [list(range(EXPERTS))] * 4


def test_swapping_is_what_the_definition_says():
    """With every expert's parameters those of expert 5, all experts give what expert 5 does."""
    region = region_of(Indexed())
    found, _ = told(region)
    values = values_of(region)
    swapped = found.swapped(values, torch.full((EXPERTS,), 5))
    [node] = found.stacks
    assert torch.equal(swapped[node], values[node][5].expand_as(values[node]))
    assert all(swapped[other] is value for other, value in values.items() if other is not node)


def asked(shapes, *, columns=EXPERTS, names=None, part=False):
    """`Told` of parameters of these shapes, before anything is run, and its leaves."""
    w = Written()
    leaves = {w.input(torch.zeros(sizes)): None for sizes in shapes}
    for number, node in enumerate(leaves):
        name = names[number] if names else node.name
        source = w.graph.call_function(to_local, (node,)) if part else w.graph.placeholder("source")
        source.target = source.target if part else name
        leaves[node] = types.SimpleNamespace(source=source, kind="state")
    found = Told.__new__(Told)
    gate = types.SimpleNamespace(num_experts=EXPERTS, router_weight=w.given(3, columns), top_k=2)
    found._region = types.SimpleNamespace(leaves=leaves, gate=gate)
    found._draws = [{node: node.meta["example_value"] for node in leaves}]
    found._experts = EXPERTS
    return found, list(leaves)


def to_local(x):
    return x


class TestLayouts:
    """The ways in which a tensor of some sizes may hold a part for each of eight experts, the likeliest first."""

    @pytest.mark.parametrize(
        ("sizes", "stacks"),
        [
            ((), []),
            ((5,), []),
            ((8,), [Stack(0, 8)]),
            ((8, 8, 3), [Stack(0, 8), Stack(1, 8)]),
            ((3, 8), [Stack(1, 8)]),
            ((9, 3), [Stack(0, 9)]),
            ((15,), [Stack(0, 15)]),
            ((16, 3), [Stack(0, 8), Stack(0, 8, True)]),
            ((3, 24), [Stack(1, 8), Stack(1, 8, True)]),
            ((17, 3), []),
            ((4, 3), []),
        ],
    )
    def test_sizes(self, sizes, stacks):
        found, [node] = asked([sizes])
        assert list(found._layouts(node)) == stacks

    def test_further_columns_of_the_router(self):
        """A stack may have a part for each."""
        found, [node] = asked([(10, 3)], columns=10)
        assert list(found._layouts(node)) == [Stack(0, 10)]
        found, [node] = asked([(8, 10)], columns=10)
        assert list(found._layouts(node)) == [Stack(0, 8), Stack(1, 10)]
        found, [node] = asked([(8, 6)], columns=6)
        assert list(found._layouts(node)) == [Stack(0, 8)]

    def test_a_rank_s_part(self):
        """Any of the equal parts; of what no rank shares there is none."""
        found, [node] = asked([(4, 3)], part=True)
        assert list(found._layouts(node)) == [Stack(0, 4), Stack(0, 4, first=4)]
        found, [node] = asked([(3, 4)], part=True)
        assert list(found._layouts(node)) == []


class TestNames:
    def test_a_number_that_takes_as_many_values_as_there_are_experts(self):
        names = [f"layers.3.experts.{e}.up" for e in range(8)] + [f"layers.3.experts.{e}.down" for e in range(8)]
        found, members = asked([(2, 3)] * 8 + [(3, 2)] * 8, names=names)
        assert list(found._named(members)) == [dict(enumerate(members[:8])), dict(enumerate(members[8:]))]
        assert list(found._named(members[::-1])) == [dict(enumerate(members[8:])), dict(enumerate(members[:8]))]

    def test_two_roles_by_turns(self):
        found, members = asked([(2, 3)] * 16, names=[f"experts.{n}.w" for n in range(16)])
        assert list(found._named(members)) == [dict(enumerate(members[::2])), dict(enumerate(members[1::2]))]

    @pytest.mark.parametrize("count", [7, 9, 12])
    def test_another_number_of_tensors_is_none(self, count):
        found, members = asked([(2, 3)] * count, names=[f"experts.{n}.w" for n in range(count)])
        assert list(found._named(members)) == []

    def test_other_shapes_or_names_are_others(self):
        shapes = [(2, 3)] * 7 + [(3, 2)]
        found, members = asked(shapes, names=[f"experts.{n}.w" for n in range(8)])
        assert list(found._named(members)) == []
        found, members = asked([(2, 3)] * 8, names=[*(f"experts.{n}.w" for n in range(7)), "experts.7.v"])
        assert list(found._named(members)) == []


class TestRuns:
    """What two runs of a region tell, by rows of its exit."""

    def told(self, before, after, tokens=2):
        found, _ = asked([])
        found._exit = "exit"
        found._before, found._ids = [{"exit": before}], [torch.zeros(tokens, 2)]
        found._run = lambda values: {"exit": after}
        return found._changed(0, {})

    def test_rows_that_differ(self):
        """By more than a millionth of the largest number; NaN differs."""
        before = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
        assert self.told(before, before.clone()).tolist() == [False, False]
        assert self.told(before, before + torch.tensor([[0.0, 0.0], [0.0, 1e-5]])).tolist() == [False, True]
        assert self.told(before, before + torch.tensor([[2e-6, 0.0], [0.0, 0.0]])).tolist() == [False, False]
        assert self.told(before, torch.tensor([[1.0, torch.nan], [2.0, 0.0]])).tolist() == [True, False]
        assert self.told(before.view(2, 1, 2), before.view(2, 1, 2) + 1).tolist() == [True, True]
        assert self.told(torch.zeros(2, 2), torch.full((2, 2), 1e-14)).tolist() == [True, True]
        assert self.told(torch.zeros(2, 2), torch.full((2, 2), 1e-16)).tolist() == [False, False]

    def test_other_shapes_tell_nothing(self):
        assert self.told(torch.zeros(2, 2), torch.zeros(2, 3)) is None

    def test_sets_of_experts(self):
        found, _ = asked([])
        first, others, further = found._sets(torch.tensor([[5, 2], [7, 7]]))
        assert first.tolist() == [2, 5]
        assert others.tolist() == [0, 1, 3, 4, 6, 7]
        assert further.tolist() == list(range(7))
