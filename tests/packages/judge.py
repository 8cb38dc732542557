"""Take a model of a package through `compile(capture="auto")`, and say of each gate what became of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import sere_compile
from sere_compile import SereConfig, SimilarityProfile
from sere_compile.compiler.kept_aside import KeptAside, alike

from .gated import Gated
from .oracle import Exchanged


@dataclass(frozen=True)
class Outcome:
    """What became of the gates of a model.

    Attributes:
        rewritten: names of the router weights whose gates are re-routed.
        refused: the reason by the name of each other's.
        wrong: what is not as the oracle says, empty where all is.
    """

    rewritten: tuple[str, ...]
    refused: dict[str, str]
    wrong: str = ""


def matrix(experts: int, seed: int) -> torch.Tensor:
    """A random similarity matrix."""
    half = torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


def judge(gated: Gated, tolerance: float = 1e-4, capture: str = "auto") -> Outcome:
    """Compare S = K with the eager model, bit for bit, and S = 1 with the oracle.

    Args:
        gated: the model.
        tolerance: of S = 1, relative to the largest value of the output.
        capture: as `compile` takes it.
    """
    model, layers = gated.model, gated.layers
    matrices = {layer.router: matrix(len(layer.experts), seed) for seed, layer in enumerate(layers)}
    sere_compile.attach(model, SimilarityProfile(matrices))
    torch._dynamo.reset()
    report = sere_compile.explain(model, *_arguments(gated), config=SereConfig(select_top_k=1, capture=capture))
    done = {row.name for row in report.rewritten} & set(matrices)
    refused = {layer.router: _reason(report, layer.router) for layer in layers if layer.router not in done}
    with torch.no_grad():
        plain, kept = _run(model, gated), _kept(model)
        restless = _differing(kept, (_run(model, gated), _kept(model))[1])
        with Exchanged(layers, {name: matrices[name] for name in done}, 1).watching() as exchanged:
            wanted = _run(model, gated)
        kept_wanted = _kept(model)  # without what the oracle hangs on the model
        torch._dynamo.reset()
        same = _run(sere_compile.compile(model, capture=capture, select_top_k=64, inner="eager"), gated)
        kept_same = _kept(model)
        torch._dynamo.reset()
        got = _run(sere_compile.compile(model, capture=capture, select_top_k=1, inner="eager"), gated)
        kept_got = _kept(model)
    torch._dynamo.reset()
    wrong = [f"S = K differs by {_difference(same, plain):.2g}"] if not _equal(same, plain) else []
    for text, left, right in (("K", kept_same, kept), ("1", kept_got, kept_wanted)):
        if other := _differing(left, right) - restless:
            wrong.append(f"S = {text} keeps other things in {sorted(other)}")
    if done and not all(exchanged.maps.get(name) for name in done):
        wrong.append(f"nothing is re-routed by the oracle in {sorted(done - set(exchanged.maps))}")
    if (error := _difference(got, wanted)) > tolerance:
        wrong.append(f"S = 1 is off by {error:.2g} of the largest value")
    if done and _difference(plain, wanted) < 10 * tolerance:
        wrong.append("re-routing changes nothing: the case tests nothing")
    return Outcome(tuple(layer.router for layer in layers if layer.router in done), refused, "; ".join(wrong))


def _reason(report: Any, router: str) -> str:
    """Of a gate that is not re-routed: its row's, or those of the selections that were looked at."""
    own = [row.reason for row in report if row.name == router]
    return (
        own[0] if own else "; ".join(dict.fromkeys(row.reason for row in report if not row.num_experts)) or "not seen"
    )


def _arguments(gated: Gated) -> tuple[Any, ...]:
    return copy.deepcopy(gated.arguments)


def _run(model: Any, gated: Gated) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [leaf for leaf in tree_leaves(model(*_arguments(gated))) if isinstance(leaf, torch.Tensor)]


def _kept(model: Any) -> dict[str, Any]:
    """What a call has left in attributes of the modules, and in what they hold."""
    found = KeptAside(model).content()
    found.pop("_compile_kwargs", None)  # Lightning notes how a model was compiled
    return found


def _differing(left: dict[str, Any], right: dict[str, Any]) -> set[str]:
    return {name for name in left.keys() | right.keys() if not alike(left.get(name), right.get(name))}


def _equal(ours: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(own) and all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


def _difference(ours: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> float:
    """The largest difference of any result, relative to its largest value."""
    pairs = list(zip(ours, own, strict=True))
    return max(
        (float((a.double() - b.double()).abs().max()) / max(float(b.double().abs().max()), 1e-12) for a, b in pairs),
        default=0.0,
    )
