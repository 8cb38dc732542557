"""The verdict on one program in one tracer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import sere_compile
from sere_compile import ProfileError, SereConfig, SereError, SimilarityProfile

from .compare import Difference, differences, worst
from .oracle import Oracle, Rerouting, clones, flat
from .program import GATE, Built, Program, build, forget
from .tracers import Outcome, enter, heard

REROUTED = "ok, re-routed"
PARTLY = "ok, some layers re-routed"
REFUSED = "ok, refused with a reason"
RAISED = "ok, refused by an error of the library"
UNTOUCHED = "ok, untouched"
OUTPUT = "WRONG output"
SIDE = "WRONG side value"
IDENTITY = "WRONG at S = K"
TOUCHED = "LOOK-ALIKE TOUCHED"
STOPPED = "LOOK-ALIKE STOPPED"
SILENT = "SILENT"
CRASH = "CRASH"
VACUOUS = "vacuous"
TORCH = "torch itself fails"

FAILURES = (OUTPUT, SIDE, IDENTITY, TOUCHED, STOPPED, SILENT, CRASH)
VERDICTS = (REROUTED, PARTLY, REFUSED, RAISED, UNTOUCHED, *FAILURES, VACUOUS, TORCH)

# How far results may be from the oracle's, relative to the largest; autocast computes in bfloat16.
TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 4e-2
# How many tolerances re-routing has to change the output by, for a program to tell anything.
_TELLING = 5
# Calls of one compiled program: what is missed is told when the second begins.
_CALLS = 2
# Inputs that are tried until re-routing changes the output.
_INPUTS = 12


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        word: one of `VERDICTS`.
        detail: what was off and by how much, or the product's reason.
        error: relative, of the worst result.
        rerouted: how many layers of the program were re-routed, of how many.
    """

    word: str
    detail: str = ""
    error: float = 0.0
    rerouted: tuple[int, int] = (0, 0)

    @property
    def failed(self) -> bool:
        """Whether the product is at fault."""
        return self.word in FAILURES


@dataclass
class Case:
    """A program beside everything that its verdict needs."""

    program: Program
    tracer: str
    config: SereConfig
    built: Built
    inputs: list[tuple[torch.Tensor, ...]]

    @property
    def tolerance(self) -> float:
        """How far results may be off."""
        return tolerance(self.program)


def tolerance(program: Program) -> float:
    """How far a program's results may be off, relative to the largest."""
    return BFLOAT16_TOLERANCE if program.choices.get("around") == "autocast" else TOLERANCE


def judge(program: Program, *, identity: bool = False) -> Verdict:
    """Run a program eagerly, through the product, and through the oracle.

    Args:
        program: a gate or a look-alike.
        identity: ask for S = K instead, which has to give the eager program bit for bit.
    """
    torch._dynamo.reset()
    built = build(program)
    try:
        if program.kind == GATE:
            return _identity(program, built) if identity else _gate(program, built)
        return _look_alike(program, built)
    finally:
        forget(built)
        torch._dynamo.reset()


def _config(program: Program, select_top_k: int) -> SereConfig:
    return SereConfig(
        select_top_k=select_top_k,
        min_active=0,
        threshold=float(program.choices.get("rho", "0")),
        strict=program.choices.get("strict") == "yes",
    )


def matrices(program: Program, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A random symmetric matrix for each layer; one for all where they share the router."""
    generator = torch.Generator().manual_seed(program.seed + 1)
    made = {}
    for path in layers:
        half = torch.rand(program.sizes["E"], program.sizes["E"], generator=generator)
        made[path] = ((half + half.T) / 2).fill_diagonal_(1.0)
    if program.choices["around"] == "two layers, one router":
        made = dict.fromkeys(made, made[layers[0]])
    return made


# --- gates -------------------------------------------------------------------------------------------------------------


def _gate(program: Program, built: Built) -> Verdict:
    oracle = Oracle(program)
    select = 1 + program.seed % (program.sizes["K"] - 1)
    attached = program.router is not None
    rerouting = Rerouting(matrices(program, oracle.layers), select, float(program.choices["rho"]))
    if attached and (problem := _attach(built.model, program, rerouting)):
        attached = False
    if not attached:
        # Where the first token's best expert is the only primary one, no matrix matters.
        rerouting = replace(rerouting, select_top_k=1, threshold=0.0)
    inputs = _telling_inputs(program, oracle, built, rerouting, one_token=not attached)
    if inputs is None:
        return Verdict(VACUOUS, "re-routing changes the output of no input that was tried")
    config = _config(program, rerouting.select_top_k).replace(threshold=rerouting.threshold)
    case = Case(program, program.choices["tracer"], config, built, inputs)
    outcome, results, problem = _run(case)
    if problem is not None:
        return problem
    return _compare(case, oracle, rerouting, outcome, results)


def _attach(model: nn.Module, program: Program, rerouting: Rerouting) -> str:
    """Attach the matrices by the names of the routers' weights; what the product says against it, or nothing."""
    names = {f"{path}.{program.router}" if path else str(program.router): m for path, m in rerouting.matrices.items()}
    if program.choices["around"] == "two layers, one router":
        names = dict([next(iter(names.items()))])
    try:
        sere_compile.attach(model, SimilarityProfile(names))
    except ProfileError as error:
        return str(error)
    return ""


def _telling_inputs(
    program: Program, oracle: Oracle, built: Built, rerouting: Rerouting, *, one_token: bool
) -> list[tuple[torch.Tensor, ...]] | None:
    """Inputs whose re-routed results differ from the original ones by far more than the tolerance."""
    found: list[tuple[torch.Tensor, ...]] = []
    everything = frozenset(oracle.layers)
    for seed in range(_INPUTS):
        inputs = built.inputs(seed)
        if one_token:
            inputs = tuple(value[:1] for value in inputs)
        plain, _ = oracle.run(inputs, rerouting, frozenset())
        moved, _ = oracle.run(inputs, rerouting, everything)
        finite = all(bool(value.isfinite().all()) for value in (*plain, *moved))
        if finite and differences(plain[:1], moved[:1])[0].error > _TELLING * tolerance(program):
            found.append(inputs)
        if len(found) == _CALLS:
            return found
    return None


def _run(case: Case) -> tuple[Outcome, list[Any], Verdict | None]:
    """The product's results for every input, with the buffers after each call; or the verdict that none is needed."""
    results: list[Any] = []
    outcome = Outcome(case.built.model)
    try:
        with torch.no_grad():
            outcome = enter(case.tracer, case.built.model, case.inputs[0], case.config)
            with heard(outcome):
                for inputs in case.inputs:
                    results.append((flat(outcome.call(*clones(inputs))), _buffers(case.built.model)))
    except Exception as error:  # noqa: BLE001 - whatever the product or torch raises is what is judged
        return outcome, results, _raised(case, error)
    return outcome, results, None


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def _raised(case: Case, error: BaseException) -> Verdict:
    """A refusal by an error of the library, a crash, or what torch cannot do without us either."""
    cause, inner = error, error
    while inner is not None:
        cause = inner
        if isinstance(cause, SereError):
            return Verdict(RAISED, f"{type(cause).__name__}: {cause}")
        inner = cause.__cause__ or getattr(cause, "inner_exception", None)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    return Verdict(TORCH if _torch_fails(case) else CRASH, text)


def _torch_fails(case: Case) -> bool:
    """Whether the tracer alone, without the product, fails on the program."""
    from .tracers import AHEAD

    torch._dynamo.reset()
    built = build(case.program)
    try:
        with torch.no_grad():
            if case.tracer in AHEAD:
                AHEAD[case.tracer](built.model, case.inputs[0])
            else:
                call = torch.compile(built.model, backend="eager")
                for inputs in case.inputs:
                    call(*clones(inputs))
    except Exception:  # noqa: BLE001 - any failure is the answer
        return True
    return False


def _compare(case: Case, oracle: Oracle, rerouting: Rerouting, outcome: Outcome, results: list[Any]) -> Verdict:
    layers = oracle.layers
    best: tuple[float, frozenset[str], list[Difference]] | None = None
    subsets = (set_ for count in range(len(layers), -1, -1) for set_ in itertools.combinations(layers, count))
    for chosen, without_padding in itertools.product(subsets, oracle.meanings):
        found = _off(case, oracle, rerouting, frozenset(chosen), results, without_padding)
        error = worst(found, main=True).error
        if error <= case.tolerance:
            return _fits(case, outcome, found, len(chosen), len(layers))
        if best is None or error < best[0]:
            best = (error, frozenset(chosen), found)
    assert best is not None
    off = worst(best[2], main=True)
    return Verdict(OUTPUT, f"{off}; nearest with {len(best[1])} of {len(layers)} gates re-routed", off.error)


def _off(
    case: Case,
    oracle: Oracle,
    rerouting: Rerouting,
    layers: frozenset[str],
    results: list[Any],
    without_padding: bool,
) -> list[Difference]:
    """How far every result of every call is from the oracle's with these layers re-routed."""
    found: list[Difference] = []
    added: dict[str, torch.Tensor] = {}
    for inputs, (got, buffers) in zip(case.inputs, results, strict=True):
        want, after = oracle.run(inputs, rerouting, layers, without_padding=without_padding)
        found += differences(got, want, case.program.labels)
        for name, value in after.items():
            added[name] = added[name] + value if name in added else value
        if "counts in a buffer" in case.program.choices.values():
            names = [name for name in added if name.endswith("load")]
            found += differences([buffers[n] for n in names], [added[n] for n in names], names)
    return found


def _fits(case: Case, outcome: Outcome, found: list[Difference], rerouted: int, layers: int) -> Verdict:
    """The verdict where the main result is that of some layers being re-routed."""
    side = worst(found, main=False)
    tally = (rerouted, layers)
    if side.error > case.tolerance:
        return Verdict(SIDE, str(side), side.error, tally)
    if rerouted == layers:
        return Verdict(REROUTED, rerouted=tally)
    if not outcome.reasons:
        reasons, claims = _explained(case)
        if claims > rerouted:
            return Verdict(SILENT, f"explain claims {claims} re-routed gates; {rerouted} are", rerouted=tally)
        outcome.reasons += reasons
    if not outcome.reasons:
        return Verdict(SILENT, "no warning, and explain gives no reason", rerouted=tally)
    return Verdict(PARTLY if rerouted else REFUSED, outcome.reasons[-1], rerouted=tally)


def _explained(case: Case) -> tuple[list[str], int]:
    """Reasons for what is skipped by `explain`, and how many gates it says are re-routed."""
    if case.tracer not in ("dynamo", "capture auto"):
        return [], 0
    torch._dynamo.reset()
    config = case.config.replace(capture="auto") if case.tracer == "capture auto" else case.config
    with torch.no_grad():
        report = sere_compile.explain(case.built.model, *clones(case.inputs[0]), config=config)
    reasons = [f"{row.name}: {row.reason}" for row in report if row.reason]
    return reasons + ([report.hint] if report.hint else []), len(report.rewritten)


# --- S = K -------------------------------------------------------------------------------------------------------------


def _identity(program: Program, built: Built) -> Verdict:
    """With S = K nothing may change, not by one bit."""
    inputs = [built.inputs(seed) for seed in range(_CALLS)]
    config = _config(program, program.sizes["K"]).replace(threshold=0.0, strict=False)
    case = Case(program, program.choices["tracer"], config, built, inputs)
    _, results, problem = _run(case)
    if problem is not None:
        return problem
    plain = build(program)
    for given, (got, _) in zip(inputs, results, strict=True):
        with torch.no_grad():
            want = flat(plain.model(*clones(given)))
        off = [d for d in differences(got, want, program.labels) if d.error > 0]
        if off:
            return Verdict(IDENTITY, str(off[0]), off[0].error)
    return Verdict(UNTOUCHED)


# --- look-alikes -------------------------------------------------------------------------------------------------------


def _look_alike(program: Program, built: Built) -> Verdict:
    inputs = [built.inputs(seed) for seed in range(_CALLS)]
    case = Case(program, program.choices["tracer"], _config(program, 1), built, inputs)
    plain = build(program)
    wanted = []
    for given in inputs:
        with torch.no_grad():
            wanted.append(flat(plain.model(*clones(given))))
    outcome, results, problem = _run(case)
    if problem is not None:
        # Whatever the reason: an ordinary program ran before, and does not now.
        return replace(problem, word=STOPPED) if problem.word == RAISED else problem
    for want, (got, _) in zip(wanted, results, strict=True):
        off = worst(differences(got, want), main=None)
        if off.error > 0:
            return Verdict(TOUCHED, str(off), off.error)
    if outcome.operators:
        return Verdict(TOUCHED, f"{outcome.operators} re-routing operators in its graphs; the results happen to agree")
    return Verdict(UNTOUCHED)
