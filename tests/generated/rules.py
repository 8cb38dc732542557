"""What does not go together: programs that would not run, or that nobody defined."""

from __future__ import annotations

from collections.abc import Callable

from .forms.dispatches import DISPATCHES, OUTPUTS_ONLY, OUTPUTS_OR_UNIFORM
from .forms.paddings import MASKS, PADDINGS
from .forms.routers import ROUTERS
from .forms.scorings import SCORINGS, SIGNED
from .forms.selections import NO_VALUES, TWO_ONLY

# One choice for each dimension.
Choices = dict[str, str]
Rule = Callable[[Choices], bool]

_BY_DYNAMO = ("dynamo", "capture auto")
_STACKED_LAYERS = ("two layers", "two layers, one router")


def fits(c: Choices) -> bool:
    """Whether the choices go together."""
    return broken(c) == 0


def broken(c: Choices) -> int:
    """How many rules the choices break."""
    return sum(rule(c) for rule in (*COMMON, *(GATE_RULES if "dispatch" in c else ())))


def _needs_look_up(c: Choices) -> bool:
    """Whether the selected values are no weights."""
    return c["selection"] in NO_VALUES or SCORINGS[c["scoring"]].choice != "scores"


def _shows_order(c: Choices) -> bool:
    return (
        DISPATCHES[c["dispatch"]].ordered
        or c["dispatch"] in ("by rank", "token loop")
        or c["normalising"] in ("dropped last", "viewed, square root")
        or c["late reader"] in ("residual of the first weight", "first id as a number")
        or c["returned"] in ("ids", "weights", "ids and weights")
        or c["padding"] == "ids of the first token"  # with the token's own weights
    )


def _breaks(c: Choices) -> bool:
    return c["break"] != "none"


def _loops_over_data(c: Choices) -> bool:
    return not DISPATCHES[c["dispatch"]].traced


def _counts_experts(c: Choices) -> bool:
    """Whether ids outside [0, E) would be an error in what is returned."""
    return c["returned"] in ("counts", "tokens by one-hot", "balance loss", "load of experts", "load of real tokens")


def _changes_ids(c: Choices) -> bool:
    return PADDINGS[c["padding"]].outside or PADDINGS[c["padding"]].sends


def _has_plain_mask(c: Choices) -> bool:
    return (c["mask"], c["masked where"], c["first call"]) == ("bool", "in the layer", "masks")


def _reads_shapes(c: Choices) -> bool:
    """Whether the source takes a shape apart, which symbolic_trace cannot follow."""
    return (
        c["selection"] == "topk into given tensors"
        or c["scoring"].endswith("groups")
        or c["look-up"] == "rows"
        or c.get("dispatch") in ("flat, index_add", "dense rows", "grouped")
    )


COMMON: tuple[Rule, ...] = (
    lambda c: _breaks(c) and c["tracer"] not in _BY_DYNAMO,
    lambda c: c["tracer"] == "capture auto" and c["strict"] == "yes",
    lambda c: c["look-up"] == "values" and _needs_look_up(c),
    lambda c: c["scoring"] in SIGNED and c["normalising"] not in ("none", "softmax", "clamp", "square"),
    lambda c: c["tracer"] == "symbolic_trace" and _reads_shapes(c),
    lambda c: c["selection"] in TWO_ONLY and "K 2" not in c["sizes"],
)

_PLACES: tuple[Rule, ...] = (
    lambda c: _breaks(c) and c["around"].startswith(("vmap", "autocast", "checkpointed")),
    lambda c: c["break"].endswith("in eager mode") and c["structure"] == "one module",
    lambda c: c["look-up"] == "rows" and c["around"] == "three dimensions",
    lambda c: ROUTERS[c["router"]].flat_only and c["around"] == "three dimensions",
    lambda c: c["returned"] == "balance loss" and c["around"] == "three dimensions",
    lambda c: c["normalising"] == "viewed, square root" and c["around"] == "three dimensions",
    lambda c: c["selection"] == "topk into given tensors" and c["around"].startswith("vmap"),
    lambda c: c["returned"] != "output" and c["around"].startswith("vmap"),
    lambda c: c["container"] != "tuple" and c["around"].startswith(("two layers", "vmap")),
    lambda c: c["container"] == "dataclass" and c["tracer"] not in _BY_DYNAMO,
    lambda c: c["tracer"] != "dynamo" and c["around"].startswith("checkpointed"),
    lambda c: c["tracer"] == "symbolic_trace" and c["around"].startswith(("vmap", "autocast")),
    lambda c: c["early reader"] == "counts in a buffer" and c["around"].startswith("vmap"),
    lambda c: c["early reader"] == "counts in a buffer" and c["tracer"] == "symbolic_trace",
    lambda c: c["around"] == "functional call" and c["tracer"] == "symbolic_trace",
    lambda c: c["around"] == "checkpointed experts" and c["structure"] == "one module",
)
_CALLS: tuple[Rule, ...] = (
    lambda c: c["calls"] != "of one size" and (c["tracer"] not in _BY_DYNAMO or c["around"] != "nothing"),
    lambda c: c["calls"] != "of one size" and (c["profile"] == "none" or ROUTERS[c["router"]].weight is None),
    lambda c: c["calls"] == "without tokens first" and c["dispatch"] in ("token loop", "sorted loop", "grouped"),
    lambda c: c["calls"] == "without tokens first" and c["break"].startswith("number read"),
)
_EXPERTS: tuple[Rule, ...] = (
    lambda c: _loops_over_data(c) and c["tracer"] in ("make_fx", "symbolic_trace"),
    lambda c: c["dispatch"] == "sorted loop" and c["tracer"] == "export",
    lambda c: _loops_over_data(c) and c["around"].startswith(("vmap", "checkpointed")),
    lambda c: c["dispatch"] == "grouped" and c["around"].startswith(("vmap", "autocast")),
    lambda c: c["dispatch"] == "grouped" and (c["experts"] != "mlp" or "H 12" in c["sizes"]),
    lambda c: c["dispatch"] == "score mask" and c["scoring"] == "softmax over the selected",
    lambda c: c["dispatch"] == "score mask" and c["around"] == "three dimensions",
    lambda c: c["dispatch"] == "score mask" and c["early reader"].startswith("scale"),
    lambda c: c["dispatch"] == "chained" and c["experts"] == "one output",
    lambda c: c["dispatch"] == "concatenated" and c["late reader"] != "none",
    lambda c: c["dispatch"] == "concatenated" and c["around"] in _STACKED_LAYERS,
    lambda c: c["storage"] == "modules" and not DISPATCHES[c["dispatch"]].modules,
    lambda c: c["storage"] == "parameter lists" and not c["dispatch"].endswith(" loop"),
    lambda c: c["storage"] == "parameter lists" and c["experts"] == "on a common base",
    lambda c: c["weights applied to"] != "outputs" and c["dispatch"] in OUTPUTS_ONLY,
    lambda c: c["weights applied to"] not in ("outputs", "uniform") and c["dispatch"] in OUTPUTS_OR_UNIFORM,
    lambda c: (
        c["storage"] == "modules"
        and c["dispatch"].startswith("dense")
        and c["weights applied to"] in ("inputs", "inside the activation")
    ),
    # An order that nobody promised may not show.
    lambda c: c["selection"] == "topk, unsorted" and _shows_order(c),
)
_PADDING: tuple[Rule, ...] = (
    lambda c: c["padding"] != "none" and c["around"] != "nothing",
    lambda c: PADDINGS[c["padding"]].outside and not DISPATCHES[c["dispatch"]].compares,
    lambda c: _changes_ids(c) and (c["early reader"] != "none" or _counts_experts(c)),
    # What no mask leaves nothing of.
    lambda c: c["padding"] == "none" and not _has_plain_mask(c),
    lambda c: c["masked where"] != "in the layer" and not PADDINGS[c["padding"]].choice,
    lambda c: c["masked where"] != "in the layer" and c["structure"] == "one module",
    lambda c: c["padding"] == "zeros put" and (MASKS[c["mask"]].whole or c["tracer"] == "symbolic_trace"),
    lambda c: c["mask"] == "length" and c["tracer"] == "symbolic_trace",
    lambda c: MASKS[c["mask"]].whole and c["first call"] == "masks",
    lambda c: c["mask"] == "length" and c["calls"] != "of one size",
    lambda c: c["padding"] == "none" and c["returned"] == "load of real tokens",
)
_SHARED: tuple[Rule, ...] = (
    lambda c: c["shared expert"] == "added" and c["dispatch"] == "concatenated",
    lambda c: (
        c["shared expert"] == "joined by cat"
        and (
            c["dispatch"] in ("score mask", "capacity")
            or PADDINGS[c["padding"]].outside
            or c["masked where"] != "in the layer"
            or DISPATCHES[c["dispatch"]].ordered
            or _counts_experts(c)
        )
    ),
)
GATE_RULES: tuple[Rule, ...] = (*_PLACES, *_CALLS, *_EXPERTS, *_PADDING, *_SHARED)
