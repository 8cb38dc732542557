"""Prove the re-routing of ids that leave their graph, by running the code that receives them.

A graph that ends between router and experts (an expert loop over data-dependent sizes, a print) does not show what
becomes of the ids. Neither names nor counts are evidence. So the block around the router is copied, with random
parameters, and its copy is compiled like the model, but with a backend that runs each graph as it was traced or
re-routed, on made-up choices of the router. Its code outside the graphs runs as it is. Re-routing by a map m is right
where the block gives what it gives, as traced, when expert u has the parameters of expert m(u).

    graph 1: .. topk -> (ids, weights) | the block's own code: experts(hidden, ids, weights) -> output
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...experts.owner import Owner, Owners
from ...experts.spread import spread_over_ranks
from ...experts.trial_block import Settings, fingerprint
from ...passes import Gate
from ...passes.proof.region import size_by_data
from .. import dynamo
from .compare_versions import Verdict, least_rows
from .other_calls import kinds_of
from .try_block import signature, try_block

_SPREAD = (
    "{}, and a trial of the code outside the graph would wait for ranks that make none: "
    'experts_implementation="sere" (sere_compile.register_experts) re-routes such experts of transformers'
)


def prove_outside(gate: Gate, owner: Owner | None, *, kept: bool = False) -> Verdict:
    """What is proven of re-routing a gate whose ids leave the graph.

    Args:
        gate: found, not yet rewritten; some of its dispatch uses leave the graph.
        owner: of its router's weight.
        kept: asks for rewrites in which what leaves is of the ids that the router chose, and its graph dispatches.
    """
    if owner is None:
        return Verdict(None, "no module of this process owns its router weight", is_gate=False)
    verdict = Verdict(None, "no module around its router could be run", is_gate=False)
    if counted := size_by_data(gate.ids):
        return Verdict(None, counted)
    # Before anything of a block is read, which may be an exchange as well.
    if spread := next(filter(None, map(spread_over_ranks, owner.surroundings)), ""):
        return Verdict(None, _SPREAD.format(spread))
    blocks = [(module, _number(module)) for module in owner.surroundings]
    _blocks_around[owner.weight] = frozenset(block for _, block in blocks)
    _settings.pop(owner.weight, None)
    for place, (module, block) in enumerate(blocks):
        found = _verdict_on(module, block, gate, owner, kept)
        if found is not None and found.is_gate >= verdict.is_gate:
            verdict = replace(found, block=block)
            if not kept:
                _settings[owner.weight] = Settings(module, found.written or frozenset())
        # Else a router that is a module of its own: its experts stand further out.
        if verdict.is_gate and verdict.whole:
            return _with_what_is_around(verdict, blocks[place:], gate, owner) if kept else verdict
    return verdict


def _with_what_is_around(
    verdict: Verdict, blocks: Sequence[tuple[torch.nn.Module, int]], gate: Gate, owner: Owner
) -> Verdict:
    """The verdict on the modules around a block too, as far as they have numbers of each expert of their own.

    They may add biases behind a break, by the ids that the block keeps or returns.
    """
    inner = blocks[0][0]
    for module, block in blocks[1:]:
        if _holds_more_of_experts(module, inner, gate.num_experts):
            found = _verdict_on(module, block, gate, owner, kept=True)
            if found is not None and found.is_gate and found.whole and found.off:
                verdict = found
    return replace(verdict, block=blocks[-1][1], written=None)


def _verdict_on(module: torch.nn.Module, block: int, gate: Gate, owner: Owner, kept: bool) -> Verdict | None:
    """What trying one module around the router shows, once for all that compute the same."""
    # What cannot be traced with dynamic-shape capture may be without, and the other way round.
    called_with = dynamo.arguments_of(module)
    capture = dynamo.captures_dynamic_shapes(), dynamo.makes_graphs_before_loops()
    key = (block, signature(gate), capture, kinds_of(called_with), kept, least_rows(gate))
    if key not in _verdicts:
        with dynamo.forgetting_new_codes():
            _verdicts[key] = try_block(gate, module, owner, called_with, kept)
    return _verdicts[key]


def _holds_more_of_experts(module: torch.nn.Module, inner: torch.nn.Module, num_experts: int) -> bool:
    """Whether a module has parameters beside an inner one's that count experts, and no layer like it."""
    if any(type(other) is type(inner) and other is not inner for other in module.modules()):
        return False
    inside = {id(tensor) for tensor in itertools.chain(inner.parameters(), inner.buffers())}
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(id(tensor) not in inside and num_experts in tensor.shape for tensor in tensors)


# By what a block computes, so that layers of one kind are tried once; None for a block that does not hold the gate.
_verdicts: dict[Any, Verdict | None] = {}


def computes_the_same(weight: object, verdict: Verdict) -> bool:
    """Whether a verdict holds for another router weight too, or still: one of the blocks around it computes the same.

    Asked at every call, as a guard: the blocks around a weight are looked at once, and again where settings change.
    """
    if not isinstance(weight, torch.Tensor):
        return False
    # Each is looked up once: another thread may let go of it meanwhile.
    settings, around = _settings.get(weight), _blocks_around.get(weight)
    if settings is not None and not settings.are_the_same():
        settings = around = None
        _settings.pop(weight, None)
    watched = verdict.written is not None and settings is None
    if around is None or (watched and verdict.block in around):
        owner = Owners().find(weight)
        blocks = {} if owner is None else {_number(module): module for module in owner.surroundings}
        around = _blocks_around[weight] = frozenset(blocks)
        if verdict.written is not None and verdict.block in blocks:
            _settings[weight] = Settings(blocks[verdict.block], verdict.written)
    return verdict.block in around


_blocks_around = WeakTensorKeyDictionary()
_settings = WeakTensorKeyDictionary()
_numbers: dict[tuple[Any, ...], int] = {}
_unused = itertools.count()  # no thread gets a number twice


def _number(module: torch.nn.Module) -> int:
    """The same number for modules that compute the same."""
    return _numbers.setdefault(fingerprint(module), next(_unused))
