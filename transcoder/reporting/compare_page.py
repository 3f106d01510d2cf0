"""Runs, or methods over seeds, beside each other on one page: figures, differences with their intervals, curves, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transcoder.files import replace_atomically
from transcoder.reporting.compare import metric_named
from transcoder.reporting.elements import (
    Block,
    Cell,
    Line,
    charts,
    heading,
    interval_chart,
    interval_words,
    line_chart,
    table,
    text,
)
from transcoder.reporting.format import MISSING, number
from transcoder.reporting.page import render_page
from transcoder.reporting.run import Run
from transcoder.reporting.summary_metrics import SummaryMetric

FILE_NAME = "comparison.html"
CURVES = (
    ("metrics/fvu", "Training FVU", "FVU"),
    ("evaluation/fvu", "Held-out FVU", "FVU"),
    ("metrics/l0", "L0", "latents a token"),
    ("sparsity/dead_share", "Dead latents, share", "share"),
    ("duplicates/pairs", "Candidate pairs", "pairs"),
    ("duplicates/flagged", "Flagged pairs", "pairs"),
    ("duplicates/effective_dictionary_size", "Effective dictionary size", "latents"),
    ("metrics/tokens_per_second", "Throughput", "tokens/s"),
)
COLORS = 6


def write_run_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write what `compare_runs` returned as one self-contained page; returns its path.

    The runs' folders are read again for their curves.
    """
    labels = [run["label"] for run in comparison["runs"]]
    folders = [Run(run["path"], empty_ok=True) for run in comparison["runs"]]
    parts = [
        ("figures", "Figures", _figures(comparison, labels)),
        ("paired", "Paired differences", _paired(comparison, labels)),
        ("curves", "Curves", _curves(labels, folders)),
        ("settings", "Settings", _settings(comparison, labels)),
        ("missing", "What is missing", _missing(comparison)),
    ]
    states = [f"{run['label']}: {run['status']}, {number(run['step'])} steps" for run in comparison["runs"]]
    return _write(
        path, f"{labels[0]} and {len(labels) - 1} more" if len(labels) > 2 else " and ".join(labels), states, parts
    )


def write_method_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write what `compare_methods` returned as one self-contained page; returns its path."""
    methods, seeds = comparison["methods"], comparison["seeds"]
    parts = [
        ("figures", "Figures", _method_figures(comparison)),
        ("differences", "Differences", _method_charts(comparison)),
    ]
    return _write(path, " and ".join(methods), [f"{seeds} seeds each", f"differences from {methods[0]}"], parts)


def _write(path: str | Path, title: str, facts: Sequence[str], parts: Sequence[tuple[str, str, list[Block]]]) -> Path:
    core = {
        "kind": "comparison",
        "title": f"{title}: comparison",
        "header": {
            "eyebrow": "Comparison of transcoder runs",
            "title": title,
            "pill": [f"{len(facts)} runs" if len(facts) > 2 else "comparison", ""],
            "facts": list(facts),
            "progress": None,
        },
        "sections": [{"id": key, "title": name, "blocks": blocks} for key, name, blocks in parts],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_atomically(path, render_page(core, {}))


def _figures(comparison: dict[str, Any], labels: list[str]) -> list[Block]:
    rows: list[list[Cell]] = []
    for row in comparison["figures"]:
        metric = metric_named(row)
        cells: list[Cell] = [{"text": row["label"].strip(), "note": row["meaning"]}]
        for value, difference, verdict in zip(row["values"], row["differences"], row["verdicts"], strict=True):
            cells.append(_value(metric, value, difference, verdict))
        rows.append(cells)
    lead = (
        f"Differences are from {labels[0]}. A verdict only says which number is better; how sure that is, is said under paired "
        "differences, and over seeds by `transcoder compare NAME=RUN,RUN NAME=RUN,RUN`."
    )
    return [text(lead, "lead"), table(["", *labels], rows, range(1, len(labels) + 1), caption="Final figures")]


def _value(metric: SummaryMetric, value: float | None, difference: float | None, verdict: str | None) -> Cell:
    if value is None:
        return MISSING
    if difference is None:
        return {"text": metric.text(value)}
    note = metric.signed(difference)
    return {"text": metric.text(value), "note": note if verdict is None else f"{note}, {verdict}"}


def _paired(comparison: dict[str, Any], labels: list[str]) -> list[Block]:
    if not comparison["paired"]:
        return [text("The runs have too few logged steps in common for paired differences.", "empty")]
    drawn, rows = [], []
    for row in comparison["paired"]:
        metric = metric_named(row)
        found = []
        for label, d in zip(labels, row["differences"], strict=True):
            if d is not None:
                found.append({"label": label, **d, "verdict": metric.verdict(d["low"], d["high"]) or ""})
                rows.append([row["label"], label, interval_words(d), number(row["steps"]), number(row["from_step"])])
        drawn.append(interval_chart(row["label"], found, x_label=f"difference from {labels[0]}"))
    lead = (
        "Mean differences at the steps that all runs logged, in the second half of them, with 95 % intervals from twenty steps "
        "on. They cover the noise between batches; seeds are another matter."
    )
    head = ["SummaryMetric", "Run", "Difference, mean [95 %]", "Steps", "From step"]
    return [text(lead, "lead"), charts(drawn), table(head, rows, [2, 3, 4], caption="Paired differences")]


def _curves(labels: list[str], folders: list[Run]) -> list[Block]:
    drawn = []
    for name, title, unit in CURVES:
        lines = []
        for n, (label, run) in enumerate(zip(labels, folders, strict=True)):
            series = run.metrics.get(name)
            lines.append(Line(label, series.steps, series.values, f"c{n % COLORS}", name.startswith("evaluation/")))
        drawn.append(line_chart(title, lines, y_label=unit, from_zero=True))
    shown = charts(drawn)
    return [shown] if shown["charts"] else [text("No figures were logged, so there are no curves.", "empty")]


def _settings(comparison: dict[str, Any], labels: list[str]) -> list[Block]:
    if not comparison["settings"]:
        return [text("The runs have the same settings.")]
    rows = [
        [name, *("null" if v is None else str(v) for v in values)] for name, values in comparison["settings"].items()
    ]
    return [
        text("Only settings that differ.", "lead"),
        table(["Setting", *labels], rows, caption="Settings that differ"),
    ]


def _missing(comparison: dict[str, Any]) -> list[Block]:
    rows = [[run["label"], what, why] for run in comparison["runs"] for what, why in run["missing"]]
    if not rows:
        return [text("Nothing: every run's folder is whole.")]
    return [table(["Run", "What", "Why"], rows, caption="What is missing")]


def _method_figures(comparison: dict[str, Any]) -> list[Block]:
    methods = comparison["methods"]
    rows: list[list[Cell]] = []
    for row in comparison["figures"]:
        cells: list[Cell] = [{"text": row["label"].strip(), "note": row["meaning"]}]
        for mean, d, verdict in zip(row["means"], row["differences"], row["verdicts"], strict=True):
            shown = MISSING if mean is None else f"{mean:.4g}"
            words = "" if d is None else interval_words(d)
            cells.append({"text": shown, "note": words if not verdict else f"{words}, {verdict}"})
        rows.append(cells)
    lead = (
        f"Means over {comparison['seeds']} seeds; below each the paired difference from {methods[0]} with its 95 % interval. "
        "Better and worse are said only where the interval leaves 0 out; of twenty such intervals one misses by chance."
    )
    return [text(lead, "lead"), table(["", *methods], rows, range(1, len(methods) + 1), caption="Means over seeds")]


def _method_charts(comparison: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for n, method in enumerate(comparison["methods"]):
        rows = []
        for row in comparison["figures"]:
            d = row["relative"][n]
            if d is not None:
                shown = {k: None if v is None else 100 * v for k, v in d.items()}
                rows.append({"label": row["label"].strip(), **shown, "verdict": row["verdicts"][n]})
        drawn = interval_chart(
            f"{method} against {comparison['methods'][0]}", rows, x_label="difference, % of the first"
        )
        if drawn is not None:
            blocks.extend([heading(method), drawn])
    return blocks or [text("No figure has a difference to show.", "empty")]
