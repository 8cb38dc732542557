"""What is compared: stock ways to run the same module, and ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..backend import sere_backend
from ..errors import SereError
from .timing import Run, call_all, capture

log = logging.getLogger(__name__)

# Compiles stock modules, and ours after the passes.
INNER = "inductor"
# Above the similarity of any two experts.
NEVER_SIMILAR = 2.0


@dataclass(frozen=True)
class Variant:
    """One way to run a module.

    Attributes:
        name: in the table.
        experts: implementation of transformers.
        backend: of torch.compile; None runs eagerly.
        select_top_k: S whose output it gives, K where that is the model's own; None for stock.
    """

    name: str
    experts: str
    backend: Any
    select_top_k: int | None = None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled for fixed shapes, apart from what other variants made of the same code."""
        if self.backend is None:
            return function
        return torch.compile(_code_of_its_own(function), backend=self.backend, dynamic=False)

    def run_of(
        self, function: Callable[..., Any], inputs: list[torch.Tensor], keep: list[Any]
    ) -> tuple[Run, list[Any]]:
        """What calls the function on all inputs (a graph, or one by one if eager or on a CPU), and what it returned.

        `keep` collects what has to live as long as the graph.
        """
        function = self.compiled(function)
        if self.backend is None:
            return functools.partial(call_all, function, inputs), [function(x) for x in inputs]
        results: list[Any] = []
        graph = capture(function, inputs, results)
        graph.replay()
        keep.append((graph, function, results))
        return graph, results


def _code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls it: Dynamo keeps compiled graphs by code, and would give one variant another's."""

    def call(x: Any = None) -> Any:
        return function() if x is None else function(x)

    call.__code__ = call.__code__.replace()
    return call


def all_variants(
    selects: Sequence[int], top_k: int, stock: Sequence[str] = ("grouped_mm", "batched_mm")
) -> list[Variant]:
    """Eager, Inductor with each stock implementation, and ours for each S (S = K re-routes nothing).

    Ours compiles the module as it comes: with `grouped_mm`.
    """
    found = [Variant("eager", "grouped_mm", None)]
    found += [Variant(f"inductor {experts}", experts, INNER) for experts in stock]
    for select in dict.fromkeys(min(select, top_k) for select in selects):
        backend = sere_backend.with_options(select_top_k=select, strict=True, inner=INNER)
        name = "sere S=K" if select >= top_k else f"sere S={select}"
        found.append(Variant(name, "grouped_mm", backend, select))
    return found


# How names of the variants that `with_own_experts` adds end.
OWN_EXPERTS = ", lower_experts"


def with_own_experts(selects: Sequence[int], top_k: int) -> list[Variant]:
    """On a CPU ours for each S once more, with `lower_experts="always"`; on a GPU that is what they are already."""
    if torch.cuda.is_available():
        return []
    return [
        Variant(
            f"{variant.name}{OWN_EXPERTS}", variant.experts,
            variant.backend.with_options(lower_experts="always"), variant.select_top_k,
        )
        for variant in all_variants(selects, top_k, ())[1:]
    ]  # fmt: skip


def without_effect(top_k: int) -> Variant:
    """Re-routing at full cost that changes nothing: S=1, and no expert is similar enough to replace another."""
    backend = sere_backend.with_options(select_top_k=1, threshold=NEVER_SIMILAR, strict=True, inner=INNER)
    return Variant("sere, re-routes nothing", "grouped_mm", backend, top_k)


def token_error(result: torch.Tensor, want: torch.Tensor) -> float:
    """The median over tokens (rows) of the relative error.

    The median, because two correct programs may round a router's score differently, and where two scores are nearly
    tied the token then goes to another expert: few tokens differ much, whereas a wrong program differs everywhere.
    """
    result, want = (x.detach().double().reshape(-1, x.shape[-1]) for x in (result, want))
    return ((result - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)).median().item()


def those_that_fit(variants: Sequence[Variant], prepare: Callable[[Variant], None]) -> list[Variant]:
    """Prepare each variant, and leave out those for which the device has no memory; the log says which.

    `batched_mm` copies the weights of every slot, which at large batches exceed the whole model.
    """
    fitting = []
    for variant in variants:
        # To free memory; a CPU has plenty, and without a CUDA graph what was compiled is still to be called.
        if torch.cuda.is_available():
            torch._dynamo.reset()
        try:
            prepare(variant)
        except torch.OutOfMemoryError as error:
            log.warning("%s is not measured: the device is out of memory (%s)", variant.name, _first_line(error))
        else:
            fitting.append(variant)
    return fitting


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def use_experts(model: Any, implementation: str) -> None:
    """Let a model of transformers run its experts by one of its implementations.

    Raises:
        SereError: the model does not offer them.
    """
    try:
        model.set_experts_implementation(implementation)
    except ValueError as error:
        raise SereError(f"{type(model).__name__} cannot run its experts by {implementation}: {error}") from error


def experts_of(variants: Sequence[Variant], model: Any) -> Callable[[str], None]:
    """Gives the model the experts of the variant with a name: what was compiled asks which it has."""
    implementations = {variant.name: variant.experts for variant in variants}
    return lambda name: use_experts(model, implementations[name])


def tell_if_blind(what: str, expected: dict[int, torch.Tensor], top_k: int, tolerance: float) -> None:
    """Log which re-routed references are too close to the model's own output for a comparison to tell them apart."""
    for select in sorted(set(expected) - {top_k}):
        distance = token_error(expected[select], expected[top_k])
        if distance <= tolerance:
            log.warning(
                "%s: the reference of S=%d is %.0e from the model's own output, and %.0e is allowed, so that an output "
                "that is not re-routed would pass for one that is", what, select, distance, tolerance,
            )  # fmt: skip
