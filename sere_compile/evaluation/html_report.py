"""One page about a model under re-routing that opens without a network: everything that it shows is in it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..report import GateReport
from ..similarity.profile import SimilarityProfile
from ..whole_file import write_whole
from .charts import chart_html, loss_chart, plotly_javascript, similarity_chart
from .heat_maps import GateSimilarity
from .recommendation import least_losing, recommend, say_least_losing, undecided
from .sweep import SweepRow

# Nothing is fetched, whatever a browser or the library for charts would like to.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_BY_BYTES = (
    "Expected is what a decode step gains whose time follows the bytes of weights that it reads: all but the experts, "
    "and the active experts. Attention's cache is not counted. Not measured: sere bench --json does, and sere report "
    "--speed reads it"
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; max-height: 32rem }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: #fff }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto }
"""


@dataclass(frozen=True)
class Contents:
    """What a report is about.

    Attributes:
        model: its name.
        data: the text that settings were measured on.
        gates: of `sere_compile.explain`.
        profile: the similarity that was used.
        profile_file: where it came from; "" if it was measured without data.
        rows: of a sweep.
        budget: growth of perplexity that is allowed, 0.01 for one percent.
        speedup: expected for a row, or None where that is not known for this model.
        made_by: versions, in words.
        speed_source: lines that say what a measured expectation comes from; none where it follows from bytes alone.
    """

    model: str
    data: str
    gates: GateReport
    profile: SimilarityProfile
    profile_file: str
    rows: Sequence[SweepRow]
    budget: float
    speedup: Callable[[SweepRow], float] | None
    made_by: str
    speed_source: Sequence[str] = ()


def write_report(contents: Contents, path: str | Path) -> None:
    """Write the page.

    Raises:
        MissingExtraError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    write_whole(path, report_html(contents).encode())


def report_html(contents: Contents) -> str:
    """The page as text.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    parts = [
        paragraph(
            f"Text: {contents.data}. Similarity: {contents.profile_file or 'measured without data'}. "
            f"{contents.made_by}."
        ),
        *_recommended(contents),
        *_losses(contents),
        *_gates(contents.gates),
        *_similarity(contents.profile),
    ]
    return page_html(f"Re-routing in {contents.model}", parts)


def page_html(title: str, parts: Iterable[str]) -> str:
    """A page under a title, with the library for charts in it; nothing on it is fetched.

    Args:
        title: plain text.
        parts: elements, as of `paragraph`, `table_html` and `charts.chart_html`.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    title = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<script>{plotly_javascript()}</script>\n</head><body>\n"
        + "\n".join([f"<h1>{title}</h1>", *parts])
        + "\n</body></html>\n"
    )


def _recommended(contents: Contents) -> list[str]:
    budget = f"{100 * contents.budget:g} %"
    parts = [
        "<h2>Recommended</h2>",
        paragraph(
            "For each decode batch, the setting with the fewest active experts, which is the fastest, whose perplexity "
            f"is, with 95 % confidence, at most {budget} above the original's; of those with about as few the one that "
            "loses least."
        ),
    ]
    open_ones = undecided(contents.rows, contents.budget)
    for batch, row in recommend(contents.rows, contents.budget).items():
        if row is None:
            parts.append(paragraph(f"Decode batch {batch}: no setting is shown to stay within {budget}."))
        else:
            parts.append(paragraph(f"Decode batch {batch}: {_detail(row, contents, ', ')}"))
            lines = [f'model = torch.compile(model, backend="sere", options={row.options})']
            if row.similarity and contents.profile_file:
                lines.insert(0, f"sere_compile.attach(model, {contents.profile_file!r})")
            parts.append(f'<pre class="recommended">{html.escape(chr(10).join(lines), quote=False)}</pre>')
        if batch in open_ones:
            better, needed = open_ones[batch]
            parts.append(
                paragraph(
                    f"Decode batch {batch}: too few data for {better.label} ({better.change}); about {needed} "
                    "sequences would decide."
                )
            )
    least = {batch: say_least_losing(pairs) for batch, pairs in least_losing(contents.rows).items() if pairs}
    return parts + [paragraph(f"Decode batch {batch}, least lost by {text}.") for batch, text in least.items()]


def _losses(contents: Contents) -> list[str]:
    rows, speedup = contents.rows, contents.speedup

    def hover(row: SweepRow) -> str:
        return html.escape(_detail(row, contents, "\n")).replace("\n", "<br>")

    active = loss_chart(rows, lambda row: row.active_after, "active experts per layer", hover)
    parts = [
        "<h2>Loss against active experts</h2>",
        paragraph("Bars are one standard error. Pale: another setting is better in both. Hover for values."),
        chart_html(active, "loss-active"),
        "<h2>Loss against expected speed</h2>",
    ]
    if speedup is None:
        parts.append(paragraph("Not known: this model's experts are not stacked weights beside a router."))
    else:
        parts += [paragraph(f"{line[:1].upper()}{line[1:]}.") for line in contents.speed_source or [_BY_BYTES]]
        parts.append(chart_html(loss_chart(rows, speedup, "expected speed-up of a decode step", hover), "loss-speed"))
    heads = ["decode batch", "rule", "S", "rho", "perplexity", "change"]
    heads += ["KL", "top-1 same", "active experts", "expected speed"]
    lines = [
        [
            str(row.decode_batch),
            row.rule,
            f"auto, at most {row.max_active}" if row.max_active else row.select_top_k,
            row.threshold,
            f"{row.perplexity:.3f}",
            row.change,
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
            f"{row.active_before:.1f} → {row.active_after:.1f}",
            row.speed or ("" if speedup is None else f"{speedup(row):.2f}x"),
        ]
        for row in rows
    ]
    return [*parts, "<h2>Every setting</h2>", table_html("settings", heads, lines)]


def _detail(row: SweepRow, contents: Contents, separator: str) -> str:
    parts = [
        row.label,
        f"perplexity {row.change}",
        f"KL {row.kl:.4f}, top-1 same {row.top1_agreement:.1%}",
        f"active experts {row.active_before:.1f} → {row.active_after:.1f}",
    ]
    if row.speed:
        parts.append(f"expected {row.speed}")
    elif contents.speedup is not None:
        parts.append(f"expected speed-up {contents.speedup(row):.2f}x")
    return separator.join(parts)


def _gates(report: GateReport) -> list[str]:
    heads = ["gate", "E", "K", "scoring", "dispatch", "status", "reason"]
    lines = [
        [row.name, *("" if n is None else str(n) for n in (row.num_experts, row.top_k)), row.scoring, row.dispatch]
        + [row.status, row.reason]
        for row in report
    ]
    summary = f"{len(report.gates)} found, {len(report.rewritten)} re-routed. {report.hint}"
    return ["<h2>Gates</h2>", paragraph(summary), table_html("gates", heads, lines)]


def _similarity(profile: SimilarityProfile) -> list[str]:
    gates = [GateSimilarity.of(name, matrix, "q0.2") for name, matrix in profile.items()]
    heads = ["gate", "experts", "nearest, median", "most similar", "least similar fifth (rho q0.2)"]
    lines = [
        [
            gate.name,
            str(len(gate.nearest)),
            f"{gate.nearest.median():.3f}",
            ", ".join(f"{u}-{v} {value:.3f}" for u, v, value in gate.most_similar()),
            ", ".join(map(str, gate.critical)) + f" (below {gate.rho:.3f})",
        ]
        for gate in gates
    ]
    chart = similarity_chart(gates, profile.metadata.get("method", "given"))
    return ["<h2>Similarity of experts</h2>", chart_html(chart, "similarity"), table_html("similar", heads, lines)]


def paragraph(text: str) -> str:
    """Plain text as an element."""
    return f"<p>{html.escape(text, quote=False)}</p>"


def table_html(name: str, heads: Iterable[str], lines: Iterable[Sequence[Any]]) -> str:
    """Rows of plain text as an element whose id is `name`."""

    def cells(kind: str, texts: Iterable[str]) -> str:
        return "".join(f"<{kind}>{html.escape(text, quote=False)}</{kind}>" for text in texts)

    body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f'<table id="{name}"><thead><tr>{cells("th", heads)}</tr></thead><tbody>\n{body}\n</tbody></table>'
