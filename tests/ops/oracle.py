"""The operators once more, token by token in plain Python, from the method's text. Shares no code with ops/."""

import math

import numpy as np


def as_fp32_rows(similarity):
    """A [E, E] tensor of any floating dtype as rows of numpy fp32 scalars."""
    return similarity.float().cpu().numpy()


def union_of_first_slots(rows, real, num_experts, width):
    union = set()
    for row, is_real in zip(rows, real, strict=True):
        if is_real:
            union.update(u for u in row[:width] if 0 <= u < num_experts)
    return union


def primary_set(rows, real, num_experts, select_top_k, min_active):
    """The primary set, or None for "change nothing"."""
    num_slots = len(rows[0])
    for width in range(select_top_k, num_slots):
        union = union_of_first_slots(rows, real, num_experts, width)
        if len(union) >= min_active:
            return union
    return None


def destination(u, similarity, primary, threshold):
    """v(u) for an expert that is not primary, or u when it stays."""
    best, target = np.float32(-math.inf), None
    for v in sorted(primary):
        if similarity[u][v] > best:
            best, target = similarity[u][v], v
    if target is None:
        return u
    if threshold > 0 and best < np.float32(threshold):
        return u
    return target


def reroute_rows(rows, similarity, select_top_k, threshold=0.0, min_active=0, real=None):
    """rows: list of lists of ids. Returns new rows."""
    num_experts = len(similarity)
    if not rows or select_top_k <= 0 or select_top_k >= len(rows[0]):
        return [list(row) for row in rows]
    real = [True] * len(rows) if real is None else real
    primary = primary_set(rows, real, num_experts, select_top_k, min_active)
    if primary is None:
        return [list(row) for row in rows]
    result = []
    for row in rows:
        new_row = []
        for u in row:
            stays = not 0 <= u < num_experts or u in primary
            new_row.append(u if stays else destination(u, similarity, primary, threshold))
        result.append(new_row)
    return result


def merge_rows(rows, new_rows, weights, num_experts, real=None):
    """Merge equal slots of changed tokens. weights: list of lists of floats. Returns (ids, weights)."""
    real = [True] * len(rows) if real is None else real
    active = union_of_first_slots(new_rows, real, num_experts, None)
    merged_ids, merged_weights = [], []
    for row, new_row, weight_row in zip(rows, new_rows, weights, strict=True):
        ids, sums = list(new_row), list(weight_row)
        if row != new_row:
            ids, sums = merge_token(row, new_row, weight_row, num_experts, active)
        merged_ids.append(ids)
        merged_weights.append(sums)
    return merged_ids, merged_weights


def merge_token(row, new_row, weight_row, num_experts, active):
    ids, sums = list(new_row), list(weight_row)
    holder, freed = {}, []
    for k, v in enumerate(new_row):
        if not 0 <= v < num_experts:
            continue
        if v in holder:
            sums[holder[v]] += weight_row[k]
            sums[k] = 0.0
            freed.append(k)
        else:
            holder[v] = k
    fillers = sorted(active - set(holder))
    for k in freed:
        if fillers:
            ids[k] = fillers.pop(0)
        else:
            # Never the group's own expert, which its first slot names.
            ids[k] = row[k] if row[k] != new_row[k] else row[holder[new_row[k]]]
    return ids, sums
