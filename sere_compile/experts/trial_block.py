"""A private copy of the block around a router, on which a rewrite can be tried without touching the model.

A compiled graph may end between router and experts. What the code behind it does with ids and weights
is then unknown; but the block as a whole, router and experts, can be run. The copy has random float32
parameters, so that what it shows does not depend on what the model has learnt, and the parameters of
one expert can take the place of another's.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dis
import math
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..passes.graph.identity import identity

# Numbers of a layer that say where it stands, not what it does.
_PLACES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "idx"})
# Attributes that every module has.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_LEAST = 0.1  # of a buffer whose numbers are not below 0
_DEEP = 4  # lists in lists in dictionaries ..
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class ExpertSlices:
    """Parameters that hold one part per expert.

    Attributes:
        name: of the stacked parameter, or of the parameter within each of a list's experts.
        tensors: one stacked tensor, or one tensor per expert.
        dim: along which a stacked tensor counts the experts; None for one tensor per expert.
        by_turns: whether the experts take turns along it, as in peft's second factor of stacked weights.
    """

    name: str
    tensors: tuple[torch.Tensor, ...]
    dim: int | None
    by_turns: bool = False

    @property
    def is_of_modules(self) -> bool:
        """Whether each expert is a module that holds its part, and not a list of parameters."""
        return self.dim is None and not self.name.endswith("*")

    def parts(self, num_experts: int) -> list[torch.Tensor]:
        """The part of each expert: views, so that writing to one changes the parameter."""
        if self.dim is None:
            return [tensor.data for tensor in self.tensors]
        size = self.tensors[0].shape[self.dim]
        if self.by_turns:
            return list(self.tensors[0].data.unflatten(self.dim, (-1, num_experts)).unbind(self.dim + 1))
        # A stack may have rows behind the experts', for those that compute nothing.
        rows = 1 if size % num_experts else size // num_experts
        return list(self.tensors[0].data.split(rows, self.dim))[:num_experts]


class TrialBlock:
    """A copy of one module, its router weight among its parameters.

    Args:
        block: the module to copy.
        weight: the router weight, a parameter or buffer somewhere in it.
        root: the model; modules of it outside the block are not copied, whoever refers to them.
        num_experts: E.
        columns: how many scores the router gives, at least E.

    Raises:
        RuntimeError, TypeError, NotImplementedError, ValueError: the block cannot be copied.
    """

    def __init__(self, block: nn.Module, weight: torch.Tensor, root: nn.Module, num_experts: int, columns: int) -> None:
        inside = set(block.modules())
        memo: dict[int, Any] = {id(module): module for module in root.modules() if module not in inside}
        with _groups_shared():
            self.module = copy.deepcopy(block, memo)
        self.weight = memo[id(weight)]
        self.num_experts, self.columns = num_experts, columns
        # Buffers that a call has written to or replaced.
        self._written: dict[tuple[nn.Module, str], None] = {}
        generator = torch.Generator().manual_seed(0)
        buffers = {id(buffer) for buffer in self.module.buffers()}
        for tensor in _tensors(self.module).values():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator) / max(tensor.shape[-1:], default=1) ** 0.5
                # A variance that is below 0 would make all of it NaN.
                below = id(tensor) not in buffers or bool((tensor.float() < 0).any())
                tensor.data = (drawn if below else drawn.abs() + _LEAST).to(tensor.device)

    def candidates(self) -> list[ExpertSlices]:
        """Every parameter and buffer that could hold one part per expert, by its sizes alone."""
        found: list[ExpertSlices] = []
        listed: set[int] = set()
        for path, holder in self.module.named_modules():
            for name, members in _lists(holder):
                if len(members) == self.num_experts:
                    for inner in members[0]:
                        group = tuple(member[inner] for member in members if inner in member)
                        if len(group) == len(members) and len({tensor.shape for tensor in group}) == 1:
                            listed.update(id(tensor) for tensor in group)
                            found.append(ExpertSlices(f"{path}.{name}.*.{inner}".strip("."), group, None))
        for name, tensor in _tensors(self.module).items():
            if tensor is not self.weight and id(tensor) not in listed:
                dims = [d for d, size in enumerate(tensor.shape) if size in (self.num_experts, self.columns)]
                if not dims and tensor.dim() == 2:
                    dims = [d for d, size in enumerate(tensor.shape) if size % self.num_experts == 0]
                found += [ExpertSlices(name, (tensor,), dim) for dim in dims]
                longer = [dim for dim in dims if tensor.shape[dim] > self.num_experts and tensor.dim() == 2]
                turns = [dim for dim in longer if tensor.shape[dim] % self.num_experts == 0]
                found += [ExpertSlices(name, (tensor,), dim, by_turns=True) for dim in turns]
        return found

    @contextlib.contextmanager
    def state_restored(self) -> Iterator[Callable[[], list[torch.Tensor]]]:
        """Buffers may be written to or replaced meanwhile, and are what they were afterwards.

        Gives a function that tells what those hold that some call so far has written to.
        """
        kept = {
            (module, name): (buffer, buffer.clone(), buffer._version)
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }

        def written() -> list[torch.Tensor]:
            for (module, name), (buffer, before, version) in kept.items():
                if module._buffers[name] is not buffer or is_changed(buffer, before, version):
                    self._written[module, name] = None
            found = (module._buffers[name] for module, name in self._written)
            return [buffer.detach().clone() for buffer in found if buffer is not None]

        try:
            yield written
        finally:
            for (module, name), (buffer, before, version) in kept.items():
                if module._buffers[name] is not buffer or is_changed(buffer, before, version):
                    write_back(buffer, before)
                    module._buffers[name] = buffer

    @contextlib.contextmanager
    def exchanged(self, slices: list[ExpertSlices], expert_map: Mapping[int, int]) -> Iterator[None]:
        """Meanwhile expert u has the parameters of expert `expert_map[u]`."""
        with contextlib.ExitStack() as stack:
            for one in slices:
                parts = one.parts(self.num_experts)
                kept = stack.enter_context(_restored(parts))
                for expert, target in enumerate(parts):
                    target.copy_(kept[expert_map.get(expert, expert)])
            yield

    @contextlib.contextmanager
    def zeroed(self, slices: list[ExpertSlices]) -> Iterator[None]:
        """Meanwhile every expert's part of these parameters is zero."""
        parts = [part for one in slices for part in one.parts(self.num_experts)]
        with _restored(parts):
            for part in parts:
                part.zero_()
            yield

    @contextlib.contextmanager
    def disturbed(self, slices: ExpertSlices, expert: int) -> Iterator[None]:
        """Meanwhile the part of one expert is another one."""
        part = slices.parts(self.num_experts)[expert]
        with _restored([part]):
            if part.is_floating_point():  # a variance stays above 0, see `__init__`
                part.copy_(part * (-1.5 if bool((part < 0).any()) else 1.5) + 0.25)
            else:
                part.copy_(~part)
            yield


def is_changed(buffer: torch.Tensor, before: torch.Tensor, version: int) -> bool:
    """Whether numbers are others than before; `running_mean` changes and no version counter tells."""
    if buffer._version != version or not _fits(buffer, before):
        return True
    # Memory that nobody has written to yet may hold a NaN, which is equal to none.
    return not torch.equal(buffer, before) and not bool(((buffer == before) | (buffer.isnan() & before.isnan())).all())


def write_back(buffer: torch.Tensor, before: torch.Tensor) -> None:
    """Make a buffer what it was, also where `buffer.data` was given another size."""
    if _fits(buffer, before):
        buffer.copy_(before)
    else:
        buffer.data = before.clone()


def _fits(buffer: torch.Tensor, before: torch.Tensor) -> bool:
    return buffer.shape == before.shape and buffer.dtype == before.dtype


@contextlib.contextmanager
def _restored(parts: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parts of parameters that may be written to meanwhile; gives copies of what they were, and will be again."""
    kept = [part.clone() for part in parts]
    try:
        yield kept
    finally:
        for part, before in zip(parts, kept, strict=True):
            part.copy_(before)


@contextlib.contextmanager
def _groups_shared() -> Iterator[None]:
    """Meanwhile a copy of a process group is the group itself: it cannot be copied, and holds nothing of a model."""
    table, group = copyreg.dispatch_table, torch.distributed.ProcessGroup if torch.distributed.is_available() else None
    if group is None or group in table:
        yield
        return
    table[group] = lambda shared: "shared"  # a name in place of parts says that copying keeps the object
    try:
        yield
    finally:
        del table[group]


def fingerprint(block: nn.Module) -> tuple[Any, ...]:
    """What a block's code depends on but for the numbers in its tensors: equal where blocks compute the same.

    Objects that are neither numbers nor modules (a configuration, a function) count by their identity, and by the plain
    attributes that the block's code names, except those that each layer has of its own: in private attributes, and what
    hooks refer to. So do globals that it names.
    """
    described = []
    for name, module in block.named_modules():
        plain = tuple(
            (key, _described(value))
            for key, value in sorted(vars(module).items())
            if key not in OF_EVERY_MODULE and key not in _PLACES and (not key.startswith("_") or _is_plain(value))
        )
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in module.named_parameters(recurse=False))
        described.append((name, type(module), module.training, plain, _hooks_of(module), shapes))
    elsewhere = tuple((name, _described(values[name])) for values, name in _read_elsewhere(block) if name in values)
    return (*described, elsewhere)


class Settings:
    """The attributes that a block's own code reads and no call of it writes, and its hooks, as they were.

    Code outside graphs reads them anew in each call, and no guard of a graph knows of them. So it does numbers and
    texts that it does not write in globals, and in objects that the block holds, as a configuration.

    Args:
        block: is not kept alive.
        written: attributes that its calls write, by their path.
    """

    def __init__(self, block: nn.Module, written: frozenset[str]) -> None:
        own = [(path, module) for path, module in block.named_modules() if not _is_of_torch(type(module))]
        read = _names_read(block)
        self._held = [
            (weakref.ref(module), name, _described(value))
            for path, module in own
            for name, value in vars(module).items()
            if name in read and name not in OF_EVERY_MODULE and f"{path}.{name}".strip(".") not in written
        ]
        self._hooks = [(weakref.ref(module), _hooks_of(module)) for module in block.modules()]
        self._elsewhere = [(values, name, _described(values.get(name))) for values, name in _read_elsewhere(block)]

    def are_the_same(self) -> bool:
        """Whether all of them are what they were."""
        gone = object()
        for reference, name, described in self._held:
            module = reference()
            if module is None or _described(vars(module).get(name, gone)) != described:
                return False
        if any(_described(values.get(name, gone)) != described for values, name, described in self._elsewhere):
            return False
        return all((module := ref()) is not None and _hooks_of(module) == hooks for ref, hooks in self._hooks)


def _names_read(block: nn.Module) -> set[str]:
    """The names of attributes that the code of a block's own modules reads."""
    return {name for kind in _own_kinds(block) for name in _names_in(kind)}


def _own_kinds(block: nn.Module) -> set[type]:
    return {kind for kind in map(type, block.modules()) if not _is_of_torch(kind)}


def _read_elsewhere(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Numbers and texts that a block's code reads and does not write, outside its modules: whose, and their names."""
    functions = [function for kind in _own_kinds(block) for function in _functions_of(kind)]
    read = _names_read(block) - {name for function in functions for name in _names_written(function.__code__)}
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}

    def add(values: dict[str, Any], name: str) -> None:
        if name not in values:
            return
        value = values[name]
        if isinstance(value, _PLAIN) and name in read:
            found[id(values), name] = (values, name)
        elif _is_plain_object(value):
            for key in [key for key in vars(value).keys() & read if isinstance(vars(value)[key], _PLAIN)]:
                found[id(vars(value)), key] = (vars(value), key)

    for module in block.modules():
        for name in vars(module).keys() & read:
            if not _is_plain(vars(module)[name]):
                add(vars(module), name)
    for function in functions:
        for name in function.__code__.co_names:
            add(function.__globals__, name)
    return list(found.values())


def _is_plain_object(value: Any) -> bool:
    """Whether an object holds settings, as a configuration does: not code, a tensor, a module, or what may hold one."""
    kinds = (nn.Module, torch.Tensor, type, types.ModuleType)
    if isinstance(value, kinds) or callable(value) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return not any(isinstance(held, nn.Module) for held in vars(value).values())


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "torch"


def _functions_of(kind: type) -> Iterator[types.FunctionType]:
    """The methods of a class and of those that it is made of, but for torch's own and what makes an object."""
    for one in kind.__mro__:
        members = {} if _is_of_torch(one) else {name: held for name, held in vars(one).items() if name != "__init__"}
        functions = (getattr(member, "__wrapped__", member) for member in members.values())
        yield from (found for found in functions if isinstance(found, types.FunctionType))


def _names_in(kind: type) -> Iterator[str]:
    """The names of attributes that methods of a class read, also `getattr(self, "scales")`."""
    pending = [function.__code__ for function in _functions_of(kind)]
    while pending:
        code = pending.pop()
        reading = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")
        yield from (i.argval for i in dis.get_instructions(code) if i.opname in reading)
        yield from (constant for constant in code.co_consts if isinstance(constant, str))
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _names_written(code: types.CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_ATTR", "STORE_GLOBAL"))


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    if not (module._forward_hooks or module._forward_pre_hooks):
        return ()  # a guard asks hundreds of modules in each call, of which most have none
    return tuple(map(_hook, [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]))


def _hook(hook: Any) -> tuple[Any, ...]:
    """What a hook does: its code, and the plain values that it closes over."""
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType):
        return (type(hook),)
    held = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return (function.__code__, *(_described(value) for value in held if _is_plain(value)))


def _is_plain(value: Any, deep: int = _DEEP) -> bool:
    """Whether a setting is made of plain values alone."""
    if deep and isinstance(value, dict):
        return _is_plain([*value, *value.values()], deep - 1)
    if deep and isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_plain(held, deep - 1) for held in value)
    return isinstance(value, _PLAIN)


def _described(value: Any, deep: int = _DEEP) -> Any:
    """A setting by its value where it is made of plain ones, else by its identity."""
    if deep and isinstance(value, (tuple, list)):
        return tuple(_described(held, deep - 1) for held in value)
    if deep and isinstance(value, dict):
        return tuple((_described(key), _described(held, deep - 1)) for key, held in value.items())
    if deep and isinstance(value, (set, frozenset)):
        return frozenset(_described(held, deep - 1) for held in value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # which is equal to itself
    return value if isinstance(value, _PLAIN) else identity(value)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _lists(holder: nn.Module) -> Iterator[tuple[str, list[dict[str, torch.Tensor]]]]:
    """Children and parameters of a module that come as a list or dictionary, each member with its tensors by name."""
    for name, child in holder.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield name, [_tensors(member) for member in child.children()]
        elif isinstance(child, nn.ParameterList):
            yield name, [{"": parameter} for parameter in child]
