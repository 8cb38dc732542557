"""Run every expert of a gate on the same tokens, without knowing the model's code.

Counterfactual routing: the dispatch runs with expert e in a token's first slot at weight 1 and
other experts behind it at weight 0, which leaves e's own output. Two functions can be the dispatch.
The region between routing and its post-dominator in the traced graph is there for any code, but
computes all K slots of a row, and takes as many rows as the graph was traced with. An experts
module beside the router that takes ids of any width does with one slot, and any number of rows; it
is used where it is all there is, or where it gives what the region gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import CalibrationError
from ..passes import DispatchRegion
from ..passes.graph.failures import program_errors
from .experts_module import Experts

# (token number of each row [R], ids [R, K], weights [R, K] float32) -> outputs [R, H]
Dispatch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Rows that an experts module runs at once, as bytes of the weights that "batched_mm" would copy for
# them.
_COPIED_BYTES = 2**28
# Share of the root mean square by which a module may differ from the region, by rounding alone.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


class CounterfactualExperts:
    """The experts behind a gate on the hidden states of one forward.

    Args:
        dispatch: the gate's dispatch on rows that are chosen by their token number.
        rows: R, how many rows one run takes; None: any number up to `most`.
        slots: how many ids a row has.
        most: the largest number of rows, where any is possible.
    """

    def __init__(self, dispatch: Dispatch, rows: int | None, slots: int, most: int = 0) -> None:
        self._dispatch, self._rows, self._slots, self._most = dispatch, rows, slots, most

    def outputs(self, tokens: torch.Tensor, num_experts: int) -> torch.Tensor:
        """What each expert gives for each token: [E, n, H].

        Args:
            tokens: int64 [n], token numbers, at least one.
            num_experts: E, at least the number of slots.
        """
        pairs = num_experts * len(tokens)
        rows = self._rows if self._rows is not None else min(pairs, self._most)
        slots = torch.arange(self._slots, device=tokens.device)
        weights = torch.zeros(rows, self._slots, device=tokens.device)
        weights[:, 0] = 1
        found: torch.Tensor | None = None
        for start in range(0, pairs, rows):
            # A region takes all its rows: those behind the last pair begin again.
            stop = start + rows if self._rows is not None else min(start + rows, pairs)
            pair = torch.arange(start, stop, device=tokens.device) % pairs
            expert, token = pair // len(tokens), pair % len(tokens)
            # Distinct experts in a token: some dispatches lose a slot when one is named twice.
            ids = (expert[:, None] + slots) % num_experts
            with program_errors():
                result = self._dispatch(tokens[token], ids, weights[: len(pair)])
            if found is None:
                found = result.new_empty(pairs, result.shape[-1])
            found[pair] = result
        assert found is not None
        return found.view(num_experts, len(tokens), -1)


def of_region(
    region: DispatchRegion,
    ids: torch.Tensor,
    weights_dtype: torch.dtype,
    inputs: Sequence[Any],
    activations: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor] | None = None,
) -> CounterfactualExperts:
    """The region on the tensors of one forward.

    Args:
        region: from `passes.extract_dispatch`.
        ids: [..., K], as the gate chose them; shape and dtype are what the region takes.
        weights_dtype: of the routing weights.
        inputs: the tensors and sizes behind `region.inputs`.
        activations: the tensors behind `region.activations`; their rows are tokens, or K equal ones
            per token.
        tables: rows [N, H] for each activation to choose from in their place.
    """
    rows, slots = ids.numel() // ids.shape[-1], ids.shape[-1]
    copies = [_rows_a_token(tensor, rows, region) for tensor in activations]
    own = [a.reshape(rows, count, -1)[:, 0] for a, count in zip(activations, copies, strict=True)]
    chosen_from = own if tables is None else tables
    unwritten = _Unwritten(inputs)

    def dispatch(token: torch.Tensor, new_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = [
            table[token].repeat_interleave(count, dim=0).reshape(tensor.shape)
            for table, count, tensor in zip(chosen_from, copies, activations, strict=True)
        ]
        new_ids = new_ids.to(ids.dtype).reshape(ids.shape)
        with unwritten as given:
            result = region.module(new_ids, weights.to(weights_dtype).reshape(ids.shape), *given, *chosen)
        return result.reshape(rows, -1)

    return CounterfactualExperts(dispatch, rows, slots)


class _Unwritten:
    """The inputs of a region as they are before every run: loops add to a tensor that was made in front of them."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values, self._given = values, list(values)
        # Of the first run on: where a run writes to.
        self._written = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and not _is_weight(v)]

    def __enter__(self) -> list[Any]:
        self._given = list(self._values)
        for place in self._written:
            self._given[place] = self._values[place].clone()
        return self._given

    def __exit__(self, *_: object) -> None:
        self._written = [i for i in self._written if self._given[i].is_inference() or self._given[i]._version]


def _is_weight(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _rows_a_token(tensor: torch.Tensor, rows: int, region: DispatchRegion) -> int:
    leading = tensor.numel() // tensor.shape[-1]
    if leading % rows:
        raise CalibrationError(
            f"the dispatch at {region.output.name} reads a tensor of shape {tuple(tensor.shape)}, which has not a row "
            f"for each of {rows} tokens"
        )
    return leading // rows


def of_module(experts: Experts, hidden: torch.Tensor, slots: int, expert_bytes: int) -> CounterfactualExperts:
    """An experts module (hidden [T, H], ids [T, K], weights [T, K]) on hidden states [T, H] of one forward.

    Args:
        experts: the module.
        hidden: [T, H].
        slots: how many ids to give it, 1 where it takes any number.
        expert_bytes: size of one expert's weights, to bound what the module may copy for its rows.
    """

    def dispatch(token: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return experts(hidden[token], ids, weights.to(hidden.dtype))

    return CounterfactualExperts(dispatch, None, slots, most=max(1, _COPIED_BYTES // max(1, expert_bytes * slots)))


def agree(left: CounterfactualExperts, right: CounterfactualExperts, tokens: torch.Tensor, num_experts: int) -> bool:
    """Whether two dispatches give the same expert outputs on some tokens, but for rounding.

    Only finite rows of the left are compared: behind an expert of weight 0 that gives NaN, every
    row is NaN.
    """
    expected = left.outputs(tokens, num_experts)
    actual = right.outputs(tokens, num_experts)
    if actual.shape != expected.shape:
        return False
    finite = expected.isfinite().all(-1)
    if not finite.any():
        return False
    expected, actual = expected[finite], actual[finite]
    tolerance = _TOLERANCE.get(expected.dtype, 1e-3)
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return bool(difference <= tolerance * expected.double().square().mean().sqrt())
