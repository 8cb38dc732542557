"""What tells an object from every other one of the process, also from those that are made once it is gone."""

from __future__ import annotations

import itertools
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

_identities = WeakIdKeyDictionary()
_unused = itertools.count()
_kept: dict[int, Any] = {}  # what cannot be referred to weakly, as a `slice`


def identity(value: Any) -> tuple[str, int]:
    """What no other object has, ever: an address is another object's once this one is gone."""
    try:
        known = _identities.get(value)
    except TypeError:
        return "kept", id(_kept.setdefault(id(value), value))
    if known is None:
        known = _identities[value] = ("object", next(_unused))
    return known  # type: ignore[no-any-return]
