"""The source of a drawn look-alike."""

from __future__ import annotations

from ..forms.normalisings import NORMALISINGS
from ..forms.routers import ROUTERS
from ..forms.scorings import SCORINGS
from ..forms.selections import LOOK_UPS, SELECTIONS
from ..forms.text import Part, class_lines, part
from .families import FAMILIES, OWN_SELECTION

# What has E entries nearby, and takes part for every token alike.
BESIDE: dict[str, Part] = {
    "nothing": part(),
    "as many layers": part(
        "for inner in self.layers:\n    x = x + torch.tanh(inner(x))",
        "self.layers = nn.ModuleList([nn.Linear(H, H) for _ in range(E)])",
    ),
    "as many heads": part(
        "x = x + torch.tanh(torch.einsum('th,ehj->tj', x, self.heads) / E)",
        "self.heads = nn.Parameter(torch.randn(E, H, H) / H**0.5)",
    ),
    "as many channels": part(
        "x = x + self.narrow(torch.relu(self.wide(x.unsqueeze(1)))).squeeze(1)",
        "self.wide, self.narrow = nn.Conv1d(1, E, 3, padding=1), nn.Conv1d(E, 1, 1)",
    ),
    "blocks with attention": part(
        "for inner in self.layers:\n    x = x + inner['mlp'](inner['norm'](x))",
        "self.layers = nn.ModuleList(\n"
        "    [nn.ModuleDict({'norm': nn.LayerNorm(H), 'mlp': nn.Linear(H, H)}) for _ in range(E)]\n)",
    ),
}
_FORWARD = "def forward(self, x):"
PLACES = ("one module", "head as a module", "body as a module", "both as modules")
BREAKS = ("none", "before the selection", "after the selection", "after the body")


def look_alike_source(c: dict[str, str]) -> str:
    """The whole program; `model` and `make_inputs` are what it defines."""
    size = dict(pair.split() for pair in c["sizes"].split(", "))
    constants = f"E, K, T, H, I, R = {size['E']}, {size['K']}, {size['T']}, {size['H']}, 4, 5"
    head_init, head = _head(c)
    body = BESIDE[c["beside"]]
    broken = ['print("", end="")'] if c["break"] == "after the body" else []
    lines = ["import torch", "import torch.nn.functional as F", "from torch import nn", "", constants, "", ""]
    inside_init, inside = [*body.init, *head_init], [*body.body, *broken, *head]
    if c["place"] in ("head as a module", "both as modules"):
        lines += class_lines("Head", head_init, _FORWARD, head)
        inside_init, inside = [*body.init, "self.head = Head()"], [*body.body, *broken, "return self.head(x)"]
    if c["place"] in ("body as a module", "both as modules"):
        lines += class_lines("Body", list(body.init), _FORWARD, [*body.body, "return x"])
        rest_init, rest = inside_init[len(body.init) :], inside[len(body.body) :]
        inside_init, inside = ["self.body = Body()", *rest_init], ["x = self.body(x)", *rest]
    lines += class_lines("Model", inside_init, _FORWARD, inside)
    lines += ["model = Model()", "", ""]
    lines += ["def make_inputs(generator, masking=True):", "    return (torch.randn(T, H, generator=generator),)"]
    return "\n".join(lines) + "\n"


def _head(c: dict[str, str]) -> tuple[list[str], list[str]]:
    if c["family"] in OWN_SELECTION:
        own = OWN_SELECTION[c["family"]]
        return list(own.init), [*own.body, "return result"]
    router, scoring, family = ROUTERS[c["router"]], SCORINGS[c["scoring"]], FAMILIES[c["family"]]
    printed = ['print("", end="")']
    lines = [
        *router.part.body,
        *scoring.part.body,
        *(printed if c["break"] == "before the selection" else []),
        *(line.format(choice=scoring.choice) for line in SELECTIONS[c["selection"]]),
        *LOOK_UPS[c["look-up"]],
        *(printed if c["break"] == "after the selection" else []),
        *scoring.after,
        *NORMALISINGS[c["normalising"]],
        *family.body,
        "return result",
    ]
    return [*router.part.init, *scoring.part.init, *family.init], lines
