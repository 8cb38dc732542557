"""Arguments of a block, and others of the same kind."""

import torch

from sere_compile.compiler.outside.arguments import detached, half_masked, hidden_of, in_float32, turned, with_rows

from .blocks import HIDDEN


class TestWhatIsMadeUp:
    def test_other_hidden_states(self):
        """Of the same kind; what is no floating-point number stays."""
        ids = torch.arange(3)
        assert turned(ids) is ids
        assert turned("x") == "x"
        assert turned(torch.tensor([2.0, 4.0])).tolist() == [2.0, 1.0]
        assert in_float32(torch.ones(2).half()).dtype == torch.float32
        assert in_float32(ids) is ids
        assert in_float32(7) == 7
        value = torch.ones(2, requires_grad=True)
        assert not detached(value).requires_grad
        assert detached(7) == 7


class TestCallsInGraphs:
    """What stands in a block's graph while it is tried."""

    def test_a_mask_of_tokens_marks_the_second_half(self):
        assert half_masked(torch.ones(5, dtype=torch.bool), 5).tolist() == [True, True, False, False, False]
        assert half_masked(torch.ones(2, 2, dtype=torch.bool), 4).tolist() == [[True, True], [False, False]]
        assert half_masked(torch.ones(2, dtype=torch.bool), 2).tolist() == [True, False]
        others = (7, torch.ones(1, dtype=torch.bool), torch.ones(5), torch.ones(4, dtype=torch.bool))
        for value, tokens in zip(others, (5, 1, 5, 5), strict=True):
            assert half_masked(value, tokens) is value


class TestArgumentsOfATrial:
    X = torch.randn(5, HIDDEN)

    def test_hidden_states_are_all_the_tensors_there_are(self):
        """Floats, of two tokens or more."""
        x = self.X
        for hidden in (x, x[None], torch.zeros(3, 2, 4), torch.zeros(2, 1)):
            assert hidden_of(((hidden, "word", 2.5), {"flag": None})) is hidden
            assert hidden_of(((), {"x": [hidden]})) is hidden
        for hidden in (x[0], x[:1], x[:, None], x[None, None], x.long(), x > 0, "word"):
            assert hidden_of(((hidden,), {})) is None
        assert hidden_of(((x, torch.ones(5)), {})) is None
        assert hidden_of(((), {})) is None

    def test_more_rows(self):
        """The same each time; what else is given stays."""
        for dim, sizes in ((0, (7, 5, HIDDEN)), (1, (3, 7, HIDDEN))):
            x, word = torch.ones(3, 5, HIDDEN).double(), "word"
            (made, same), kwargs = with_rows(((x, word), {"flag": 1}), dim, 7)
            assert (made.shape, made.dtype, same, kwargs) == (sizes, torch.float64, word, {"flag": 1})
            assert torch.equal(made, with_rows(((x, word), {}), dim, 7)[0][0])
            assert made.std() > 0.5
            assert (x == 1).all()
