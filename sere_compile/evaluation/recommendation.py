"""What a sweep says: the setting that a budget allows, what more data could decide, and which rule loses least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from .result import NORMAL
from .sweep import SLACK, SweepRow


def recommend(rows: Iterable[SweepRow], budget: float) -> dict[int, SweepRow | None]:
    """For each decode batch, the setting with the fewest active experts that is within a budget, error included.

    Fewest is fastest: the time of a step grows with them, whatever the rule. Of settings with about as few, it is the
    one that loses least, so that no rule is recommended where another one is better.

    Args:
        rows: of a sweep.
        budget: growth of perplexity, 0.01 for one percent, that `upper_bound` has to keep to.
    """
    rows = list(rows)
    sizes = dict.fromkeys(row.decode_batch for row in rows)
    return {size: _best(r for r in rows if r.decode_batch == size and r.upper_bound <= budget) for size in sizes}


def _best(rows: Iterable[SweepRow]) -> SweepRow | None:
    """Of those with the fewest active experts, but for chance, the one that loses least."""
    rows = list(rows)
    fewest = min((row.active_after for row in rows), default=0.0)
    return min(
        (row for row in rows if row.active_after <= fewest * (1 + SLACK)),
        key=lambda row: (row.perplexity_change, row.active_after), default=None,
    )  # fmt: skip


def undecided(rows: Iterable[SweepRow], budget: float) -> dict[int, tuple[SweepRow, int]]:
    """For each decode batch, a better setting that more data could show to be within a budget, and how many sequences.

    That is the best of those that were measured within the budget, if the error keeps it from being recommended. The
    number is what its bound needs if mean and spread stay; at least twice the data.
    """
    rows = list(rows)
    within = [row for row in rows if row.perplexity_change < budget < math.inf]
    found: dict[int, tuple[SweepRow, int]] = {}
    for size, chosen in recommend(rows, budget).items():
        better = _best(row for row in within if row.decode_batch == size)
        if better is not None and (chosen is None or better.active_after * (1 + SLACK) < chosen.active_after):
            found[size] = (better, _sequences_needed(better, budget))
    return found


def _sequences_needed(row: SweepRow, budget: float) -> int:
    """How many sequences bring the bound of a setting within a budget, rounded up to whole decoding batches."""
    given = max(row.decode_batches, 1)
    if math.isnan(row.standard_error):
        return 8 * row.decode_batch
    spread = row.standard_error * given**0.5
    needed = math.ceil((NORMAL * spread / (budget - row.perplexity_change)) ** 2)
    return max(needed, 2 * given) * row.decode_batch


def least_losing(rows: Iterable[SweepRow]) -> dict[int, list[tuple[str, list[SweepRow]]]]:
    """For each decode batch and setting, the rules that lose least with about as many active experts.

    Args:
        rows: of a sweep.

    Returns:
        Pairs of setting and rows: the one that loses least, then those that are worse by less than two standard errors
        of the difference over decoding batches. Settings with only one rule to compare, or one batch, have no pair.
    """
    found: dict[int, list[tuple[str, list[SweepRow]]]] = {}
    for (size, setting), group in _grouped(rows).items():
        fewest = min(row.active_after for row in group)
        group = sorted(
            (row for row in group if row.active_after <= fewest * (1 + SLACK)), key=lambda row: row.perplexity_change
        )
        pairs = found.setdefault(size, [])
        if len(group) > 1 and len(group[0].losses) > 1:
            pairs.append((setting, [group[0], *(row for row in group[1:] if not _is_worse(row, group[0]))]))
    return found


def _grouped(rows: Iterable[SweepRow]) -> dict[tuple[int, str], list[SweepRow]]:
    groups: dict[tuple[int, str], list[SweepRow]] = {}
    for row in rows:
        groups.setdefault((row.decode_batch, row.setting), []).append(row)
    return groups


def _is_worse(row: SweepRow, best: SweepRow) -> bool:
    """By more than two standard errors of the paired difference."""
    difference = torch.tensor(row.losses, dtype=torch.float64) - torch.tensor(best.losses, dtype=torch.float64)
    return (difference.mean() > 2 * difference.std() / len(difference) ** 0.5).item()


def say_least_losing(pairs: Sequence[tuple[str, Sequence[SweepRow]]]) -> str:
    """Pairs of `least_losing` in words."""
    clear = {rule: [setting for setting, _ in group] for rule, group in itertools.groupby(pairs, key=_names)}
    return "; ".join(f"{' and '.join(settings)}: {rule}" for rule, settings in clear.items())


def _names(pair: tuple[str, Sequence[SweepRow]]) -> str:
    first, *others = [row.rule for row in pair[1]]
    return f"{first} ({', '.join(others)}: within two standard errors)" if others else first
