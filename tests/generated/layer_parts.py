"""The lines of a layer with a gate: router, padding, experts, and what follows them."""

from __future__ import annotations

import re

from .forms.dispatches import DISPATCHES
from .forms.experts import EXPERTS
from .forms.normalisings import NORMALISINGS
from .forms.paddings import MASKS, PADDINGS
from .forms.readers import EARLY, LATE, PASSED, RETURNED
from .forms.routers import ROUTERS
from .forms.scorings import SCORINGS
from .forms.selections import LOOK_UPS, SELECTIONS
from .forms.text import class_lines
from .rules import Choices

# What breaks a graph.
STATEMENTS = {"print": 'print("", end="")', "graph_break": "torch._dynamo.graph_break()"}


def routing(c: Choices) -> tuple[list[str], list[str]]:
    """Lines of `__init__` and of the body up to `ids` and `weights`."""
    router, scoring = ROUTERS[c["router"]], SCORINGS[c["scoring"]]
    selection = [line.format(choice=scoring.choice) for line in SELECTIONS[c["selection"]]]
    body = [
        *router.part.body,
        *PADDINGS[c["padding"]].logits,
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
    body += PASSED[c["ids passed"]]
    return [*router.part.init, *scoring.part.init, *EARLY[c["early reader"]].init], body


def _break(c: Choices, place: str) -> list[str]:
    kind, _, where = c["break"].partition(" after the ")
    if where != place:
        return []
    if kind == "number read":
        return ["if ids.max().item() >= E:", '    raise ValueError("no such expert")']
    return [STATEMENTS[kind]]


def masked(c: Choices) -> list[str]:
    """From the argument `given` to `mask`, and what that does before the router."""
    if c["padding"] == "none":
        return []
    return [*MASKS[c["mask"]].body, *PADDINGS[c["padding"]].hidden]


def masks_in_experts(c: Choices) -> bool:
    """Whether the experts' code gets the mask, and changes ids or weights by it."""
    return c["masked where"] == "in the experts' code"


def padded(c: Choices) -> list[str]:
    """What padding does to ids, weights, or hidden states, in the layer."""
    return [] if masks_in_experts(c) else list(PADDINGS[c["padding"]].choice)


def final_ids(c: Choices) -> str:
    """The ids that experts get, at the place where the oracle is told of them."""
    return PADDINGS[c["padding"]].ids if masks_in_experts(c) else "ids"


def shared(c: Choices) -> list[str]:
    """A shared expert as one more slot, of number E."""
    if c["shared expert"] != "joined by cat":
        return []
    return [
        "ids = torch.cat([ids, torch.full_like(ids[:, :1], E)], -1)",
        "weights = torch.cat([weights, torch.ones_like(weights[:, :1])], -1)",
    ]


def expert_count(c: Choices) -> str:
    """How many experts there are, as source."""
    return "(E + 1)" if c["shared expert"] == "joined by cat" else "E"


def expert_init(c: Choices) -> list[str]:
    """Lines that make the experts."""
    if c["storage"] == "modules":
        return [f"self.experts = nn.ModuleList([Expert() for _ in range({expert_count(c)})])"]
    lines = [line.format(n=expert_count(c)) for line in EXPERTS[c["experts"]].init]
    if c["storage"] == "parameter lists":
        # A list takes the rows of a tensor, each as a parameter of its own.
        lines = [line.replace("nn.Parameter(", "nn.ParameterList([*(").removesuffix(")") + ")])" for line in lines]
    return lines


def dispatch(c: Choices) -> list[str]:
    """From x, ids and weights to `y`."""
    form = DISPATCHES[c["dispatch"]]
    lines = form.lines(c["experts"], c["weights applied to"], c["storage"] == "modules", expert_count(c))
    lines = [re.sub(r"\bK\b", "ids.shape[1]", line) for line in lines] if expert_count(c) != "E" else list(lines)
    lines = [*PADDINGS[c["padding"]].choice, *lines] if masks_in_experts(c) else lines
    return [*lines, *([STATEMENTS["print"]] if c["break"] == "print before the end" else [])]


def after_experts(c: Choices) -> tuple[list[str], list[str]]:
    """Lines of `__init__`, and those behind `y`: late readers, a shared expert, results."""
    late, lines = LATE[c["late reader"]], RETURNED[c["returned"]][1]
    shared = ["y = y + self.shared(x)"] if c["shared expert"] == "added" else []
    return (["self.shared = nn.Linear(H, H)"] if shared else []), [
        *late.body,
        *PADDINGS[c["padding"]].late,
        *shared,
        *lines,
    ]


def expert_class(c: Choices) -> list[str]:
    """The class of one expert, where experts are modules."""
    if c["storage"] != "modules":
        return []
    kind = EXPERTS[c["experts"]]
    inside = c["weights applied to"] == "inside the activation"
    text = kind.module.format(x="x", w=" * w" if inside else "")
    forward = f"def forward(self, x{', w' if inside else ''}):"
    return class_lines("Expert", list(kind.module_init), forward, [f"return {text}"])
