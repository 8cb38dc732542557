"""The source of a drawn program with a gate, and what the oracle has to know of it."""

from __future__ import annotations

from .choices import sizes
from .forms.experts import EXPERTS
from .forms.paddings import MASKS
from .forms.readers import RETURNED
from .forms.routers import ROUTERS
from .forms.text import class_lines
from .layer_parts import expert_class
from .layer_source import experts_class, has_router_module, layer_class, router_class
from .rules import Choices

_HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
"""


def gate_source(c: Choices) -> str:
    """The whole program: it defines `model` and `make_inputs`. See `layer_source.REPORT`."""
    size = sizes(c)
    constants = f"E, K, T, H, I, R = {size['E']}, {size['K']}, {size['T']}, {size['H']}, 8, 5"
    classes = [*expert_class(c), *router_class(c), *experts_class(c), *layer_class(c), *_outer(c)]
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
    return f"gate.{weight}" if weight and has_router_module(c) else weight


def _outer(c: Choices) -> list[str]:
    around = c["around"]
    if around in ("nothing", "three dimensions") or (around == "checkpointed experts"):
        return ["model = Layer()"]
    names = RETURNED[c["returned"]][0]
    init, body = ["self.layer = Layer()"], []
    if around.startswith("two layers"):
        init = ["self.layers = nn.ModuleList([Layer() for _ in range(2)])"]
        if around == "two layers, one router":
            path = "gate.router" if has_router_module(c) else "router"
            init += [f"self.layers[1].{path} = self.layers[0].{path}"]
        rest = "".join(f", {name}" for name in names)
        body = ["rest = []", "for layer in self.layers:", f"    y{rest} = layer(x)", "    x = x + y"]
        body += [f"    rest += [{', '.join(names)}]"] if names else []
        body += ["return x, *rest" if names else "return x"]
    elif around == "block with a norm":
        init += ["self.norm = nn.LayerNorm(H)"]
        body = ["return self.layer(self.norm(x))"]
    elif around == "functional call":
        body = ["return torch.func.functional_call(self.layer, dict(self.layer.named_parameters()), (x,))"]
    elif around == "vmap over sequences":
        body = ["return torch.func.vmap(self.layer)(x)"]
    elif around == "vmap over tokens":
        body = ["return torch.func.vmap(lambda row: self.layer(row.unsqueeze(0)).squeeze(0))(x)"]
    elif around == "checkpointed layer":
        body = ["return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)"]
    else:
        body = ['with torch.autocast("cpu", dtype=torch.bfloat16):', "    return self.layer(x)"]
    return [*class_lines("Model", init, "def forward(self, x):", body), "model = Model()"]


def _inputs(c: Choices) -> list[str]:
    batched = c["around"] in ("three dimensions", "vmap over sequences")
    shape = "2, T, H" if batched else "T, H"
    values = [f"torch.randn({shape}, generator=generator)"]
    if c["padding"] != "none":
        mask = MASKS[c["mask"]]
        values += [f"({mask.masking}) if masking else ({mask.real})"]
    return ["", "", "def make_inputs(generator, masking=True):", f"    return ({', '.join(values)},)"]


def labels_of(c: Choices) -> list[str]:
    """What each result of the model is, in order: "y" or the name of a side value."""
    names = list(RETURNED[c["returned"]][0])
    return ["y", *names, *names] if c["around"].startswith("two layers") else ["y", *names]
