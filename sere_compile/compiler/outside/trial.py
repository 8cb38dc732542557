"""One block around a router, compiled to be run on choices that are made up."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from ...experts.trial_block import ExpertSlices, TrialBlock
from ...passes import Gate
from ...passes.graph import nodes
from ...passes.graph.failures import FAILURES, program_errors, short
from ...passes.graph.run_part import plain_number
from .. import dynamo
from ..held_warnings import in_trial
from ..kept_aside import KeptAside, alike, content, outline
from .arguments import Arguments, detached, hidden_of, in_float32, with_rows
from .made_up_choices import Draw
from .other_calls import is_rows, of_few_tokens, other_calls, with_masks
from .results import is_finite
from .trial_graphs import TrialGraphs

log = logging.getLogger(__name__)

RETURNED = ""  # the name of what is returned, beside those of what is kept
_ROWS = 12
_FEW_TOKENS = 64


class Trial:
    """One block, compiled so that the gate's graph runs in one of several versions, on choices that are given.

    Args:
        gate: as the model's graph has it.
        block: around its router.
        called_with: what the model calls the block with.

    Attributes:
        graphs: of the compiled block.
        kept: what the last run left besides its results, see `KeptAside`, or returned.
        written: names of what runs have left so far.
        restless: what is other in each run, as a time is, and whether it is of other sizes, too.
        is_compiled: whether there is a graph with the gate.
    """

    def __init__(self, gate: Gate, block: TrialBlock, called_with: Arguments | None) -> None:
        self.gate = gate
        self.block = block
        self._called_with = called_with
        self.graphs = TrialGraphs(block)
        self.kept: dict[str, Any] = {}
        self.written: set[str] = set()
        self.restless: dict[str, bool] = {}
        self.is_compiled = False
        self._others: list[Arguments] | None = None  # see `other_calls`
        self._by_sequence = False  # whether sequences choose, and not tokens
        self._aside = KeptAside(block.module)
        backend = dynamo.OwnBackend(self.graphs.compile)
        self._call: Callable[..., Any] = torch.compile(block.module, backend=backend, dynamic=False)

    def inputs(self) -> Arguments | None:
        """What the block takes: what it is being called with, if little, or made-up hidden states."""
        weight = self.block.weight
        hidden = nodes.last_size(self.gate.router_input) or weight.shape[-1]
        drawn = torch.randn(1, _ROWS, hidden, generator=torch.Generator().manual_seed(3)).to(weight.device)
        tried: list[Arguments] = [((drawn,), {}), ((drawn[0],), {})]
        if self._called_with is not None:
            # Sizes that Dynamo has seen teach it nothing new: tried first, unless they are a whole prompt's.
            called_with = tree_map(in_float32, self._called_with)
            tokens = tokens_in_call(self.gate)
            tried.insert(0 if tokens <= _FEW_TOKENS else 2, called_with)
            if tokens > _FEW_TOKENS and hidden_of(called_with) is None:  # what else it is given may be a mask
                tried.insert(0, of_few_tokens(called_with, tokens, _ROWS))
        for arguments in tried:
            self.graphs.found.clear()
            try:
                self.run(arguments)
            except FAILURES as error:
                log.debug("%s does not run on what was tried: %s", type(self.block.module).__name__, short(error))
                continue
            if self.graphs.found:
                return self._of_many(arguments)
        return None

    def other_calls(self, inputs: Arguments) -> list[Arguments]:
        """The inputs with other masks, flags, lengths and words, as far as the block takes them."""
        if self._others is None:
            self._others = [given for given in self._made_up_calls(inputs) if self._serves(given)]
        return self._others

    def _made_up_calls(self, inputs: Arguments) -> Iterator[Arguments]:
        yield from other_calls(inputs, self.block.module)
        # A later call may have a mask where this one has none: the graph before a break need not have asked.
        hidden = next((leaf for leaf in tree_leaves(inputs) if is_rows(leaf)), None)
        if hidden is not None:
            for masked in with_masks(inputs, self.block.module, hidden.shape[:-1], hidden.device):
                if self._serves(masked):
                    yield from other_calls(masked, self.block.module)

    def _serves(self, inputs: Arguments) -> bool:
        """Whether the block takes the inputs, and returns finite numbers."""
        try:
            results = self.run(inputs)
        except FAILURES as error:
            log.debug("%s does not run on another mask: %s", type(self.block.module).__name__, short(error))
            return False
        return bool(self.graphs.ids) and all(map(is_finite, results))

    def _of_many(self, arguments: Arguments) -> Arguments:
        """The same for several sequences, where one choice is made for all tokens of the only one."""
        hidden = hidden_of(arguments)
        if hidden is None or hidden.dim() < 3 or self.graphs.ids[0].numel() > self.gate.top_k:
            return arguments
        self._by_sequence = True
        several = with_rows(arguments, 0, _ROWS)
        self.graphs.found.clear()
        self.run(several)
        return several

    def find_restless(self, inputs: Arguments) -> dict[str, bool]:
        """What two runs of the same leave as different things, and whether of different sizes."""
        self.run(inputs)
        first = self.kept
        self.run(inputs)
        pairs = {name: (first.get(name), self.kept.get(name)) for name in first.keys() | self.kept.keys()}
        return {name: outline(a) != outline(b) for name, (a, b) in pairs.items() if not alike(a, b)}

    def is_left_alike(self, name: str, left: Any, right: Any) -> bool:
        """Whether two runs have left the same, as far as it is the same in each run."""
        if name in self.restless:
            return self.restless[name] or outline(left) == outline(right)
        return alike(left, right)

    def run(
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
        self.graphs.version, self.graphs.draw = version, Draw(seed, scores, absent, chosen)
        if self.is_compiled:
            # Code behind the graph that other numbers would make compile anew runs as it is: it gives the same.
            with dynamo.compiling_nothing_more():
                results = self._run_once(inputs)
            if self.graphs.ids:
                return results
        return self._run_once(inputs)

    def _run_once(self, inputs: Arguments) -> list[torch.Tensor]:
        self.graphs.ids.clear()
        self.graphs.weights.clear()
        with dynamo.compiling_aside(), self.aside_of_model() as (written, changed):
            args, kwargs = copy.deepcopy(tree_map(detached, inputs))
            if (hidden := hidden_of((args, kwargs))) is not None:
                # The graph that is made serves many tokens as well.
                dynamo.let_vary(hidden, self.counting_dim(hidden))
            with program_errors():
                result = self._call(*args, **kwargs)
            returned = [leaf.clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.kept = {RETURNED: content(result)} | changed()
            self.written.update(self.kept)
            return returned + written()

    def with_exchange(
        self, experts: list[ExpertSlices], inputs: Arguments, *, seed: int = 0, scores: str = "own"
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the block returns, and what it returns when experts take each other's parameters."""
        before = self.run(inputs, seed=seed, scores=scores)
        with self.block.exchanged(experts, shift(self.block.num_experts)):
            return before, self.run(inputs, seed=seed, scores=scores)

    @contextlib.contextmanager
    def aside_of_model(self) -> Iterator[tuple[Callable[[], list[torch.Tensor]], Callable[[], dict[str, Any]]]]:
        """What a run changes is put back; gives functions that tell what it wrote, and what it left elsewhere."""
        device = self.block.weight.device
        devices = [device] if device.type == "cuda" else []
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices),
            self.block.state_restored() as written,
            self._aside.restored() as changed,
            in_trial(),  # the program's own are given by its own call
            _without_cached_parameters(),
        ):
            torch.manual_seed(0)
            yield written, changed

    def counting_dim(self, hidden: torch.Tensor) -> int:
        """The dimension of hidden states [.., T, H] that counts who chooses: tokens, or sequences in [B, T, H]."""
        choosing = tokens_in_call(self.gate)
        of_sequences = choosing == hidden.shape[0] != hidden.shape[:-1].numel()
        return 0 if hidden.dim() == 3 and (of_sequences or self._by_sequence) else hidden.dim() - 2


def tokens_in_call(gate: Gate) -> int:
    """How many tokens choose in the call that was traced. Comparing symbols would limit the graph that is compiled."""
    return math.prod(map(plain_number, nodes.value(gate.ids).shape)) // gate.top_k


@contextlib.contextmanager
def _without_cached_parameters() -> Iterator[None]:
    """`parametrize.cached()` may be in force around the call that is compiled: what a trial computes is not for it."""
    held = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = held


def shift(num_experts: int) -> dict[int, int]:
    """An exchange of all experts: each takes the parameters of the next."""
    return {expert: (expert + 1) % num_experts for expert in range(num_experts)}
