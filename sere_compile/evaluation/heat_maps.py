"""Similarity profiles as pictures: a heat map for each gate, or an overview of many gates and pages of maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..similarity.profile import SimilarityProfile
from ..similarity.threshold import resolve_threshold
from .pictures import new_figure, save

# Maps on one page.
COLUMNS = 4
MOST_MAPS = 12
# Listed by name under a map.
MOST_PAIRS = 3
MOST_EXPERTS = 8
# Names of gates that an overview has room for.
MOST_NAMES = 64


@dataclass(frozen=True)
class GateSimilarity:
    """What a picture shows of one gate.

    Attributes:
        name: of the gate.
        matrix: [E, E], NaN on the diagonal.
        nearest: [E], each expert's similarity to the other one that is most like it.
        rho: the threshold as this gate's number.
        critical: experts less similar than rho to every other one, which always stay.
    """

    name: str
    matrix: torch.Tensor
    nearest: torch.Tensor
    rho: float
    critical: list[int]

    @classmethod
    def of(cls, name: str, matrix: torch.Tensor, threshold: float | str) -> GateSimilarity:
        """Of a matrix [E, E]; `threshold` as in `SereConfig`, 0 for none."""
        matrix = matrix.detach().float().cpu()
        itself = torch.eye(len(matrix), dtype=torch.bool)
        nearest = matrix.masked_fill(itself, -torch.inf).amax(1)
        rho = resolve_threshold(threshold, matrix)
        on = isinstance(threshold, str) or threshold > 0
        critical = (nearest < rho).nonzero().flatten().tolist() if on else []
        return cls(name, matrix.masked_fill(itself, torch.nan), nearest, rho, critical)

    def most_similar(self, count: int = MOST_PAIRS) -> list[tuple[int, int, float]]:
        """The pairs (u, v, similarity) that are most alike, each once."""
        both = torch.maximum(self.matrix, self.matrix.T).triu(1)
        pairs = both.masked_fill(~torch.ones_like(both, dtype=torch.bool).triu(1), -torch.inf).flatten()
        size = len(self.matrix)
        best = pairs.topk(min(count, size * (size - 1) // 2))
        indices = [divmod(index, size) for index in best.indices.tolist()]
        return [(u, v, value) for (u, v), value in zip(indices, best.values.tolist(), strict=True)]


def plot_profile(profile: SimilarityProfile, path: str | Path, threshold: float | str = 0.0) -> list[Path]:
    """A heat map for each gate, or, of more than 12 gates, an overview and pages of 12 maps beside it.

    Args:
        profile: of at least one gate.
        path: of the picture, or of the overview; pages are named `NAME-1`, `NAME-2`, ...
        threshold: experts less similar than this to all others, which are always critical, are marked. One such as
            "q0.2" is a different number for each gate, see `sere_compile.similarity.threshold`.

    Returns:
        The files that were written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    path = Path(path)
    gates = [GateSimilarity.of(name, matrix, threshold) for name, matrix in profile.items()]
    title = title_of(profile)
    if len(gates) <= MOST_MAPS:
        save(_page(gates, gates, title, profile), path)
        return [path]
    save(_overview(gates, title, profile), path)
    written = [path]
    for number, first in enumerate(range(0, len(gates), MOST_MAPS), start=1):
        page = path.with_stem(f"{path.stem}-{number}")
        save(_page(gates[first : first + MOST_MAPS], gates, title, profile), page)
        written.append(page)
    return written


def title_of(profile: SimilarityProfile) -> str:
    """Whose similarity it is, and on what it was measured."""
    known = profile.metadata
    text = known.get("data") or (f"{known['tokens']} tokens" if known.get("tokens") else "")
    return "  |  ".join(filter(None, ["similarity of experts", known.get("model") or known.get("model_type"), text]))


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What the names have in common, with `*` for the rest, and the rest of each: layers' numbers, mostly."""
    if len(names) < 2:
        return "", list(names)
    parts = [name.split(".") for name in names]
    front = _shared(parts)
    back = _shared([part[front:][::-1] for part in parts])
    if any(len(part) == front + back for part in parts):
        return "", list(names)
    rest = [".".join(part[front : len(part) - back]) for part in parts]
    return ".".join([*parts[0][:front], "*", *parts[0][len(parts[0]) - back :]]), rest


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts are the same in all, from the first on."""
    same = (len(set(column)) == 1 for column in zip(*parts, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def _scale(gates: Iterable[GateSimilarity]) -> tuple[float, float]:
    """The least and the largest similarity of two different experts: one scale for every map."""
    values = torch.cat([gate.matrix.flatten() for gate in gates])
    values = values[values.isfinite()]
    return (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)


def _page(
    gates: Sequence[GateSimilarity], every: Sequence[GateSimilarity], title: str, profile: SimilarityProfile
) -> Any:
    columns = min(COLUMNS, len(gates))
    lines = -(-len(gates) // columns)
    figure = new_figure(max(3.6 * columns, 5.0) + 1.0, 4.3 * lines + 0.9)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(gates) :]:
        axis.set_axis_off()
    low, high = _scale(every)
    for axis, gate in zip(axes.flat, gates, strict=False):
        mark = min(3.0, 160 / len(gate.matrix))  # points: about a cell
        image = axis.imshow(gate.matrix.numpy(), cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        marks = axis.scatter(gate.critical, gate.critical, marker="s", color="red", s=mark**2)
        axis.set_title(gate.name, fontsize=8)
        axis.set_xlabel(f"expert v\n{_listed(gate)}", fontsize=7)
        axis.set_ylabel("expert u", fontsize=7)
        axis.tick_params(labelsize=6)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30)
    bar.set_label(f"similarity of u and v ({profile.metadata.get('method', 'given')})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    if any(gate.critical for gate in gates):
        marks.set_label("critical: less similar than rho to every other expert, always stays")
        figure.legend(handles=[marks], loc="outside lower center", fontsize=8)
    return figure


def _listed(gate: GateSimilarity) -> str:
    """The most similar and the critical experts in words."""
    pairs = ", ".join(f"{u}-{v} {value:.2f}" for u, v, value in gate.most_similar())
    text = f"nearest: median {gate.nearest.median():.2f}\nmost similar: {pairs or 'none'}"
    if not gate.critical:
        return f"{text}\ncritical: none"
    more = len(gate.critical) - MOST_EXPERTS
    named = ", ".join(map(str, gate.critical[:MOST_EXPERTS])) + (f", {more} more" if more > 0 else "")
    return f"{text}\n{len(gate.critical)} critical at rho {gate.rho:.2f}: {named}"


def _overview(gates: Sequence[GateSimilarity], title: str, profile: SimilarityProfile) -> Any:
    """A row for each gate: its experts' nearest similarity, sorted, and how many are critical."""
    widest = max(len(gate.nearest) for gate in gates)
    rows = torch.full((len(gates), widest), torch.nan)
    for row, gate in zip(rows, gates, strict=True):
        row[: len(gate.nearest)] = gate.nearest.sort().values
    figure = new_figure(11.0, min(2.6 + 0.17 * len(gates), 13.0))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    image = left.imshow(rows.numpy(), cmap="viridis", aspect="auto", interpolation="nearest")
    pattern, names = short_names([gate.name for gate in gates])
    step = -(-len(gates) // MOST_NAMES)
    left.set_yticks(range(0, len(gates), step), labels=names[::step], fontsize=6)
    left.set_ylabel(f"gate, {pattern}" if pattern else "gate", fontsize=8)
    left.set_xlabel("experts, least similar first", fontsize=8)
    right.barh(range(len(gates)), [len(gate.critical) for gate in gates], color="red", height=0.7)
    (ticker,) = require("plot", "matplotlib.ticker", needed_for="plots need")
    right.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    right.set_xlabel("critical experts: less similar\nthan rho to every other one", fontsize=8)
    bar = figure.colorbar(image, ax=left, shrink=0.7)
    bar.set_label(f"similarity to the nearest expert ({profile.metadata.get('method', 'given')})", fontsize=8)
    for axis in (right, bar.ax):
        axis.tick_params(labelsize=7)
    left.tick_params(axis="x", labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
