"""`sere::fill` once more, token by token in plain Python, from the method's text. Shares no code with ops/."""

import math

CLOSED = -3.0e38


def statistics(rows, weights, real, num_experts):
    """({expert: sum of squared weights}, {expert: best slot}) of the experts that real tokens name."""
    mass, best = {}, {}
    for row, weight_row, is_real in zip(rows, weights, real, strict=True):
        for slot, (u, weight) in enumerate(zip(row, weight_row, strict=True)):
            if is_real and 0 <= u < num_experts:
                mass[u] = mass.get(u, 0.0) + (0.0 if math.isnan(weight) else weight * weight)
                best[u] = min(best.get(u, slot), slot)
    return mass, best


def kept(rows, weights, real, num_experts, select_top_k, threshold=0.0, min_active=0, max_active=0):
    """The set of kept experts, or None for "change nothing"."""
    mass, best = statistics(rows, weights, real, num_experts)
    least = max(min_active, len(rows[0]))
    if max_active:
        count = max(max_active, least)
    else:
        for width in range(select_top_k, len(rows[0]) + 1):
            count = sum(slot < width for slot in best.values())
            if count >= least:
                break
    order = sorted(mass, key=lambda u: (best[u] > 0, -mass[u], u))
    chosen = set(order[:count])
    if threshold > 0:
        chosen |= {u for u in mass if mass[u] > threshold * sum(mass.values())}
    return None if chosen == set(mass) else chosen


def fill_token(row, weight_row, scores, choice, chosen):
    """New ids and weights of one token."""
    experts = range(len(scores))
    places = [k for k, u in enumerate(row) if u in experts]
    lost = [k for k in places if row[k] not in chosen]
    if not lost:
        return list(row), list(weight_row)
    new_row, new = list(row), list(weight_row)
    total, worth_of = sum(weight_row[k] for k in places), sum(scores[row[k]] for k in places)
    worth = 0.75 * total / worth_of if worth_of > 0 else 0.0
    closed = {u for u in experts if not choice[u] > CLOSED}
    # Open experts by their choice, then closed ones; the lowest of equals.
    left = sorted(chosen - set(row), key=lambda u: (u in closed, 0 if u in closed else -choice[u], u))
    for k in lost:
        new[k] = 0.0
        if left:
            new_row[k] = left.pop(0)
            if new_row[k] not in closed:
                new[k] = worth * scores[new_row[k]]
    sums = sum(new[k] for k in places)
    factor = (total / sums) ** 0.75 if total > 0 and sums > 0 else 1.0
    for k in places:
        new[k] *= factor
    return new_row, new


def fill_rows(rows, weights, scores, select_top_k, *, real=None, choice=None, **options):
    """Lists of rows of ids, weights, scores. Returns (rows of ids, rows of weights)."""
    if not rows or not 0 < select_top_k < len(rows[0]):
        return [list(row) for row in rows], [list(row) for row in weights]
    real = [True] * len(rows) if real is None else real
    chosen = kept(rows, weights, real, len(scores[0]), select_top_k, **options)
    if chosen is None:
        return [list(row) for row in rows], [list(row) for row in weights]
    choice = scores if choice is None else choice
    filled = [fill_token(*token, chosen) for token in zip(rows, weights, scores, choice, strict=True)]
    return [row for row, _ in filled], [new for _, new in filled]
