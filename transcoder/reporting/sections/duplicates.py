"""Which latents rise and fall together, strongest first, with their contexts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transcoder.reporting.charts import bar_chart
from transcoder.reporting.html import escape, tiles
from transcoder.reporting.numbers import MISSING, number, percent
from transcoder.reporting.runfolder import RunFolder

LISTED = 200
"""Pairs in the page; the JSON report has the rest."""
GROUPS = 40
SEQUENCES_COUNTABLE = 1420
"""What the monitor's bitmaps of 256 bits can count: 256 ln 256. They say this of every larger number."""


def section(run: RunFolder) -> str:
    report = run.correlation
    if not report:
        why = next((m.why for m in run.missing if m.what == "correlation report"), "")
        return f'<p class="empty">No correlation report to show: {escape(why)}.</p>'
    beside = f'<div class="beside"><div class="charts one">{_charts(report)}</div><div>{_groups(report)}</div></div>'
    return _facts(report) + beside + _pairs(report)


def pairs_of(run: RunFolder) -> list[tuple[int, int]]:
    """The listed pairs as (i, j), strongest first."""
    return [(p["i"], p["j"]) for p in _ranked(run.correlation)]


def _ranked(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = report.get("pairs")
    rows = listed if isinstance(listed, list) else []
    good = [
        p
        for p in rows
        if isinstance(p, dict)
        and all(isinstance(p.get(n), int) for n in "ij")
        and _real(p.get("correlation")) is not None
    ]
    return sorted(good, key=lambda p: -p["correlation"])[:LISTED]


def _facts(report: Mapping[str, Any]) -> str:
    limits = report.get("thresholds")
    limits = limits if isinstance(limits, dict) else {}
    share = _real(report.get("share_of_live_with_neighbour"))
    facts = [
        ("Pairs above the threshold", number(_real(report.get("pairs_total")))),
        ("Flagged", number(_real(report.get("pairs_flagged")))),
        ("Mergeable", number(_real(report.get("pairs_mergeable")))),
        ("Correlated, but no duplicate", number(_real(report.get("pairs_refused")))),
        ("Without a merge test", number(_real(report.get("pairs_untested")))),
        ("Live latents", number(_real(report.get("live_latents")))),
        ("Distinct latents, flagged pairs merged", number(_real(report.get("distinct_latents")))),
        ("Distinct latents, candidates merged too", number(_real(report.get("distinct_latents_candidates")))),
        ("With a neighbour", percent(share)),
        ("Effective dictionary size", number(_real(report.get("effective_dictionary_size")))),
    ]
    cosine = report.get("decoder_cosine")
    if isinstance(cosine, dict):
        facts.append(("Nearest decoder cosine, median", number(_real(cosine.get("median")))))
        facts.append(("Nearest decoder cosine, 99th percentile", number(_real(cosine.get("p99")))))
    correlation, support, sequences = (
        number(_real(limits.get(n))) for n in ("correlation", "min_support", "min_sequences")
    )
    text = (
        f"At step {number(_real(report.get('step')))}, after {number(_real(report.get('tokens')))} tokens. A candidate has a "
        f"correlation above {correlation} and fires on at least {support} tokens in {sequences} sequences; it is flagged when "
        "the lower bound holds in several disjoint blocks. The cost of folding is what one latent in the place of two loses on "
        "held-out tokens, as a share of what the latent is worth."
    )
    return f'<p class="lead">{escape(text)}</p>{tiles(facts)}'


def _charts(report: Mapping[str, Any]) -> str:
    histogram = report.get("histogram")
    if not isinstance(histogram, dict):
        return ""
    edges = [_real(v) for v in histogram.get("edges") or []]
    counts = [_real(v) for v in histogram.get("counts") or []]
    if None in edges or None in counts or len(edges) != len(counts) + 1:
        return ""
    limits = report.get("thresholds")
    threshold = _real(limits.get("correlation")) if isinstance(limits, dict) else None
    return bar_chart(
        "Correlation of latent pairs",
        [e for e in edges if e is not None],
        [("pairs", [c for c in counts if c is not None], "c0")],
        x_label="correlation",
        y_label="pairs",
        log=True,
        marks=[] if threshold is None else [(threshold, f"threshold {number(threshold)}")],
    )


def _groups(report: Mapping[str, Any]) -> str:
    flagged = _group_list(report, "components", "Groups", "joined by flagged pairs")
    wider = _group_list(report, "candidate_components", "Candidate groups", "joined by candidate or flagged pairs")
    return flagged + wider


def _group_list(report: Mapping[str, Any], field: str, title: str, joined: str) -> str:
    listed = report.get(field)
    groups = [g for g in listed if isinstance(g, list) and len(g) > 1] if isinstance(listed, list) else []
    if not groups:
        return ""
    groups.sort(key=len, reverse=True)
    chips = "".join(
        '<span class="group">'
        + "".join(f'<a class="chip" href="#latent-{i}" data-latent="{i}">{i}</a>' for i in g[:12] if isinstance(i, int))
        + (f"<small>and {len(g) - 12} more</small>" if len(g) > 12 else "")
        + "</span>"
        for g in groups[:GROUPS]
    )
    more = f" The {GROUPS} largest are shown." if len(groups) > GROUPS else ""
    count = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
    return f'<h3>{title}</h3><p class="note">{count} of latents {joined}.{more}</p><p class="groups">{chips}</p>'


def _pairs(report: Mapping[str, Any]) -> str:
    ranked = _ranked(report)
    if not ranked:
        return '<p class="empty">No pair of latents is above the threshold.</p>'
    rows = "".join(map(_row, ranked))
    total = _real(report.get("pairs_total"))
    shown = (
        f"The {len(ranked)} strongest of {number(total)}." if total and total > len(ranked) else f"All {len(ranked)}."
    )
    head = (
        "<tr><th>Latents</th><th></th><th>Correlation, 95 % interval</th><th class=n>Cosine</th><th class=n>Jaccard</th>"
        "<th class=n>Tokens</th><th class=n>Sequences</th><th class=n>Cost of folding</th><th>State</th></tr>"
    )
    return (
        '<h3>Pairs, strongest first</h3><div class="tools" data-for="pairs" hidden>'
        '<label>Latent <input type="search" id="pair-search" inputmode="numeric" placeholder="id"></label>'
        '<label class="check"><input type="checkbox" id="pair-flagged"> flagged only</label>'
        f'<span class="count" id="pair-count" role="status">{escape(shown)}</span></div>'
        f'<div class="scroll" tabindex="0"><table id="pairs"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        '<p><button type="button" id="pair-more" hidden>Show more</button></p>'
    )


def _row(p: dict[str, Any]) -> str:
    i, j, flagged = p["i"], p["j"], p.get("flagged") is True
    pill = '<span class="pill bad">flagged</span>' if flagged else '<span class="pill">candidate</span>'
    names = " ".join(f'<a class="chip" href="#latent-{n}" data-latent="{n}">{n}</a>' for n in (i, j))
    cells = [
        f"<td>{names}</td>",
        '<td><button type="button" class="open" aria-expanded="false" hidden>contexts</button></td>',
        f'<td class="r">{_interval(p)}</td>',
        *(f"<td class=n>{number(_real(p.get(name)))}</td>" for name in ("cosine", "jaccard", "support")),
        f"<td class=n>{_sequences(_real(p.get('sequences')))}</td>",
        f"<td class=n>{percent(_real(p.get('merge_share')))}</td>",
        f"<td>{pill}</td>",
    ]
    return f'<tr data-i="{i}" data-j="{j}" data-flagged="{int(flagged)}">{"".join(cells)}</tr>'


def _sequences(count: float | None) -> str:
    return f"≥ {number(count)}" if count is not None and count >= SEQUENCES_COUNTABLE else number(count)


def _interval(p: dict[str, Any]) -> str:
    """The correlation as a dot on its interval, over 0.5 to 1."""
    r, low, high = float(p["correlation"]), _real(p.get("lower")), _real(p.get("upper"))

    def at(value: float) -> float:
        return 4 + 72 * min(1.0, max(0.0, (value - 0.5) / 0.5))

    drawing, spoken = "", MISSING
    if low is not None and high is not None:
        drawing = f'<line class="ci" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="7" y2="7"/>'
        spoken = f"{number(low)} to {number(high)}"
    return (
        f'<b>{r:.3f}</b><svg class="interval" viewBox="0 0 80 14" width="80" height="14" role="img" '
        f'aria-label="interval {spoken}"><title>{spoken}</title><line class="grid" x1="4" x2="76" y1="7" y2="7"/>{drawing}'
        f'<circle class="c0" cx="{at(r):.1f}" cy="7" r="3.2"/></svg>'
    )


def _real(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
