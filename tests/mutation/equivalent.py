"""Mutants that compute the same as the code: a test cannot tell them apart."""

from __future__ import annotations

from .draw import Mutant

# Module, function, what the statement becomes, and why nothing changes.
EQUIVALENT: tuple[tuple[str, str, str, str], ...] = (
    (
        "passes/fuse_reroute.py",
        "fuse_reroute",
        "any((not matrix <= routed for matrix in matrices))",
        "the operator is none of its own matrices",
    ),
    (
        "ops/route/reference.py",
        "_limited_to_groups",
        "best = groups.sort(descending=True).values[..., :1 if scoring.group_score == 'max' else 2].sum(-1)",
        "a sort is along the last dimension unless it is told another",
    ),
)

_KNOWN = {(path, function, after) for path, function, after, _ in EQUIVALENT}


def is_equivalent(mutant: Mutant) -> bool:
    """Whether this mutant is one of them."""
    return (mutant.path, mutant.function, mutant.after) in _KNOWN
