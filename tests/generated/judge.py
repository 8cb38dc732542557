"""The verdict on one program in one tracer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

import sere_compile
from sere_compile import GateNotFoundError, ProfileError, SereConfig, SimilarityProfile

from . import product
from .cases import Called, Case, Enter, tolerance
from .compare import Difference, differences, worst
from .forms.paddings import MASKS
from .oracle import Oracle, Rerouting, clones, flat
from .product import Inputs, Outcome
from .program import GATE, Built, Program, build, forget
from .verdicts import (
    IDENTITY,
    OUTPUT,
    PARTLY,
    RAISED,
    REFUSED,
    REROUTED,
    SIDE,
    SILENT,
    STOPPED,
    TOUCHED,
    UNTOUCHED,
    VACUOUS,
    Verdict,
)

# How many tolerances re-routing has to change the output by, for a program to tell anything.
_TELLING = 5
# Calls of one compiled program: what is missed is told when the second begins.
_CALLS = 2
# Inputs that are tried until re-routing changes the output.
_TRIED = 12


def judge(program: Program, *, identity: bool = False, enter: Enter = product.enter) -> Verdict:
    """Run a program eagerly, through the product, and through the oracle.

    Args:
        program: a gate or a look-alike.
        identity: ask for S = K instead, which has to give the eager program bit for bit.
        enter: the product.
    """
    torch._dynamo.reset()
    built = build(program)
    try:
        if program.kind != GATE:
            return _look_alike(program, built, enter)
        return _identity(program, built, enter) if identity else _gate(program, built, enter)
    finally:
        forget(program)
        torch._dynamo.reset()


def _config(program: Program, rerouting: Rerouting) -> SereConfig:
    return SereConfig(
        select_top_k=rerouting.select_top_k,
        threshold=rerouting.threshold,
        min_active=0,
        strict=program.choices["strict"] == "yes",
    )


# --- gates ----------------------------------------------------------------------------------------


def _gate(program: Program, built: Built, enter: Enter) -> Verdict:
    oracle = Oracle(program)
    select = 1 + program.seed % (program.sizes["K"] - 1)
    rerouting = Rerouting(matrices(program, oracle.layers), select, float(program.choices["rho"]))
    attached = program.choices["profile"] == "attached" and _attach(built.model, program, rerouting)
    if not attached:
        # Where the first token's best expert is the only primary one, no matrix matters.
        rerouting = replace(rerouting, select_top_k=1, threshold=0.0)
    inputs = _telling_inputs(program, oracle, built, rerouting, one_token=not attached)
    if inputs is None:
        return Verdict(VACUOUS, f"re-routing changes the output of none of {_TRIED} inputs")
    case = Case(program, built, inputs, _config(program, rerouting), enter)
    outcome, results, raised = case.run()
    return raised or _compare(case, oracle, rerouting, outcome, results)


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


def _attach(model: nn.Module, program: Program, rerouting: Rerouting) -> bool:
    """Attach the matrices by the names of the routers' weights; whether the product takes them."""
    if program.router is None:
        return False
    names = {f"{path}.{program.router}" if path else program.router: m for path, m in rerouting.matrices.items()}
    if program.choices["around"] == "two layers, one router":
        names = dict([next(iter(names.items()))])
    try:
        sere_compile.attach(model, SimilarityProfile(names))
    except ProfileError:
        return False
    return True


def _telling_inputs(
    program: Program, oracle: Oracle, built: Built, rerouting: Rerouting, *, one_token: bool
) -> list[Inputs] | None:
    """Inputs of each call, whose results re-routing changes by more than the tolerance.

    Where there are any, such that give one token the same expert twice: what a form does then is what breaks it.
    """
    found: list[list[tuple[bool, Inputs]]] = [[] for _ in range(_CALLS)]
    for seed in range(_TRIED):
        call = seed % _CALLS
        masking = call > 0 or program.choices["first call"] == "masks"
        inputs = _sized(program, built.inputs(seed, masking=masking), call, one_token=one_token)
        plain, _ = oracle.run(inputs, rerouting, frozenset())
        moved, _ = oracle.run(inputs, rerouting, frozenset(oracle.layers))
        finite = all(bool(value.isfinite().all()) for value in (*plain, *moved))
        tells = differences(moved[:1], plain[:1])[0].error > _TELLING * tolerance(program)
        # A flag that is off may leave nothing to re-route.
        if finite and (tells or (MASKS[program.choices["mask"]].whole and masking)):
            found[call].append((oracle.repeats, inputs))
        if all(any(repeats for repeats, _ in of) for of in found):
            break
    if not all(found):
        return None
    best = [max(of, key=lambda pair: pair[0])[1] for of in found]
    empty = tuple(_cut(value, slice(0)) for value in best[0])
    return [empty, *best] if program.choices["calls"] == "without tokens first" else best


def _sized(program: Program, inputs: Inputs, call: int, *, one_token: bool) -> Inputs:
    """The inputs with as many tokens as the call shall have."""
    if one_token:
        return tuple(value[:1, :1] if value.dim() == 3 else _cut(value, slice(1)) for value in inputs)
    if call and program.choices["calls"] == "of two sizes":
        return tuple(_cut(value, slice(-1)) for value in inputs)
    return inputs


def _cut(value: torch.Tensor, rows: slice) -> torch.Tensor:
    return value[rows] if value.dim() else value


def _compare(case: Case, oracle: Oracle, rerouting: Rerouting, outcome: Outcome, results: list[Called]) -> Verdict:
    """The product chooses which layers it re-routes: its results have to fit one choice."""
    nearest: tuple[Difference, int] | None = None
    for chosen, without_padding in itertools.product(_subsets(oracle.layers), oracle.meanings):
        found = _off(case, oracle, rerouting, chosen, results, without_padding)
        main = worst(found, main=True)
        if main.error <= case.tolerance:
            return _fits(case, outcome, found, (len(chosen), len(oracle.layers)))
        if nearest is None or main.error < nearest[0].error:
            nearest = main, len(chosen)
    assert nearest is not None
    tally = f"{nearest[1]} of {len(oracle.layers)} gates re-routed"
    return Verdict(OUTPUT, f"{nearest[0]}; nearest with {tally}", nearest[0].error)


def _subsets(layers: tuple[str, ...]) -> Iterator[frozenset[str]]:
    """Largest first."""
    for count in range(len(layers), -1, -1):
        yield from map(frozenset, itertools.combinations(layers, count))


def _off(
    case: Case,
    oracle: Oracle,
    rerouting: Rerouting,
    layers: frozenset[str],
    results: list[Called],
    without_padding: bool,
) -> list[Difference]:
    """How far each result of each call, and each counter, is from the oracle's."""
    found: list[Difference] = []
    counted: dict[str, torch.Tensor] = {}
    for inputs, (got, buffers) in zip(case.inputs, results, strict=True):
        want, after = oracle.run(inputs, rerouting, layers, without_padding=without_padding)
        found += differences(got, want, case.program.labels)
        for name in (name for name in after if name.endswith("load")):
            # The oracle's buffers begin anew with each call, the program's go on.
            counted[name] = counted.get(name, 0) + after[name]
            found += differences([buffers[name]], [counted[name]], [f"the buffer {name}"])
    return found


def _fits(case: Case, outcome: Outcome, found: list[Difference], tally: tuple[int, int]) -> Verdict:
    """The verdict where the main result is that of some layers being re-routed."""
    rerouted, layers = tally
    side = worst(found, main=False)
    if side.error > case.tolerance:
        return Verdict(SIDE, str(side), side.error, tally)
    if rerouted == layers:
        return Verdict(REROUTED, rerouted=tally)
    reasons = list(outcome.reasons)
    if not reasons:
        reasons, claimed = outcome.explained()
        if claimed > rerouted:
            return Verdict(SILENT, f"explain claims {claimed} re-routed gates; {rerouted} are", rerouted=tally)
    if not reasons:
        return Verdict(SILENT, "no warning, and explain gives no reason", rerouted=tally)
    return Verdict(PARTLY if rerouted else REFUSED, reasons[-1], rerouted=tally)


# --- what has to stay as it is --------------------------------------------------------------------


def _eager(program: Program, inputs: list[Inputs]) -> list[list[torch.Tensor]]:
    plain = build(program)
    with torch.no_grad():
        return [flat(plain.model(*clones(given))) for given in inputs]


def _identity(program: Program, built: Built, enter: Enter) -> Verdict:
    """With S = K nothing may change, not by one bit."""
    inputs = [built.inputs(seed) for seed in range(_CALLS)]
    config = SereConfig(select_top_k=program.sizes["K"], min_active=0)
    _, results, raised = Case(program, built, inputs, config, enter).run()
    if raised:
        return raised
    for want, (got, _) in zip(_eager(program, inputs), results, strict=True):
        off = worst(differences(got, want, program.labels), main=None)
        if off.error > 0:
            return Verdict(IDENTITY, str(off), off.error)
    return Verdict(UNTOUCHED)


def _look_alike(program: Program, built: Built, enter: Enter) -> Verdict:
    inputs = [built.inputs(seed) for seed in range(_CALLS)]
    config = SereConfig(select_top_k=1, min_active=0, strict=program.choices["strict"] == "yes")
    outcome, results, raised = Case(program, built, inputs, config, enter).run()
    if raised:
        asked_for = config.strict and raised.detail.startswith(GateNotFoundError.__name__)
        # But for that, an ordinary program ran before, and does not now.
        return replace(raised, word=STOPPED) if raised.word == RAISED and not asked_for else raised
    for want, (got, _) in zip(_eager(program, inputs), results, strict=True):
        off = worst(differences(got, want), main=None)
        if off.error > 0:
            return Verdict(TOUCHED, str(off), off.error)
    if outcome.operators:
        return Verdict(TOUCHED, f"{outcome.operators} re-routing operators in its graphs; the results happen to agree")
    return Verdict(UNTOUCHED)
