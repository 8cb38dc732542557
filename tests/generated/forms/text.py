"""The smallest piece of source that a choice stands for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Lines of a module.

    Attributes:
        init: of `__init__`.
        body: of `forward`.
    """

    init: tuple[str, ...] = ()
    body: tuple[str, ...] = ()


def part(body: str = "", init: str = "") -> Part:
    """A part from two texts; blank lines are dropped."""
    return Part(_lines(init), _lines(body))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line.strip())


def indented(lines: tuple[str, ...] | list[str], depth: int) -> list[str]:
    """The lines, `depth` levels deeper."""
    return ["    " * depth + line if line else "" for line in lines]


def class_lines(name: str, init: list[str], forward: str, body: list[str], more: list[str] | None = None) -> list[str]:
    """The source of a module.

    Args:
        name: of the class.
        init: lines of `__init__`.
        forward: the line that begins the main method.
        body: its lines.
        more: lines of other methods.
    """
    return [
        f"class {name}(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *indented(init, 2),
        "",
        *indented(more or [], 1),
        *indented([forward], 1),
        *indented(body, 2),
        "",
        "",
    ]
