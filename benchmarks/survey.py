"""Trace a small model of an architecture with each tracer and compare what the library does with the oracle.

One Dynamo trace serves every question: the backend here compiles each graph in several ways and picks one at a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sere_compile
from sere_compile import GateRow, SereConfig, SimilarityProfile
from sere_compile.backend import SereBackend
from sere_compile.compiler.observed_graph import observer
from sere_compile.compiler.program import Program
from sere_compile.compiler.report_rows import row_of_skip
from tests.zoo.oracle import counting, rerouted, router_weights
from tests.zoo.registry import ENTRIES, build, inputs

EAGER = "does not run in eager mode"
_ROUTING = {torch.ops.sere.reroute.default, torch.ops.sere.reroute_merged.default}


@dataclass
class Survey:
    """What one tracer made of one model.

    Attributes:
        run: how many selections of experts ran in eager mode.
        rows: the report's rows, gates and refused selections.
        graphs: how many graphs the tracer made.
        failed: why the model did not trace, or empty.
        identity_differs: whether S = K changed a bit.
        error: largest difference from the oracle with S = 1, None where nothing was re-routed.
        effect: largest difference that re-routing makes: what a tolerance has to be small against.
        ids_differ: whether re-routed ids differ from the oracle's for the ids that an operator was given; merged ones
            are not compared.
        turned: the first gate that was given other ids than the oracle's. In low precision, where layers before it may
            round otherwise, nothing behind it can be compared with the oracle's model.
    """

    run: int = 0
    rows: tuple[GateRow, ...] = ()
    graphs: int = 0
    failed: str = ""
    identity_differs: bool = False
    error: float | None = None
    effect: float = 0.0
    ids_differ: bool = False
    turned: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def gates(self) -> list[GateRow]:
        """The rows that are gates."""
        return [row for row in self.rows if row.num_experts is not None]

    def count(self, status: str) -> int:
        """How many gates have a status."""
        return sum(row.status == status for row in self.gates)


class _Ids(TorchDispatchMode):
    """Records what the re-routing operators are given, and what they return where duplicates are not merged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ROUTING:
            self.seen.append((args[0], result if isinstance(result, torch.Tensor) else None))
        return result


class _Variants:
    """A backend that compiles each graph as it is, explained, with S = K and with S = 1."""

    def __init__(self, model: nn.Module, profile: SimilarityProfile | None, *, probed: bool) -> None:
        self.model, self.profile, self.probed = model, profile, probed
        self.current = "plain"
        self.graphs = 0
        self.ids = _Ids()

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        # Before a profile is attached, unless it is needed: it would be evidence of its own for ids that leave a graph.
        sere_compile.detach(self.model)
        if self.profile is not None and not self.probed:
            sere_compile.attach(self.model, self.profile)
        explained = SereBackend(SereConfig(inner="eager", strict=True), explaining=True)(module, example_inputs)
        if self.profile is not None:
            sere_compile.attach(self.model, self.profile)
        made = {
            "plain": module.forward,
            "explain": explained,
            "identity": SereBackend(SereConfig(select_top_k=64, inner="eager"))(module, example_inputs),
            "reroute": SereBackend(SereConfig(select_top_k=1, inner=self._recorded))(module, example_inputs),
        }
        return lambda *arguments: made[self.current](*arguments)

    def _recorded(self, graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self.ids:
                return graph.forward(*arguments)

        return run


def random_profile(name: str, model: nn.Module) -> SimilarityProfile | None:
    """A random symmetric matrix for whatever could be a router's weight; None where K = 1 needs none."""
    if ENTRIES[name].identity:
        return None
    columns, experts = ENTRIES[name].columns, ENTRIES[name].experts
    generator = torch.Generator().manual_seed(1)
    matrices = {}
    for weight in router_weights(model, columns):
        half = torch.rand(experts, experts, generator=generator)
        matrices[weight] = ((half + half.T) / 2).fill_diagonal_(1.0)
    return SimilarityProfile(matrices)


def survey_dynamo(
    name: str, experts: str, dtype: torch.dtype = torch.float32, *, by_layer: bool = False, **compiling: Any
) -> Survey:
    """One architecture through Dynamo, as a whole or each decoder layer for itself.

    Raises:
        What the backend raises, wrapped by Dynamo: a bug of the library.
    """
    model, call = build(name, experts, dtype), inputs(name)
    profile = random_profile(name, model)
    result = Survey()
    try:
        with torch.no_grad(), counting(name, model) as calls:
            eager = model(**call)[0]
    except RuntimeError as error:
        if dtype is torch.float32:
            raise
        result.failed = f"{EAGER}: {first_line(error)}"  # upstream's model mixes types
        return result
    result.run = len(calls) - ENTRIES[name].unselected
    torch._dynamo.reset()
    backend = _Variants(model, profile, probed=ENTRIES[name].probed)
    compiled: Any = model if by_layer else torch.compile(model, backend=backend, **compiling)
    for layer in _layers(model) if by_layer else ():
        layer.compile(backend=backend, **compiling)

    def run(variant: str) -> torch.Tensor:
        backend.current = variant
        return compiled(**call)[0]

    # One limit for all: "eager" experts break graphs, and one graph a layer may be compiled.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=512):
        plain = run("plain")
        rows: list[GateRow] = []
        token = observer.set(rows.append)
        try:
            run("explain")
        finally:
            observer.reset(token)
        result.rows, result.graphs = tuple(rows), backend.graphs
        identity = run("identity")
        rerouted_output = run("reroute")
    torch._dynamo.reset()
    result.identity_differs = not torch.equal(plain, identity)
    if dtype is torch.float32 and not torch.allclose(plain, eager, rtol=1e-4, atol=1e-4):
        result.notes.append("the traced model differs from the eager one by itself")
    matrices = {row.name: profile[row.name] for row in result.gates if profile and row.status == "rewritten"}
    for layer in _layers(model) if by_layer else ():
        layer._compiled_call_impl = None
    _compare(result, name, model, call, matrices, rerouted_output, backend.ids.seen)
    result.effect = float((rerouted_output - plain).abs().max())
    return result


def _layers(model: nn.Module) -> nn.ModuleList:
    return next(m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and path.endswith("layers"))


def _compare(
    result: Survey,
    name: str,
    model: nn.Module,
    call: dict[str, Any],
    matrices: dict[str, torch.Tensor],
    got: torch.Tensor,
    ids: list[tuple[torch.Tensor, torch.Tensor | None]],
) -> None:
    """Fill in the differences from the oracle."""
    if not matrices:
        return
    with torch.no_grad(), rerouted(name, model, matrices, 1) as wanted:
        expected = model(**call)[0]
    result.error = float((got.float() - expected.float()).abs().max())
    if len(ids) != len(wanted):
        result.notes.append(f"{len(ids)} operators ran, {len(wanted)} were expected")
    for number, ((given, new), (old, rerouted_ids)) in enumerate(zip(ids, wanted, strict=False)):
        if not torch.equal(given.reshape(old.shape), old):
            result.turned = number
            return
        result.ids_differ |= new is not None and not torch.equal(new.reshape(old.shape), rerouted_ids)


def _exported(model: nn.Module, call: dict[str, Any], **options: Any) -> Any:
    return torch.export.export(model, (), call, **options)


def _made_fx(model: nn.Module, call: dict[str, Any]) -> GraphModule:
    """A graph of the token ids alone; what a model asks of its values it skips, as it does for torch.export."""

    def logits(ids: torch.Tensor) -> Any:
        return model(**{name: ids if isinstance(value, torch.Tensor) else value for name, value in call.items()})[0]

    with mock.patch.multiple(torch.compiler, _is_compiling_flag=True, _is_exporting_flag=True):
        return make_fx(logits)(call["input_ids"])


# What gives a graph ahead of time, by its name in the table.
AHEAD: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "torch.export": _exported,
    "strict": lambda model, call: _exported(model, call, strict=True),
    "decomposed": lambda model, call: _exported(model, call).run_decompositions(),
    "make_fx": _made_fx,
}


def survey_ahead(name: str, experts: str, tracer: str = "torch.export") -> Survey:
    """One architecture through a tracer of `AHEAD`, then `rewrite`."""
    model, call = build(name, experts), inputs(name)
    profile = random_profile(name, model)
    result = Survey(graphs=1)
    with torch.no_grad(), counting(name, model) as calls:
        eager = model(**call)[0]
    result.run = len(calls) - ENTRIES[name].unselected
    try:
        with torch.no_grad():
            program = AHEAD[tracer](model, call)
    except Exception as error:  # noqa: BLE001 (whatever upstream raises is the finding)
        result.failed = f"{type(error).__name__}: {first_line(error)}"
        return result
    finally:
        torch._dynamo.reset()
    view = Program(program)
    found = sere_compile.passes.find_gates(view.module)
    result.rows = tuple(_row_of(gate, view) for gate in found.gates) + tuple(map(row_of_skip, found.skips))
    if not result.gates:
        return result

    def run(traced: Any) -> torch.Tensor:
        return traced(call["input_ids"]) if isinstance(traced, GraphModule) else traced.module()(**call)[0]

    ids = _Ids()
    with torch.no_grad():
        plain = run(program)
        result.identity_differs = not torch.equal(plain, run(_rewritten(program, profile, 64)))
        changed = _rewritten(program, profile, 1)
        with ids:
            got = run(changed)
    if not torch.allclose(plain, eager, rtol=1e-4, atol=1e-4):
        result.notes.append("the traced model differs from the eager one by itself")
    matrices = {row.name: profile[row.name] for row in result.gates if profile}
    _compare(result, name, model, call, matrices, got, ids.seen)
    result.effect = float((got - plain).abs().max())
    return result


def _rewritten(program: Any, profile: SimilarityProfile | None, select_top_k: int) -> Any:
    return sere_compile.rewrite(program, profile=profile, config=SereConfig(select_top_k=select_top_k))


def _row_of(gate: Any, program: Program) -> GateRow:
    status = "identity" if gate.top_k == 1 else "rewritten"
    return GateRow(
        program.weight_name(gate), gate.num_experts, gate.top_k, 1, gate.scoring, gate.is_sorted, gate.dispatch, status
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    return next(iter(str(error).strip().splitlines()), "")[:160]
