"""Which latents rise and fall together, strongest first, with their contexts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transcoder.reporting.elements import Block, bar_chart, charts, columns, heading, real, short, text, tiles
from transcoder.reporting.format import number, percent, whole
from transcoder.reporting.run import Run

LISTED = 500
"""Pairs in the page; the JSON report has the rest."""
GROUPS = 40
DRAWN = 160
"""Latents in the drawing of the groups, the largest groups first: more would be a grey cloud."""
SEQUENCES_COUNTABLE = 1420
"""What the monitor's bitmaps of 256 bits can count: 256 ln 256. They say this of every larger number."""


def section(run: Run) -> list[Block]:
    report = run.correlation
    if not report:
        why = next((m.why for m in run.missing if m.what == "correlation report"), "")
        return [text(f"No correlation report to show: {why}.", "empty")]
    pairs = ranked_pairs(report)
    drawn = charts([_histogram(report), _merge_costs(pairs)])
    graph = _graph(report, pairs)
    return [
        *_facts(report),
        *_pairs(report, pairs),
        heading("Groups, and how pairs are spread"),
        columns([graph] if graph else [text("No groups: no pair is above the threshold.", "empty")], [drawn]),
        *_groups(report),
    ]


def ranked_pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The listed pairs that can be read, strongest first."""
    listed = report.get("pairs")
    rows = listed if isinstance(listed, list) else []
    good = [
        p
        for p in rows
        if isinstance(p, dict)
        and all(whole(p.get(n)) is not None for n in "ij")
        and real(p.get("correlation")) is not None
    ]
    return sorted(good, key=lambda p: -p["correlation"])[:LISTED]


def _facts(report: Mapping[str, Any]) -> list[Block]:
    limits = report.get("thresholds")
    limits = limits if isinstance(limits, dict) else {}
    share = real(report.get("share_of_live_with_neighbour"))
    facts = [
        ("Pairs above the threshold", number(real(report.get("pairs_total")))),
        ("Flagged", number(real(report.get("pairs_flagged")))),
        ("Mergeable", number(real(report.get("pairs_mergeable")))),
        ("Correlated, but no duplicate", number(real(report.get("pairs_refused")))),
        ("Without a merge test", number(real(report.get("pairs_untested")))),
        ("Live latents", number(real(report.get("live_latents")))),
        ("Distinct latents, flagged pairs merged", number(real(report.get("distinct_latents")))),
        ("Distinct latents, candidates merged too", number(real(report.get("distinct_latents_candidates")))),
        ("With a neighbour", percent(share)),
        ("Effective dictionary size", number(real(report.get("effective_dictionary_size")))),
    ]
    for side in ("decoder", "encoder"):
        cosine = report.get(f"{side}_cosine")
        if isinstance(cosine, dict):
            random = cosine.get("random")
            for key, told in (("median", "median"), ("p99", "99th percentile")):
                of_random = number(real(random.get(key))) if isinstance(random, dict) else ""
                facts.append(
                    (
                        f"Nearest {side} cosine, {told}",
                        number(real(cosine.get(key))) + (f" (random {of_random})" if of_random else ""),
                    )
                )
    correlation, support, sequences = (
        number(real(limits.get(n))) for n in ("correlation", "min_support", "min_sequences")
    )
    words = (
        f"At step {number(real(report.get('step')))}, after {number(real(report.get('tokens')))} tokens. A candidate has a "
        f"correlation above {correlation} and fires on at least {support} tokens in {sequences} sequences; it is flagged when "
        "the lower bound holds in several disjoint blocks. The cost of folding is what one latent in the place of two loses on "
        "held-out tokens, as a share of what the latent is worth: a tenth or less is a duplicate."
    )
    return [text(words, "lead"), tiles(facts)]


def _histogram(report: Mapping[str, Any]) -> Block | None:
    histogram = report.get("histogram")
    if not isinstance(histogram, dict):
        return None
    edges = [real(v) for v in histogram.get("edges") or []]
    counts = [real(v) for v in histogram.get("counts") or []]
    if None in edges or None in counts or len(edges) != len(counts) + 1:
        return None
    limits = report.get("thresholds")
    threshold = real(limits.get("correlation")) if isinstance(limits, dict) else None
    return bar_chart(
        "Correlation of latent pairs",
        [e for e in edges if e is not None],
        [("pairs", [c for c in counts if c is not None], "c0")],
        x_label="correlation",
        y_label="pairs",
        log=True,
        marks=[] if threshold is None else [(threshold, f"threshold {number(threshold)}")],
    )


def _merge_costs(pairs: list[dict[str, Any]]) -> Block | None:
    """How many of the listed pairs fold at which cost."""
    shares = [s for p in pairs if (s := real(p.get("merge_share"))) is not None]
    edges = [n / 10 for n in range(11)]
    counts = [0.0] * 10
    for share in shares:
        counts[min(9, max(0, int(10 * share)))] += 1
    return bar_chart(
        "What folding the listed pairs would cost",
        edges,
        [("pairs", counts, "c2")],
        x_label="share of the dropped latent's worth (1: all of it, or more)",
        y_label="pairs",
        marks=[(0.1, "← duplicates")],
    )


def _components(report: Mapping[str, Any], field: str) -> list[list[int]]:
    listed = report.get(field)
    groups = (
        [[i for i in g if type(i) is int] for g in listed if isinstance(g, list)] if isinstance(listed, list) else []
    )
    return sorted((g for g in groups if len(g) > 1), key=len, reverse=True)


def groups_of(report: Mapping[str, Any]) -> list[list[int]]:
    """Groups of latents joined by candidate or flagged pairs, the largest first."""
    return _components(report, "candidate_components") or _components(report, "components")


def _graph(report: Mapping[str, Any], pairs: list[dict[str, Any]]) -> Block | None:
    groups: list[list[int]] = []
    count = 0
    for group in groups_of(report):
        if count + len(group) > DRAWN and groups:
            break
        groups.append(group[:DRAWN])
        count += len(groups[-1])
    if not groups:
        return None
    known = {i for g in groups for i in g}
    edges = [
        [p["i"], p["j"], short(p["correlation"]), int(p.get("flagged") is True), int(p.get("mergeable") is True)]
        for p in pairs
        if p["i"] in known and p["j"] in known
    ]
    total = len(groups_of(report))
    return {
        "is": "chart",
        "kind": "graph",
        "title": "Groups of correlated latents",
        "x": "",
        "y": "",
        "groups": groups,
        "edges": edges,
        "note": "A thick line is a flagged pair, an orange one folds at little cost. A latent opens its card.",
        "spoken": f"{total} groups; {len(groups)} drawn, the largest of {len(groups[0])} latents",
    }


def _groups(report: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for field, title, joined in (
        ("components", "Groups", "joined by flagged pairs"),
        ("candidate_components", "Candidate groups", "joined by candidate or flagged pairs"),
    ):
        groups = _components(report, field)
        if groups:
            more = f" The {GROUPS} largest are shown." if len(groups) > GROUPS else ""
            count = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
            shown = [[g[:12], max(0, len(g) - 12)] for g in groups[:GROUPS]]
            blocks.append(
                {"is": "groups", "title": title, "text": f"{count} of latents {joined}.{more}", "rows": shown}
            )
    return blocks


def _pairs(report: Mapping[str, Any], pairs: list[dict[str, Any]]) -> list[Block]:
    if not pairs:
        return [text("No pair of latents is above the threshold.", "empty")]
    total = real(report.get("pairs_total"))
    shown = f"The {len(pairs)} strongest of {number(total)}." if total and total > len(pairs) else f"All {len(pairs)}."
    return [
        heading("Pairs, strongest first"),
        {"is": "pairs", "shown": shown, "rows": [_row(p) for p in pairs]},
    ]


def _row(p: Mapping[str, Any]) -> dict[str, Any]:
    low, high = real(p.get("lower")), real(p.get("upper"))
    mergeable = p.get("mergeable")
    return {
        "i": p["i"],
        "j": p["j"],
        "r": short(p["correlation"]),
        "low": None if low is None else short(low),
        "high": None if high is None else short(high),
        "cells": [
            number(real(p.get("cosine"))),
            number(real(p.get("jaccard"))),
            number(real(p.get("support"))),
            _sequences(real(p.get("sequences"))),
        ],
        "fold": percent(real(p.get("merge_share"))),
        "test": "duplicate" if mergeable is True else "no duplicate" if mergeable is False else "not tested",
        "flagged": p.get("flagged") is True,
    }


def _sequences(count: float | None) -> str:
    return f"≥ {number(count)}" if count is not None and count >= SEQUENCES_COUNTABLE else number(count)
