"""A program on its way through the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sere_compile import SereConfig, SereError

from .oracle import clones, flat
from .product import Inputs, Outcome, heard, traces_without_us
from .program import Built, Program, build
from .verdicts import CRASH, RAISED, TORCH, Verdict

# How far results may be off, relative to the largest; some programs compute in bfloat16.
TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 4e-2

Enter = Callable[[str, nn.Module, Inputs, SereConfig], Outcome]
# The results of one call, and the buffers after it.
Called = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class Case:
    """A program beside everything that its verdict needs.

    Attributes:
        program: what was drawn.
        built: of it, for the product.
        inputs: of each call.
        config: what is asked of the product.
        enter: the product.
    """

    program: Program
    built: Built
    inputs: list[Inputs]
    config: SereConfig
    enter: Enter

    @property
    def tolerance(self) -> float:
        """How far results may be off, relative to the largest."""
        return tolerance(self.program)

    def run(self) -> tuple[Outcome, list[Called], Verdict | None]:
        """The product's results for every input; or the verdict, where it raised."""
        results: list[Called] = []
        outcome = Outcome(self.built.model)
        try:
            with torch.no_grad():
                outcome = self.enter(self.program.choices["tracer"], self.built.model, self.inputs[0], self.config)
                with heard(outcome):
                    for inputs in self.inputs:
                        made = flat(outcome.call(*clones(inputs)))
                        results.append((made, buffers(self.built.model)))
        except Exception as error:  # noqa: BLE001 - whatever the product raises is what is judged
            return outcome, results, self._raised(error)
        return outcome, results, None

    def _raised(self, error: BaseException) -> Verdict:
        """A refusal by the library, a crash, or what torch alone cannot do either."""
        cause = error
        while not isinstance(cause, SereError):
            inner = cause.__cause__ or getattr(cause, "inner_exception", None)
            if inner is None:
                break
            cause = inner
        if isinstance(cause, SereError):
            return Verdict(RAISED, f"{type(cause).__name__}: {cause}")
        text = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        alone = traces_without_us(self.program.choices["tracer"], build(self.program).model, self.inputs)
        return Verdict(CRASH if alone else TORCH, text)


def tolerance(program: Program) -> float:
    """How far a program's results may be off, relative to the largest."""
    rounds = program.choices.get("around") == "autocast" or program.choices.get("dispatch") == "grouped"
    return BFLOAT16_TOLERANCE if rounds else TOLERANCE


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's buffers."""
    return {name: value.clone() for name, value in model.named_buffers()}
