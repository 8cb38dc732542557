"""What a block's code keeps besides its results, parameters and buffers, where a later reader may look for it.

`self.last_ids = ids`, `self.stats["load"].append(..)` and `SEEN.append(ids)` are results as much as what is returned:
they hold what the router chose. A trial of the block tells what a call changes there, and puts everything back: lists
among a module's globals are the user's own.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import contextvars
import dis
import functools
import inspect
import math
import os
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import nn

from ..experts.trial_block import OF_EVERY_MODULE

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LISTS = (list, tuple, set, frozenset, collections.deque)
_CODE = (types.ModuleType, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, nn.Module)
_BOUND = (types.MethodType, functools.partial)
_LIBRARIES = tuple({os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
_LIBRARIES += (os.path.dirname(torch.__path__[0]),)
_DEEP = 4  # lists in lists in objects ..
_MANY = 2000  # members that are looked at of one holder: the last, where calls add to a long list
_LARGE = 1 << 20  # numbers of a tensor that are copied at most

_NOT_COPIED = "not copied"  # stands for the numbers of a large tensor, and for what an iterator gives next

Content = Any  # nested lists of plain values and tensors, which tell two states apart


@dataclass(frozen=True)
class Remembered:
    """What was kept at some time.

    Attributes:
        changed: what is other than it was, by names that a reader of the block's code knows.
        put_back: makes it what it was.
        is_all_known: whether all that has changed can be put back; large tensors and iterators are not copied.
        has_uncopied: whether there are any.
    """

    changed: Callable[[], dict[str, Content]]
    put_back: Callable[[], None]
    is_all_known: Callable[[], bool]
    has_uncopied: bool


class KeptAside:
    """The attributes of a block's modules, and the containers and objects that their code names as globals.

    Modules that the block's refer to and that are no part of it, as a hook refers to the model that gathers its
    statistics, are looked at too, with their buffers.

    Args:
        block: a module.
    """

    def __init__(self, block: nn.Module) -> None:
        self._modules = list(block.named_modules())
        named = [found for _, module in self._modules for found in _globals_of(module)]
        self._globals = _by_name((name, value) for name, value in named if not isinstance(value, nn.Module))
        inside = {module for _, module in self._modules}
        referred = [*named, *(found for _, module in self._modules for found in _modules_in(module))]
        outside: dict[nn.Module, str] = {}
        for name, module in referred:
            if isinstance(module, nn.Module) and module not in outside:
                parts = ((part, f"{name}.{path}".strip(".")) for path, part in module.named_modules())
                outside |= {part: path for part, path in parts if part not in inside and part not in outside}
        self._modules += [(path, module) for module, path in outside.items()]
        self._buffers = [(f"{path}.buffers", module._buffers) for module, path in outside.items() if module._buffers]

    def content(self) -> dict[str, Content]:
        """What is kept, by names that a reader of the block's code knows."""
        return {name: content(value) for name, value in self._holders()}

    @contextlib.contextmanager
    def restored(self) -> Iterator[Callable[[], dict[str, Content]]]:
        """What is kept is afterwards what it was; gives a function that tells what has changed so far."""
        remembered = self.remember()
        try:
            yield remembered.changed
        finally:
            remembered.put_back()

    def remember(self) -> Remembered:
        """What is kept now, for later."""
        before = self.content()
        attributes = [(module, dict(_attributes(module))) for _, module in self._modules]
        inside = [_snapshot(value) for _, value in self._holders()] + [remember_generators()]

        def changed() -> dict[str, Content]:
            now = self.content()
            return {
                name: now.get(name) for name in now.keys() | before.keys() if not alike(now.get(name), before.get(name))
            }

        def put_back() -> None:
            for module, held in attributes:
                for name in [name for name, _ in _attributes(module) if name not in held]:
                    del vars(module)[name]
                vars(module).update(held)
            for restore in inside:
                restore()

        def is_all_known() -> bool:
            return not any(
                _holds_uncopied(found) or _holds_uncopied(before.get(name)) for name, found in changed().items()
            )

        return Remembered(changed, put_back, is_all_known, any(map(_holds_uncopied, before.values())))

    def _holders(self) -> Iterator[tuple[str, Any]]:
        for path, module in self._modules:
            for name, value in _attributes(module):
                yield f"{path}.{name}".strip("."), value
        yield from self._buffers
        yield from self._globals.items()


def remember_generators() -> Callable[[], None]:
    """Remember where Python's and numpy's random numbers are; gives what puts them back. torch's are not among them."""
    own, of_numpy = random.getstate(), numpy.random.get_state()

    def put_back() -> None:
        random.setstate(own)
        numpy.random.set_state(of_numpy)

    return put_back


@dataclass(frozen=True)
class _Variable:
    """A number or the like that functions set: `global calls`, `nonlocal calls`, `Statistics.calls += 1`.

    Attributes:
        holder: the globals of a module, a class, a cell of a closure, or a context variable.
        name: in these globals or this class.
    """

    holder: Any
    name: str

    def get(self) -> Any:
        """What it is now."""
        match self.holder:
            case types.CellType():
                return self.holder.cell_contents
            case type():
                return vars(self.holder).get(self.name)
            case contextvars.ContextVar():
                return self.holder.get() if self.holder in contextvars.copy_context() else None
        return self.holder.get(self.name)

    def put(self, value: Any) -> None:
        """Make it what it was."""
        match self.holder:
            case types.CellType():
                self.holder.cell_contents = value
            case type():
                setattr(self.holder, self.name, value)
            case contextvars.ContextVar():
                self.holder.set(value)
            case _:
                self.holder[self.name] = value


def _by_name(found: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Each once, by a name of its own: helpers in two modules may have the same for two lists."""
    named: dict[str, Any] = {}
    known = set[Any]()
    for name, value in found:
        key = (id(value.holder), value.name) if isinstance(value, _Variable) else id(value)
        if key not in known:
            known.add(key)
            number = sum(1 for other in named if other.split(" (")[0] == name)
            named[f"{name} ({number + 1})" if number else name] = value
    return named


def content(value: Any, deep: int = _DEEP) -> Content:
    """A copy of a value in which two states of it can be told apart."""
    if isinstance(value, torch.Tensor):
        small = value.numel() <= _LARGE and type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta
        return value.detach().clone() if small else [_NOT_COPIED, id(value), value._version]
    if isinstance(value, _PLAIN):
        return value
    if type(value).__module__ == "numpy":
        small = getattr(value, "size", 0) <= _LARGE
        return getattr(value, "tolist", lambda: id(value))() if small else [_NOT_COPIED, id(value)]
    if isinstance(value, collections.abc.Iterator):
        return [_NOT_COPIED, object()]  # nobody can tell whether it has moved on
    members = _members(value) if deep else None
    if members is None:
        return ["object", id(value)] if not isinstance(value, _LISTS) else ["list", len(value)]
    inside = ([content(name, 1), content(member, deep - 1)] for name, member in members[-_MANY:])
    return [type(value).__name__, len(members), *inside]


def alike(left: Content, right: Content, tolerance: float = 1e-4) -> bool:
    """Whether two contents are the same but for rounding."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        if not left.is_floating_point():
            return torch.equal(left, right)
        scale = float(right.abs().nan_to_num(posinf=0).max()) if right.numel() else 0.0
        return torch.allclose(left, right, rtol=0, atol=tolerance * scale, equal_nan=True)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(alike(a, b, tolerance) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float):
        near = math.isfinite(right) and abs(left - right) <= tolerance * abs(right)
        return left == right or near or (left != left and right != right)
    return type(left) is type(right) and not isinstance(left, torch.Tensor) and bool(left == right)


def outline(found: Content) -> Content:
    """What is left of a content without its numbers: types, sizes and names."""
    if isinstance(found, torch.Tensor):
        return [found.dtype, found.shape]
    if isinstance(found, list):
        return [outline(one) for one in found]
    return found if isinstance(found, str) else type(found)


def _holds_uncopied(found: Content) -> bool:
    if isinstance(found, str):
        return found is _NOT_COPIED
    return isinstance(found, list) and any(map(_holds_uncopied, found))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(vars(module).items()) if name not in OF_EVERY_MODULE)


def _modules_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that attributes refer to, also in lists and dictionaries: `self.owner = [model]` registers none."""
    for name, value in _attributes(module):
        members = _members(value) if isinstance(value, (*_LISTS, dict)) else None
        for held in [value] if members is None else [member for _, member in members]:
            if isinstance(held, nn.Module):
                yield name, held


def _globals_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Containers, objects and modules that a module's own code names, and what its class and its helpers hold of them.

    What hooks and attributes are bound to as well: `router.register_forward_hook(recorder.record)`.
    """
    hooks = [hook for held in (module._forward_hooks, module._forward_pre_hooks) for hook in held.values()]
    code = [value for _, value in _attributes(module)]
    for call in hooks + [value for value in code if isinstance(value, _BOUND)]:
        yield from ((type(held).__name__, held) for held in _bound_to(call) if _is_kept_or_module(held))
    code += hooks
    for kind in type(module).__mro__:
        if kind.__module__.split(".")[0] not in ("torch", "builtins"):
            yield from _held_by_class(kind)
            code += vars(kind).values()
    yield from _used_by(code)


def _held_by_class(kind: type) -> Iterator[tuple[str, _Variable]]:
    """What a class holds for all of its objects: no code, and nothing that acts as an attribute of theirs."""
    for name, value in list(vars(kind).items()):
        if not name.startswith("__") and not isinstance(value, _CODE) and not hasattr(type(value), "__get__"):
            yield f"{kind.__name__}.{name}", _Variable(kind, name)


def _used_by(code: list[Any]) -> Iterator[tuple[str, Any]]:
    """Containers and objects that functions name or close over, and what functions of the user's that they call do."""
    kinds, seen = set[type](), set[int]()
    pending = [function for value in code for function in _functions(value, kinds)]
    while len(seen) < _MANY:
        for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
            if id(kind) not in seen:
                seen.add(id(kind))
                yield from _held_by_class(kind)
        kinds.clear()
        if not pending:
            break
        function = pending.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name, value in _named(function):
            if isinstance(value, contextvars.ContextVar):
                value = _Variable(value, name)
            held = _bound_to(value) if isinstance(value, _BOUND) else [value]
            yield from ((name, one) for one in held if _is_kept_or_module(one))
            pending += [called for called in _functions(value, kinds) if _is_own(called)]


def _bound_to(call: Any) -> list[Any]:
    """The objects that a call of a hook, method or partial may change besides what it is called with."""
    if isinstance(call, functools.partial):
        return [*call.args, *call.keywords.values(), *_bound_to(call.func)]
    return [call.__self__] if isinstance(call, types.MethodType) else [call]


def _functions(value: Any, kinds: set[type]) -> list[types.FunctionType]:
    """The functions that a call of a value or its methods runs, as far as that can be seen.

    The user's classes among what is met, whose methods these are, join `kinds`.
    """
    found: list[types.FunctionType] = []
    kind = value if isinstance(value, type) else type(value)
    if not isinstance(value, (nn.Module, *_PLAIN)) and _is_own_class(kind):
        classes = [one for one in kind.__mro__ if _is_own_class(one)]
        kinds.update(classes)
        members = [member for one in classes for member in vars(one).values()]
        found += [made for member in members if not _is_own_class(type(member)) for made in _called(member)]
    return found + _called(value)


def _called(value: Any) -> list[types.FunctionType]:
    """The functions that a call of a function, method, partial or wrapper runs."""
    if isinstance(value, property):
        return [made for made in (value.fget, value.fset) if isinstance(made, types.FunctionType)]
    found: list[types.FunctionType] = []
    while value is not None and len(found) < _DEEP:
        for _ in range(_DEEP):  # a partial of a method, too
            value = getattr(value, "func" if isinstance(value, functools.partial) else "__func__", value)
        if isinstance(value, types.FunctionType):
            found.append(value)
        value = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
    return found


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads of its module, of other modules of the user, and of its closure, by name."""
    pending, names, stored = [function.__code__], list[str](), set[str]()
    while pending:  # functions and comprehensions in it, too
        code = pending.pop()
        names += code.co_names
        stored |= {one.argval for one in dis.get_instructions(code) if one.opname in ("STORE_GLOBAL", "STORE_DEREF")}
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    known = function.__globals__
    for name in dict.fromkeys(names):
        if name in stored:
            yield name, _Variable(known, name)
        if name in known:
            yield name, known[name]
            if isinstance(known[name], types.ModuleType) and _is_users(vars(known[name])):
                yield from ((inner, vars(known[name])[inner]) for inner in names if inner in vars(known[name]))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not filled yet
            yield name, cell.cell_contents
            if name in stored:
                yield name, _Variable(cell, name)
    defaults = function.__defaults__ or ()
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    if function.__dict__:
        yield function.__name__, function.__dict__


def _is_own_class(kind: type) -> bool:
    return kind.__module__ != "builtins" and _is_users(vars(sys.modules.get(kind.__module__, types)))


def _is_own(function: types.FunctionType) -> bool:
    return _is_users(function.__globals__)


def _is_users(known: dict[str, Any]) -> bool:
    """Whether a module is the user's, by its globals: nothing that was installed, or came with Python.

    Modules without a file are Python's own, as `sys`, or the user's, as `__main__` of a notebook.
    """
    name, place = str(known.get("__name__", "torch")).split(".")[0], known.get("__file__")
    if name in ("torch", __name__.split(".")[0]):
        return False
    return not os.path.abspath(place).startswith(_LIBRARIES) if place else name not in sys.builtin_module_names


def _is_kept(value: Any) -> bool:
    """Whether a global or the like may be written to by a call: no code, constant, or thing of a library's.

    Nor what is imported: to put that back would undo imports, and what is imported twice is there twice.
    """
    if value is sys.modules:
        return False
    if isinstance(value, (dict, list, set, collections.deque, torch.Tensor, numpy.ndarray, collections.abc.Iterator)):
        return True
    return _has_own_members(value) and type(value).__module__.split(".")[0] not in ("torch", "logging", "typing")


def _is_kept_or_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or _is_kept(value)


def _has_own_members(value: Any) -> bool:
    if isinstance(value, (*_PLAIN, *_LISTS, *_CODE, dict, torch.Tensor)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots(value))


def _slots(value: Any) -> list[str]:
    """The names of what an object of a class with `__slots__` may hold."""
    kinds = [kind for kind in type(value).__mro__ if "__slots__" in vars(kind)]
    return [name for kind in kinds for name, found in vars(kind).items() if inspect.ismemberdescriptor(found)]


def _own_members(value: Any) -> dict[str, Any]:
    """What an object holds in attributes and slots."""
    slots = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
    return slots | getattr(value, "__dict__", {})


def _members(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container or object holds, by name or place; None where it holds nothing that is looked at."""
    found: list[tuple[Any, Any]]
    if isinstance(value, _Variable):
        found = [(value.name, value.get())]
    elif isinstance(value, dict):
        found = list(value.items())
    elif isinstance(value, (set, frozenset)) and len(value) > _MANY:
        return None
    elif isinstance(value, (set, frozenset)):
        found = [(None, member) for member in sorted(value, key=str)]
    elif isinstance(value, _LISTS):
        found = list(enumerate(value))
    elif _has_own_members(value):
        found = list(_own_members(value).items())
    else:
        return None
    return found if len(found) <= _LARGE else None


def _snapshot(value: Any, deep: int = _DEEP) -> Callable[[], None]:
    """Remember a value and what it holds; gives what puts it back."""
    if isinstance(value, torch.Tensor):
        if value.numel() > _LARGE or type(value) not in (torch.Tensor, nn.Parameter):
            return lambda: None
        kept, version = value.detach().clone(), value._version

        def put_back() -> None:
            if value._version != version and value.shape == kept.shape:
                value.data.copy_(kept)

        return put_back
    if isinstance(value, numpy.ndarray) and value.size <= _LARGE and value.flags.writeable:
        return functools.partial(numpy.copyto, value, value.copy())
    members = _members(value) if deep else None
    if members is None:
        return lambda: None
    inside = [_snapshot(member, deep - 1) for _, member in members[-_MANY:]]

    def restore() -> None:
        now = _members(value)
        if now is None or [(name, id(member)) for name, member in now] != [(n, id(member)) for n, member in members]:
            _refill(value, members)
        for put_back in inside:
            put_back()

    return restore


def _refill(value: Any, members: list[tuple[Any, Any]]) -> None:
    match value:
        case _Variable():
            value.put(members[0][1])
        case dict():
            value.clear()
            value.update(members)
        case set():
            value.clear()
            value.update(member for _, member in members)
        case list() | collections.deque():
            value.clear()
            value.extend(member for _, member in members)
        case tuple() | frozenset():
            pass
        case _:
            held = dict(members)
            for name in [name for name in _own_members(value) if name not in held]:
                object.__delattr__(value, name)
            for name, member in members:
                object.__setattr__(value, name, member)
