"""docs/quality.md from the rows of docs/quality.csv."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TABLE, PAGE, FINE = DOCS / "quality.csv", DOCS / "quality.md", DOCS / "quality_fine.csv"
# Rows of the table of filling.
COMPARED = (
    "drop", "opportunistic fill", "SERE, frobenius", "SERE, cosine", "projection, cosine", "recombine",
    "recombine, primary", "fill", "fill, 0.5 and 0.5",
)  # fmt: skip
CASES = (("qwen3", "1"), ("qwen3", "2"), ("mixtral", "1"), ("upcycled", "1"), ("upcycled", "2"))
BATCHES = ("4", "16", "64")
MATRICES = ("frobenius", "cosine", "cka", "data-free")
BEST = "recombine, all substitutes, fill 0.75, restore 0.5"
FREE = "recombine, fill 0.75, restore 0.5"


@dataclass(frozen=True)
class Row:
    """One rule in one case; of random matrices the mean of all draws.

    Attributes:
        change: growth of perplexity.
        growth: of the loss in nats, draw of sequences by draw.
    """

    change: float
    kl: float
    active: float
    growth: tuple[float, ...]


Lookup = Callable[..., Row | None]


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The lines of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lookup(lines: Sequence[dict[str, str]]) -> Lookup:
    """A function from model, S, decode batch, rule, similarity, threshold, data and part to a row, or None."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        key = ("model", "select_top_k", "decode_batch", "rule", "similarity", "threshold", "data", "part")
        found.setdefault(tuple(line[name] for name in key), []).append(line)

    def row(
        model: str, s: str, batch: str, rule: str, similarity: str = "", threshold: str = "0.0",
        data: str = "mixed", part: str = "test",
    ) -> Row | None:  # fmt: skip
        own = found.get((model, s, batch, rule, similarity, threshold, data, part), [])
        if not own:
            return None
        draws = zip(*([float(value) for value in line["growth_by_draw"].split()] for line in own), strict=True)
        change, kl, active = (
            statistics.fmean(float(line[name]) for line in own) for name in ("perplexity_change", "kl", "active_after")
        )
        return Row(change, kl, active, tuple(map(statistics.fmean, draws)))

    return row


def page(lines: Sequence[dict[str, str]]) -> str:
    """The whole page."""
    row = lookup(lines)
    template = (Path(__file__).parent / "quality_page.md").read_text("utf-8")
    for name, text in {
        "TABLES": "\n\n".join(
            f"### {title}\n\n{loss_table(lines, row, batch, threshold)}"
            for threshold, what in (("0.0", "threshold off"), ("q0.2", 'threshold "q0.2"'))
            for batch in BATCHES
            for title in [f"Decode batch {batch}, {what}"]
        ),
        "BEST": best_table(row),
        "CHANCE": chance_table(row),
        "FILL": fill_table(read(FINE)),
        "DOMAINS": domain_table(row),
        "SEARCH": search_table(lines, row),
    }.items():
        template = template.replace(f"<!-- {name} -->", text)
    return template


def fill_table(lines: Sequence[dict[str, str]]) -> str:
    """Of docs/quality_fine.csv, a table for each model: rules by decode batch and S."""
    tables = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = {
            (line["rule"], line["decode_batch"], line["select_top_k"]): line for line in lines if line["model"] == model
        }
        cases = sorted({key[1:] for key in own}, key=lambda case: (int(case[0]), int(case[1])))
        head = f"| {model} | " + " | ".join(f"{batch}, S={s}" for batch, s in cases) + " |"
        body = [
            f"| {rule} | "
            + " | ".join(
                f"{100 * float(line['perplexity_change']):.1f} ± {100 * float(line['standard_error']):.1f}"
                for line in (own[rule, *case] for case in cases)
            )
            + " |"
            for rule in COMPARED
            if (rule, *cases[0]) in own
        ]
        tables.append("\n".join([head, "| --- " * (len(cases) + 1) + "|", *body]))
    return "\n\n".join(tables)


def rules(threshold: str = "0.0") -> list[tuple[str, str, str]]:
    """Of the big tables: what is printed, rule, similarity."""
    guided = [
        (f"{title}, {similarity}", rule, similarity)
        for rule, title in (("reroute", "SERE"), ("projection", "projection"))
        for similarity in (*MATRICES, "random")
    ]
    if threshold != "0.0":
        return guided
    plain = [
        ("naive top-S", "naive top-S", ""),
        ("drop", "drop", ""),
        ("drop, renormalised", "drop, renormalised", ""),
        ("opportunistic fill", "opportunistic fill", ""),
    ]
    ours = [
        (f"recombine{name}", FREE.replace("recombine", f"recombine{name}"), "inner products" if "sub" in name else "")
        for primary in ("", ", primary")
        for name in (primary, f"{primary}, one substitute", f"{primary}, all substitutes")
    ]
    return [*plain, *guided, *ours]


def loss_table(lines: Sequence[dict[str, str]], row: Lookup, batch: str, threshold: str) -> str:
    """Growth of perplexity, KL and active experts of every rule in every case."""
    heads = [f"{model}, S = {s}" for model, s in CASES]
    test = [line for line in lines if line["data"] == "mixed" and line["part"] == "test"]
    first = {(line["model"], line["decode_batch"]): line for line in test}
    original = [first[model, batch] for model, _ in CASES]
    body = [[f"{float(o['original']):.2f} · 0 · {float(o['active_before']):.1f}" for o in original]]
    names = ["original (perplexity)"]
    for title, rule, similarity in rules(threshold):
        found = [row(model, s, batch, rule, similarity, threshold) for model, s in CASES]
        names.append(title)
        body.append([f"{r.change:+.1%} · {r.kl:.3f} · {r.active:.1f}" if r else "" for r in found])
    return _table(["rule", *heads], [[name, *cells] for name, cells in zip(names, body, strict=True)])


def best_table(row: Lookup) -> str:
    """Our rules beside the best of the others in each case, and how often they are better."""
    cells: list[list[str]] = []
    told: dict[str, list[str]] = {BEST: [], FREE: []}
    for batch in BATCHES:
        for model, s in CASES:
            others = [
                (title, r)
                for title, rule, similarity in rules()
                if not rule.startswith("recombine") and (r := row(model, s, batch, rule, similarity))
            ]
            title, other = min(others, key=lambda pair: pair[1].change)
            own = []
            for rule in (BEST, FREE):
                mine = row(model, s, batch, rule, "inner products" if rule == BEST else "")
                assert mine
                told[rule].append(verdict(mine, other))
                own.append(f"{mine.change:+.2%}, {told[rule][-1]}")
            cells.append([batch, f"{model}, S = {s}", f"{title}: {other.change:+.2%}", *own])
    heads = ["decode batch", "model", "best other rule", "recombine, all substitutes", "recombine"]
    counts = [
        f"{title} {counted(told[rule])}" for title, rule in (("all substitutes", BEST), ("recombine alone", FREE))
    ]
    return _table(heads, cells) + f"\n\nAgainst the best other rule of each row: {'; '.join(counts)}."


def chance_table(row: Lookup) -> str:
    """Each matrix beside a random one, and how often it is better under the paper's rule."""
    cells: list[list[str]] = []
    told: dict[str, list[str]] = {matrix: [] for matrix in MATRICES}
    for rule, batch in (*(("reroute", batch) for batch in BATCHES), ("projection", "16")):
        for model, s in CASES:
            chance = row(model, s, batch, rule, "random")
            assert chance
            texts = []
            for matrix in MATRICES:
                own = row(model, s, batch, rule, matrix)
                assert own
                texts.append(f"{own.change:+.2%}, {verdict(own, chance)}")
                if rule == "reroute":
                    told[matrix].append(verdict(own, chance))
            name = "SERE" if rule == "reroute" else rule
            cells.append([name, batch, f"{model}, S = {s}", f"{chance.change:+.2%}", *texts])
    counts = "; ".join(f"{matrix} {counted(found)}" for matrix, found in told.items())
    table = _table(["rule", "decode batch", "model", "random", *MATRICES], cells)
    return f"{table}\n\nUnder the paper's rule, against chance: {counts}."


def domain_table(row: Lookup) -> str:
    """The profile of a text's own domain beside that of the other."""
    cells: list[list[str]] = []
    told: dict[str, list[str]] = {"SERE": [], "projection": []}
    for model, s in CASES:
        for data, other in (("code", "prose"), ("prose", "code")):
            for rule in ("reroute", "projection"):
                own, wrong, both = (
                    row(model, s, "16", rule, f"calibrated on {kind}", "0.0", data) for kind in (data, other, "both")
                )
                assert own
                assert wrong
                assert both
                name = "SERE" if rule == "reroute" else rule
                told[name].append(verdict(own, wrong))
                cells.append([
                    f"{model}, S = {s}", data, name, f"{own.change:+.2%}", f"{wrong.change:+.2%}",
                    f"{both.change:+.2%}", told[name][-1],
                ])  # fmt: skip
    heads = ["model", "text", "rule", "own domain", "other domain", "both", "own domain is"]
    counts = "; ".join(f"{name} {counted(found)}" for name, found in told.items())
    return _table(heads, cells) + f"\n\nThe text's own domain against the other: {counts}."


def search_table(lines: Sequence[dict[str, str]], row: Lookup, count: int = 12) -> str:
    """Rules by the geometric mean of their growth of perplexity on validation text, least first."""
    names = {(line["rule"], line["similarity"]) for line in lines if line["part"] == "validation"}
    rated = []
    for rule, similarity in names:
        found = [row(model, s, "16", rule, similarity, "0.0", "mixed", "validation") for model, s in CASES]
        changes = [max(r.change, 1e-4) for r in found if r]
        kls = [r.kl for r in found if r]
        if len(changes) == len(CASES):
            title = f"{rule} ({similarity})" if similarity and not rule.startswith("recombine") else rule
            rated.append((statistics.geometric_mean(changes), statistics.geometric_mean(kls), title, changes))
    rated.sort()
    shown = rated[:count] + [r for r in rated[count:] if not r[2].startswith("recombine") or r[2] in (BEST, FREE)]
    cells = [
        [title, f"{mean:.2%}", f"{kl:.4f}", *(f"{change:+.2%}" for change in changes)]
        for mean, kl, title, changes in shown
    ]
    heads = ["rule", "geometric mean", "of KL", *(f"{model}, S = {s}" for model, s in CASES)]
    return f"{len(rated)} rules were rated.\n\n" + _table(heads, cells)


def verdict(mine: Row, theirs: Row) -> str:
    """Whether two rules differ by more than twice the standard error of their difference on the same draws."""
    differences = [a - b for a, b in zip(mine.growth, theirs.growth, strict=True)]
    mean = statistics.fmean(differences)
    noise = 2 * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    if abs(mean) <= noise:
        return "equal"
    return "better" if mean < 0 else "worse"


def counted(verdicts: Sequence[str]) -> str:
    """How often which."""
    return ", ".join(f"{word} in {verdicts.count(word)}" for word in ("better", "equal", "worse"))


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
