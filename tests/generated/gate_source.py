"""The source of a drawn module with a gate."""

from __future__ import annotations

import re

from .choices import Choices, sizes
from .forms.dispatches import DISPATCHES
from .forms.experts import EXPERTS
from .forms.normalisings import NORMALISINGS
from .forms.readers import EARLY, LATE, RETURNED
from .forms.routers import ROUTERS
from .forms.scorings import SCORINGS
from .forms.selections import LOOK_UPS, SELECTIONS
from .forms.text import indented

# Begins the line where the ids of the routed experts are final; only the oracle's version of the source has it.
REPORT = "report(self, ids"
_HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
"""
_INTRA = {"print": 'print("", end="")', "graph_break": "torch._dynamo.graph_break()"}


def gate_source(c: Choices) -> str:
    """The whole program; `model` and `make_inputs` are what it defines. See `REPORT`."""
    size = sizes(c)
    constants = f"E, K, T, H, I, R = {size['E']}, {size['K']}, {size['T']}, {size['H']}, 8, 5"
    classes = [*_expert_class(c), *_router_class(c), *_experts_class(c), *_layer(c), *_outer(c)]
    header = f"import dataclasses\n\n{_HEADER}" if c["container"] == "dataclass" else _HEADER
    return "\n".join([header, constants, "", *classes, *_inputs(c)]) + "\n"


def experts_of(c: Choices) -> list[str]:
    """Paths of the experts' parameters or lists in a `Layer`."""
    names = ["experts"] if c["storage"] == "modules" else list(EXPERTS[c["experts"]].names)
    if c["structure"] == "router and experts modules":
        return [f"branch.{name}" for name in names]
    if c["structure"] == "two sets of experts":
        return [f"{branch}.{name}" for branch in ("branch", "other") for name in names]
    return names


def router_of(c: Choices) -> str | None:
    """Path of the router's weight in a `Layer`, None where nothing can be attached to it."""
    weight = ROUTERS[c["router"]].weight
    return f"gate.{weight}" if weight and _has_router_module(c) else weight


def _has_router_module(c: Choices) -> bool:
    return c["structure"] in ("router module", "router and experts modules", "two sets of experts")


# --- parts of the layer -----------------------------------------------------------------------------------------------


def _routing(c: Choices) -> tuple[list[str], list[str]]:
    """Lines of `__init__` and of the body up to `ids` and `weights`."""
    router, scoring = ROUTERS[c["router"]], SCORINGS[c["scoring"]]
    selection = [line.format(choice=scoring.choice) for line in SELECTIONS[c["selection"]]]
    body = [
        *router.part.body,
        *_break(c, "logits"),
        *scoring.part.body,
        *_break(c, "scores"),
        *selection,
        *LOOK_UPS[c["look-up"]],
        *_break(c, "selection"),
        *scoring.after,
        *NORMALISINGS[c["normalising"]],
        *EARLY[c["early reader"]].body,
        *_break(c, "weights"),
    ]
    if c["around"] == "three dimensions":
        body += ["ids, weights = ids.reshape(-1, K), weights.reshape(-1, K)"]
    return [*router.part.init, *scoring.part.init, *EARLY[c["early reader"]].init], body


def _break(c: Choices, place: str) -> list[str]:
    kind, _, where = c["break"].partition(" after the ")
    if where != place:
        return []
    if kind == "number read":
        return ["if ids.max().item() >= E:", '    raise ValueError("no such expert")']
    return [_INTRA[kind]]


def _padded(c: Choices) -> list[str]:
    if c["padding"] == "none":
        return []
    if c["padding"] == "weights times mask":
        return ["weights = weights * mask.unsqueeze(-1)"]
    value = c["padding"].removeprefix("ids of ")
    return [f"ids = ids.masked_fill(~mask.unsqueeze(-1), {value})"]


def _shared(c: Choices) -> list[str]:
    if c["shared expert"] != "joined by cat":
        return []
    return [
        "ids = torch.cat([ids, torch.full_like(ids[:, :1], E)], -1)",
        "weights = torch.cat([weights, torch.ones_like(weights[:, :1])], -1)",
    ]


def _count(c: Choices) -> str:
    return "(E + 1)" if c["shared expert"] == "joined by cat" else "E"


def _expert_init(c: Choices) -> list[str]:
    if c["storage"] == "modules":
        return [f"self.experts = nn.ModuleList([Expert() for _ in range({_count(c)})])"]
    return [line.format(n=_count(c)) for line in EXPERTS[c["experts"]].init]


def _dispatch(c: Choices) -> list[str]:
    form = DISPATCHES[c["dispatch"]]
    lines = form.lines(c["experts"], c["weights applied to"], c["storage"] == "modules", _count(c))
    lines = [re.sub(r"\bK\b", "ids.shape[1]", line) for line in lines] if _count(c) != "E" else list(lines)
    return [*lines, *([_INTRA["print"]] if c["break"] == "print before the end" else [])]


def _after(c: Choices) -> tuple[list[str], list[str]]:
    late, lines = LATE[c["late reader"]], RETURNED[c["returned"]][1]
    shared = ["y = y + self.shared(x)"] if c["shared expert"] == "added" else []
    return (["self.shared = nn.Linear(H, H)"] if shared else []), [*late.body, *shared, *lines]


def _expert_class(c: Choices) -> list[str]:
    if c["storage"] != "modules":
        return []
    kind = EXPERTS[c["experts"]]
    inside = c["weights applied to"] == "inside the activation"
    text = kind.module.format(x="x", w=" * w" if inside else "")
    forward = f"def forward(self, x{', w' if inside else ''}):"
    return _class("Expert", list(kind.module_init), forward, [f"return {text}"])


# --- classes ----------------------------------------------------------------------------------------------------------


def _class(name: str, init: list[str], forward: str, body: list[str], more: list[str] | None = None) -> list[str]:
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


def _carried(c: Choices, *later: list[str]) -> str:
    """What the router hands on: ids, weights, and scores or logits where they are read later."""
    text = "\n".join([*(line for lines in later for line in lines), *RETURNED[c["returned"]][0]])
    return ", ".join(["ids", "weights", *(n for n in ("scores", "logits") if re.search(rf"\b{n}\b", text))])


def _eager(c: Choices, part: str) -> list[str]:
    return ["@torch.compiler.disable"] if c["break"] == f"{part} in eager mode" else []


def _router_class(c: Choices) -> list[str]:
    if not _has_router_module(c):
        return []
    init, body = _routing(c)
    carried = _carried(c, _dispatch(c), _after(c)[1])
    forward = ["def forward(self, x):"]
    made = _class("Router", init, forward[0], [*body, f"return {carried}"])
    return _decorated(made, forward[0], _eager(c, "router"))


def _decorated(lines: list[str], start: str, decorator: list[str]) -> list[str]:
    at = next(i for i, line in enumerate(lines) if line.strip().startswith(start))
    return [*lines[:at], *indented(decorator, 1), *lines[at:]]


def _dispatch_arguments(c: Choices) -> str:
    return _carried(c, _dispatch(c)).replace(", logits", "")


def _experts_class(c: Choices) -> list[str]:
    if c["structure"] not in ("router and experts modules", "two sets of experts"):
        return []
    forward = f"def forward(self, x, {_dispatch_arguments(c)}):"
    made = _class("Experts", _expert_init(c), forward, [*_dispatch(c), "return y"])
    return _decorated(made, forward, _eager(c, "experts"))


def _layer(c: Choices) -> list[str]:
    after_init, after = _after(c)
    structure, arguments = c["structure"], _dispatch_arguments(c)
    carried = _carried(c, _dispatch(c), after)
    init, body, methods = [], [], []
    routing_init, routing = _routing(c)
    if structure in ("one module", "methods"):
        init += routing_init
    else:
        init += ["self.gate = Router()"]
        body += [f"{carried} = self.gate(x)"]
    if structure == "one module":
        body += routing
    if structure == "methods":
        body += [f"{carried} = self.route(x)"]
        methods += [*_eager(c, "router"), "def route(self, x):", *indented([*routing, f"return {carried}"], 1), ""]
    if c["around"] == "three dimensions":
        body += ["x = x.reshape(-1, H)"]
    body += [*_padded(c), f"{REPORT}{', mask' if c['padding'] != 'none' else ''})", *_shared(c)]
    body += [_INTRA["print"]] if c["break"] == "print before the experts" else []
    body += _experts_called(c, arguments)
    if structure in ("one module", "methods", "router module"):
        init += _expert_init(c)
    if structure in ("methods", "router module"):
        methods += [*_eager(c, "experts"), f"def dispatch(self, x, {arguments}):"]
        methods += [*indented([*_dispatch(c), "return y"], 1), ""]
    if structure in ("router and experts modules", "two sets of experts"):
        init += ["self.branch = Experts()"]
    if structure == "two sets of experts":
        init += ["self.other = Experts()"]
    init += after_init
    body += [*after, *_result(c)]
    forward = "def forward(self, x, mask):" if c["padding"] != "none" else "def forward(self, x):"
    return [*_dataclass(c), *_class("Layer", init, forward, body, methods)]


def _experts_called(c: Choices, arguments: str) -> list[str]:
    structure = c["structure"]
    if structure == "one module":
        return _dispatch(c)
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


# --- around the layer -------------------------------------------------------------------------------------------------


def _outer(c: Choices) -> list[str]:
    around = c["around"]
    if around in ("nothing", "three dimensions") or (around == "checkpointed experts"):
        return ["model = Layer()"]
    names = RETURNED[c["returned"]][0]
    init, body = ["self.layer = Layer()"], []
    if around.startswith("two layers"):
        init = ["self.layers = nn.ModuleList([Layer() for _ in range(2)])"]
        if around == "two layers, one router":
            path = "gate.router" if _has_router_module(c) else "router"
            init += [f"self.layers[1].{path} = self.layers[0].{path}"]
        rest = "".join(f", {name}" for name in names)
        body = ["rest = []", "for layer in self.layers:", f"    y{rest} = layer(x)", "    x = x + y"]
        body += [f"    rest += [{', '.join(names)}]"] if names else []
        body += ["return x, *rest" if names else "return x"]
    elif around == "block with a norm":
        init += ["self.norm = nn.LayerNorm(H)"]
        body = ["return self.layer(self.norm(x))"]
    elif around == "vmap over sequences":
        body = ["return torch.func.vmap(self.layer)(x)"]
    elif around == "vmap over tokens":
        body = ["return torch.func.vmap(lambda row: self.layer(row.unsqueeze(0)).squeeze(0))(x)"]
    elif around == "checkpointed layer":
        body = ["return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)"]
    else:
        body = ['with torch.autocast("cpu", dtype=torch.bfloat16):', "    return self.layer(x)"]
    return [*_class("Model", init, "def forward(self, x):", body), "model = Model()"]


def _inputs(c: Choices) -> list[str]:
    batched = c["around"] in ("three dimensions", "vmap over sequences")
    shape = "2, T, H" if batched else "T, H"
    values = [f"torch.randn({shape}, generator=generator)"]
    if c["padding"] != "none":
        values += ["torch.arange(T) < T - 2"]
    return ["", "", "def make_inputs(generator):", f"    return ({', '.join(values)},)"]


def labels_of(c: Choices) -> list[str]:
    """What each result of the model is, in order: "y" or the name of a side value."""
    names = list(RETURNED[c["returned"]][0])
    return ["y", *names, *names] if c["around"].startswith("two layers") else ["y", *names]
