"""What a mask of tokens changes, and how it comes into a layer.

A first call decides nothing: what it masks, the next may not, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Padding:
    """What `mask`, true where a token is real, does.

    Attributes:
        choice: lines behind the ids and weights that the router gives.
        ids: what the ids are then, as an expression, for the oracle.
        hidden: lines before the router, from and to `x`.
        logits: lines behind the logits.
        late: lines behind `y`.
        outside: whether it makes ids that are no expert's.
        sends: whether it sends tokens to experts that they did not choose.
    """

    choice: tuple[str, ...] = ()
    ids: str = "ids"
    hidden: tuple[str, ...] = ()
    logits: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    outside: bool = False
    sends: bool = False


def _of_ids(expression: str, *more: str, outside: bool = False) -> Padding:
    return Padding((f"ids = {expression}", *more), expression, outside=outside, sends=not outside)


_WEIGHED = "weights = weights * mask.unsqueeze(-1)"
PADDINGS: dict[str, Padding] = {
    "none": Padding(),
    "weights times mask": Padding((_WEIGHED,)),
    "ids of -1": _of_ids("ids.masked_fill(~mask.unsqueeze(-1), -1)", outside=True),
    "ids of E": _of_ids("ids.masked_fill(~mask.unsqueeze(-1), E)", outside=True),
    "ids of 0": _of_ids("ids.masked_fill(~mask.unsqueeze(-1), 0)"),
    "ids of E - 1": _of_ids("torch.where(mask.unsqueeze(-1), ids, E - 1)"),
    "ids of 0, weights times mask": _of_ids("ids.masked_fill(~mask.unsqueeze(-1), 0)", _WEIGHED),
    "ids times mask": _of_ids("ids * mask.unsqueeze(-1)"),
    "ids or zeros": _of_ids("torch.where(mask.unsqueeze(-1), ids, torch.zeros_like(ids))"),
    "zeros put": Padding(
        ("ids = ids.clone()", "ids[~mask] = 0"), "ids.masked_fill(~mask.unsqueeze(-1), 0)", sends=True
    ),
    "ids of -1, clamped": _of_ids("ids.masked_fill(~mask.unsqueeze(-1), -1).clamp(min=0)"),
    "ids of -1, clamped, weights times mask": _of_ids(
        "ids.masked_fill(~mask.unsqueeze(-1), -1).clamp(min=0)", _WEIGHED
    ),
    "ids of the next": _of_ids("torch.where(mask.unsqueeze(-1), ids, (ids + 1) % E)"),
    "ids of the first token": _of_ids("torch.where(mask.unsqueeze(-1), ids, ids[:1])"),
    "weights halved": Padding(("weights = torch.where(mask.unsqueeze(-1), weights, weights * 0.5)",)),
    "logits masked": Padding(logits=("logits = logits.masked_fill(~mask.unsqueeze(-1), -1e9)",)),
    "an expert masked": Padding(logits=("logits = logits - 1e9 * (~mask.unsqueeze(-1) & (torch.arange(E) == 1))",)),
    "hidden states times mask": Padding(hidden=("x = x * mask.unsqueeze(-1)",)),
    "experts' hidden states times mask": Padding(("x = x * mask.unsqueeze(-1)",)),
    "output times mask": Padding(late=("y = y * mask.unsqueeze(-1)",)),
}


@dataclass(frozen=True)
class Mask:
    """How the mask is handed over.

    Attributes:
        body: from `given` to `mask`.
        masking: an argument that masks.
        real: one that masks nothing.
        whole: whether it is of all tokens at once.
    """

    body: tuple[str, ...]
    masking: str
    real: str
    whole: bool = False


_LAST_TWO = "torch.arange(T) < T - 2"
MASKS: dict[str, Mask] = {
    "bool": Mask(("mask = given",), _LAST_TWO, "torch.arange(T) >= 0"),
    "bool, of padding": Mask(("mask = ~given",), "torch.arange(T) >= T - 2", "torch.arange(T) < 0"),
    "0 and 1": Mask(("mask = given.bool()",), f"({_LAST_TWO}).long()", "torch.ones(T, dtype=torch.int64)"),
    "0. and 1.": Mask(("mask = given > 0.5",), f"({_LAST_TWO}).float()", "torch.ones(T)"),
    "column": Mask(("mask = given.squeeze(-1)",), f"({_LAST_TWO}).view(T, 1)", "torch.arange(T).view(T, 1) >= 0"),
    "added to scores": Mask(("mask = given == 0",), "-1e9 * (torch.arange(T) >= T - 2)", "torch.zeros(T)"),
    "inverted in floats": Mask(
        ("added = (1.0 - given.float()) * -1e9", "mask = added > -1.0"),
        f"({_LAST_TWO}).long()",
        "torch.ones(T, dtype=torch.int64)",
    ),
    "length": Mask(("mask = torch.arange(x.shape[0]) < given",), "torch.tensor(T - 2)", "torch.tensor(T)"),
    "words": Mask(("mask = given != 0",), f"(torch.arange(T) + 3) * ({_LAST_TWO})", "torch.arange(T) + 3"),
    "words, 7 is none": Mask(
        ("mask = given != 7",), f"torch.where({_LAST_TWO}, torch.arange(T) % 5, 7)", "torch.arange(T) % 5"
    ),
    "flag": Mask(("mask = given",), "torch.tensor(False)", "torch.tensor(True)", whole=True),
    "flag of 0 or 1": Mask(("mask = given > 0",), "torch.tensor(0)", "torch.tensor(1)", whole=True),
    "flag as a number": Mask(("mask = given > 0.5",), "torch.tensor(0.0)", "torch.tensor(1.0)", whole=True),
}
