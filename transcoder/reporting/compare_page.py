"""Runs, or methods over seeds, on one page: final metrics, differences with their intervals, curves, settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transcoder.files import local_path, replace_atomically
from transcoder.reporting.charts import Chart, Line, interval_chart, interval_words, line_chart, point_chart
from transcoder.reporting.compare import mean_text, metric_named, summary_lines
from transcoder.reporting.format import number
from transcoder.reporting.page import render, render_page
from transcoder.reporting.run import Run
from transcoder.reporting.sections import Section
from transcoder.reporting.summary_metrics import HELDOUT_FVU, L0

CURVES = (
    ("metrics/fvu", "Training FVU", "FVU"),
    ("evaluation/fvu", "Held-out FVU", "FVU"),
    ("metrics/l0", "L0", "latents a token"),
    ("sparsity/dead_share", "Dead latents, share", "share"),
    ("duplicates/pairs", "Candidate pairs, in training", "pairs"),
    ("metrics/tokens_per_second", "Throughput", "tokens/s"),
)
COLORS = 6
TITLES = {"metrics": "Final metrics", "paired": "Paired differences", "missing": "What is missing"}
"""Where a section is not named for its id."""


def write_run_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write what `compare_runs` returned as one self-contained page; returns its path.

    The runs' folders are read again for their curves.
    """
    labels = [run["label"] for run in comparison["runs"]]
    parts = {
        "metrics": {**_metrics(comparison, labels), "charts": [_frontier(comparison, labels)]},
        "paired": _paired(comparison, labels),
        "curves": _curves(labels, [Run(run["path"], empty_ok=True) for run in comparison["runs"]]),
        "settings": _settings(comparison, labels),
        "missing": _missing(comparison),
    }
    states = [f"{run['label']}: {run['status']}, {number(run['step'])} steps" for run in comparison["runs"]]
    title = f"{labels[0]} and {len(labels) - 1} more" if len(labels) > 2 else " and ".join(labels)
    return _write(path, title, states, parts)


def write_method_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write what `compare_methods` returned as one self-contained page; returns its path."""
    methods = comparison["methods"]
    parts = {"metrics": _method_metrics(comparison), "differences": _method_charts(comparison)}
    return _write(
        path, " and ".join(methods), [f"{comparison['seeds']} seeds each", f"differences from {methods[0]}"], parts
    )


def _write(path: str | Path, title: str, facts: Sequence[str], parts: dict[str, Section]) -> Path:
    core = {
        "title": f"{title}: comparison",
        "header": {
            "eyebrow": "Comparison of transcoder runs",
            "title": title,
            "pill": (f"{len(facts)} runs" if len(facts) > 2 else "comparison", ""),
            "facts": facts,
            "progress": None,
        },
        "sections": [
            {"id": name, "title": TITLES.get(name, name.capitalize()), "html": render("sections/plain.html", **part)}
            for name, part in parts.items()
        ],
    }
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_atomically(path, render_page(core, {}))


def _table(head: Sequence[str], rows: list[list[Any]], caption: str, numeric: Sequence[int] = ()) -> Section:
    return {"head": head, "rows": rows, "caption": caption, "numeric": numeric}


def _metrics(comparison: dict[str, Any], labels: list[str]) -> Section:
    lead = (
        f"{' '.join(summary_lines(comparison))} Colours only say which number is better than {labels[0]}'s; see Paired "
        "differences for confidence intervals, and `transcoder train --seeds` for runs to compare over seeds."
    )
    rows = [
        _metric_row(row, "values", metric_named(row).text, metric_named(row).signed) for row in comparison["figures"]
    ]
    return {"lead": lead, "table": _table(["", *labels], rows, "Final metrics", range(1, len(labels) + 1))}


def _frontier(comparison: dict[str, Any], labels: list[str]) -> Chart | None:
    """Held-out FVU against L0: a dictionary is better to the left and below."""
    values = {row["name"]: row["values"] for row in comparison["figures"]}
    known = zip(labels, values.get(L0.name, ()), values.get(HELDOUT_FVU.name, ()), strict=False)
    points = [(label, x, y) for label, x, y in known if x is not None and y is not None]
    return point_chart("Held-out FVU against L0", points, x_label="L0, latents a token", y_label="FVU")


def _metric_row(
    row: dict[str, Any], values: str, text: Callable[[Any], str], difference: Callable[[Any], str]
) -> list[dict[str, str]]:
    """A metric's name and meaning, then its values, each with the difference from the first and the verdict."""
    cells = [{"text": row["label"].strip(), "note": row["meaning"]}]
    for value, d, verdict in zip(row[values], row["differences"], row["verdicts"], strict=True):
        notes = [] if d is None else [difference(d), verdict]
        look = {"better": "good", "worse": "bad"}.get(verdict or "", "")
        cells.append({"text": text(value), "note": ", ".join(filter(None, notes)), "look": look})
    return cells


def _paired(comparison: dict[str, Any], labels: list[str]) -> Section:
    if not comparison["paired"]:
        return {"empty": "The runs have too few logged steps in common for paired differences."}
    charts: list[Chart | None] = []
    rows = []
    for row in comparison["paired"]:
        metric = metric_named(row)
        found = []
        for label, d in zip(labels, row["differences"], strict=True):
            if d is not None:
                found.append({"label": label, **d, "verdict": metric.verdict(d["low"], d["high"])})
                rows.append([row["label"], label, interval_words(d), number(row["steps"]), number(row["from_step"])])
        charts.append(interval_chart(row["label"], found, x_label=f"difference from {labels[0]}"))
    lead = (
        "Mean differences at the steps that all runs logged, in the second half of them, with 95 % intervals from twenty steps "
        "on. They cover the noise between batches, not seed-to-seed variation."
    )
    head = ["Metric", "Run", "Difference, mean [95 %]", "Steps", "From step"]
    return {"lead": lead, "charts": charts, "table": _table(head, rows, "Paired differences", [2, 3, 4])}


def _curves(labels: list[str], folders: list[Run]) -> Section:
    charts = []
    for name, title, unit in CURVES:
        lines = []
        for n, (label, run) in enumerate(zip(labels, folders, strict=True)):
            steps, values = run.metrics.get(name)
            lines.append(Line(label, steps, values, f"c{n % COLORS}", name.startswith("evaluation/")))
        charts.append(line_chart(title, lines, y_label=unit, from_zero=True))
    return {"charts": charts, "empty": "" if any(charts) else "No metrics were logged, so there are no curves."}


def _settings(comparison: dict[str, Any], labels: list[str]) -> Section:
    if not comparison["settings"]:
        return {"lead": "The runs have the same settings."}
    rows = [[name, *("null" if v is None else v for v in values)] for name, values in comparison["settings"].items()]
    return {"lead": "Only settings that differ.", "table": _table(["Setting", *labels], rows, "Settings that differ")}


def _missing(comparison: dict[str, Any]) -> Section:
    rows = [[run["label"], what, why] for run in comparison["runs"] for what, why in run["missing"]]
    if not rows:
        return {"lead": "Nothing: every run's folder is whole."}
    return {"table": _table(["Run", "What", "Why"], rows, "What is missing")}


def _method_metrics(comparison: dict[str, Any]) -> Section:
    methods = comparison["methods"]
    lead = (
        f"Means over {comparison['seeds']} seeds; below each the paired difference from {methods[0]} with its 95 % interval. "
        "Better and worse are said only where the interval leaves 0 out; about 1 in 20 of these intervals is wrong by chance."
    )
    rows = [_metric_row(row, "means", mean_text, interval_words) for row in comparison["figures"]]
    return {"lead": lead, "table": _table(["", *methods], rows, "Means over seeds", range(1, len(methods) + 1))}


def _method_charts(comparison: dict[str, Any]) -> Section:
    charts = []
    for n, method in enumerate(comparison["methods"]):
        rows = []
        for row in comparison["figures"]:
            d = row["relative"][n]
            if d is not None:
                shown = {k: None if v is None else 100 * v for k, v in d.items()}
                rows.append({"label": row["label"].strip(), **shown, "verdict": row["verdicts"][n]})
        title = f"{method} against {comparison['methods'][0]}"
        charts.append(interval_chart(title, rows, x_label="difference, % of the first"))
    return {"charts": charts, "empty": "" if any(charts) else "No metric has a difference to show."}
