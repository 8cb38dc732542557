"""How a block is run, and on what."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sere_compile.compiler import dynamo
from sere_compile.compiler.outside import trial as module
from sere_compile.compiler.outside.made_up_choices import Draw
from sere_compile.compiler.outside.trial import shift

from ...passes.graph.written import Written
from .blocks import EXPERTS, HIDDEN, TOP_K, Block, Experts, MaskedLater, rows
from .trials import EagerTrial, parameters, raising, returning, trial_of, verdicts, watched_compiling


class Layer(nn.Module):
    """Router and experts inside a layer that takes more than hidden states."""

    def __init__(self, experts):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts

    def forward(self, x, *, scale):
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        return x + self.experts(x * scale, ids, weights)


def test_a_layer_is_run_on_what_it_is_called_with():
    assert [v.merged for v in verdicts(Layer(Experts()), rows()[0], scale=2.0)] == [True]


def test_where_torch_compile_copies_what_it_is_given(monkeypatch):
    """As Lightning's does, which keeps a deep copy of the arguments."""
    own = torch.compile

    def copying(*args, **kwargs):
        copy.deepcopy(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", copying)
    assert [v.merged for v in verdicts(Block(Experts()), rows())] == [True]


def test_the_model_is_left_as_it_was():
    """Parameters, buffers, hooks and the state of the random generator."""
    model = Block(Experts())
    model.register_buffer("seen", torch.zeros(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert [v.merged for v in verdicts(model, rows())] == [True]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_mask_that_only_a_later_call_has():
    """The graph before the break serves that call too: it did not ask."""
    [verdict] = verdicts(MaskedLater(lambda given: given[:, None]), rows()[0])
    assert verdict.merged is None
    assert "mark their ids with -1 before the graph ends" in verdict.reason


def test_the_mask_of_a_long_prompt_is_tried():
    """Though so many tokens are not: the block takes made-up hidden states without a mask as well."""
    long = torch.randn(100, HIDDEN)
    block = MaskedLater(lambda given: given[:, None])
    assert [v.merged for v in verdicts(block, long, torch.ones(100, dtype=torch.bool))] == [None]


class TestTrialsWithoutCompiling:
    """What is concluded from runs of a block, in no time: what makes them run is tested elsewhere."""

    def test_what_is_tried_as_input(self):
        """What the model calls the block with, if that is little; else made-up hidden states of one batch, or none."""
        trial = EagerTrial(Experts())
        assert [a.shape for a in trial.inputs()[0]] == [(1, 12, HIDDEN)]
        trial._called_with = ((torch.ones(5, HIDDEN).double(),), {})
        found = trial.inputs()[0][0]
        assert (found.shape, found.dtype) == ((5, HIDDEN), torch.float32)
        w = Written()
        trial.gate.ids = w.input(torch.zeros(200, TOP_K, dtype=torch.int64))
        assert [a.shape for a in trial.inputs()[0]] == [(1, 12, HIDDEN)]
        trial.gate.ids = w.input(torch.zeros(64, TOP_K, dtype=torch.int64))
        assert [a.shape for a in trial.inputs()[0]] == [(5, HIDDEN)]
        trial.gate.ids = w.input(torch.zeros(65, TOP_K, dtype=torch.int64))
        trial._called_with = None
        trial._call = lambda x: trial.block.module(x) if x.dim() == 2 else [][0]
        assert [a.shape for a in trial.inputs()[0]] == [(12, HIDDEN)]

    def test_how_wide_made_up_hidden_states_are(self):
        """As what the router reads; else, where that is not known, as its weight."""
        trial = EagerTrial(Experts())
        trial.block.weight = torch.zeros(HIDDEN, EXPERTS)
        assert trial.inputs()[0][0].shape[-1] == HIDDEN
        trial.block.weight = torch.zeros(EXPERTS, HIDDEN)
        trial.gate.router_input = Written().graph.placeholder("unknown")
        assert trial.inputs()[0][0].shape[-1] == HIDDEN

    @pytest.mark.parametrize(
        ("sizes", "by_sequence", "dim"),
        [
            ((5,), False, 0),
            ((1, 5), False, 1),
            ((5, 1), False, 1),
            ((5, 7), False, 0),
            ((7, 5), False, 1),
            ((1, 7), True, 0),
            ((5, 2, 7), False, 2),
            ((1, 2, 7), True, 2),
            ((5,), True, 0),
        ],
    )
    def test_what_counts_who_chooses(self, sizes, by_sequence, dim):
        """Tokens; in [B, T, H] sequences, where there are as many choices, or one was seen to be made for all."""
        trial = EagerTrial(Experts())  # five choose
        trial._by_sequence = by_sequence
        assert trial.counting_dim(torch.zeros(*sizes, HIDDEN)) == dim

    def test_runs_tell_what_is_returned_and_written(self):
        trial = EagerTrial(Experts())
        x = torch.randn(5, HIDDEN, requires_grad=True)
        [out] = trial.run(((x,), {}), seed=4)
        assert not out.requires_grad
        assert torch.equal(trial.run(((x,), {}), seed=4)[0], out)
        assert not torch.equal(trial.run(((x,), {}), seed=6)[0], out)
        assert torch.equal(trial.run(((), {"x": x}), seed=4)[0], out)
        assert len(trial.graphs.ids) == len(trial.graphs.weights) == 1
        state = torch.get_rng_state()
        trial.run(((x,), {}))
        assert torch.equal(torch.get_rng_state(), state)


class TestRunsOfATrial:
    X = ((torch.randn(5, HIDDEN),), {})

    @pytest.mark.parametrize(
        ("tokens", "masked", "order"),
        [
            (64, False, ["called", "made up", "one batch"]),
            (64, True, ["called", "made up", "one batch"]),
            (65, False, ["made up", "one batch", "called"]),
            (65, True, ["few", "made up", "one batch", "called"]),
        ],
    )
    def test_what_is_tried_as_input_in_order(self, tokens, masked, order):
        """The first for which a graph with the gate is made; what was found of those before does not count."""
        trial, hidden = trial_of(_of_many=lambda given: given), torch.randn(tokens, HIDDEN).double()
        mask = (torch.ones(tokens, dtype=torch.bool),) if masked else ()
        trial._called_with = ((hidden, *mask), {})
        trial.gate.ids = Written().input(torch.zeros(tokens, TOP_K, dtype=torch.int64))
        kinds = {(tokens, HIDDEN): "called", (12, HIDDEN): "few" if masked else "one batch", (1, 12, HIDDEN): "made up"}
        for last in (*order, None):
            seen = []

            def run(given, seen=seen, last=last):
                assert given[0][0].dtype == torch.float32
                few = len(given[0]) > 1 and len(given[0][1]) == 12
                of = kinds[given[0][0].shape] if few or given[0][0].shape != (12, HIDDEN) else "one batch"
                seen.append(of)
                assert trial.graphs.found == []
                if of == last:
                    trial.graphs.found.append("gate")
                elif len(seen) % 2:
                    trial.graphs.found.append("of a call that fails")
                    raise ValueError(of)

            trial.run = run
            found = trial.inputs()
            assert seen == order[: order.index(last) + 1 if last else None]
            assert (found is None) is (last is None)

    def test_what_differs_between_two_runs_is_restless(self):
        """Also what only one has left; True where it is of other sizes, too."""
        left = [
            {"": 1, "time": 0.5, "log": [1], "same": 1.0, "gone": 1},
            {"": 1, "time": 0.7, "log": [1, 2], "same": 1.0, "new": 1},
        ]
        trial = trial_of()
        runs = iter(left)
        trial.run = lambda inputs: setattr(trial, "kept", next(runs))
        assert trial.find_restless(self.X) == {"time": False, "log": True, "gone": True, "new": True}

    def test_what_is_left_alike(self):
        trial = trial_of()
        trial.restless = {"time": False, "log": True}
        alike = trial.is_left_alike
        assert alike("log", [1], None)
        assert alike("time", 0.5, 0.7)
        assert not alike("time", 0.5, None)
        assert alike("last", 0.5, 0.5)
        assert not alike("last", 0.5, 0.7)

    @pytest.mark.parametrize(
        ("results", "ids", "serves"),
        [
            ([torch.ones(2), torch.ones(2, dtype=torch.int64)], [0], True),
            ([], [0], True),
            ([torch.ones(2)], [], False),
            ([torch.ones(2), torch.tensor([1.0, float("nan")])], [0], False),
            ([torch.tensor([float("inf")])], [0], False),
        ],
    )
    def test_a_call_that_is_served(self, results, ids, serves):
        """The gate runs, and all that comes out is finite."""
        trial = trial_of(run=returning(results), ids=ids)
        assert trial._serves(self.X) is serves

    def test_a_call_that_is_not_taken(self):
        for error in (RuntimeError, KeyError, AttributeError):
            assert trial_of(run=raising(error()), ids=[0])._serves(self.X) is False

    def test_other_calls_are_made_up_once(self, monkeypatch):
        """Of the inputs, and of those with a mask that they do not have, where the block takes it."""
        made = []
        monkeypatch.setattr(module, "other_calls", lambda given, block: [(given, number) for number in range(2)])

        def with_masks(given, block, leading, device):
            made.append((given, leading, device))
            return ["taken", "refused"]

        monkeypatch.setattr(module, "with_masks", with_masks)
        trial = trial_of(_serves=lambda given: given not in ("refused", ("taken", 1), (self.X, 0)))
        assert trial.other_calls(self.X) == [(self.X, 1), ("taken", 0)]
        assert made == [(self.X, (5,), torch.device("cpu"))]
        assert trial.other_calls(None) == [(self.X, 1), ("taken", 0)]
        assert len(made) == 1
        without = ((torch.arange(5),), {})
        assert list(trial_of(_serves=returning(True))._made_up_calls(without)) == [(without, 0), (without, 1)]
        assert len(made) == 1

    @pytest.mark.parametrize(
        ("sizes", "choices", "several"),
        [((1, 4), TOP_K, True), ((1, 4), TOP_K + 1, False), ((4,), TOP_K, False), ((1, 4), 1, True)],
    )
    def test_several_sequences_where_one_choice_is_made_for_one(self, sizes, choices, several):
        ran, given = [], ((torch.randn(*sizes, HIDDEN),), {})
        trial = trial_of(run=ran.append, ids=[torch.zeros(choices)], found=["before"])
        found = trial._of_many(given)
        assert trial._by_sequence is several
        if several:
            assert (found[0][0].shape, ran, trial.graphs.found) == ((12, 4, HIDDEN), [found], [])
        else:
            assert (found is given, ran, trial.graphs.found) == (True, [], ["before"])
        without = ((torch.arange(5),), {})
        assert trial._of_many(without) is without

    def test_what_a_run_is_told(self):
        trial = trial_of(_run_once=returning(["result"]))
        assert trial.run(self.X) == ["result"]
        assert (trial.graphs.version, trial.graphs.draw) == ("original", Draw(0, "own", None, ()))
        trial.run(self.X, "merged", 3, scores="others", absent=2, chosen=[1])
        assert (trial.graphs.version, trial.graphs.draw) == ("merged", Draw(3, "others", 2, [1]))
        trial.run(self.X, seed=3, scores="equal")
        assert (trial.graphs.version, trial.graphs.draw) == ("original", Draw(3, "equal", None, ()))

    def test_code_behind_the_graph_is_not_compiled_anew(self, monkeypatch):
        """But the graph is, where no graph serves the call."""
        ran, inside = [], watched_compiling(monkeypatch)
        trial = trial_of(ids=[0])
        trial._run_once = lambda inputs: ran.append(bool(inside)) or len(ran)
        assert (trial.run(self.X), ran) == (1, [False])
        trial.is_compiled = True
        assert (trial.run(self.X), ran) == (2, [False, True])
        trial.graphs.ids = []
        assert (trial.run(self.X), ran) == (4, [False, True, True, False])

    def test_a_run_leaves_its_inputs_and_its_block_as_they_were(self):
        class Writing(Experts):
            def __init__(self):
                super().__init__()
                self.register_buffer("load", torch.zeros(2))
                self.last = None

            def forward(self, x, ids, weights):
                out = super().forward(x, ids, weights)
                self.load += 1
                self.last = x.mul_(2)
                return out, "word"

        trial, given = EagerTrial(Writing()), ((torch.ones(5, HIDDEN),), {})
        experts = trial.block.module.experts
        before = experts.load.clone()
        for _ in range(2):
            out, load = trial.run(given)
            assert torch.equal(load, before + 1)
        assert (given[0][0].sum(), experts.last) == (5 * HIDDEN, None)
        assert torch.equal(experts.load, before)
        assert set(trial.kept) == {"", "experts.last"}
        assert trial.written >= {"", "experts.last"}
        assert trial.kept["experts.last"].sum() == 2 * 5 * HIDDEN
        assert torch.equal(trial.kept[""][2][1], out)
        trial.block.module.experts = Experts()
        trial.run(given)
        assert trial.written >= {"", "experts.last"}

    def test_what_a_trial_is_made_of(self, monkeypatch):
        """A block that is compiled by a backend of its own, for one size."""
        asked = []
        monkeypatch.setattr(torch, "compile", lambda block, **options: asked.append((block, options)))
        trial = trial_of()
        [(block, options)] = asked
        assert block is trial.block.module
        assert list(options) == ["backend", "dynamic"]
        assert isinstance(options["backend"], dynamo.OwnBackend)
        assert options["dynamic"] is False

    def test_what_is_around_a_run(self, recwarn):
        """No gradients, no inference mode, the same random numbers in each; its warnings are not the program's."""
        trial, drawn = trial_of(), []
        state = torch.get_rng_state()
        for outer in (torch.inference_mode, torch.enable_grad):
            with outer(), trial.aside_of_model():
                assert not torch.is_inference_mode_enabled()
                assert not torch.is_grad_enabled()
                drawn.append(float(torch.rand(1)))
                warnings.warn("of a trial", stacklevel=1)
        assert drawn[0] == drawn[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert len(recwarn) == 0

    def test_parameters_that_the_call_keeps_are_not_a_trials(self):
        """`parametrize.cached()` around a call is in force while it is compiled."""
        trial = trial_of()
        parametrize.register_parametrization(trial.block.module.experts, "w", nn.Tanh())
        with parametrize.cached():
            with trial.aside_of_model():
                assert trial.block.module.experts.w is not trial.block.module.experts.w
            assert trial.block.module.experts.w is trial.block.module.experts.w

    def test_hidden_states_may_vary_in_number(self, monkeypatch):
        told = []
        monkeypatch.setattr(dynamo, "let_vary", lambda tensor, dim: told.append((tensor.shape, dim)))
        trial = trial_of()
        trial.run(((torch.randn(1, 7, HIDDEN),), {}))
        trial.run(((torch.randn(7, HIDDEN),), {}))
        trial.block.module.forward = lambda x, mask: x
        trial.run(((torch.randn(7, HIDDEN), torch.ones(7)), {}))
        assert told == [((1, 7, HIDDEN), 1), ((7, HIDDEN), 0)]


class TestWhatIsMadeUp:
    def test_an_exchange_moves_every_expert(self):
        assert shift(3) == {0: 1, 1: 2, 2: 0}


class TestWhoseParametersTheyAre:
    """What is concluded from the outputs of runs with others in their place."""

    X = ((torch.randn(5, HIDDEN),), {})

    def test_an_exchange(self):
        """Of all experts, at the same choice and scores."""
        trial, ran = EagerTrial(Experts()), []
        [w] = parameters(trial, "experts.w")
        kept = w.tensors[0].clone()
        trial.run = lambda *given, **options: ran.append((given, options, w.tensors[0].clone())) or len(ran)
        assert trial.with_exchange([w], self.X, seed=3, scores="equal") == (1, 2)
        assert [(given, options) for given, options, _ in ran] == [((self.X,), {"seed": 3, "scores": "equal"})] * 2
        assert torch.equal(ran[0][2], kept)
        assert torch.equal(ran[1][2], kept.roll(-1, 0))
        assert torch.equal(w.tensors[0], kept)
