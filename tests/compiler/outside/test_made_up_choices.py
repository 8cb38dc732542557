"""Choices that are made up, and the calls that put them into a graph."""

import types

import pytest
import torch

from sere_compile.compiler.outside.made_up_choices import Choose, Draw, Score, Tell, made_up_order

from ...passes.graph.written import Written
from .blocks import EXPERTS


def test_experts_that_are_to_be_chosen_take_the_places_behind_the_first():
    order = made_up_order((2, 5), EXPERTS, seed=4, chosen=[3, 5, 6], places=2)
    assert set(order[..., 1:3].flatten().tolist()) >= {3, 5, 6}
    assert set(order[..., 0].flatten().tolist()) == {0, 1}


def test_half_of_the_draws_let_most_tokens_name_an_expert_twice():
    order = made_up_order((4, 5), EXPERTS, seed=0)
    assert sorted(order[0, 0].tolist()) == list(range(EXPERTS))
    assert set(order[..., 0].flatten().tolist()) == {0, 1}
    assert len(set(made_up_order((4, 5), EXPERTS, seed=1)[..., 0].flatten().tolist())) > 2


class TestWhatIsMadeUp:
    def test_an_order_of_all_experts(self):
        """Even seeds: the first two experts are the first choices, by turns, so that most tokens name one twice."""
        for leading in ((6,), (2, 3)):
            for seed in range(4):
                order = made_up_order(leading, 5, seed)
                assert order.shape == (*leading, 5)
                assert order.dtype == torch.int64
                assert all(sorted(row) == list(range(5)) for row in order.view(-1, 5).tolist())
                first = order[..., 0].flatten().tolist()
                assert (first == [0, 1] * 3) is (seed % 2 == 0)
                assert torch.equal(order, made_up_order(leading, 5, seed))
            assert not torch.equal(made_up_order(leading, 5, 0)[..., 1:], made_up_order(leading, 5, 2)[..., 1:])
        assert made_up_order((3,), 1, 0).tolist() == [[0]] * 3
        assert {row[0] for row in made_up_order((6,), 2, 0).tolist()} == {0, 1}


def test_other_scores_are_made_of_a_seed_of_their_own():
    assert [Draw(3, scores).seed_of_scores for scores in ("own", "equal", "others")] == [3, 3, 1003]
    assert Draw().seed_of_scores == 0


class TestCallsInGraphs:
    """What stands in a block's graph while it is tried."""

    @staticmethod
    def draw(seed=1, **changes):
        return lambda: Draw(seed, **changes)

    def choose(self, form="top-k", columns=6, flat=False, leading=(4,), **changes):
        w = Written()
        scores = w.given(*leading, columns)
        ids = w.input(torch.zeros(*leading, *(() if flat else (2,)), dtype=torch.int64))
        return Choose(self.draw(**changes), scores, types.SimpleNamespace(form=form, ids=ids, top_k=2))

    @pytest.mark.parametrize("leading", [(4,), (2, 3)])
    def test_a_choice_in_place_of_the_routers(self, leading):
        like = torch.zeros(*leading, 2, dtype=torch.int32)
        ids = self.choose(leading=leading)(like)
        assert (ids.shape, ids.dtype) == (like.shape, like.dtype)
        assert torch.equal(ids, made_up_order(leading, 6, 1)[..., :2].int())
        picked = self.choose(leading=leading)((torch.zeros(*leading, 2, dtype=torch.float64), like))
        assert torch.equal(picked.indices, ids)
        assert picked[1] is picked.indices
        assert (picked.values.shape, picked.values.dtype) == (like.shape, torch.float64)
        assert picked.values.is_contiguous()
        assert (picked.values[..., 0] > picked.values[..., 1]).all()
        assert (picked.values >= 0.1).all()
        assert (picked.values <= 1.1).all()

    def test_one_choice_without_its_dimension(self):
        like = torch.zeros(4, dtype=torch.int64)
        ids = self.choose("max", flat=True)(like)
        assert torch.equal(ids, made_up_order((4,), 6, 1)[..., 0])
        picked = self.choose("max", flat=True)((torch.zeros(4), like))
        assert torch.equal(picked.indices, ids)
        assert picked.values.shape == (4,)

    def test_other_scores_are_of_another_seed(self):
        like = (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))
        own, other = self.choose()(like), self.choose(scores="others")(like)
        assert torch.equal(own.indices, other.indices)
        assert not torch.equal(own.values, other.values)
        assert torch.equal(own.values, self.choose()(like).values)

    def test_an_absent_expert_is_the_last_choice(self):
        order = made_up_order((4,), 6, 1, last=3)
        assert (order[:, -1] == 3).all()
        assert (made_up_order((4,), 6, 1, last=0)[:, -1] == 0).all()
        ids = self.choose(absent=3)(torch.zeros(4, 5, dtype=torch.int64))
        assert not (ids == 3).any()

    @pytest.mark.parametrize(("scores", "least"), [("own", 1 / 6), ("others", 1 - 5 / 600)])
    def test_scores_of_steps(self, scores, least):
        """The best that is left is the next choice, whatever a step masks; others are within 2 % of the best."""
        made = self.choose("steps", scores=scores)(torch.zeros(4, 6, dtype=torch.float64))
        order = made_up_order((4,), 6, 1)
        assert torch.equal(made.argsort(-1, descending=True), order)
        want = torch.linspace(1, least, 6, dtype=torch.float64).expand(4, 6)
        torch.testing.assert_close(made.gather(-1, order), want)
        assert made.dtype == torch.float64

    def test_logits(self):
        logits = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
        assert Score(self.draw())(logits) is logits
        assert Score(self.draw(scores="equal"))(logits).tolist() == [[0, 0, 0]]
        other = Score(self.draw(scores="others"))(logits)
        assert other.dtype == torch.float64
        ratio = other / logits
        assert ((ratio >= 0.5) & (ratio <= 1.5)).all()
        assert len(ratio.unique()) == 3
        assert torch.equal(other, Score(self.draw(scores="others"))(logits))
        assert not torch.equal(other, Score(self.draw(2, scores="others"))(logits))

    def test_what_is_told_is_a_copy(self):
        told, value = [], torch.ones(2, requires_grad=True)
        assert Tell(told)(value) is None
        assert told[0].tolist() == [1, 1]
        assert not told[0].requires_grad
        assert told[0].data_ptr() != value.data_ptr()


class TestArgumentsOfATrial:
    def test_weights_of_every_order(self):
        """In one draw of three, so that what is left out for weighing little shows."""
        choose, like = TestCallsInGraphs().choose, (torch.zeros(400, 6), torch.zeros(400, 6, dtype=torch.int64))
        for seed in range(6):
            values = choose(leading=(400,), seed=seed)(like).values
            assert (values.diff(dim=-1) <= 0).all()
            low, high = (1e-4, 1.0) if seed % 3 == 2 else (0.1, 1.1)
            assert low <= values.min() <= low * 1.5
            assert high * 0.9 <= values.max() <= high

    @pytest.mark.parametrize(("top_k", "places"), [(1, 1), (2, 1), (3, 2), (4, 3)])
    def test_experts_that_are_chosen_leave_a_token_its_first_choice(self, top_k, places):
        """But where it has only one."""
        w, like = Written(), torch.zeros(4, top_k, dtype=torch.int64)
        gate = types.SimpleNamespace(form="top-k", ids=w.input(like), top_k=top_k)
        choose = Choose(TestCallsInGraphs.draw(chosen=[5, 3]), w.given(4, 6), gate)
        order = made_up_order((4,), 6, 1, chosen=[5, 3], places=places)
        assert torch.equal(choose(like), order[:, :top_k])

    def test_places_behind_the_first_choice(self):
        order = made_up_order((4,), 6, 1, chosen=[5, 3], places=2)
        assert [sorted(row) for row in order[:, :2].tolist()] == [[3, 5]] * 4
        assert order[:, 2:].unique().tolist() == [0, 1, 2, 4]
        order = made_up_order((2, 2), 6, 1, last=5, chosen=[5, 3, 4], places=1)
        assert order[..., -1].flatten().tolist()[0] == 5
        assert order[..., 0].flatten().tolist()[1:3] == [3, 4]
