"""How many experts each rank reads under expert parallelism, by who decides which experts are primary. No device.

    python -m benchmarks.parallel_simulation           # writes the table and the picture of docs/parallel.md, minutes
    python -m benchmarks.parallel_simulation --print   # only prints

Data parallel with expert parallel: every rank has tokens of its own and E / ranks experts, and an expert is read once
for the tokens of all ranks that meet at it. Tokens choose K experts by logits, the sum of an expert's popularity and
the token's own taste; experts are similar as random vectors are. Re-routing is `sere::reroute` itself.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sere_compile.ops import reroute

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "parallel.md", DOCS / "parallel.svg"
RANKS, BATCHES, EXPERTS = (8, 32, 64), (1, 2, 4, 8, 16, 32, 64), (128, 256)
TOP_K, SELECT, REPEATS = 8, 1, 4
# Spread of the experts' popularity where a token's own taste spreads by 1. 32 tokens of 128 experts then activate 107,
# as 106 with the dummy weights of Qwen3-30B-A3B's shape in vLLM.
POPULARITY = 0.2
# As many numbers describe an expert; from them, how similar two are.
FEATURES = 16
# Of the best similarity: targets that are as good as this may go to the less loaded rank.
AS_GOOD = 0.02


@dataclass(frozen=True)
class Loads:
    """What one rule leaves, means over draws.

    Attributes:
        active: experts that a rank reads, mean over ranks.
        largest: of the rank that reads most.
        rows: slots that the rank with most of them computes, relative to the mean.
        kept: similarity of what a slot was given to what it had chosen, 1 where it was left; mean over slots.
    """

    active: float
    largest: float
    rows: float
    kept: float


def draw(tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Ids [T, K], best first."""
    popularity = POPULARITY * torch.randn(experts, generator=generator)
    return (popularity + torch.randn(tokens, experts, generator=generator)).topk(TOP_K, dim=-1).indices


def similarity(experts: int, generator: torch.Generator) -> Tensor:
    """Float32 [E, E] in 0 to 1, symmetric, 1 with itself."""
    vectors = torch.nn.functional.normalize(torch.randn(experts, FEATURES, generator=generator), dim=-1)
    return ((1 + vectors @ vectors.T) / 2).fill_diagonal_(1.0)


def per_rank(ids: Tensor, matrix: Tensor, ranks: int, min_active: int) -> Tensor:
    """Each rank's own tokens are one routing batch; ids [T, K], the first T / ranks of the first rank."""
    return torch.cat([reroute(own, matrix, SELECT, 0.0, min_active) for own in ids.chunk(ranks)])


def balanced(ids: Tensor, matrix: Tensor, ranks: int) -> Tensor:
    """Agreed; of targets that are as good, the one on the rank with fewer slots so far takes it."""
    return reroute(ids, _towards_idle_ranks(ids, matrix, ranks), SELECT, 0.0, TOP_K)


def _towards_idle_ranks(ids: Tensor, matrix: Tensor, ranks: int) -> Tensor:
    """The matrix in steps of what counts as equal, less a fraction of a step by the load of the target's rank."""
    experts = len(matrix)
    load = torch.bincount(ids[:, :SELECT].flatten() // (experts // ranks), minlength=ranks).float()
    order = load.argsort().argsort().float() / ranks
    steps = (matrix / AS_GOOD).floor() - order.repeat_interleave(experts // ranks)
    return steps.fill_diagonal_(2 / AS_GOOD)


RULES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "none": lambda ids, matrix, ranks: ids,
    "per rank": lambda ids, matrix, ranks: per_rank(ids, matrix, ranks, TOP_K),
    "per rank, min_active 0": lambda ids, matrix, ranks: per_rank(ids, matrix, ranks, 0),
    "agreed": lambda ids, matrix, ranks: reroute(ids, matrix, SELECT, 0.0, TOP_K),
    "agreed, balanced": balanced,
}


def loads(old: Tensor, new: Tensor, matrix: Tensor, ranks: int) -> Loads:
    """What `new` ids [T, K] in the place of `old` cost, with experts in order on the ranks."""
    experts = len(matrix)
    counts = torch.bincount(new.flatten(), minlength=experts).view(ranks, -1)
    active, rows = (counts > 0).sum(1).float(), counts.sum(1).float()
    kept = torch.where(old == new, 1.0, matrix[old, new]).mean()
    return Loads(active.mean().item(), active.max().item(), (rows.max() / rows.mean()).item(), kept.item())


def simulate(ranks: int, batch: int, experts: int, repeats: int = REPEATS) -> dict[str, Loads]:
    """Each rule on the same draws."""
    generator = torch.Generator().manual_seed(ranks * 1000 + batch)
    found: dict[str, list[Loads]] = {name: [] for name in RULES}
    for _ in range(repeats):
        ids, matrix = draw(ranks * batch, experts, generator), similarity(experts, generator)
        for name, rule in RULES.items():
            found[name].append(loads(ids, rule(ids, matrix, ranks), matrix, ranks))
    return {
        name: Loads(*(statistics.fmean(getattr(one, key) for one in each) for key in Loads.__annotations__))
        for name, each in found.items()
    }


# What the page shows; the picture has all batches.
ROWS = (1, 4, 16, 64)
COLUMNS = (
    "E",
    "ranks",
    "batch per rank",
    "none",
    "per rank",
    "per rank, `min_active` 0",
    "agreed",
    "kept per rank, `min_active` 0",
    "kept agreed",
    "fullest rank, agreed",
    "fullest rank, balanced",
)
SHOWN = ("none", "per rank", "per rank, min_active 0", "agreed")


def row(experts: int, ranks: int, batch: int, found: dict[str, Loads]) -> tuple[str, ...]:
    """Of the table: mean and largest active experts of each rule, what is kept, rows of the fullest rank."""
    active = [f"{found[name].active:.1f} / {found[name].largest:.1f}" for name in SHOWN]
    kept = [f"{found[name].kept:.2f}" for name in ("per rank, min_active 0", "agreed")]
    rows = [f"{found[name].rows:.2f}" for name in ("agreed", "agreed, balanced")]
    return (str(experts), str(ranks), str(batch), *active, *kept, *rows)


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def read() -> dict[tuple[int, int, int], tuple[str, ...]]:
    """The rows of the page by (E, ranks, batch per rank)."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(line(COLUMNS)) + 2
    rows = {}
    for text in lines[start:]:
        if not text.startswith("|"):
            break
        cells = tuple(cell.strip() for cell in text.strip("|").split("|"))
        rows[tuple(int(cell) for cell in cells[:3])] = cells
    return rows


def write(rows: list[tuple[str, ...]]) -> None:
    """Replace the table in the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(line(COLUMNS)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    lines[start:end] = [line(cells) for cells in rows]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_picture(found: dict[tuple[int, int, int], dict[str, Loads]], to: Path) -> None:
    """Experts that the fullest rank reads, against the batch per rank: a panel for each E and number of ranks."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(len(EXPERTS), len(RANKS), sharex=True)
    for experts, across in zip(EXPERTS, panels, strict=True):
        for ranks, panel in zip(RANKS, across, strict=True):
            for name, style in zip(SHOWN, ("k:", "s-", "x--", "o-"), strict=True):
                values = [found[experts, ranks, batch][name].largest for batch in BATCHES]
                panel.plot(BATCHES, values, style, label=name, markersize=4)
            panel.set(title=f"E = {experts}, {ranks} ranks", xscale="log", ylim=(0, experts / ranks * 1.05))
            panel.set_xticks(BATCHES, labels=map(str, BATCHES))
    panels[-1][1].set_xlabel("batch per rank")
    panels[0][0].legend(fontsize=7)
    figure.supylabel("experts of the fullest rank")
    # The same file for the same figures.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "sere", "svg.fonttype": "none"}):
        figure.savefig(to, metadata={"Date": None})


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="only", help="write nothing")
    only = parser.parse_args().only
    found = {}
    for experts, ranks, batch in itertools.product(EXPERTS, RANKS, BATCHES):
        found[experts, ranks, batch] = simulate(ranks, batch, experts)
        print(line(row(experts, ranks, batch, found[experts, ranks, batch])), flush=True)
    if not only:
        write([row(*key, loads) for key, loads in found.items() if key[2] in ROWS])
        draw_picture(found, PICTURE)


if __name__ == "__main__":
    main()
