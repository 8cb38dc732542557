"""Quality under re-routing, as in decoding.

One teacher-forced forward over many tokens is one huge routing batch: its primary set saturates, and re-routing looks
lossless. Here every position of B aligned sequences is a routing batch of its own, as in a lockstep decode, and all of
them go through the model in one forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import SereConfig
from ..errors import EvaluationError, expect
from ..similarity import binding
from ..similarity.profile import SimilarityProfile
from .configured import ConfiguredRule
from .result import Evaluation, Totals
from .routing import GateCall, RoutedModel
from .rules import RoutingBatch, Rule, active_experts

# The type of the keys of rules: a string, a setting, a configuration.
Name = TypeVar("Name", bound=Hashable)

# Logits of one forward, unless a single decoding batch makes more.
_MOST_LOGITS = 2**25


def evaluate(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    profile: SimilarityProfile | None = None,
    decode_batch: int = 16,
    attention_mask: torch.Tensor | None = None,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Compare a model that decodes with re-routing to the unchanged model, on held-out tokens.

    Sequences i*B .. i*B + B - 1 decode together, and every position of them is a routing batch of its own.

    Example:
        >>> sere_compile.evaluate(model, tokens, profile=profile, decode_batch=16, select_top_k=1)

    Args:
        model: as for `evaluate_rules`.
        tokens: int64 [N, L], N a multiple of `decode_batch`.
        profile: similarity; None: the one attached to the model, or none where every gate is filled.
        decode_batch: B.
        attention_mask: [N, L], 0 at padding.
        progress: show a bar.
        **options: of `SereConfig`, as for the backend.

    Raises:
        ArgumentError: `model` is no nn.Module.
        ConfigError: an unknown option or a bad value.
        EvaluationError: no profile, or what `evaluate_rules` raises.
    """
    expect(model, nn.Module, "evaluate takes a torch.nn.Module")
    config = SereConfig().replace(**options)
    if profile is not None:
        rule = ConfiguredRule.of(config, profile)
    elif config.fills_everywhere:
        rule = ConfiguredRule(config, {})
    else:
        rule = ConfiguredRule(config, *_attached_matrices(model))
    return evaluate_rules(
        model, tokens, {"": rule}, decode_batch=decode_batch, attention_mask=attention_mask, progress=progress
    )[""]


def _attached_matrices(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    entries = {name: binding.lookup(parameter) for name, parameter in model.named_parameters()}
    bound = {name: entry for name, entry in entries.items() if entry is not None and entry.matrix is not None}
    if not bound:
        raise EvaluationError("no similarity profile: pass profile=, or attach one with sere_compile.attach")
    matrices = {name: entry.matrix for name, entry in bound.items() if entry.matrix is not None}
    return matrices, {name: entry.projection for name, entry in bound.items() if entry.projection is not None}


def evaluate_rules(
    model: nn.Module,
    tokens: torch.Tensor,
    rules: Mapping[Name, Rule],
    *,
    decode_batch: int = 16,
    attention_mask: torch.Tensor | None = None,
    progress: bool = False,
) -> dict[Name, Evaluation]:
    """Compare a model under each of several routing rules to the unchanged model.

    Sequences i*B .. i*B + B - 1 decode together: order them as they would be served, mixed or by domain.

    Args:
        model: a causal language model that takes `input_ids` and gives `.logits`; its forward must see the tokens
            in the order [batch, position].
        tokens: int64 [N, L], N a multiple of `decode_batch`.
        rules: by name; see `sere_compile.evaluation.rules`.
        decode_batch: B.
        attention_mask: [N, L], 0 at padding: padding activates no expert, and predictions of padding or from it
            do not count.
        progress: show a bar, which counts forwards over the same tokens: one of the original, one for each rule.

    Raises:
        EvaluationError: wrong shapes, nothing to predict, no gate, or a gate that cannot be re-routed.
    """
    mask = _checked_mask(tokens, attention_mask, decode_batch)
    routed = RoutedModel(model)
    totals = {name: Totals() for name in rules}
    training = model.training
    model.eval()
    rows = decode_batch * _batches_a_forward(model, tokens.shape[1], decode_batch)
    parts = list(zip(tokens.to(_device(model)).split(rows), mask.to(_device(model)).split(rows), strict=True))
    bar = _bar(len(parts) * (1 + len(rules)), decode_batch, progress)
    try:
        for part, real in parts:
            inputs = _inputs(part, real, padded=attention_mask is not None)
            before = _Recorder(None, real, decode_batch)
            routed.decide = before
            original = _log_probabilities(routed(**inputs))
            bar.update()
            for name, rule in rules.items():
                after = _Recorder(rule, real, decode_batch)
                routed.decide = after
                changed = _log_probabilities(routed(**inputs))
                totals[name].add(original, changed, part, real, before.active, after.active, decode_batch)
                bar.update()
    finally:
        bar.close()
        model.train(training)
    return {name: total.result(decode_batch) for name, total in totals.items()}


class _Recorder:
    """Applies a rule to every position of every decoding batch, and keeps the number of active experts.

    Args:
        rule: None leaves routing unchanged.
        real: bool [rows, length], False at padding.
        decode_batch: B, divides rows; None: all rows are one decoding batch.
    """

    def __init__(self, rule: Rule | None, real: torch.Tensor, decode_batch: int | None = None) -> None:
        self._rule = rule
        self._batch = decode_batch or len(real)
        self._length = real.shape[1]
        self._real = self._by_position(real.flatten()[:, None])[..., 0]
        self.active: dict[str, float] = {}

    def __call__(self, call: GateCall) -> tuple[torch.Tensor, torch.Tensor]:
        if len(call.ids) != self._real.numel():
            raise EvaluationError(
                f"{call.name} routed {len(call.ids)} tokens in a forward over {self._real.numel()}: its tokens cannot "
                "be told apart by position"
            )
        ids, weights, scores = map(self._by_position, (call.ids, call.weights, call.scores))
        choice = None if call.choice is None else self._by_position(call.choice)
        batch = RoutingBatch(call.name, ids, weights, scores, self._real, choice)
        ids, weights = (batch.ids, batch.weights) if self._rule is None else self._rule(batch)
        steps = self._real.any(1)
        self.active[call.name] = active_experts(batch, ids, weights)[steps].float().sum().item()
        return self._in_order(ids), self._in_order(weights)

    def _by_position(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, n] in the model's order as [decoding batches x positions, B, n]."""
        apart = rows.view(-1, self._batch, self._length, rows.shape[-1])
        return apart.transpose(1, 2).flatten(0, 1)

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        apart = values.view(-1, self._length, self._batch, values.shape[-1])
        return apart.transpose(1, 2).reshape(-1, values.shape[-1])


def _checked_mask(tokens: torch.Tensor, attention_mask: torch.Tensor | None, decode_batch: int) -> torch.Tensor:
    shape = tuple(tokens.shape)
    if len(shape) != 2 or shape[1] < 2 or tokens.is_floating_point():
        raise EvaluationError(f"tokens must be integers [sequences, length] with length >= 2, got {shape}")
    if decode_batch < 1 or not shape[0] or shape[0] % decode_batch:
        raise EvaluationError(f"{shape[0]} sequences do not make decoding batches of decode_batch={decode_batch}")
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = attention_mask.bool()
    if tuple(mask.shape) != shape:
        raise EvaluationError(f"attention_mask is {tuple(mask.shape)}, tokens are {shape}")
    if not (mask[:, :-1] & mask[:, 1:]).any():
        raise EvaluationError("attention_mask leaves no token to predict")
    return mask


def _batches_a_forward(model: nn.Module, length: int, decode_batch: int) -> int:
    """How many decoding batches go through the model at once; they do not affect each other."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        return 1
    return max(1, _MOST_LOGITS // (decode_batch * length * vocabulary))


def _bar(forwards: int, decode_batch: int, progress: bool) -> Any:
    from tqdm.auto import tqdm  # here, because it looks for a notebook

    name = f"evaluating, decode batch {decode_batch}"
    return tqdm(total=forwards, unit="forward", desc=name, disable=not progress)


def _inputs(tokens: torch.Tensor, real: torch.Tensor, padded: bool) -> dict[str, Any]:
    inputs = {"input_ids": tokens, "use_cache": False}
    if padded:
        inputs["attention_mask"] = real.long()
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    return inputs


def _log_probabilities(output: Any) -> torch.Tensor:
    return output.logits.float().log_softmax(-1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
