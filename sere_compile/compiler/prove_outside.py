"""Prove the re-routing of ids that leave their graph, by running the code that receives them.

A graph that ends between router and experts (an expert loop over data-dependent sizes, a print) does not show what
becomes of the ids. Neither names nor counts are evidence. So the block around the router is copied, with random
parameters, and its copy is compiled like the model, but with a backend that runs each graph as it was traced or
re-routed, on made-up choices of the router. Its code outside the graphs runs as it is. Re-routing by a map m is right
where the block gives what it gives, as traced, when expert u has the parameters of expert m(u).

    graph 1: .. topk -> (ids, weights) | the block's own code: experts(hidden, ids, weights) -> output
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops as _ops  # noqa: F401  (registers torch.ops.sere)
from ..experts.owner import Owner, Owners
from ..experts.spread import spread_over_ranks
from ..experts.trial_block import ExpertSlices, Settings, TrialBlock, fingerprint
from ..passes import (
    Gate,
    RoutingSettings,
    Skip,
    SkipReason,
    UseKind,
    find_gates,
    reroute_dispatch,
    separate_statistics,
)
from ..passes.evidence.router import Router, trace_router
from ..passes.graph import nodes
from ..passes.graph.run_part import plain_number
from ..passes.proof.made_up import by_turns
from ..passes.proof.region import ends_of
from ..passes.proof.ways import leads_to
from . import dynamo
from .expert_products import WatchProducts
from .kept_aside import KeptAside, alike, content, outline
from .other_calls import is_rows, kinds_of, of_few_tokens, other_calls, with_masks

log = logging.getLogger(__name__)

_ROWS = 12
_MANY_ROWS = 256
_DRAWS = 3
_MOST_DRAWS = 24  # until each expert was re-routed once
_FEW_TOKENS = 64
_TOLERANCE = 1e-4
_IDS_ALONE = ", ids alone"
_IDS_KEPT = ", ids kept"
_RETURNED = ""  # the name of what is returned, beside those of what is kept
_SENT_ELSEWHERE = (
    "outside the graph some tokens go to other experts than it chose, or to none, as padding does: mark their ids with "
    "-1 before the graph ends"
)
_SPREAD = (
    "{}, and a trial of the code outside the graph would wait for ranks that make none: "
    'experts_implementation="sere" (sere_compile.register_experts) re-routes such experts of transformers'
)
# What code that is run on made-up numbers may raise.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Picked = collections.namedtuple("_Picked", ("values", "indices"))


@dataclass(frozen=True)
class Verdict:
    """What trying a gate's block has shown.

    Attributes:
        merged: whether slots are merged in the rewrite that was proven; None where none was.
        reason: why none was.
        saves_nothing: why no fewer weights are read where it is re-routed.
        is_gate: whether experts were seen to act on the hidden states of the tokens that name them.
        block: a number for what the block that was tried computes, see `computes_the_same`.
        whole: whether the block holds the gate as the model's graph does; else it may be a part of it.
        ids_alone: whether what is made of the ids in the graph keeps what the router chose, see `ids_alone`.
        off: of the rewrites that merge slots and those that do not, which gave other things when the block was run.
        written: attributes of the block that its calls write; None where the block that was tried is another.
    """

    merged: bool | None
    reason: str = ""
    is_gate: bool = True
    block: int = -1
    whole: bool = True
    saves_nothing: str = ""
    ids_alone: bool = False
    off: frozenset[bool] = frozenset()
    written: frozenset[str] | None = None


def ids_alone(gate: Gate) -> Gate | None:
    """The gate where new ids leave the graph as they are, and what else leaves is made of the router's own.

    `load = (zeros.scatter(1, ids, weights) > 0).sum(0); return ids, load`: whether the code outside dispatches by the
    load or returns it shows when it is run. None where that is no way of its own.
    """
    leaves = [use.consumer.op == "output" for use in gate.uses if use.kind.dispatches]
    if all(leaves) or not any(leaves):
        return None
    made = tuple(
        replace(use, kind=UseKind.STATISTIC) if use.kind.dispatches and use.consumer.op != "output" else use
        for use in gate.uses
    )
    return replace(gate, uses=made)


def _ids_kept(gate: Gate) -> Gate | None:
    """The gate where its dispatch in the graph gets new ids, and whatever leaves is of the router's own."""
    ends = ends_of(gate)
    if isinstance(ends, Skip):
        return None
    kept = [
        replace(use, kind=UseKind.STATISTIC)
        if use.kind.dispatches and not leads_to(use.consumer, ends.complete)
        else use
        for use in gate.uses
    ]
    return replace(gate, uses=tuple(kept)) if any(use.kind.dispatches for use in kept) else None


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
    key = (block, _signature(gate), capture, kinds_of(called_with), kept)
    if key not in _verdicts:
        with dynamo.forgetting_new_codes():
            _verdicts[key] = _try_block(gate, module, owner, called_with, kept)
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
    if weight in _settings and not _settings[weight].are_the_same():
        del _settings[weight], _blocks_around[weight]
    watched = verdict.written is not None and weight not in _settings
    if weight not in _blocks_around or (watched and verdict.block in _blocks_around[weight]):
        owner = Owners().find(weight)
        blocks = {} if owner is None else {_number(module): module for module in owner.surroundings}
        _blocks_around[weight] = frozenset(blocks)
        if verdict.written is not None and verdict.block in blocks:
            _settings[weight] = Settings(blocks[verdict.block], verdict.written)
    return verdict.block in _blocks_around[weight]


_blocks_around = WeakTensorKeyDictionary()
_settings = WeakTensorKeyDictionary()
_numbers: dict[tuple[Any, ...], int] = {}


def _number(module: torch.nn.Module) -> int:
    """The same number for modules that compute the same."""
    return _numbers.setdefault(fingerprint(module), len(_numbers))


def _signature(gate: Gate) -> tuple[Any, ...]:
    """What tells a gate from others of its block: the trial has to find the same."""
    kinds = tuple(sorted(use.kind.name for use in gate.uses))
    return gate.form, gate.num_experts, gate.top_k, gate.scoring, kinds, gate.weights is None, gate.needs_merge


def _try_block(
    gate: Gate, module: torch.nn.Module, owner: Owner, called_with: Arguments | None, kept: bool
) -> Verdict | None:
    """The verdict on one module around the router, or None where it does not hold the gate and its experts."""
    try:
        scores = nodes.operand(gate.selection)
        columns = gate.num_experts if scores is None else nodes.last_size(scores) or gate.num_experts
        block = TrialBlock(module, owner.weight, owner.root, gate.num_experts, columns)
    except _FAILURES as error:
        return Verdict(None, f"{type(module).__name__} cannot be copied to try it: {_short(error)}")
    candidates = block.candidates()
    if not candidates:
        return None
    trial = _Trial(gate, block, called_with, kept)
    verdict = trial.run_whole(candidates)
    return verdict and replace(verdict, written=frozenset(trial.written))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:120]}"


class _Trial:
    """One block, compiled so that the gate's graph runs in one of several versions, on choices that are given."""

    def __init__(self, gate: Gate, block: TrialBlock, called_with: Arguments | None, kept: bool = False) -> None:
        self._gate = gate
        self._ids_are_kept = kept
        self._called_with = called_with
        self._block = block
        self._version = "original"
        self._seed = 0
        self.scores = "own"  # those of the run that is under way, see `_run`
        self.absent: int | None = None  # the expert that nobody chooses in the run that is under way
        self.chosen: Sequence[int] = ()  # experts that are to be chosen behind the first in the run that is under way
        self.kept: dict[str, Any] = {}  # what the last run left besides its results, see `KeptAside`, or returned
        self.written: set[str] = set()  # names of what runs have left so far
        # What is other in each run, as a time is, and whether it is of other sizes, too.
        self._restless: dict[str, bool] = {}
        self._others: list[Arguments] | None = None  # see `_other_calls`
        self._is_compiled = False  # whether there is a graph with the gate
        self._found: list[Gate] = []
        self._by_sequence = False  # whether sequences choose, and not tokens
        self._ids: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        matrix = torch.rand(gate.num_experts, gate.num_experts, generator=torch.Generator().manual_seed(1))
        self._matrix = matrix.to(block.weight.device)
        self._aside = KeptAside(block.module)
        backend = dynamo.OwnBackend(self._backend)
        self._call: Callable[..., Any] = torch.compile(block.module, backend=backend, dynamic=False)

    # What the block is run on, and how.

    def run_whole(self, candidates: list[ExpertSlices]) -> Verdict | None:
        """The verdict on this block, or None where it is not the one that holds the gate and its experts."""
        inputs = self._inputs()
        if inputs is None:
            return None
        name = type(self._block.module).__name__
        if len(self._found) > 1 or _signature(self._found[0]) != _signature(self._gate):
            return Verdict(None, f"{name} compiled alone has another gate than it has in the model", whole=False)
        seen = False
        self._is_compiled = True
        try:
            self._restless = self._find_restless(inputs)
            experts = self._experts(candidates, inputs)
            if isinstance(experts, str):
                return Verdict(None, experts, is_gate=False)
            seen = True
            verdict = self._compare(experts, inputs)
            if verdict.merged is None:
                return verdict
            if self._weighs_nothing(experts, inputs):
                return Verdict(None, SkipReason.NOTHING_WEIGHED.value)
            if self._sends_elsewhere(experts, inputs):
                return Verdict(None, _SENT_ELSEWHERE)
            if self._computes_all(experts, inputs):
                return replace(verdict, saves_nothing=f"{SkipReason.DENSE.value} (seen in a run of {name})")
            return verdict
        except _FAILURES as error:
            return Verdict(None, f"{name} could not be run on made-up choices: {_short(error)}", is_gate=seen)

    def _inputs(self) -> Arguments | None:
        """What the block takes: what it is being called with, if little, or made-up hidden states."""
        weight = self._block.weight
        hidden = nodes.last_size(self._gate.router_input) or weight.shape[-1]
        drawn = torch.randn(1, _ROWS, hidden, generator=torch.Generator().manual_seed(3)).to(weight.device)
        tried: list[Arguments] = [((drawn,), {}), ((drawn[0],), {})]
        if self._called_with is not None:
            # Sizes that Dynamo has seen teach it nothing new: tried first, unless they are a whole prompt's.
            called_with = tree_map(_in_float32, self._called_with)
            tokens = nodes.value(self._gate.ids).numel() // self._gate.top_k
            tried.insert(0 if tokens <= _FEW_TOKENS else 2, called_with)
            if tokens > _FEW_TOKENS and _hidden_of(called_with) is None:  # what else it is given may be a mask
                tried.insert(0, of_few_tokens(called_with, tokens, _ROWS))
        for arguments in tried:
            self._found.clear()
            try:
                self._run(arguments)
            except _FAILURES as error:
                log.debug("%s does not run on what was tried: %s", type(self._block.module).__name__, _short(error))
                continue
            if self._found:
                return self._of_many(arguments)
        return None

    def _other_calls(self, inputs: Arguments) -> list[Arguments]:
        """The inputs with other masks, flags, lengths and words, as far as the block takes them."""
        if self._others is None:
            self._others = [given for given in self._made_up_calls(inputs) if self._serves(given)]
        return self._others

    def _made_up_calls(self, inputs: Arguments) -> Iterator[Arguments]:
        yield from other_calls(inputs, self._block.module)
        # A later call may have a mask where this one has none: the graph before a break need not have asked.
        hidden = next((leaf for leaf in tree_leaves(inputs) if is_rows(leaf)), None)
        if hidden is not None:
            for masked in with_masks(inputs, self._block.module, hidden.shape[:-1], hidden.device):
                if self._serves(masked):
                    yield from other_calls(masked, self._block.module)

    def _serves(self, inputs: Arguments) -> bool:
        """Whether the block takes the inputs, and returns finite numbers."""
        try:
            results = self._run(inputs)
        except _FAILURES as error:
            log.debug("%s does not run on another mask: %s", type(self._block.module).__name__, _short(error))
            return False
        return bool(self._ids) and all(map(_is_finite, results))

    def _of_many(self, arguments: Arguments) -> Arguments:
        """The same for several sequences, where one choice is made for all tokens of the only one."""
        hidden = _hidden_of(arguments)
        if hidden is None or hidden.dim() < 3 or self._ids[0].numel() > self._gate.top_k:
            return arguments
        self._by_sequence = True
        several = _with_rows(arguments, 0, _ROWS)
        self._found.clear()
        self._run(several)
        return several

    def _find_restless(self, inputs: Arguments) -> dict[str, bool]:
        """What two runs of the same leave as different things, and whether of different sizes."""
        self._run(inputs)
        first = self.kept
        self._run(inputs)
        pairs = {name: (first.get(name), self.kept.get(name)) for name in first.keys() | self.kept.keys()}
        return {name: outline(a) != outline(b) for name, (a, b) in pairs.items() if not alike(a, b)}

    def _is_left_alike(self, name: str, left: Any, right: Any) -> bool:
        """Whether two runs have left the same, as far as it is the same in each run."""
        if name in self._restless:
            return self._restless[name] or outline(left) == outline(right)
        return alike(left, right)

    def _run(
        self,
        inputs: Arguments,
        version: str = "original",
        seed: int = 0,
        *,
        scores: str = "own",
        absent: int | None = None,
        chosen: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Every tensor that the block returns, and every buffer that it leaves changed.

        Args:
            inputs: of the block.
            version: of its graph.
            seed: of the choice that is made up.
            scores: at which the choice is made: the router's "own", "others", or "equal" ones for all.
            absent: an expert that no token chooses.
            chosen: experts that tokens choose behind their first, by turns.
        """
        self._version, self._seed, self.scores, self.absent, self.chosen = version, seed, scores, absent, chosen
        if self._is_compiled:
            # Code behind the graph that other numbers would make compile anew runs as it is: it gives the same.
            with dynamo.compiling_nothing_more():
                results = self._run_once(inputs)
            if self._ids:
                return results
        return self._run_once(inputs)

    def _run_once(self, inputs: Arguments) -> list[torch.Tensor]:
        self._ids.clear()
        self._weights.clear()
        with dynamo.compiling_aside(), self._aside_of_model() as (written, changed):
            args, kwargs = copy.deepcopy(tree_map(_detached, inputs))
            if (hidden := _hidden_of((args, kwargs))) is not None:
                # The graph that is made serves many tokens as well.
                dynamo.let_vary(hidden, self._counting_dim(hidden))
            result = self._call(*args, **kwargs)
            returned = [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.kept = {_RETURNED: content(result)} | changed()
            self.written.update(self.kept)
            return returned + written()

    @contextlib.contextmanager
    def _aside_of_model(self) -> Iterator[tuple[Callable[[], list[torch.Tensor]], Callable[[], dict[str, Any]]]]:
        """What a run changes is put back; gives functions that tell what it wrote, and what it left elsewhere."""
        device = self._block.weight.device
        devices = [device] if device.type == "cuda" else []
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices),
            self._block.state_restored() as written,
            self._aside.restored() as changed,
            warnings.catch_warnings(record=True),  # the program's own are given by its own call
        ):
            torch.manual_seed(0)
            yield written, changed

    # Which parameters are the experts'.

    def _experts(self, candidates: list[ExpertSlices], inputs: Arguments) -> list[ExpertSlices] | str:
        """The parameters that act on the hidden states of one expert's tokens alone; or why there are none."""
        base = self._run(inputs)
        ids, weights = self._ids[0], [w.clone() for w in self._weights]
        taken: list[ExpertSlices] = []
        for one in candidates:
            if any(tensor is other for tensor in one.tensors for known in taken for other in known.tensors):
                continue
            if self._belongs_to_experts(one, inputs, base, ids, weights):
                taken.append(one)
        taken = [one for one in taken if not self._scales_weights(one, taken, inputs)]
        if not taken:
            return "no parameter around its router acts on the tokens of one expert alone"
        if all(one.dim is not None and _is_vector(one.parts(self._block.num_experts)[0]) for one in taken):
            return "what its indices fetch are vectors, which act on no hidden states: values of a table, no experts"
        if not self._acts_on_hidden(taken, inputs):
            return "what its indices fetch is added up whatever the hidden states are: values of a table, no experts"
        return taken

    def _scales_weights(self, one: ExpertSlices, taken: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether a number per expert may scale routing weights, and be the router's.

        A bias of the experts shows where all else that they have is zero, and adds the same whatever that is. So does
        no scale of weights, also where these are read elsewhere, `y + (1 - weights[:, :1]) * x`.
        """
        others = [other for other in taken if other is not one]
        if one.parts(self._block.num_experts)[0].numel() > 1 or not others:
            return False
        # Weights that are returned change with it, whatever the experts give.
        made_by_experts = self._changes_with(others, inputs)
        with self._block.zeroed(others):
            changes = self._changes_with([one], inputs)
        if not any(by_one and by_experts for by_one, by_experts in zip(changes, made_by_experts, strict=True)):
            return True
        return not self._adds_alone(one, others, inputs)

    def _adds_alone(self, one: ExpertSlices, others: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether what an exchange of other parameters changes is the same whatever one of them is."""
        before, after = self._with_exchange(others, inputs)
        with self._block.exchanged([one], _shift(self._block.num_experts)):
            then_before, then_after = self._with_exchange(others, inputs)
        runs = zip(before, after, then_before, then_after, strict=True)
        return all(_close(b - a, d - c) for a, b, c, d in runs if _floats(a))

    def _changes_with(self, exchanged: list[ExpertSlices], inputs: Arguments) -> list[bool]:
        """Which of the tensors that the block returns are others when experts take each other's parameters."""
        return [not torch.equal(a, b) for a, b in zip(*self._with_exchange(exchanged, inputs), strict=True)]

    def _with_exchange(
        self, experts: list[ExpertSlices], inputs: Arguments, *, seed: int = 0, scores: str = "own"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the block returns, and what it returns when experts take each other's parameters."""
        before = self._run(inputs, seed=seed, scores=scores)
        with self._block.exchanged(experts, _shift(self._block.num_experts)):
            return before, self._run(inputs, seed=seed, scores=scores)

    def _is_same_effect(self, experts: list[ExpertSlices], *runs: tuple[Arguments, str]) -> bool:
        """Whether an exchange of experts adds the same to what two runs give, each of inputs and scores."""
        differences = []
        for inputs, scores in runs:
            before, after = self._with_exchange(experts, inputs, scores=scores)
            differences.append([a - b for a, b in zip(after, before, strict=True) if _floats(a)])
        return all(_close(a, b) for a, b in zip(*differences, strict=True))

    def _weighs_nothing(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether other scores for the same choice change nothing of what the experts give, as of attended prompts."""
        return self._gate.top_k > 1 and self._is_same_effect(experts, (inputs, "own"), (inputs, "others"))

    def _belongs_to_experts(
        self,
        one: ExpertSlices,
        inputs: Arguments,
        base: list[torch.Tensor],
        ids: torch.Tensor,
        weights: list[torch.Tensor],
    ) -> bool:
        """Whether disturbing an expert's part changes outputs of tokens that name it, and of no others."""
        count = ids.numel() // self._gate.top_k
        chosen = [expert for expert in ids.flatten().tolist() if 0 <= expert < self._block.num_experts]
        for expert in chosen[:2]:
            try:
                with self._block.disturbed(one, expert):
                    changed = self._run(inputs)
            except _FAILURES as error:  # numbers that have to be what they are, such as places in a table
                log.debug("%s is no expert's: disturbed, %s", one.name, _short(error))
                return False
            if not all(torch.equal(a, b) for a, b in zip(weights, self._weights, strict=True)):
                return False  # the router's own number per expert
            rows = _changed_rows(base, changed, count)
            if rows is None or not bool(rows.any()):
                return False
            names = (ids.reshape(count, -1) == expert).any(-1).to(rows.device)
            if bool((rows & ~names).any()):
                return False
        return True

    def _acts_on_hidden(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether what an exchange of experts changes depends on the hidden states, at the same choices and weights."""
        return not self._is_same_effect(experts, (inputs, "equal"), (tree_map(_turned, inputs), "equal"))

    def _sends_elsewhere(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether the code outside changes ids before the experts get them, as those of padding: it may count no token.

        An expert that padding would be sent to must do nothing where nobody chose it, and what a token chose must do
        something, whatever a mask of tokens among the inputs says. (One of attention may leave a token nothing.)
        """
        self._run(inputs)
        tokens = self._ids[0].numel() // self._gate.top_k
        masked = tree_map(lambda value: _half_masked(value, tokens), inputs)
        has_mask = any(a is not b for a, b in zip(tree_leaves(masked), tree_leaves(inputs), strict=True))
        calls = [inputs, *([masked] if has_mask else []), *self._other_calls(inputs)]
        return any(self._adds_tokens(experts, given) or self._misses_tokens(experts, given) for given in calls)

    def _computes_all(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether every expert computes every token, into a table of which the choice picks or weighs."""
        parameters = [tensor for one in experts for tensor in one.tensors]
        tokens = self._ids[0].numel() // self._gate.top_k
        with self._aside_of_model(), WatchProducts(parameters, tokens, self._block.num_experts) as watch:
            args, kwargs = copy.deepcopy(tree_map(_detached, inputs))
            self._block.module(*args, **kwargs)
        return watch.makes_all

    def _adds_tokens(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether the first or last expert does something for tokens that did not choose it."""
        count = self._block.num_experts
        for expert in (0, count - 1) if self._gate.top_k < count else ():
            before = self._run(inputs, seed=1, absent=expert)
            with contextlib.ExitStack() as stack:
                for one in experts:
                    stack.enter_context(self._block.disturbed(one, expert))
                after = self._run(inputs, seed=1, absent=expert)
            if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                return True
        return False

    def _misses_tokens(self, experts: list[ExpertSlices], inputs: Arguments) -> bool:
        """Whether some tokens with a choice are the same in every draw, whatever their experts are, or go to others."""
        served: torch.Tensor | None = None
        for seed in range(_DRAWS):
            before, after = self._with_exchange(experts, inputs, seed=seed)
            ids = self._ids[0].reshape(-1, self._gate.top_k)  # the same in both runs
            changed = _changed_rows(before, after, len(ids))
            if changed is None:
                return False
            if self._takes_others(experts, inputs, seed, before, ids):
                return True
            unmarked = ((ids >= 0) & (ids < self._block.num_experts)).any(-1).to(changed.device)
            found = changed | ~unmarked
            served = found if served is None else served | found
        # Where none is served, a flag switches the experts off.
        return served is not None and bool(served.any()) and not bool(served.all())

    def _takes_others(
        self, experts: list[ExpertSlices], inputs: Arguments, seed: int, before: list[torch.Tensor], ids: torch.Tensor
    ) -> bool:
        """Whether some experts do something for tokens that chose none of them, as where padding takes others' choice.

        Args:
            experts: the parameters of all.
            inputs: of the run.
            seed: of the run.
            before: what it returned.
            ids: that it chose, int [T, K].
        """
        some = random.Random(seed).sample(range(self._block.num_experts), max(1, self._block.num_experts // 2))
        with contextlib.ExitStack() as stack:
            for one, expert in itertools.product(experts, some):
                stack.enter_context(self._block.disturbed(one, expert))
            changed = _changed_rows(before, self._run(inputs, seed=seed), len(ids))
        names = torch.isin(ids, torch.tensor(some, device=ids.device)).any(-1)
        return changed is not None and bool((changed & ~names.to(changed.device)).any())

    # Whether a rewrite is right.

    def _compare(self, experts: list[ExpertSlices], inputs: Arguments) -> Verdict:
        merged_first, problems, off = self._gate.needs_merge, [], set[bool]()
        ways = ["", _IDS_ALONE] if ids_alone(self._found[0]) is not None else [""]
        for way in [_IDS_KEPT] if self._ids_are_kept else ways:
            for merged in (merged_first, not merged_first):
                version = _version(merged, way)
                try:
                    problem = self._problem_with(version, experts, inputs)
                    if problem is not None and version in self._versions:
                        off.add(merged)
                except _FAILURES as error:  # an expert named twice is not counted twice, and sizes no longer fit
                    name = type(self._block.module).__name__
                    problem = f"{name} could not be run on made-up choices: {_short(error)}"
                if problem is None:
                    return Verdict(merged, ids_alone=way == _IDS_ALONE)
                problems.append(problem)
        return Verdict(None, problems[0], off=frozenset(off))

    def _problem_with(self, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
        """How a rewritten version differs from the definition, or None."""
        if version not in self._versions:
            return f"{self._refused.get(version, 'it cannot be rewritten')}"
        for given in (inputs, *self._other_calls(inputs)):
            problem = self._problem_in_draws(version, experts, given)
            if problem is not None:
                return problem if given is inputs else f"{problem} under another mask: {_SENT_ELSEWHERE}"
        return self._problem_with_more(version, experts, inputs)

    def _problem_in_draws(self, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
        """The same with one call's inputs, in as many draws as it takes to re-route each expert once."""
        stays = set(range(self._block.num_experts))  # experts that were not re-routed so far
        for seed in range(_MOST_DRAWS):
            if seed >= _DRAWS and not stays:
                break
            # An even seed: few first choices, and the others are re-routed.
            chosen = sorted(stays) if seed >= _DRAWS else ()
            problem = self._problem_in_draw(version, experts, inputs, 2 * seed if chosen else seed, chosen)
            if problem is not None:
                return problem
            stays -= {expert for expert, other in self._expert_map().items() if expert != other}
        return None

    def _problem_in_draw(
        self, version: str, experts: list[ExpertSlices], inputs: Arguments, seed: int, chosen: Sequence[int] = ()
    ) -> str | None:
        got, kept = self._run(inputs, version, seed, chosen=chosen), self.kept
        with self._block.exchanged(experts, self._expert_map()):
            wanted = self._run(inputs, "original", seed, chosen=chosen)
        error = _distance(got, wanted)
        run = f"run with the code that receives its ids, {type(self._block.module).__name__}"
        if error is not None and error > _TOLERANCE:
            return f"{run} is off by {error:.2g} of its scale"
        names = sorted(kept.keys() | self.kept.keys())
        other = next((n for n in names if not self._is_left_alike(n, kept.get(n), self.kept.get(n))), None)
        if error is None or other == _RETURNED:
            return f"{run} returns other things"
        return None if other is None else f"{run} leaves other things in {other}, where they may be read later"

    def _problem_with_more(self, version: str, experts: list[ExpertSlices], inputs: Arguments) -> str | None:
        """The same with many tokens, if the block takes them: code may drop what is beyond a place."""
        hidden = _hidden_of(inputs)
        if hidden is None:
            return None
        dim = self._counting_dim(hidden)
        more = _with_rows(inputs, dim, _MANY_ROWS)
        # A number of sequences is often a constant of the graph, which is made anew then.
        by_tokens = dim == hidden.dim() - 2
        with dynamo.compiling_nothing_more() if by_tokens else contextlib.nullcontext():
            try:
                self._run(more)
            except _FAILURES as error:
                log.debug("%s does not run on more tokens: %s", type(self._block.module).__name__, _short(error))
                return None
            if not self._ids:  # the gate's graph serves no more than it was made for
                return None
            problem = self._problem_in_draw(version, experts, more, 0)
        return None if problem is None else f"{problem} where there are {_MANY_ROWS} tokens"

    def _counting_dim(self, hidden: torch.Tensor) -> int:
        """The dimension of hidden states [.., T, H] that counts who chooses: tokens, or sequences in [B, T, H]."""
        choosing = math.prod(map(plain_number, nodes.shape(self._gate.ids) or ())) // self._gate.top_k
        of_sequences = choosing == hidden.shape[0] != hidden.shape[:-1].numel()
        return 0 if hidden.dim() == 3 and (of_sequences or self._by_sequence) else hidden.dim() - 2

    def _expert_map(self) -> dict[int, int]:
        """What re-routing makes of each expert that the last run chose."""
        before = self._ids[0]
        after = torch.ops.sere.reroute.default(before, self._matrix, 1, 0.0, 0)
        return dict(zip(before.flatten().tolist(), after.flatten().tolist(), strict=True))

    # The graphs.

    def _backend(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        gates = _gates_of(dynamo.copy_graph(module), inputs, self._block)
        if not gates:
            return module.forward
        self._found += gates
        versions: dict[str, Callable[..., Any]] = {}  # of this graph: other sizes make another
        self._versions, self._refused = versions, {}
        ways = [(merged, way) for merged in (False, True) for way in ("", _IDS_ALONE, _IDS_KEPT)]
        for version in ("original", *(_version(*way) for way in ways)):
            made = self._rewritten(module, inputs, version)
            if isinstance(made, Skip):
                self._refused[version] = str(made)
            else:
                versions[version] = made
        return lambda *arguments: versions[self._version](*arguments)

    def _rewritten(self, module: GraphModule, inputs: Sequence[Any], version: str) -> Callable[..., Any] | Skip:
        """The graph with the choice put in, what it chose told, and re-routed as the version says."""
        copy = dynamo.copy_graph(module)
        [gate] = _gates_of(copy, inputs, self._block)
        graph = copy.graph
        if version.endswith((_IDS_ALONE, _IDS_KEPT)):
            other = ids_alone(gate) if version.endswith(_IDS_ALONE) else _ids_kept(gate)
            if other is None:
                return Skip(SkipReason.NO_IDS, gate.selection, "all of it leaves in one way")
            gate = other
        if version != "original":
            copy.register_buffer("sere_trial_similarity", self._matrix)
            with graph.inserting_before(next(iter(graph.nodes))):
                similarity = graph.get_attr("sere_trial_similarity")
            done = reroute_dispatch(gate, similarity, RoutingSettings(1), merged=version.startswith("merged"))
            if isinstance(done, Skip):
                return done
        for node, told in ((gate.ids, self._ids), (gate.weights, self._weights)):
            if node is not None:
                with graph.inserting_after(node):
                    graph.call_function(_Tell(told), (node,))
        scores = nodes.operand(gate.selection)
        assert scores is not None
        chosen = scores if gate.form == "steps" else gate.selection
        with graph.inserting_after(chosen):
            forced = graph.call_function(_Choose(self, scores, gate), (chosen,))
        chosen.replace_all_uses_with(forced, delete_user_cb=lambda user: user is not forced)
        router = trace_router(scores, nodes.last_size(scores) or 0)
        assert isinstance(router, Router)
        with graph.inserting_after(router.projection):
            given = graph.call_function(_Score(self), (router.projection,))
        router.projection.replace_all_uses_with(given, delete_user_cb=lambda user: user is not given)
        graph.lint()
        copy.recompile()
        return copy.forward

    @property
    def seed(self) -> int:
        """Of the choices made up for the run that is under way."""
        return self._seed

    @property
    def seed_of_scores(self) -> int:
        """Of the scores at which they are made."""
        return self._seed + 1000 * (self.scores == "others")


def _gates_of(module: GraphModule, inputs: Sequence[Any], block: TrialBlock) -> list[Gate]:
    """The gates of the block's router in a copy of its graph."""
    separate_statistics(module.graph)
    placeholders = list(module.graph.find_nodes(op="placeholder"))

    def is_router(node: Node) -> bool:
        held = inputs[placeholders.index(node)] if node.op == "placeholder" else nodes.value(node)
        return held is block.weight

    found = find_gates(module, lambda node, columns: min(block.num_experts, columns) if is_router(node) else 0)
    return [gate for gate in found.gates if is_router(gate.router_weight)]


def _version(merged: bool, way: str) -> str:
    """The name of a way to rewrite a graph."""
    return ("merged" if merged else "plain") + way


class _Tell:
    """A call in a graph that keeps what a node gives."""

    __name__ = "tell"

    def __init__(self, told: list[torch.Tensor]) -> None:
        self._told = told

    def __call__(self, value: torch.Tensor) -> None:
        self._told.append(value.detach().clone())


class _Score:
    """A call in a graph that puts other logits in place of the router's, where they are asked for."""

    __name__ = "score"

    def __init__(self, trial: _Trial) -> None:
        self._trial = trial

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, or others."""
        if self._trial.scores == "own":
            return logits
        if self._trial.scores == "equal":
            return torch.zeros_like(logits)
        generator = torch.Generator().manual_seed(self._trial.seed_of_scores)
        return logits * (torch.rand(logits.shape, generator=generator) + 0.5).to(logits)


class _Choose:
    """A call in a graph that puts a made-up choice in place of the router's."""

    __name__ = "choose"

    def __init__(self, trial: _Trial, scores: Node, gate: Gate) -> None:
        self._trial = trial
        self._columns = nodes.last_size(scores) or 0
        self._steps = gate.form == "steps"
        self._flat = len(nodes.shape(gate.ids) or ()) < len(nodes.shape(scores) or ())  # max without keepdim
        self._places = max(gate.top_k - 1, 1)

    def __call__(self, chosen: Any) -> Any:
        """The choice in the form of what the router's selection gives."""
        if self._steps:  # scores, of which each step takes the best that is left
            order = self._order(chosen.shape[:-1]).to(chosen.device)
            level = torch.arange(self._columns, 0, -1, device=chosen.device).to(chosen) / self._columns
            level = level**2 if self._trial.scores == "others" else level
            return torch.zeros_like(chosen).scatter(-1, order, level.expand(order.shape))
        ids = chosen if isinstance(chosen, torch.Tensor) else chosen[1]
        leading = ids.shape if self._flat else ids.shape[:-1]
        order = self._order(leading).to(ids)
        made_up = (order[..., 0] if self._flat else order[..., : ids.shape[-1]]).contiguous()
        if isinstance(chosen, torch.Tensor):
            return made_up
        generator = torch.Generator().manual_seed(self._trial.seed_of_scores)
        values = torch.rand(order.shape, generator=generator)
        # Weights of every order, too: what is left out for weighing little has to show.
        values = 10 ** (-4 * values) if self._trial.seed % 3 == 2 else values + 0.1
        values = values.sort(-1, descending=True)[0].to(chosen[0])
        values = values[..., 0] if self._flat else values[..., : ids.shape[-1]]
        return _Picked(values.contiguous(), made_up)

    def _order(self, leading: Sequence[int]) -> torch.Tensor:
        trial = self._trial
        return made_up_order(leading, self._columns, trial.seed, trial.absent, trial.chosen, self._places)


def made_up_order(
    leading: Sequence[int],
    columns: int,
    seed: int,
    last: int | None = None,
    chosen: Sequence[int] = (),
    places: int = 1,
) -> torch.Tensor:
    """An order of all experts for each token, int64 [*leading, columns].

    With an even seed the first choices are two experts only, so that most tokens name an expert twice after re-routing.
    With an odd one the expert `last` is every token's last choice. The experts `chosen` take `places` of each token
    behind its first choice, by turns.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(*leading, columns, generator=generator)
    if chosen:
        rows = keys.view(-1, columns)
        for place, expert in enumerate(by_turns(chosen, len(rows), places)):
            rows[torch.arange(len(rows)), expert] = place - float(places)
    if last is not None:
        keys[..., last] = 2
    order = keys.argsort(-1)
    if seed % 2 or columns < 2:
        return order
    rows = torch.arange(order[..., 0].numel()).view(order.shape[:-1])
    first = (rows % 2)[..., None]
    return torch.cat([first, order[order != first].view(*order.shape[:-1], -1)], -1)


def _detached(value: Any) -> Any:
    """A tensor without its history, which cannot be copied."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _half_masked(value: Any, tokens: int) -> Any:
    """A mask of so many tokens marks the second half of them; other values are as they are."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.numel() != tokens or tokens < 2:
        return value
    return torch.arange(tokens, device=value.device).view(value.shape) < tokens // 2


def _hidden_of(inputs: Arguments) -> torch.Tensor | None:
    """Hidden states [.., T, H], if they are all the tensors among the arguments."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    fits = len(tensors) == 1 and _floats(tensors[0]) and 2 <= tensors[0].dim() <= 3
    return tensors[0] if fits and tensors[0].shape[-2] > 1 else None


def _with_rows(inputs: Arguments, dim: int, rows: int) -> Arguments:
    """The arguments with other hidden states, so many along one dimension; they are all the tensors among them."""
    hidden = _hidden_of(inputs)
    assert hidden is not None
    sizes = [*hidden.shape]
    sizes[dim] = rows
    drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(3)).to(hidden)
    return tree_map(lambda value: drawn if value is hidden else value, inputs)  # type: ignore[no-any-return]


def _turned(value: Any) -> Any:
    """Other numbers of the same kind."""
    return value.flip(-1) * 0.5 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _shift(num_experts: int) -> dict[int, int]:
    return {expert: (expert + 1) % num_experts for expert in range(num_experts)}


def _is_vector(part: torch.Tensor) -> bool:
    return sum(size > 1 for size in part.shape) < 2


def _is_finite(tensor: torch.Tensor) -> bool:
    return not _floats(tensor) or bool(tensor.isfinite().all())


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    scale = float(torch.maximum(left.abs().max(), right.abs().max())) if left.numel() else 0.0
    return bool(((left - right).abs() <= _TOLERANCE * scale + 1e-7).all())


def _changed_rows(before: list[torch.Tensor], after: list[torch.Tensor], rows: int) -> torch.Tensor | None:
    """Which tokens' outputs differ, bool [rows]; None where no output has a row per token."""
    changed = None
    for a, b in zip(before, after, strict=True):
        if a.is_floating_point() and a.shape == b.shape and _counts_rows(a.shape, rows):
            differs = (a != b).reshape(rows, -1).any(-1)
            changed = differs if changed is None else changed | differs
    return changed


def _counts_rows(shape: torch.Size, rows: int) -> bool:
    """Whether the leading sizes of a tensor count so many rows: [T, H], [B, S, H], or [B, S, H] of B sequences."""
    return any(shape[:end].numel() == rows for end in range(1, len(shape)))


def _distance(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float | None:
    """The largest difference relative to the largest number of its tensor; None where other things are returned."""
    worst = 0.0
    if len(got) != len(wanted):
        return None
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return None
            continue
        if a.numel():
            scale = float(b.abs().max().clamp(min=1e-6))
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst
