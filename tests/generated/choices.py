"""What can be drawn: the dimensions of the grammar, and the draw itself."""

from __future__ import annotations

import random
from collections.abc import Mapping

from .forms.dispatches import DISPATCHES
from .forms.experts import APPLIED, EXPERTS
from .forms.normalisings import NORMALISINGS
from .forms.paddings import MASKS, PADDINGS
from .forms.readers import EARLY, LATE, PASSED, RETURNED
from .forms.routers import ROUTERS
from .forms.scorings import SCORINGS
from .forms.selections import LOOK_UPS, SELECTIONS
from .look_alikes import FAMILIES, OWN_SELECTION
from .look_alikes.source import BESIDE, PLACES
from .look_alikes.source import BREAKS as LOOK_ALIKE_BREAKS
from .rules import Choices, broken, fits

Dimensions = Mapping[str, tuple[str, ...]]

TRACERS = ("dynamo", "export", "make_fx", "symbolic_trace", "capture auto")
STRUCTURES = ("one module", "methods", "router module", "router and experts modules", "two sets of experts")
BREAKS = (
    "none",
    "print after the logits",
    "print after the scores",
    "print after the selection",
    "print after the weights",
    "print before the experts",
    "graph_break after the selection",
    "graph_break after the weights",
    "number read after the selection",
    "experts in eager mode",
    "router in eager mode",
    "print before the end",
)
AROUND = (
    "nothing",
    "block with a norm",
    "two layers",
    "two layers, one router",
    "three dimensions",
    "vmap over sequences",
    "vmap over tokens",
    "checkpointed experts",
    "checkpointed layer",
    "autocast",
    "functional call",
)

# The simplest choice first: the shrinker goes towards it.
GATES: Dimensions = {
    "tracer": TRACERS,
    "around": AROUND,
    "structure": STRUCTURES,
    "break": BREAKS,
    "padding": tuple(PADDINGS),
    "mask": tuple(MASKS),
    "masked where": ("in the layer", "in the experts' code"),
    "first call": ("masks", "masks nothing"),
    "shared expert": ("none", "added", "joined by cat"),
    "late reader": tuple(LATE),
    "early reader": tuple(EARLY),
    "ids passed": tuple(PASSED),
    "returned": tuple(RETURNED),
    "container": ("tuple", "dict", "dataclass"),
    "look-up": tuple(LOOK_UPS),
    "normalising": tuple(NORMALISINGS),
    "scoring": tuple(SCORINGS),
    "selection": tuple(SELECTIONS),
    "router": tuple(ROUTERS),
    "weights applied to": APPLIED,
    "storage": ("stacked", "modules", "parameter lists"),
    "experts": tuple(EXPERTS),
    "dispatch": tuple(DISPATCHES),
    "profile": ("attached", "none"),
    "calls": ("of one size", "of two sizes", "without tokens first"),
    "strict": ("no", "yes"),
    "rho": ("0", "0.6"),
    "sizes": (
        "E 6, K 2, T 5, H 8",
        "E 8, K 3, T 6, H 12",
        "E 6, K 3, T 5, H 8",
        "E 10, K 4, T 7, H 8",
        "E 8, K 4, T 8, H 8",
    ),
}
LOOK_ALIKES: Dimensions = {
    "tracer": TRACERS,
    "place": PLACES,
    "break": LOOK_ALIKE_BREAKS,
    "beside": tuple(BESIDE),
    "look-up": tuple(LOOK_UPS),
    "normalising": tuple(NORMALISINGS),
    "scoring": tuple(SCORINGS),
    "selection": tuple(SELECTIONS),
    "router": tuple(ROUTERS),
    "family": (*FAMILIES, *OWN_SELECTION),
    "strict": ("no", "yes"),
    "sizes": GATES["sizes"],
}
# How often the simplest choice is taken at least; of dimensions left out each is equally likely.
SELDOM = {
    "tracer": 0.5,
    "around": 0.6,
    "structure": 0.3,
    "break": 0.5,
    "padding": 0.7,
    "mask": 0.4,
    "masked where": 0.6,
    "first call": 0.5,
    "shared expert": 0.8,
    "late reader": 0.75,
    "early reader": 0.75,
    "ids passed": 0.75,
    "returned": 0.5,
    "container": 0.8,
    "look-up": 0.5,
    "normalising": 0.4,
    "scoring": 0.3,
    "selection": 0.5,
    "router": 0.5,
    "experts": 0.4,
    "storage": 0.6,
    "weights applied to": 0.75,
    "profile": 0.85,
    "calls": 0.7,
    "strict": 0.7,
    "rho": 0.7,
}


# What no mask leaves nothing of.
MASKED = ("mask", "masked where", "first call")

# What gives way where choices do not go together: else the choosy ones would hardly be drawn.
_GIVE_WAY = (
    ("look-up", "gather"),
    ("sizes", GATES["sizes"][0]),
    ("structure", "methods"),
    ("returned", "output"),
    ("early reader", "none"),
)


def draw(rng: random.Random, dimensions: Dimensions = GATES) -> Choices:
    """One choice for each dimension: most of them simple in some programs, few in others."""
    while True:
        plainness = rng.choice((0.0, 0.4, 0.8))
        chosen = {name: _draw_one(rng, name, values, plainness) for name, values in dimensions.items()}
        if chosen.get("padding") == "none":
            chosen |= {name: dimensions[name][0] for name in MASKED}
        elif "padding" in chosen:
            chosen["around"] = "nothing"
        if chosen.get("padding") in ("ids of -1", "ids of E"):
            chosen["dispatch"] = rng.choice([name for name, form in DISPATCHES.items() if form.compares])
        for name, value in rng.sample(_GIVE_WAY, len(_GIVE_WAY)):
            if name in chosen and broken({**chosen, name: value}) < broken(chosen):
                chosen[name] = value
        if fits(chosen):
            return chosen


def _draw_one(rng: random.Random, name: str, values: tuple[str, ...], plainness: float) -> str:
    simple = max(SELDOM[name], plainness) if name in SELDOM else 0.0
    return values[0] if rng.random() < simple else rng.choice(values)


def sizes(chosen: Choices) -> dict[str, int]:
    """E, K, T and H of the choices."""
    return {name: int(value) for name, value in (pair.split() for pair in chosen["sizes"].split(", "))}
