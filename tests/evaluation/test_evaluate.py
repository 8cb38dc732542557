"""The evaluator against real decoding, step by step."""

from __future__ import annotations

import math
import re
import types

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sere_compile
from sere_compile.errors import EvaluationError
from sere_compile.evaluation import Reroute, TopS, evaluate_rules
from sere_compile.evaluation.evaluate import (
    _MOST_LOGITS,
    _attached_matrices,
    _batches_a_forward,
    _checked_mask,
    _inputs,
    _Recorder,
)
from sere_compile.evaluation.routing import GateCall, RoutedModel
from sere_compile.similarity import binding

from ..tiny_models import build, random_profile, tokens


def lockstep_logits(model, ids, profile, select_top_k, **options):
    """Logits [B, L, V] of a decode with a cache, one position of all sequences a step, through the backend."""
    sere_compile.attach(model, profile)
    options = {"select_top_k": select_top_k, "inner": "eager", **options}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sere", options=options, dynamic=True)
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            step = compiled(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
    return torch.cat(steps, 1)


def routed_logits(model, ids, rule, real=None):
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    routed = RoutedModel(model)
    routed.decide = _Recorder(rule, real)
    return routed(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "select", "threshold"),
    [
        pytest.param("qwen3_moe", 2, 0.6, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 1, 0.0, marks=pytest.mark.slow),
        ("mixtral", 1, 0.0),
    ],
)
def test_one_forward_equals_a_lockstep_decode(name, select, threshold):
    """Every position routes as the step of a real decode does, caches, min_active and critical experts included."""
    model = build(name)
    profile = random_profile(model)
    ids = tokens(batch=5, length=6)
    expected = lockstep_logits(model, ids, profile, select, threshold=threshold)
    rule = Reroute(profile, select, threshold)
    got = routed_logits(model, ids, rule)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    whole = model(input_ids=ids, use_cache=False).logits
    assert (whole - expected).abs().max() > 1e-2, "re-routing changed nothing here"


@pytest.fixture(scope="module")
def qwen():
    model = build("qwen3_moe")
    return model, random_profile(model)


@pytest.mark.slow
def test_sequences_decode_together_in_the_order_given(qwen):
    """Two decoding batches of two are two lockstep decodes; experts touched are counted by step and batch."""
    model, profile = qwen
    ids = tokens(batch=4, length=5)
    rule = Reroute(profile, 1, min_active=0)
    both = evaluate_rules(model, ids, {"sere": rule}, decode_batch=2)["sere"]
    halves = [evaluate_rules(model, half, {"sere": rule}, decode_batch=2)["sere"] for half in ids.split(2)]
    assert both.tokens == sum(half.tokens for half in halves) == 4 * 4
    assert both.kl == pytest.approx(sum(half.kl for half in halves) / 2)
    assert both.mean_active_after == pytest.approx(sum(half.mean_active_after for half in halves) / 2)
    assert both.mean_active_after < both.mean_active_before
    together = evaluate_rules(model, ids, {"sere": rule}, decode_batch=4)["sere"]
    assert together.mean_active_after > both.mean_active_after


@pytest.mark.slow
def test_padding_changes_nothing_for_real_tokens(qwen):
    """Rows of length 6 and 3, padded to one length and decoded one by one, are the rows without padding."""
    model, profile = qwen
    ids = tokens(batch=2, length=6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    rule = {"sere": Reroute(profile, 1, min_active=0)}

    def measured(rows, real=None):
        return evaluate_rules(model, rows, rule, decode_batch=1, attention_mask=real)["sere"]

    padded, parts = measured(ids, mask), [measured(ids[:1]), measured(ids[1:, 3:])]
    assert padded.tokens == sum(part.tokens for part in parts) == 5 + 2
    for value in ("perplexity", "original_perplexity"):
        logs = [math.log(getattr(part, value)) * part.tokens for part in parts]
        assert math.log(getattr(padded, value)) == pytest.approx(sum(logs) / 7, rel=1e-4)
    assert padded.kl == pytest.approx(sum(part.kl * part.tokens for part in parts) / 7, rel=1e-3)
    for value in ("mean_active_before", "mean_active_after"):
        steps = zip(parts, (6, 3), strict=True)  # every position is a step of its layers
        assert getattr(padded, value) == pytest.approx(sum(getattr(part, value) * n for part, n in steps) / 9)


@pytest.mark.slow
def test_padding_beside_a_row_that_has_begun(qwen):
    """What stands there routes nothing and counts for nothing."""
    model, profile = qwen
    ids = tokens(batch=2, length=6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    rule = {"sere": Reroute(profile, 1, min_active=0)}
    other = ids.clone()
    other[1, :3] = 7
    first, second = (
        evaluate_rules(model, rows, rule, decode_batch=2, attention_mask=mask)["sere"] for rows in (ids, other)
    )
    assert first.tokens == 5 + 2
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
    assert first.mean_active_after == second.mean_active_after
    alone = evaluate_rules(model, ids[:1], rule, decode_batch=1)["sere"]
    assert first.mean_active_before > alone.mean_active_before, "the second row, once it has begun, adds experts"


def test_evaluate_hands_its_mask_on(qwen):
    model, profile = qwen
    ids = tokens(batch=2, length=4)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    found = sere_compile.evaluate(model, ids, profile=profile, decode_batch=2, attention_mask=mask, select_top_k=1)
    assert found.tokens == 3 + 1


def test_all_experts_primary_is_the_original(qwen):
    model, profile = qwen
    result = evaluate_rules(model, tokens(), {"same": Reroute(profile, 4)}, decode_batch=4)["same"]
    assert result.perplexity == result.original_perplexity
    assert (result.kl, result.top1_agreement) == (0, 1)


def test_perplexity_is_that_of_the_model(qwen):
    """The yardstick itself, against transformers' loss."""
    model, profile = qwen
    ids = tokens()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    result = evaluate_rules(model, ids, {"same": Reroute(profile, 4)}, decode_batch=4)["same"]
    assert result.original_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, "do not make decoding batches of decode_batch=2"),
        ({"tokens": torch.zeros(0, 4, dtype=torch.int64)}, "0 sequences do not make decoding batches"),
        ({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, "length >= 2"),
        ({"tokens": torch.zeros(2, 4)}, r"must be integers .* got \(2, 4\)"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"must be integers .* got \(4,\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask is \(2, 3\), tokens are \(2, 4\)"),
        ({"attention_mask": torch.zeros(2, 4)}, "leaves no token to predict"),
    ],
)
def test_what_cannot_be_evaluated_says_why(qwen, change, message):
    arguments = {"tokens": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": None, **change}
    with pytest.raises(sere_compile.EvaluationError, match=message):
        evaluate_rules(qwen[0], rules={"same": Reroute(qwen[1], 1)}, decode_batch=2, **arguments)


def test_a_model_without_gates_is_an_error():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(sere_compile.EvaluationError, match="no MoE gate"):
        evaluate_rules(model, tokens(), {"same": Reroute({}, 1)}, decode_batch=4)


def test_evaluate_takes_the_backends_options_and_the_attached_profile(qwen):
    model, profile = qwen
    by_rule = evaluate_rules(model, tokens(), {"sere": Reroute(profile, 1, 0.5, 0)}, decode_batch=2)["sere"]
    sere_compile.detach(model)
    with pytest.raises(sere_compile.EvaluationError, match="no similarity profile"):
        sere_compile.evaluate(model, tokens(), decode_batch=2)
    sere_compile.attach(model, profile)
    options = {"select_top_k": 1, "threshold": 0.5, "min_active": 0}
    result = sere_compile.evaluate(model, tokens(), decode_batch=2, **options)
    assert result == by_rule
    assert "active experts" in str(result)
    with pytest.raises(sere_compile.ConfigError, match="select_top_k"):
        sere_compile.evaluate(model, tokens(), select_topk=1)


@pytest.mark.slow
def test_progress(qwen, capsys):
    """A bar of forwards, the original's and each rule's, if it is asked for."""
    model, _ = qwen
    rules = {"a": TopS(1), "b": TopS(2)}
    evaluate_rules(model, tokens(8, 6), rules, decode_batch=4)
    assert capsys.readouterr().err == ""
    evaluate_rules(model, tokens(8, 6), rules, decode_batch=4, progress=True)
    shown = capsys.readouterr().err
    assert "evaluating, decode batch 4: 100%" in shown
    assert "3/3" in shown


class TestRecorder:
    """Rows of the model's order [rows x positions], position by position of a decoding batch, and back."""

    @staticmethod
    def call(rows, top_k=2, experts=5, choice=False):
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(rows, experts, generator=generator)
        weights, ids = scores.topk(top_k)
        return GateCall("gate", scores[:0], scores[:, :1], scores, ids, weights, scores.neg() if choice else None)

    def test_positions_of_a_batch_are_decided_together(self):
        """Four rows of three positions in batches of two: six batches of two tokens."""
        seen = []

        def rule(batch):
            seen.append(batch)
            return batch.ids + 0, batch.weights * 2

        call = self.call(12, choice=True)
        real = torch.ones(4, 3, dtype=torch.bool)
        real[1, 0] = real[2, 2] = False
        recorder = _Recorder(rule, real, 2)
        ids, weights = recorder(call)
        assert torch.equal(ids, call.ids)
        torch.testing.assert_close(weights, call.weights * 2)
        [batch] = seen
        order = [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
        for told, given in ((batch.ids, call.ids), (batch.scores, call.scores), (batch.choice, -call.scores)):
            assert torch.equal(told, given[torch.tensor(order)])
        assert (~batch.real).nonzero().tolist() == [[0, 1], [5, 0]]
        assert batch.name == "gate"

    def test_active_experts_of_steps_with_a_token(self):
        call = self.call(6)
        real = torch.tensor([[True, True, False], [True, False, False]])
        recorder = _Recorder(None, real)
        ids, weights = recorder(call)
        assert torch.equal(ids, call.ids)
        assert torch.equal(weights, call.weights)
        first = len(set(call.ids[0].tolist()) | set(call.ids[3].tolist()))
        assert recorder.active == {"gate": first + 2}

    def test_tokens_that_are_no_rows_of_the_forward(self):
        with pytest.raises(EvaluationError, match="gate routed 5 tokens in a forward over 6"):
            _Recorder(None, torch.ones(2, 3, dtype=torch.bool))(self.call(5))


class TestWhatIsGiven:
    @pytest.mark.parametrize(
        ("shape", "batch", "message"),
        [
            ((4,), 2, "length >= 2, got (4,)"),
            ((4, 1), 2, "length >= 2, got (4, 1)"),
            ((2, 2, 2), 2, "length >= 2, got (2, 2, 2)"),
            ((4, 2), 0, "decode_batch=0"),
            ((0, 2), 1, "0 sequences do not"),
            ((4, 2), 3, "4 sequences do not"),
        ],
    )
    def test_shapes(self, shape, batch, message):
        with pytest.raises(EvaluationError, match=re.escape(message)):
            _checked_mask(torch.zeros(shape, dtype=torch.int64), None, batch)

    def test_floating_point_tokens(self):
        with pytest.raises(EvaluationError, match="tokens must be integers"):
            _checked_mask(torch.zeros(4, 2), None, 2)

    def test_masks(self):
        """Of the tokens' shape, with two real tokens in a row somewhere; none is a full one."""
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        assert _checked_mask(tokens, None, 2).tolist() == [[True] * 3] * 2
        assert _checked_mask(tokens, None, 1).shape == (2, 3)
        mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
        assert torch.equal(_checked_mask(tokens, mask, 2), mask.bool())
        with pytest.raises(EvaluationError, match="leaves no token to predict"):
            _checked_mask(tokens, torch.tensor([[1, 0, 1], [0, 0, 1]]), 2)
        with pytest.raises(EvaluationError, match=re.escape("attention_mask is (2, 2), tokens are (2, 3)")):
            _checked_mask(tokens, torch.ones(2, 2), 2)

    def test_batches_a_forward(self):
        """As many as keep the logits within a limit, one at least, and one where the vocabulary is not known."""

        def model(size):
            return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=size))

        assert _batches_a_forward(model(_MOST_LOGITS // 60), 5, 4) == 3
        assert _batches_a_forward(model(_MOST_LOGITS), 5, 4) == 1
        assert _batches_a_forward(model(None), 5, 4) == _batches_a_forward(object(), 5, 4) == 1

    def test_inputs(self):
        """Positions count real tokens, from 0 on."""
        tokens, real = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
        assert set(_inputs(tokens, real, padded=False)) == {"input_ids", "use_cache"}
        given = _inputs(tokens, real, padded=True)
        assert given["use_cache"] is False
        assert given["input_ids"] is tokens
        assert given["attention_mask"].tolist() == real.long().tolist()
        assert given["position_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 2, 3]]


def test_matrices_that_are_attached():
    """Of gates that have one; coefficients where there are some."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3, bias=False) for name in "abc"})
    with pytest.raises(EvaluationError, match="no similarity profile"):
        _attached_matrices(model)
    binding.name(model["a"].weight, "a.weight")
    with pytest.raises(EvaluationError, match="no similarity profile"):
        _attached_matrices(model)
    binding.assign(model["b"].weight, "b.weight", torch.eye(3), "")
    binding.assign(model["c"].weight, "c.weight", torch.eye(3), "", projection=torch.ones(3, 3))
    matrices, projections = _attached_matrices(model)
    assert (set(matrices), set(projections)) == ({"b.weight", "c.weight"}, {"c.weight"})
