"""One model in the engine, alone and re-routed: what the tests compare and the table in docs/vllm.md is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

import sere_compile
from sere_compile.testing import reroute_oracle
from tests.integrations.vllm import models
from tests.integrations.vllm.engine import engine, generate, hooks
from tests.integrations.vllm.lockstep import in_transformers

BATCH = 8
SETTINGS = {"select_top_k": 1, "min_active": 0}


@dataclass
class Measured:
    """Of one model, at S = K and at S = 1.

    Attributes:
        alone, identity, rerouted: tokens of vLLM, of vLLM with S = K, and with S = 1.
        expected_alone, expected: those of transformers, and of transformers with our backend.
        wrong: choices of the engine's routers that differ from the oracle's.
        routed: how often a router was asked.
        layers, hooked: MoE layers, and hooks that ran.
        forwards, active: forwards of the engine, and those that were re-routed.
        before, after: active experts a batch, mean over layers.
    """

    name: str
    kind: str
    alone: list[list[int]] = field(default_factory=list)
    identity: list[list[int]] = field(default_factory=list)
    rerouted: list[list[int]] = field(default_factory=list)
    expected_alone: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    routed: int = 0
    layers: int = 0
    hooked: int = 0
    forwards: int = 0
    active: int = 0
    before: float = 0.0
    after: float = 0.0

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        equal = "yes" if self.identity == self.alone == self.expected_alone else "NO"
        same = "yes" if self.rerouted == self.expected and not self.wrong else "NO"
        hooked = f"{self.hooked} of {self.layers}"
        return (self.name, self.kind, hooked, equal, same, f"{self.before:.1f}", f"{self.after:.1f}")


def rotate_heads_correctly() -> None:
    """The CPU kernel of vLLM 0.32.0 rotates queries [T, heads, D] of two heads wrongly, [T, heads * D] rightly.

    Latent attention passes the former, so without this DeepSeek's tokens differ from those of transformers with SERE
    or without. Other models' are the same either way. To go when vLLM's kernel takes three dimensions.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def check_every_choice(hook, wrong: list[str], seen: list[int]) -> None:
    """Compare what a hook gives with an oracle, one token after the other, whenever the engine routes."""

    def compute_routing(hidden, logits, indices_type, *, input_ids=None):
        _, ids = hook.original(hidden, logits, indices_type, input_ids=input_ids)
        weights, new_ids = hook.compute_routing(hidden, logits, indices_type, input_ids=input_ids)
        bias = hook.router.e_score_correction_bias
        scores = logits.float() if bias is None else logits.float().sigmoid() + bias
        expected = ids
        if hook.state.active:
            order = [sorted(range(ids.shape[1]), key=lambda k, t=t: -scores[t, ids[t, k]]) for t in range(len(ids))]
            order = torch.tensor(order)
            rerouted = reroute_oracle(ids.gather(1, order), hook.matrix, 1)
            expected = torch.zeros_like(ids).scatter(1, order, rerouted)
        seen.append(len(ids))
        if not torch.equal(new_ids, expected):
            wrong.append(f"{new_ids.tolist()} instead of {expected.tolist()}")
        return weights, new_ids

    hook.router._compute_routing = compute_routing


def measure(name: str, folder: Path, profile: str, prompts: list[list[int]]) -> Measured:
    """Three engines one after the other, and two runs in transformers."""
    rotate_heads_correctly()
    result = Measured(name, models.KINDS[name])
    with engine(folder) as llm:
        result.alone = generate(llm, prompts)
    with engine(folder, {"select_top_k": 99, "profile": profile}) as llm:
        assert not hooks(llm).hooks
        result.identity = generate(llm, prompts)
    with engine(folder, {**SETTINGS, "profile": profile, "collect_stats": True}) as llm:
        installed, seen = hooks(llm), []
        for hook in installed.hooks.values():
            check_every_choice(hook, result.wrong, seen)
        result.rerouted = generate(llm, prompts)
        counted = sere_compile.stats(llm)
    result.routed, result.layers = len(seen), len(sere_compile.SimilarityProfile.load(profile))
    result.hooked = sum(hook.has_run for hook in installed.hooks.values())
    result.forwards, result.active = installed.state.forwards, installed.state.active_forwards
    result.before = sum(gate.mean_active_before for gate in counted.values()) / result.layers
    result.after = sum(gate.mean_active_after for gate in counted.values()) / result.layers
    result.expected_alone = in_transformers(folder, prompts)
    result.expected = in_transformers(folder, prompts, profile, **SETTINGS)
    return result
