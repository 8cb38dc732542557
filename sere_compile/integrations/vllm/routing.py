"""The hook behind a router: re-routes the logical expert ids that it has chosen.

Everything that changes from one forward to the next is a tensor at a fixed address, written before
the forward, so that a recorded CUDA graph and a compiled graph follow it: no branch depends on the
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...config import SereConfig
from ...gate_stats import GateStats
from ...ops import fill, reroute
from ...ops.reroute.reference import leading_tokens
from ...passes import COUNTED
from ...passes.count_routing import add_counts
from ...similarity.threshold import matrix_in_graph, threshold_in_graph
from .gates import HeldGate
from .ranks import Meeting
from .routers import KnownRouter

NO_PADDING = torch.iinfo(torch.int64).max


class BatchState:
    """What the hooks of one worker know of the batch: set by `begin`, read on the device.

    An engine may record `begin` in the CUDA graph of a forward and never come through it again: then
    its kernels run in every replay. So nothing that changes from one batch to the next is counted
    or decided in Python, and the padding is asked anew.

    Attributes:
        real_tokens: int64 [1], rows before the padding.
        rerouted_tokens: int64 [1], the same where this forward is re-routed, else 0.
        tokens_taking_part: int64 [1], rows before the padding, and 0 in a forward that the engine makes up.
    """

    def __init__(self, device: torch.device, phase: str, max_tokens: int | None, decode_tokens: int) -> None:
        self._tokens = torch.tensor([NO_PADDING, 0], dtype=torch.int64, device=device)
        self.real_tokens, self.rerouted_tokens = self._tokens[:1], self._tokens[1:]
        self.tokens_taking_part = torch.zeros(1, dtype=torch.int64, device=device)
        self._batches = torch.zeros(2, dtype=torch.int64, device=device)
        self.phase = phase
        self.max_tokens = max_tokens
        # A request that decodes has one new token, and what speculative decoding proposes.
        self.decode_tokens = decode_tokens
        self.unknown = ""

    @property
    def active(self) -> Tensor:
        """Whether this forward is re-routed: bool [1], on the device."""
        return self.rerouted_tokens > 0

    @property
    def forwards(self) -> int:
        """Forwards of real tokens since the last reset. Waits for the device."""
        return int(self._batches[0])

    @property
    def active_forwards(self) -> int:
        """Those of them that were re-routed. Waits for the device."""
        return int(self._batches[1])

    def reset(self) -> None:
        """Count from 0 again."""
        self._batches.zero_()

    def begin(self, attn_metadata: Any, is_padding: Tensor | None) -> None:
        """Before each forward: `attn_metadata` by layer or None (a dummy run), `is_padding` bool [T] or None."""
        active = attn_metadata is not None and self._wanted(attn_metadata)
        if is_padding is None:
            self.real_tokens.fill_(NO_PADDING)
        else:
            # Counted on the device: asking for the number would wait for it.
            torch.sum(~is_padding, 0, keepdim=True, out=self.real_tokens)
        if active:
            self.rerouted_tokens.copy_(self.real_tokens)
        else:
            self.rerouted_tokens.zero_()
        if attn_metadata is None:
            self.tokens_taking_part.zero_()
        else:
            self.tokens_taking_part.copy_(self.real_tokens)
            self._batches.add_(self._tokens > 0)

    def _wanted(self, attn_metadata: Any) -> bool:
        layers = attn_metadata.values() if isinstance(attn_metadata, dict) else [attn_metadata]
        distinct = list({id(m): m for m in layers if m is not None}.values())
        if self.max_tokens is not None:
            counts = [m.num_actual_tokens for m in distinct if hasattr(m, "num_actual_tokens")]
            if not counts or max(counts) > self.max_tokens:
                return False
        if self.phase == "all":
            return True
        longest = [int(m.max_query_len) for m in distinct if hasattr(m, "max_query_len")]
        if longest:
            # Not `num_prefills`: latent attention counts the tokens of speculative decoding as
            # prefills.
            return max(longest) <= self.decode_tokens
        prefills = [int(m.num_prefills) for m in distinct if hasattr(m, "num_prefills")]
        if not prefills:
            self.unknown = ", ".join(sorted({type(m).__name__ for m in distinct})) or "no attention metadata"
        return bool(prefills) and not any(prefills)


class RoutingHook:
    """Stands in for one router's `_compute_routing`: the router's own choice, then re-routing.

    Args:
        router: vLLM's router; its own top-k, whatever kind, runs first.
        similarity: float32 [E, E]; None with `substitution="fill"`.
        config: the options of this layer, with S < K.
        state: of this worker; the hook's tensors are made on its device.
        projection: float32 [E, E], what a slot's weight is multiplied by where its expert changes;
            None: by nothing.
        num_experts: E, where there is no similarity.
        part: which of the equal parts of a batch's rows this router sees, under sequence parallelism.
        meeting: the ranks whose tokens are computed by the same experts; None: no others.
    """

    def __init__(
        self,
        router: Any,
        similarity: Tensor | None,
        config: SereConfig,
        state: BatchState,
        projection: Tensor | None = None,
        num_experts: int = 0,
        part: int = 0,
        meeting: Meeting | None = None,
    ) -> None:
        self.router = router
        self.original: Callable[..., tuple[Tensor, Tensor]] = router._compute_routing
        device = state.active.device
        self.matrix = None if similarity is None else matrix_in_graph(similarity, config.threshold).to(device)
        self.projection = None if projection is None else projection.to(device)
        top_k = int(router.top_k)
        rho = threshold_in_graph(config.threshold)
        self.options = (config.resolved_top_k(top_k), rho, config.resolved_min_active(top_k))
        self.max_active = config.max_active or 0
        self.state = state
        self.part = part
        self.meeting = meeting
        self.num_experts = num_experts if similarity is None else similarity.shape[0]
        self.calls = 0
        self.traced_calls = torch.zeros(1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(len(COUNTED), dtype=torch.int64, device=device) if config.collect_stats else None
        self.ordered = _is_ordered(router, device)
        # What selects and re-routes in the place of the router; None: the router selects.
        self.known: KnownRouter | None = None
        # What gives the hidden states that logits would be made of; None: logits come.
        self.gate: HeldGate | None = None

    def install(self) -> None:
        """On the instance: whoever holds the router, or a bound `select_experts` of it, comes through here."""
        self.router._compute_routing = self.compute_routing

    def compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any = None, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights [T, K] as the router gave them, projected or filled, and ids [T, K] re-routed or filled."""
        if torch.compiler.is_compiling():
            # Counts runs of the compiled code, which may come from a cache and never pass here.
            self.traced_calls.add_(1)
        else:
            self.calls += 1
        held = None if self.gate is None else self.gate.take(router_logits)
        if self.known is not None and (held is not None or self.known.takes(router_logits)):
            return self._route(self.known, router_logits, indices_type, held)
        weights, ids = self.original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        # Kernels may ask for a type of ids, uint32, with which CUDA can do next to nothing.
        old = ids.view(torch.int32) if ids.dtype is torch.uint32 else ids
        if self.matrix is None:
            new, weights = self._filled(old, weights, router_logits)
        else:
            new = self._reroute(old, weights, router_logits)
        if self.counts is not None:
            self._count(self.counts, old, new)
        if self.projection is not None:
            weights = self._projected(self.projection, weights, old, new)
        return weights, new.view(torch.uint32) if ids.dtype is torch.uint32 else new

    @property
    def has_run(self) -> bool:
        """Whether the hook ran, in Python or inside compiled code. Waits for the device."""
        return self.calls > 0 or int(self.traced_calls) > 0

    def stats(self) -> GateStats:
        """What was counted. Waits for the device."""
        assert self.counts is not None, "statistics are not collected"
        return GateStats(**dict(zip(COUNTED, self.counts.tolist(), strict=True)))

    @property
    def selects(self) -> bool:
        """Whether selection and re-routing or filling can be one operator: nothing else needs the ids between them."""
        return self.projection is None and self.counts is None and not self.agreed

    @property
    def agreed(self) -> bool:
        """Whether the tokens of all ranks are one routing batch."""
        return self.meeting is not None and self.meeting.agreed

    def _route(
        self, known: KnownRouter, logits: Tensor, indices_type: torch.dtype | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.int64 if indices_type is torch.int64 else torch.int32
        numbers = (*self.options, self.max_active)
        real, rerouted = (self._own(tokens, logits) for tokens in (self.state.real_tokens, self.state.rerouted_tokens))
        if hidden is not None:
            assert self.gate is not None
            weights, ids = known.route(hidden, self.matrix, numbers, wide, real, rerouted, self.gate.weight)
        else:
            weights, ids = known.route(logits, self.matrix, numbers, wide, real, rerouted)
        return weights, ids.view(torch.uint32) if indices_type is torch.uint32 else ids

    def _own(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """How many of the batch's first `tokens`, int64 [1], are among the rows [T, ...] of this router."""
        return tokens if self.part == 0 else (tokens - self.part * rows.shape[0]).clamp(min=0)

    def _real(self, ids: Tensor) -> Tensor:
        """Which rows are not padding, bool [T]."""
        return leading_tokens(ids.shape[0], self._own(self.state.real_tokens, ids))

    def _reroute(self, ids: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
        if self.ordered:
            return self._reroute_ordered(ids)
        # vLLM asks for an unsorted top-k; slots are put in order, re-routed, and put back.
        order = selection_scores(self.router, ids, weights, logits).argsort(dim=-1, descending=True, stable=True)
        new_ids = self._reroute_ordered(ids.gather(1, order))
        return torch.zeros_like(new_ids).scatter(1, order, new_ids)

    def _reroute_ordered(self, ids: Tensor) -> Tensor:
        assert self.matrix is not None
        rerouted = self._own(self.state.rerouted_tokens, ids)
        if self.meeting is None or not self.meeting.agreed:
            return reroute(ids, self.matrix, *self.options, None, self.max_active, rerouted)
        numbers = (*self.options, self.max_active)
        taking_part = self._own(self.state.tokens_taking_part, ids)
        return self.meeting.reroute(ids, self.matrix, numbers, self.state.active, rerouted, taking_part)

    def _filled(self, ids: Tensor, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Filled in a forward that is re-routed; as they are in others."""
        new_ids, new_weights = self._fill(ids, weights, logits, self._real(ids))
        active = self.state.active
        return torch.where(active, new_ids, ids), torch.where(active, new_weights, weights)

    def _fill(self, ids: Tensor, weights: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights of kept experts, from the scores of all; see `cannot_fill`."""
        scores = _SCORING[getattr(self.router, "scoring_func", "softmax")](logits.float())
        bias = getattr(self.router, "e_score_correction_bias", None)
        choice = logits if bias is None else scores + bias.float()
        order = None
        if not self.ordered:
            order = selection_scores(self.router, ids, weights, logits).argsort(dim=-1, descending=True, stable=True)
            ids, weights = ids.gather(1, order), weights.gather(1, order)
        new_ids, new = fill(ids, weights, scores, *self.options, mask, self.max_active, choice)
        if order is None:
            return new_ids, new
        return tuple(torch.zeros_like(values).scatter(1, order, values) for values in (new_ids, new))  # type: ignore[return-value]

    @staticmethod
    def _projected(projection: Tensor, weights: Tensor, old: Tensor, new: Tensor) -> Tensor:
        moved = old != new
        # A slot that stays may be a sentinel, which no row belongs to.
        at = [torch.where(moved, ids, 0).long() for ids in (old, new)]
        return (weights * torch.where(moved, projection[at[0], at[1]], 1.0)).to(weights.dtype)

    def _count(self, counts: Tensor, before: Tensor, after: Tensor) -> None:
        batch = torch.zeros_like(counts)
        add_counts(before, after, self.num_experts, batch, self._real(before))
        if self.meeting is not None:
            taking_part = self._own(self.state.tokens_taking_part, before)
            batch[COUNTED.index("active_before") :] = self.meeting.active((before, after), taking_part)
        counts.add_(batch * self.state.active)

    def reset(self) -> None:
        """Count from 0 again."""
        if self.counts is not None:
            self.counts.zero_()


def cannot_fill(router: Any) -> str:
    """Why the scores of all experts that a router ranked by are not known from its logits; empty where they are."""
    opaque = [name for name in _OPAQUE if getattr(router, name, None) is not None]
    if opaque:
        return f"its router chooses by {opaque[0]}, not by its logits"
    groups = getattr(router, "num_expert_group", None)
    if groups is not None and getattr(router, "topk_group", groups) != groups:
        return "its router opens groups of experts to a token, and which ones it does not say"
    if getattr(router, "scoring_func", "softmax") not in _SCORING:
        return f"its router scores by {router.scoring_func}"
    return ""


_OPAQUE = ("custom_routing_function", "_hash_indices_table", "hash_indices_table", "zero_expert_type")


def selection_scores(router: Any, ids: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
    """By what a router ranked the experts it chose: float32 [T, K] in the order of `ids`.

    A correction bias takes part in the choice and not in the weights. Where the choice is not a
    function of logits and bias (a custom function, a table of hashes), the weights are the order.
    """
    if any(getattr(router, name, None) is not None for name in _OPAQUE):
        return weights.float()
    # Fused shared experts stand behind the routed ones; they have no logit and come last.
    known = (ids >= 0) & (ids < logits.shape[-1])
    index = torch.where(known, ids, 0).long()
    bias = getattr(router, "e_score_correction_bias", None)
    scores = logits.float()
    if bias is not None:
        scores = _SCORING[getattr(router, "scoring_func", "softmax")](scores) + bias.float()
    return torch.where(known, scores.gather(1, index), float("-inf"))


_SCORING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def _is_ordered(router: Any, device: torch.device) -> bool:
    """Whether ids come best first: vLLM's fused top-k kernel finds them one after the other."""
    return type(router).__name__ == "FusedTopKRouter" and device.type == "cuda"
