"""Everything that reads or changes Dynamo's own bookkeeping, so that a change in torch is met in one place."""

from __future__ import annotations

import collections
import contextlib
import inspect
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, NoReturn, TypeVar

import sympy
import torch
from torch._guards import Guard, TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.torch_version import TorchVersion

from ..passes.graph.copy import copy_module
from ..passes.graph.run_part import plain_number
from .capture_more import capturing_more

log = logging.getLogger(__name__)

_Error = TypeVar("_Error", bound=Exception)
_EVAL_FRAME = os.path.join(os.path.dirname(torch.__file__), "_dynamo", "eval_frame.py")
# Before, guards on a tensor in a dict are not checked again until the dict changes.
_ASKS_OF_TENSORS = TorchVersion(torch.__version__) >= "2.13"
# Attributes that AOTAutograd reads from a graph module that Dynamo made.
_MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "_backend_id")


def copy_graph(module: GraphModule) -> GraphModule:
    """A copy to edit. Editing Dynamo's own graph in place breaks the guards it builds afterwards."""
    copied, mapping = copy_module(module)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for name in _MODULE_ATTRIBUTES:
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    return copied


class OwnBackend:
    """A method as a backend, which a copy of what torch.compile is given shares.

    Lightning wraps torch.compile and copies its arguments; a method would be copied with what it belongs to: models,
    graphs, tensors without numbers that cannot be copied.
    """

    def __init__(self, compile_graph: Callable[..., Any]) -> None:
        self._compile_graph = compile_graph
        self.__name__ = "sere"

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        return self._compile_graph(module, inputs)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: object) -> OwnBackend:
        return self


def append_input(
    module: GraphModule, name: str, value: torch.Tensor, example_inputs: list[object]
) -> tuple[Node, torch.Tensor]:
    """Append a graph input behind the existing ones.

    Args:
        module: a copy made by `copy_graph`.
        name: of the placeholder.
        value: a tensor like the ones that calls will pass; its address stays the same from call to
            call, so that CUDA graphs need not copy it.
        example_inputs: the graph's inputs, to find the fake mode of its shapes.

    Returns:
        The placeholder, and the fake value to hand to the inner compiler.
    """
    from torch._dynamo.source import ConstantSource  # here, because importing Dynamo takes seconds

    graph = module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    fake_mode = detect_fake_mode([node.meta.get("example_value") for node in placeholders] + example_inputs)
    fake = fake_mode.from_tensor(value, static_shapes=True) if fake_mode is not None else value
    with graph.inserting_after(placeholders[-1]):
        node = graph.placeholder(name)
    node.meta["example_value"] = fake
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = ConstantSource(name)  # type: ignore[attr-defined]
    return node, fake


def input_name(node: Node) -> str:
    """The name of a parameter as the compiled code reaches it: `model.layers.0.mlp.gate.weight`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)
    text = _text_of(source)
    text = re.sub(r"\.__dict__\[['\"](_modules|_parameters|_buffers)['\"]\]", r".\1", text)
    text = re.sub(r"\._(modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]", r".\2", text)
    variable = re.match(r"[LG]\[['\"](\w+)['\"]\]", text)
    inside = text[variable.end() :] if variable is not None else text
    name = re.sub(r"\[['\"]?([\w]+)['\"]?\]", r".\1", inside).lstrip(".")
    # A tensor that is a variable itself, as of a function that is given its weights, has no name but that.
    return name or (variable[1] if variable is not None else text)


def _text_of(source: Any) -> str:
    """Dynamo's expression for where an object is: `L['self']._modules['gate']`."""
    return str(source.name if isinstance(source.name, str) else source.name())


def guard_input(node: Node, holds: Callable[[object], bool], text: str) -> bool:
    """Let the graph that is being compiled serve only calls where `holds` is true of one of its inputs.

    Args:
        node: placeholder of a copy made by `copy_graph`.
        holds: asked of the object behind it at every call of the compiled code; it must not raise.
        text: what Dynamo's logs call the guard.

    Returns:
        Whether there is such a guard now.
    """
    source, context = getattr(node, "_dynamo_source", None), TracingContext.try_get()
    if source is None or context is None:
        return False

    def create(builder: Any, guard: Guard) -> None:
        if _ASKS_OF_TENSORS:
            builder.get_guard_manager(guard).add_lambda_guard(holds, [text], guard.user_stack)
            return
        ask = _asked_at_the_root(source, builder.scope, holds)
        builder.guard_manager.root.add_lambda_guard(ask, [text], guard.user_stack)

    context.guards_context.dynamo_guards.add(Guard(source, create))
    return True


def _asked_at_the_root(source: Any, scope: dict[str, Any], holds: Callable[[object], bool]) -> Callable[[Any], bool]:
    """`holds` as a question about the local variables of a call, from which Dynamo's name for an input reads it."""
    read = compile(_text_of(source), "<sere guard>", "eval")
    # Without the variables of the call that is being compiled, whose tensors a guard would keep alive.
    others = {name: value for name, value in scope.items() if name != "L"}

    def ask(variables: Any) -> bool:
        try:
            value = eval(read, others, {"L": variables})
        except (AttributeError, LookupError, NameError, TypeError):
            return False
        return holds(value)

    return ask


def serve_at_most(graph: Graph, count: int | torch.SymInt, most: int) -> None:
    """Let the graph that is being compiled serve calls with up to `most` of what `count` counts.

    Dynamo compiles anew for more. One input tells the number mostly, and is asked: to limit symbols would be an error
    where the user has marked them with a range. A number that no sizes tell, as of the rows of `x[mask]`, is not
    limited: there is nothing to ask before a call.
    """
    if not isinstance(count, torch.SymInt) or plain_number(count) is None:
        return
    symbols = sorted(count.node.expr.free_symbols, key=str)
    number = sympy.lambdify(symbols, count.node.expr, modules="math")
    for node in graph.find_nodes(op="placeholder"):
        sizes = [getattr(size, "node", None) for size in getattr(node.meta.get("example_value"), "shape", ())]
        dims = {size.expr: dim for dim, size in enumerate(sizes) if size is not None}
        if dims.keys() >= set(symbols):
            places = [dims[symbol] for symbol in symbols]

            def is_served(value: Any, places: list[int] = places) -> bool:
                sizes = getattr(value, "shape", ())
                return len(sizes) > max(places) and number(*(sizes[dim] for dim in places)) <= most

            guard_input(node, is_served, "sere tokens that were tried")
            return
    bool(count <= most)


@contextlib.contextmanager
def without_own_compile(model: Any) -> Iterator[None]:
    """Calls of a module that was compiled in place (`model.compile()`) run its own code meanwhile."""
    own = getattr(model, "_compiled_call_impl", None)
    if own is None:
        yield
        return
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = own


@contextlib.contextmanager
def unlimited_recompiles() -> Iterator[None]:
    """A compile of our own must not run into the limit that the user's compiles of the same code count against."""
    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def recompile_limit_hint() -> str:
    """What to do where Dynamo gave up some code in this process, which it had compiled too often; empty where not."""
    from torch._dynamo.utils import counters

    if not any(str(reason).startswith("Dynamo recompile limit exceeded") for reason in counters["unimplemented"]):
        return ""
    return (
        "Dynamo hit torch._dynamo.config.recompile_limit in this process: code that it compiled so often runs as it "
        "is from then on. Call torch._dynamo.reset(), or raise the limit before the first call."
    )


def is_piece(module: GraphModule) -> bool:
    """Whether it is one of the graphs that Dynamo cut its own into, one per bucket of DistributedDataParallel.

    Their example inputs are fake tensors, parameters included, and each is run on such once it is compiled.
    """
    reason = getattr(module, "compile_subgraph_reason", None)
    return "DDPOptimizer" in str(getattr(reason, "reason", ""))


def held_by(node: Node, example: Any) -> Any:
    """What a graph input holds in the call that is compiled: the tensor itself where the example is a fake of it.

    What an earlier piece of the graph computes stays fake, see `is_piece`.
    """
    given = node.meta.get("grapharg") if isinstance(example, FakeTensor) else None
    return example if given is None else given.example


def is_fake_call() -> bool:
    """Whether a compiled graph runs on fake tensors now, to tell the shapes of what it gives."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def has_graph_break(module: GraphModule) -> bool:
    """Whether the graph being compiled ends at a graph break; True where Dynamo does not say.

    A piece of a graph ends as at one, see `is_piece`.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    if is_piece(module):
        return True
    try:
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    except AttributeError:
        return True
    return reason is None or bool(reason.graph_break)


def is_compile_wrapper(frame: FrameType) -> bool:
    """Whether the frame is one call of a callable that torch.compile made."""
    code = frame.f_code
    return code.co_name in ("compile_wrapper", "_fn") and code.co_filename == _EVAL_FRAME


def current_call() -> FrameType | None:
    """The frame of the outermost call of a compiled callable on this thread's stack."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        if is_compile_wrapper(frame):
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return found


def is_outermost() -> bool:
    """Whether the frame being compiled is the one torch.compile was asked for, not one called from broken code.

    Only Dynamo's frames and nn.Module's call machinery stand between it and torch.compile's
    wrapper. Where a module has hooks, that machinery calls them and its forward one by one: each is
    a frame of its own, and none is all of the call.
    """
    inside_dynamo = False
    torch_folder = os.path.dirname(torch.__file__) + os.sep
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_compile_wrapper(frame):
            return inside_dynamo
        if file == os.path.join(torch_folder, "_dynamo", "convert_frame.py"):
            inside_dynamo = True
        elif inside_dynamo and (not file.startswith(torch_folder) or _runs_hooks(frame.f_code)):
            return False
        frame = frame.f_back
    return False


def _runs_hooks(code: CodeType) -> bool:
    """Whether it is the part of a module's call that is for modules with hooks."""
    return code in torch.nn.Module._call_impl.__code__.co_consts


@contextlib.contextmanager
def dynamic_shape_capture() -> Iterator[None]:
    """Trace what Dynamo breaks graphs at by default: shapes that depend on data, and numbers read from tensors.

    What even then ends a graph inside a loop leaves a graph of what is ahead of the loop, see `graphs_before_loops`.
    """
    from torch._dynamo import config  # here, because importing Dynamo takes seconds

    with config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True), graphs_before_loops():
        yield


_before_loops: ContextVar[bool] = ContextVar("sere graphs before loops", default=False)


@contextlib.contextmanager
def graphs_before_loops() -> Iterator[None]:
    """Where a graph breaks inside a loop, compile what is ahead of the loop; the rest of the frame runs as it is.

    By default Dynamo skips the whole frame then, router and top-k included. It knows how to end a graph at the last
    line where nothing is on the Python stack, which is what it does for a break inside `try`; a `for` loop keeps its
    iterator on the stack, so that this line is ahead of it. Without the place in Dynamo where that is decided, nothing
    changes. Lines that need not break a graph do not, see `capture_more.py`.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    decide = getattr(InstructionTranslatorBase, "raise_loop_graph_break", None)
    if decide is not None and not hasattr(decide, "skipping"):

        def end_ahead_of_loop(code: CodeType, error: Exception) -> NoReturn:
            if _before_loops.get():
                raise error
            decide(code, error)
            raise AssertionError("Dynamo raises there")

        end_ahead_of_loop.skipping = decide  # type: ignore[attr-defined]
        InstructionTranslatorBase.raise_loop_graph_break = staticmethod(end_ahead_of_loop)  # type: ignore[assignment]
    token = _before_loops.set(True)
    try:
        with capturing_more():
            yield
    finally:
        _before_loops.reset(token)


def makes_graphs_before_loops() -> bool:
    """Whether what is traced now is traced so, see `graphs_before_loops`."""
    return _before_loops.get()


def captures_dynamic_shapes() -> bool:
    """Whether what is traced now is traced so, see `dynamic_shape_capture`."""
    from torch._dynamo import config

    return bool(config.capture_dynamic_output_shape_ops)


def raised_by_backend(error: Exception, kind: type[_Error]) -> _Error | None:
    """The error of one kind that a backend raised, and that Dynamo wrapped in its own; None where it is another."""
    inner = getattr(error, "inner_exception", error)
    return inner if isinstance(inner, kind) else None


def refused_operation(error: Exception) -> str | None:
    """Which line of a model asks for something that its numbers' shapes do not allow, if that is what Dynamo raised."""
    from torch._dynamo.exc import TorchRuntimeError

    if not isinstance(error, TorchRuntimeError):
        return None
    reason = re.search(r"got (\w+)\((['\"])(.*?)\2\)", str(error))
    lines = re.findall(r'File "([^"]+)", line (\d+), in', str(error))
    line = next((f" ({os.path.basename(file)}:{number})" for file, number in lines), "")
    return (f"{reason[1]}: {reason[3]}" if reason else str(error).partition("\n")[0]) + line


def arguments_of(module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a module that is being called was called with, from the stack of this thread; None where it is not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        known = frame.f_locals
        if frame.f_code is torch.nn.Module._call_impl.__code__ and known.get("self") is module:
            return known["args"], known["kwargs"]
        frame = frame.f_back
    return None


@contextlib.contextmanager
def compiling_aside() -> Iterator[None]:
    """Compile something for a purpose of ours: it neither meets the user's limits nor teaches Dynamo dynamic shapes."""
    from torch._dynamo import config  # here, because importing Dynamo takes seconds

    with unlimited_recompiles(), config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        yield


_AS_STANCE = object()  # the callback of a thread that takes no stance of its own
_own_callback: ContextVar[Any] = ContextVar("sere own callback", default=_AS_STANCE)


def compiling_nothing_more() -> AbstractContextManager[None]:
    """What is compiled serves calls that it fits; all other code runs as it is, in this thread."""
    return _taking_stance("eager_on_recompile", False)


def running_eager() -> AbstractContextManager[None]:
    """Compiled callables run their own code meanwhile, in this thread."""
    return _taking_stance("force_eager", None)


@contextlib.contextmanager
def _taking_stance(stance: str, callback: Any) -> Iterator[None]:
    """Take a stance of `torch.compiler.set_stance` in this thread alone.

    torch takes it for all threads: calls of others that have to be compiled would run as they are meanwhile, and
    nothing would be re-routed. Without the place in Dynamo that asks for the stance, it is taken so.

    Args:
        stance: by torch's name.
        callback: what Dynamo is called back with under it.
    """
    from torch._dynamo import eval_frame

    decide = getattr(eval_frame, "_callback_from_stance", None)
    if decide is None:
        with torch.compiler.set_stance(stance):
            yield
        return
    if not hasattr(decide, "asked_for_all"):

        def callback_of_thread(callback: Any) -> Any:
            own = _own_callback.get()
            return decide(callback) if own is _AS_STANCE else own

        callback_of_thread.asked_for_all = decide  # type: ignore[attr-defined]
        eval_frame._callback_from_stance = callback_of_thread
    token = _own_callback.set(callback)
    try:
        yield
    finally:
        _own_callback.reset(token)


def let_vary(tensor: torch.Tensor, dim: int) -> None:
    """A graph that is made for a tensor serves other sizes of one dimension too, where its code allows that."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


@contextlib.contextmanager
def forgetting_new_codes() -> Iterator[None]:
    """What Dynamo meets for the first time inside is as unknown to it afterwards as before.

    It keeps what it compiles with the code, and counts that against the limit of everyone who compiles it. Inside a
    compile nobody is waited for: this thread holds Dynamo's lock, and others wait for that in calls of theirs.
    """
    known = {id(code): code for code in _known_codes()}  # held, so that no other one gets its id
    try:
        yield
    finally:
        if threading.get_ident() in _codes_at_work():
            _forget(lambda code: id(code) not in known)
        else:
            running.alone(lambda: _forget(lambda code: id(code) not in known))


def _forget(is_meant: Callable[[CodeType], bool]) -> None:
    """Free what Dynamo keeps with some of the codes that it knows; those that it is at work on are spared."""
    from torch._C._dynamo.eval_frame import reset_code

    spared = {id(code) for codes in _codes_at_work().values() for code in codes}
    for code in _known_codes():
        if id(code) not in spared and is_meant(code):
            reset_code(code)


def _known_codes() -> list[CodeType]:
    from torch._dynamo.convert_frame import input_codes

    return [code for code in (reference() for reference in list(input_codes.seen)) if code is not None]


def _codes_at_work() -> dict[int, list[CodeType]]:
    """By thread, the codes that Dynamo compiles or waits to compile: what it keeps with them it holds by address."""
    from torch._dynamo.convert_frame import CatchErrorsWrapper

    found: dict[int, list[CodeType]] = {}
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code is CatchErrorsWrapper.__call__.__code__:
                found.setdefault(thread, []).append(frame.f_locals["frame"].f_code)
            frame = frame.f_back
    return found


class _Running:
    """Threads that are in calls of compiled code, and those that wait until none is.

    Dynamo frees what it keeps with a code object at once, also while another thread checks its guards: that is a
    segmentation fault.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._depths: collections.Counter[int] = collections.Counter()  # of calls in calls, by thread
        self._waiting = 0

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            if thread not in self._depths:
                self._changed.wait_for(lambda: not self._waiting)
            self._depths[thread] += 1

    def __exit__(self, *_: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._depths[thread] -= 1
            if not self._depths[thread]:
                del self._depths[thread]
                self._changed.notify_all()

    def alone(self, do: Callable[[], None], seconds: float = 300.0) -> bool:
        """Do something while no other thread is in such a call, nor begins one; whether it was done.

        Threads may wait for each other inside their calls, for a collective: then it is not done. In a call of its own
        a thread waits for nobody, for two would wait for each other.
        """
        with self._changed:
            if threading.get_ident() in self._depths:
                do()
                return True
            self._waiting += 1
            try:
                is_alone = self._changed.wait_for(lambda: not self._depths, seconds)
                if is_alone:
                    do()
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        return is_alone


running = _Running()


def forget_codes(model: Any) -> None:
    """Make Dynamo look anew at the code of a model or function and of what it called.

    Dynamo keeps compiled code and the decision to skip a frame with the code object, for whatever
    traced it. Others who compiled the same code compile it again. Waits for other threads that are in
    calls of compiled code, see `running`.
    """
    functions = [forward_of(module) for module in model.modules()] if isinstance(model, torch.nn.Module) else [model]
    files = {function.__code__.co_filename for function in functions if hasattr(function, "__code__")}
    if not running.alone(lambda: _forget(lambda code: code.co_filename in files)):
        log.warning("other threads are in calls that do not end: what Dynamo knows of this model's code is kept")


def forward_of(module: torch.nn.Module) -> Any:
    """What a module's class has as its forward; TorchScript's gives it to none but its objects."""
    return inspect.getattr_static(type(module), "forward", None)


def skipped_codes() -> set[CodeType]:
    """The code that Dynamo looked at and gave up: it runs in eager mode, as a frame of its own."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    return {code for code in _known_codes() if not _debug_get_cache_entry_list(code)}
