"""A drawn program: its source, what the oracle has to know of it, and how it becomes a module."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from . import gate_source
from .choices import sizes
from .layer_source import REPORT
from .look_alikes import look_alike_source
from .rules import Choices

GATE, LOOK_ALIKE = "gate", "look-alike"


@dataclass(frozen=True)
class Program:
    """One program of the grammar.

    Attributes:
        kind: `GATE` or `LOOK_ALIKE`.
        choices: what was drawn.
        seed: of its parameters and inputs.
        source: as it is printed; with the oracle's line in it, see `layer_source.REPORT`.
        labels: of its results, "y" for what the experts make.
        experts: paths of the experts' parameters or lists, in each layer.
        router: path of the router's weight in a layer, or None.
    """

    kind: str
    choices: Choices
    seed: int
    source: str
    labels: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    router: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The source without the oracle's line."""
        lines = self.source.splitlines(True)
        return "".join(line for line in lines if not line.strip().startswith(REPORT))


def make_program(kind: str, choices: Choices, seed: int) -> Program:
    """The program of these choices."""
    if kind == LOOK_ALIKE:
        return Program(kind, choices, seed, look_alike_source(choices), sizes=sizes(choices))
    return Program(
        kind,
        choices,
        seed,
        gate_source.gate_source(choices),
        tuple(gate_source.labels_of(choices)),
        tuple(gate_source.experts_of(choices)),
        gate_source.router_of(choices),
        sizes(choices),
    )


@dataclass(frozen=True)
class Built:
    """A program as a module with its parameters, and its inputs."""

    model: nn.Module
    make_inputs: Callable[..., tuple[torch.Tensor, ...]]

    def inputs(self, seed: int, *, masking: bool = True) -> tuple[torch.Tensor, ...]:
        """The inputs of a seed; where there is a mask, it masks some tokens or none."""
        return self.make_inputs(torch.Generator().manual_seed(seed), masking)

    def layers(self) -> dict[str, nn.Module]:
        """The layers that hold a gate, by their path."""
        return {path: module for path, module in self.model.named_modules() if type(module).__name__ == "Layer"}


def build(program: Program, report: Callable[..., None] | None = None) -> Built:
    """Run the source; equal parameters for equal seeds.

    Args:
        program: what to build.
        report: called with each layer, its final ids and, where there is padding, the mask of tokens; None leaves the
            calls out of the source.
    """
    source = program.text
    if report is not None:
        # What nobody promised to sort is sorted for the oracle: re-routing ranks by score.
        source = program.source.replace("sorted=False", "sorted=True")
    name = _module_name(program, reporting=report is not None)
    file = f"{name}.py"
    # Messages quote the source, and Dynamo imports the module of a function that it inlines.
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    module = sys.modules[name] = ModuleType(name)
    space = vars(module)
    space["report"] = report
    torch.manual_seed(program.seed)
    exec(compile(source, file, "exec"), space)
    return Built(space["model"].eval(), space["make_inputs"])


def forget(program: Program) -> None:
    """Drop the modules and source lines that `build` left."""
    for reporting in (False, True):
        name = _module_name(program, reporting=reporting)
        linecache.cache.pop(f"{name}.py", None)
        sys.modules.pop(name, None)


def _module_name(program: Program, *, reporting: bool) -> str:
    kind = program.kind.replace("-", "_")
    return f"generated_{kind}_{program.seed}{'_reporting' if reporting else ''}"
