"""What another call of a block may be given in place of the masks, flags, lengths, words and numbers of one call.

A trial of code outside the graph on one call's inputs shows nothing of a call that masks other tokens.
"""

from __future__ import annotations

import inspect
import math
import random
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...passes.proof.masks import some_elements
from .arguments import Arguments

_MASKED = 0.4  # of a tensor's elements
_MOST = 8  # other calls that are made up
_MOST_ABSENT = 3  # arguments that are not given, and are tried with a mask
_MOST_NUMBERS = 24  # that the code of a block names
_MOST_OF_A_NUMBER = 6  # others in place of a number that is no tensor
_FAR_BELOW = -1e4  # what is added to scores of padding, at least
Choice = list[float | None]


def other_calls(inputs: Arguments, block: nn.Module) -> Iterator[Arguments]:
    """The inputs with some elements marked in each tensor that may be a mask, and others not; each in several ways.

    Args:
        inputs: of the block.
        block: whose code names numbers that words may be compared with.
    """
    leaves, form = tree_flatten(inputs)
    tokens = next((math.prod(leaf.shape[:-1]) for leaf in leaves if is_rows(leaf)), 0)
    choices = {place: found for place, leaf in enumerate(leaves) if (found := _choices(leaf, block, tokens))}
    longest = max(map(len, choices.values()), default=0)
    count = longest if len(choices) == 1 else min(2 * longest, max(_MOST, longest))
    for number in range(count):
        generator = torch.Generator().manual_seed(500 + number)
        drawn = random.Random(number)
        made = list(leaves)
        for place, found in choices.items():
            choice = found[number] if number < len(found) else drawn.choice(found)
            made[place] = _marked(leaves[place], choice, generator)
        yield tree_unflatten(made, form)


def with_masks(inputs: Arguments, block: nn.Module, leading: torch.Size, device: torch.device) -> Iterator[Arguments]:
    """The inputs with a mask that masks nothing in place of each argument that is None, or left out where None stands.

    Args:
        inputs: of the block.
        block: whose `forward` names its arguments.
        leading: sizes of the mask: those of hidden states but for the last.
        device: of the mask.
    """
    try:
        parameters = inspect.signature(block.forward).parameters
        given = inspect.signature(block.forward).bind_partial(*inputs[0], **inputs[1]).arguments
    except (TypeError, ValueError):
        return
    absent = [name for name, parameter in parameters.items() if given.get(name, parameter.default) is None]
    places = {name: place for place, name in enumerate(parameters)}
    for name in absent[:_MOST_ABSENT]:
        mask = torch.ones(leading, dtype=torch.bool, device=device)
        args, kwargs = list(inputs[0]), dict(inputs[1])
        if places[name] < len(args):
            args[places[name]] = mask
        else:
            kwargs[name] = mask
        yield tuple(args), kwargs


def kinds_of(inputs: Arguments | None) -> tuple[Any, ...]:
    """What tells calls of a block apart but for sizes and numbers: one without a mask shows nothing of one with it."""
    leaves, form = tree_flatten(inputs)
    kinds = ((leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves)
    return (str(form), *kinds)


def of_few_tokens(inputs: Arguments, tokens: int, few: int) -> Arguments:
    """The inputs with the first few tokens of many: each size that counts them is smaller."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            for dim, size in enumerate(leaf.shape):
                leaf = leaf.narrow(dim, 0, few) if size == tokens else leaf
        return leaf

    return tree_map(cut, inputs)  # type: ignore[no-any-return]


def is_rows(value: Any) -> bool:
    """Whether a value is a tensor [.., H] of floats, as hidden states are."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def _choices(leaf: Any, block: nn.Module, tokens: int) -> Choice:
    """What some elements become in one call after another; None: the contrary of a mask, or any number that occurs."""
    if type(leaf) is bool:
        return [float(not leaf)]
    if type(leaf) is int:
        likely = (tokens // 2, leaf // 2, tokens, 1, tokens - 1, 0, *_numbers_of(block))
        others = [number for number in dict.fromkeys(likely) if number not in (leaf, -1)]
        return [*map(float, others[:_MOST_OF_A_NUMBER])]
    if not isinstance(leaf, torch.Tensor) or leaf.numel() == 0:
        return []
    if leaf.dtype == torch.bool:
        return [0.0, 1.0, None]
    values = leaf.detach().reshape(-1)
    if leaf.is_floating_point():
        low = bool((values <= _FAR_BELOW).any())
        if not bool(((values == 0) | (values == 1) | (values <= _FAR_BELOW)).all()):
            return []
        return [0.0, float(torch.finfo(leaf.dtype).min)] if low or not bool(values.any()) else [0.0, 1.0, None]
    if leaf.is_complex():
        return []
    if bool(((values == 0) | (values == 1)).all()):
        return [0.0, 1.0, None]
    # Elsewhere than on a CPU a number beyond a table ends the process.
    named = _numbers_of(block) if leaf.device.type == "cpu" else []
    half = [float(values.max() // 2)] if leaf.numel() == 1 else []  # a length
    return [0.0, None, *half, *(float(number) for number in named if number)]


def _marked(leaf: Any, choice: float | None, generator: torch.Generator) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf)(choice)
    some = some_elements(leaf.shape, _MASKED, generator).to(leaf.device) & ~_own_places(leaf)
    if choice is not None:
        return leaf.detach().masked_fill(some, choice)
    if leaf.dtype == torch.bool:
        return leaf.detach() ^ some
    largest = int(leaf.max())
    other = torch.randint(largest + 1, leaf.shape, generator=generator).to(leaf) if largest > 1 else 1 - leaf
    return torch.where(some, other, leaf.detach())


def _own_places(leaf: torch.Tensor) -> torch.Tensor:
    """Where a mask of attention, [.., L, S], lets a token see itself: one that sees nothing tells nothing."""
    own = torch.zeros(leaf.shape, dtype=torch.bool, device=leaf.device)
    if leaf.dim() >= 3 and 1 < leaf.shape[-2] <= leaf.shape[-1]:
        own.diagonal(leaf.shape[-1] - leaf.shape[-2], -2, -1).fill_(True)
    return own


def _numbers_of(block: nn.Module) -> list[int]:
    """Whole numbers that the code of a block's modules names, and that the modules hold as attributes."""
    found: dict[int, None] = {}
    for module in block.modules():
        held = [value for value in vars(module).values() if type(value) is int]
        codes = [vars(kind)["forward"].__code__ for kind in type(module).__mro__ if _has_code(kind)]
        found.update(dict.fromkeys([*held, *(number for code in codes for number in _constants(code))]))
    return list(found)[:_MOST_NUMBERS]


def _has_code(kind: type) -> bool:
    module = kind.__module__.split(".")[0]
    return module != "torch" and isinstance(vars(kind).get("forward"), types.FunctionType)


def _constants(code: types.CodeType) -> Iterator[int]:
    for constant in code.co_consts:
        if type(constant) is int:
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _constants(constant)
