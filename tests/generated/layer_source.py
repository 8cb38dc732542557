"""The classes of a layer with a gate: `Layer`, and `Router` and `Experts` where there are such."""

from __future__ import annotations

import re

from .forms.paddings import PADDINGS
from .forms.readers import RETURNED
from .forms.text import class_lines, indented
from .layer_parts import (
    STATEMENTS,
    after_experts,
    dispatch,
    expert_init,
    final_ids,
    masked,
    masks_in_experts,
    padded,
    routing,
    shared,
)
from .rules import Choices

# Begins the line where ids are final; only the oracle's version of the source has it.
REPORT = "report(self"


def has_router_module(c: Choices) -> bool:
    """Whether the router is a module of its own, `gate`."""
    return c["structure"] in ("router module", "router and experts modules", "two sets of experts")


def _carried(c: Choices, *later: list[str]) -> str:
    """What the router hands on: ids, weights, and scores or logits where they are read later."""
    text = "\n".join([*(line for lines in later for line in lines), *RETURNED[c["returned"]][0]])
    return ", ".join(["ids", "weights", *(n for n in ("scores", "logits") if re.search(rf"\b{n}\b", text))])


def _eager(c: Choices, part: str) -> list[str]:
    return ["@torch.compiler.disable"] if c["break"] == f"{part} in eager mode" else []


def router_class(c: Choices) -> list[str]:
    """The router as a class, where it is a module."""
    if not has_router_module(c):
        return []
    init, body = routing(c)
    carried = _carried(c, dispatch(c), after_experts(c)[1])
    forward = f"def forward(self, x{_router_arguments(c)}):"
    return _decorated(class_lines("Router", init, forward, [*body, f"return {carried}"]), forward, _eager(c, "router"))


def _decorated(lines: list[str], start: str, decorator: list[str]) -> list[str]:
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(start))
    return [*lines[:at], *indented(decorator, 1), *lines[at:]]


def _dispatch_arguments(c: Choices) -> str:
    return _carried(c, dispatch(c)).replace(", logits", "") + (", mask" if masks_in_experts(c) else "")


def _router_arguments(c: Choices) -> str:
    return ", mask" if PADDINGS[c["padding"]].logits else ""


def experts_class(c: Choices) -> list[str]:
    """All experts as one class, where they are a module."""
    if c["structure"] not in ("router and experts modules", "two sets of experts"):
        return []
    forward = f"def forward(self, x, {_dispatch_arguments(c)}):"
    made = class_lines("Experts", expert_init(c), forward, [*dispatch(c), "return y"])
    return _decorated(made, forward, _eager(c, "experts"))


def layer_class(c: Choices) -> list[str]:
    """The layer, which reports its ids to the oracle."""
    after_init, after = after_experts(c)
    structure, arguments = c["structure"], _dispatch_arguments(c)
    carried = _carried(c, dispatch(c), after)
    init, body, methods = [], masked(c), []
    beside = _router_arguments(c)
    routing_init, routed = routing(c)
    if structure in ("one module", "methods"):
        init += routing_init
    else:
        init += ["self.gate = Router()"]
        body += [f"{carried} = self.gate(x{beside})"]
    if structure == "one module":
        body += routed
    if structure == "methods":
        body += [f"{carried} = self.route(x{beside})"]
        methods += [
            *_eager(c, "router"),
            f"def route(self, x{beside}):",
            *indented([*routed, f"return {carried}"], 1),
            "",
        ]
    if c["around"] == "three dimensions":
        body += ["x = x.reshape(-1, H)"]
    body += [*padded(c), f"{REPORT}, {final_ids(c)}{', mask' if c['padding'] != 'none' else ''})", *shared(c)]
    body += [STATEMENTS["print"]] if c["break"] == "print before the experts" else []
    body += _experts_called(c, arguments)
    if structure in ("one module", "methods", "router module"):
        init += expert_init(c)
    if structure in ("methods", "router module"):
        methods += [*_eager(c, "experts"), f"def dispatch(self, x, {arguments}):"]
        methods += [*indented([*dispatch(c), "return y"], 1), ""]
    if structure in ("router and experts modules", "two sets of experts"):
        init += ["self.branch = Experts()"]
    if structure == "two sets of experts":
        init += ["self.other = Experts()"]
    init += after_init
    body += [*after, *_result(c)]
    forward = "def forward(self, x, given):" if c["padding"] != "none" else "def forward(self, x):"
    return [*_dataclass(c), *class_lines("Layer", init, forward, body, methods)]


def _experts_called(c: Choices, arguments: str) -> list[str]:
    structure = c["structure"]
    if structure == "one module":
        return dispatch(c)
    called = "self.dispatch" if structure in ("methods", "router module") else "self.branch"
    if c["around"] == "checkpointed experts":
        lines = [f"y = torch.utils.checkpoint.checkpoint({called}, x, {arguments}, use_reentrant=False)"]
    else:
        lines = [f"y = {called}(x, {arguments})"]
    return lines + ([f"y = y + self.other(x, {arguments})"] if structure == "two sets of experts" else [])


def _dataclass(c: Choices) -> list[str]:
    if c["container"] != "dataclass" or c["around"] in ("two layers", "two layers, one router"):
        return []
    fields = ["y", *RETURNED[c["returned"]][0]]
    return ["@dataclasses.dataclass", "class Result:", *(f"    {name}: torch.Tensor" for name in fields), "", ""]


def _result(c: Choices) -> list[str]:
    names = ["y", *RETURNED[c["returned"]][0]]
    if c["container"] == "dict":
        return ["return {" + ", ".join(f'"{name}": {name}' for name in names) + "}"]
    if c["container"] == "dataclass":
        return [f"return Result({', '.join(names)})"]
    return [f"return {', '.join(names)}"]
