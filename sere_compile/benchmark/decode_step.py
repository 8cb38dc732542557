"""Time whole decode steps with a static cache: model, argmax and cache update, in one CUDA graph on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import SereError
from ..integrations.transformers import cache_argument
from ..testing import oracle_routing
from .result import Row
from .subject import Subject, dense_bytes
from .timing import Calls, Timing, capture, time_in_turn
from .variant import (
    Variant,
    all_variants,
    experts_of,
    tell_if_blind,
    those_that_fit,
    token_error,
    use_experts,
    with_own_experts,
)

# Logits of a whole model in bf16: rounding adds up over layers.
TOLERANCE = 8e-2


class Decoder:
    """Greedy decoding of `steps` tokens after a random prompt, with a cache that is set back before each run."""

    def __init__(self, subject: Subject, batch: int, prompt: int, steps: int, seed: int = 0) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

        self.model, self.prompt, self.steps = subject.model, prompt, steps
        device = subject.model.device
        config = subject.model.config.get_text_config()
        generator = torch.Generator(device).manual_seed(seed)
        tokens = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator, device=device)
        self.cache: Any = StaticCache(config=config, max_cache_len=prompt + steps)
        kinds = {type(layer) for layer in self.cache.layers}
        if other := sorted(kind.__name__ for kind in kinds - {StaticLayer, StaticSlidingWindowLayer}):
            raise SereError(
                f"a decode step with a cache of {other[0]} cannot be timed: it keeps more than keys and values"
            )
        # Layers with a sliding window count in Python, which a CUDA graph cannot replay; they keep everything here.
        self.cache.layers = [StaticLayer(prompt + steps) for _ in self.cache.layers]
        self._cached = {cache_argument(subject.model): self.cache, "use_cache": True}
        logits = subject.model(input_ids=tokens, logits_to_keep=1, **self._cached).logits
        self.first = logits[:, -1].argmax(-1, keepdim=True)
        self.token = self.first.clone()
        self.logits = logits[:, -1].clone()

    def reset(self) -> None:
        """Back to the end of the prompt; what later steps wrote is masked and written again."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)
        self.token.copy_(self.first)

    def forward(self) -> torch.Tensor:
        """Logits [B, vocabulary] of the next token."""
        return self.model(input_ids=self.token, **self._cached).logits[:, -1]

    def step(self, forward: Callable[[], torch.Tensor]) -> None:
        """One token: static buffers in, static buffers out."""
        self.logits.copy_(forward())
        self.token.copy_(self.logits.argmax(-1, keepdim=True))


def bench_decode_step(
    subject: Subject,
    batch: int,
    selects: Sequence[int],
    stock: Sequence[str],
    bandwidth: float,
    prompt: int = 128,
    steps: int | None = None,
    rounds: int = 5,
) -> list[Row]:
    """Rows for decoding `steps` tokens (32, on a CPU 8) after `prompt` tokens, in microseconds per step."""
    steps = steps or (32 if subject.model.device.type == "cuda" else 8)
    use_experts(subject.model, "grouped_mm")
    decoder = Decoder(subject, batch, prompt, steps)
    top_k = subject.blocks[0].top_k
    expected, active = _references(subject, decoder, selects, top_k)
    tell_if_blind(f"decode step, batch {batch}", expected, top_k, TOLERANCE)
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    keep: list[Any] = []

    def prepare(variant: Variant) -> None:
        use_experts(subject.model, variant.experts)
        forward = variant.compiled(decoder.forward)
        decoder.reset()
        if variant.backend is None:
            decoder.step(forward)
            runs[variant.name] = _eager_run(decoder, forward)
        else:
            graph = capture(decoder.step, [forward])
            decoder.reset()
            graph.replay()
            runs[variant.name] = _graph_run(decoder, graph)
            keep.append((graph, forward))
        errors[variant.name] = token_error(decoder.logits, expected[variant.select_top_k or top_k])

    wanted = [*all_variants(selects, top_k, stock), *with_own_experts(selects, top_k)]
    variants = those_that_fit(wanted, prepare)
    times = time_in_turn(runs, steps, rounds, warmup=1, before=experts_of(variants, subject.model))
    return [_row(v, subject, batch, times[v.name], errors[v.name], active, bandwidth) for v in variants]


def _graph_run(decoder: Decoder, graph: torch.cuda.CUDAGraph | Calls) -> Callable[[], None]:
    def run() -> None:
        decoder.reset()
        for _ in range(decoder.steps):
            graph.replay()

    return run


def _eager_run(decoder: Decoder, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        decoder.reset()
        for _ in range(decoder.steps):
            decoder.step(forward)

    return run


def _references(
    subject: Subject, decoder: Decoder, selects: Sequence[int], top_k: int
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """Eager logits of the first step, and mean active experts per layer over all steps, by S."""
    expected, active = {}, {}
    for select in {*(min(s, top_k) for s in selects), top_k}:
        counts: dict[str, list[tuple[int, int]]] = {}
        decoder.reset()
        with oracle_routing(subject.model, subject.matrices, select, active=counts):
            decoder.step(decoder.forward)
            expected[select] = decoder.logits.clone()
            for _ in range(decoder.steps - 1):
                decoder.step(decoder.forward)
        active[select] = statistics.mean(after for calls in counts.values() for _, after in calls)
    return expected, active


def _row(
    variant: Variant,
    subject: Subject,
    batch: int,
    timing: Timing,
    error: float,
    active: dict[int, float],
    bandwidth: float,
) -> Row:
    count = active[variant.select_top_k or subject.blocks[0].top_k]
    size = dense_bytes(subject.model, subject.blocks) + count * sum(block.expert_bytes for block in subject.blocks)
    share = size / (timing.median * 1e-6) / bandwidth
    ours = variant.select_top_k is not None
    return Row("decode step", batch, variant.name, ours, timing, error, TOLERANCE, count, size, share)
