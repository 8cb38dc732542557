"""The layers of a TensorRT engine, as its builder lists them in the log."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .standard_operators import SCOPE


class Value(NamedTuple):
    """A tensor inside an engine, with its sizes, -1 for free ones."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: TensorRT's, such as "gemm" or "kgen" (a kernel generated for several nodes).
        nodes: names of the ONNX nodes that it computes.
        inputs: what it reads while running.
        constants: what it reads that is fixed in the engine: weights, similarity matrices, folded nodes.
        outputs: what it writes.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[Value, ...]
    constants: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def added(self) -> bool:
        """Whether a node that re-routing adds is among those it computes."""
        return any(SCOPE in node.split("/") for node in self.nodes)


def read_layers(text: str) -> tuple[Layer, ...]:
    """The layers of an engine from the builder's log, one a line after the first."""
    return tuple(_layer(line) for line in text.splitlines() if line.startswith("Name: "))


def _layer(line: str) -> Layer:
    head, _, rest = line.partition(", Inputs: ")
    given, _, rest = rest.partition(", Constants: ")
    constants, _, rest = rest.partition(", Outputs: ")
    outputs, _, rest = rest.partition(", TacticName: ")
    name, _, kind = head.removeprefix("Name: ").partition(", LayerType: ")
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", rest.partition("Metadata: ")[2])
    return Layer(name, kind, tuple(nodes), _values(given), _values(constants), _values(outputs))


def _values(text: str) -> tuple[Value, ...]:
    found = re.findall(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\]", text)
    return tuple(Value(name, tuple(int(size) for size in sizes.split(",") if size)) for name, sizes in found)
