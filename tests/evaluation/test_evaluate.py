"""The evaluator against real decoding, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sere_compile
from sere_compile.evaluation import Reroute, TopS, evaluate_rules
from sere_compile.evaluation.evaluate import _Recorder
from sere_compile.evaluation.routing import RoutedModel

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
        ("qwen3_moe", 2, 0.6),
        pytest.param("qwen3_moe", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("mixtral", 1, 0.0, marks=pytest.mark.slow),
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
