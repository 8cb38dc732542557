"""One routing batch over several ranks, without an engine: each does what one rank with all tokens would do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sere_compile import ProbeError, SereConfig
from sere_compile.integrations.vllm.plugin import whose_batch
from sere_compile.integrations.vllm.ranks import (
    Meeting,
    _bound_to_exchange,
    marks_of,
    own_rows_only,
    part_of_rows,
    physical_experts,
    ranks_meet,
)
from sere_compile.integrations.vllm.routing import BatchState, RoutingHook
from sere_compile.ops import reroute

EXPERTS, TOP_K = 16, 4
DECODE, PREFILL = ({"layer": SimpleNamespace(max_query_len=length)} for length in (1, 7))
CPU = torch.device("cpu")


class Router:
    """Softmax, best first."""

    top_k, scoring_func = TOP_K, "softmax"

    def _compute_routing(self, hidden_states, router_logits, indices_type=None, *, input_ids=None):
        weights, ids = router_logits.softmax(-1).topk(TOP_K, dim=-1)
        return weights, ids.to(torch.int32)


def similarity():
    half = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(0))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def random_logits(tokens, seed=1):
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def chosen(logits):
    return Router()._compute_routing(None, logits)[1]


class Rank:
    """A hook, and the forward that its rank runs: attention metadata, logits, how many rows are no padding."""

    def __init__(self, metadata, logits, real=None, agreed=True, part=0, **options):
        config = SereConfig(**{"select_top_k": 1, "min_active": 0, **options})
        self.state = BatchState(CPU, "decode", None, 1)
        self.meeting = Meeting(self.all_reduce, EXPERTS, agreed)
        self.hook = RoutingHook(Router(), similarity(), config, self.state, part=part, meeting=self.meeting)
        self.logits = logits
        padding = None if real is None else torch.arange(max(real, 64)) >= real
        self.state.begin(metadata, padding)
        self.gave, self.sums = [], []

    def all_reduce(self, tensor):
        self.gave.append(tensor.clone())
        return self.sums[len(self.gave) - 1].clone() if len(self.gave) <= len(self.sums) else tensor.clone()

    def ids(self):
        self.gave = []
        return self.hook.compute_routing(self.logits, self.logits)[1]


def together(*ranks):
    """Ids of each rank. What a rank adds to the k-th sum depends on the sums before: one more round for each."""
    ranks[0].ids()
    for count in range(len(ranks[0].gave)):
        for rank in ranks:
            rank.ids()
        total = sum(rank.gave[count] for rank in ranks)
        for rank in ranks:
            rank.sums.append(total)
    return [rank.ids() for rank in ranks]


@pytest.mark.parametrize("options", [
    {}, {"select_top_k": 2}, {"min_active": 9}, {"threshold": 0.6}, {"select_top_k": "auto", "max_active": 8},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(5, 3), (1, 1), (7, 0), (4, 3, 2)], ids=str)
def test_ranks_that_agree_do_what_one_rank_with_all_tokens_would(options, sizes):
    logits = random_logits(sum(sizes))
    ranks = [Rank(DECODE, part, **options) for part in logits.split(sizes)]
    hook = ranks[0].hook
    expected = reroute(chosen(logits), similarity(), *hook.options, None, hook.max_active)
    assert torch.equal(torch.cat(together(*ranks)), expected)
    if not options:
        alone = torch.cat([reroute(chosen(part), similarity(), *hook.options) for part in logits.split(sizes)])
        assert (sum(size > 0 for size in sizes) == 1) == torch.equal(expected, alone), "agreeing changes nothing here"


def test_padding_and_idle_ranks_make_no_expert_primary():
    """A rank that runs a made-up forward takes part in the collective, not in the choice."""
    logits = random_logits(6)
    first, idle = Rank(DECODE, logits, real=4), Rank(None, random_logits(3, seed=2))
    got, made_up = together(first, idle)
    expected = reroute(chosen(logits)[:4], similarity(), 1, 0.0, 0)
    assert torch.equal(got[:4], expected)
    assert torch.equal(got[4:], chosen(logits)[4:])
    assert torch.equal(made_up, chosen(random_logits(3, seed=2)))


def test_experts_that_a_prefill_reads_anyway_are_kept():
    """A rank that is not re-routed reads all of its experts, so that the others keep theirs among them."""
    logits, prompts = random_logits(4), random_logits(2, seed=2)
    decoding, prefill = Rank(DECODE, logits), Rank(PREFILL, prompts)
    got, left = together(decoding, prefill)
    assert torch.equal(left, chosen(prompts))
    read = set(chosen(prompts).flatten().tolist())
    before = chosen(logits)
    kept = torch.tensor([[int(e) in read for e in row] for row in before])
    assert torch.equal(got[kept], before[kept])
    primary = read | set(before[:, 0].tolist())
    assert set(got.flatten().tolist()) <= primary
    assert (got != before).any()


def test_numbers_that_name_no_expert_are_not_marked():
    ids = torch.tensor([[3, -1], [EXPERTS, 3]], dtype=torch.int32)
    marks = marks_of(ids, EXPERTS, torch.tensor([2]), torch.tensor([True]))
    assert marks.shape == (2, EXPERTS)
    assert marks.nonzero().tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize("agreed", [True, False])
def test_active_experts_are_counted_over_all_ranks(agreed):
    """Whoever decides: an expert is read once for the tokens of all ranks."""
    parts = random_logits(8).split([5, 3])
    ranks = [Rank(DECODE, part, agreed=agreed, collect_stats=True) for part in parts]
    together(*ranks)
    for rank in ranks:
        rank.hook.reset()
    after = [rank.ids() for rank in ranks]
    expected = [len(torch.cat(ids).unique()) for ids in ([chosen(part) for part in parts], after)]
    for rank, part in zip(ranks, parts, strict=True):
        counted = rank.hook.stats()
        assert [counted.active_before, counted.active_after] == expected
        assert counted.tokens == len(part)
    assert expected[1] < expected[0]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_the_rows_knows_its_padding(part):
    """Sequence parallelism: 7 of 12 rows are tokens, and a rank routes 4 of the 12."""
    logits = random_logits(12)
    mine = logits[4 * part : 4 * part + 4]
    rank = Rank(DECODE, mine, real=7, agreed=False, part=part)
    real = min(4, max(0, 7 - 4 * part))
    before = chosen(mine)
    assert torch.equal(rank.ids()[:real], reroute(before[:real], similarity(), 1, 0.0, 0))
    assert torch.equal(rank.ids()[real:], before[real:])


def test_sere_route_does_not_select_where_ranks_agree():
    """Their ids are needed between selection and re-routing."""
    assert Rank(DECODE, random_logits(2), agreed=False).hook.selects
    assert not Rank(DECODE, random_logits(2)).hook.selects


def test_whose_batch_it_is_stands_in_the_log():
    assert whose_batch("rank", meet=False) == "all ranks route the same tokens, which are one routing batch"
    assert "by an all-reduce per layer" in whose_batch("all_ranks", meet=True)
    assert 'of their own (routing_batch "rank")' in whose_batch("rank", meet=True)


def test_which_ranks_meet():
    moe = SimpleNamespace(dp_size=1, is_sequence_parallel=False)
    assert not ranks_meet(moe)
    assert part_of_rows(moe) == 0
    assert ranks_meet(SimpleNamespace(dp_size=2, is_sequence_parallel=False))
    assert ranks_meet(SimpleNamespace(dp_size=1, is_sequence_parallel=True))


def test_experts_without_an_exchange_are_left_as_they_are():
    runner = SimpleNamespace(_quant_method=SimpleNamespace())
    with own_rows_only(runner) as shares:
        assert shares is False


@pytest.mark.parametrize(
    ("taken", "reason"),
    [("Standard", ""), ("PaddedStandard", ""), ("BatchedExperts", "Experts takes rows in the order in which")],
)
def test_experts_that_take_rows_as_they_are(taken, reason):
    """vLLM 0.34's own for Triton take rows of padding as well."""
    experts = type("Experts", (), {"activation_format": lambda self: SimpleNamespace(name=taken)})()
    layer = SimpleNamespace(expert_map=None, global_num_experts=8)
    runner = SimpleNamespace(routed_experts=layer, moe_config=SimpleNamespace(num_local_experts=8))
    found = _bound_to_exchange(runner, SimpleNamespace(fused_experts=experts))
    assert found.startswith(reason) if reason else found == ""


def test_where_a_logical_expert_is():
    places = torch.tensor([[4, 1], [0, -1]])
    router = SimpleNamespace(eplb_state=SimpleNamespace(logical_to_physical_map=places))
    assert physical_experts(router).tolist() == [4, 0]
    assert physical_experts(SimpleNamespace(eplb_state=None)) is None
    with pytest.raises(ProbeError, match="only when they are placed"):
        physical_experts(SimpleNamespace(eplb_state=SimpleNamespace(logical_to_physical_map=None)))
