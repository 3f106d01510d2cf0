"""Runs beside each other: final figures, differences from the first, and paired differences over the steps."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from transcoder.files import replace_atomically
from transcoder.reporting.format import MISSING, number
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.summary_metrics import FIGURES, HELDOUT_FVU, L0, TRAINING_FVU, Figure

SCHEMA_VERSION = 1
PAIRED = (TRAINING_FVU, HELDOUT_FVU, L0)
BLOCKS = 10
LEAST_STEPS = 2 * BLOCKS
"""Steps that a paired interval needs; with fewer there is a mean only."""
STUDENT_95 = 2.262
"""Two-sided 95 % quantile of Student's t with BLOCKS - 1 = 9 degrees of freedom."""


def compare_runs(run_a: str | Path, run_b: str | Path, *more: str | Path) -> dict[str, Any]:
    """Compare run folders; every difference is a run's figure minus the first run's.

    Returns JSON values:
        {"schema_version": 1,
         "runs": [{"label", "path", "status", "step", "missing": [[what, why], ...]}, ...],
         "figures": [{"name", "label", "meaning", "better": "lower" | "higher" | "neither",
                      "values": [number | null per run], "differences": [null, number | null, ...],
                      "verdicts": [null, "better" | "worse" | "same" | null, ...]}, ...],
         "paired": [{"name", "label", "steps", "from_step", "differences": [null, {"mean", "low", "high"}, ...]}, ...],
         "settings": {dotted name: [value per run]}}

    A figure that a run lacks is null, never 0; a figure that every run lacks is left out. "verdicts" only compare the two
    numbers. "paired" are mean differences at the steps that all runs logged, in the second half of those, with a 95 percent
    interval from the means of ten consecutive blocks (null below 20 steps). It covers the noise between batches, not between
    seeds: a claim about a method needs several seeds.

    Raises:
        FileNotFoundError: one of the paths is no folder.
    """
    runs = [RunFolder(path) for path in (run_a, run_b, *more)]
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {
                "label": label,
                "path": str(run.path),
                "status": run.status,
                "step": run.last_step,
                "missing": [[m.what, m.why] for m in run.missing],
            }
            for run, label in zip(runs, _labels(runs), strict=True)
        ],
        "figures": [row for figure in figures_of(runs) if (row := _row(figure, runs)) is not None],
        "paired": [row for figure in PAIRED if (row := _paired_row(figure, runs)) is not None],
        "settings": _different_settings(runs),
    }


def format_comparison(comparison: dict[str, Any]) -> str:
    """The comparison as a table for a terminal. What a run lacks is '–', explained below the table."""
    runs, figures = comparison["runs"], comparison["figures"]
    two = len(runs) == 2
    head = ["", *(run["label"] for run in runs)] + (["difference", ""] if two else [])
    rows = [head, ["status", *(run["status"] for run in runs)], ["steps", *(number(run["step"]) for run in runs)]]
    for row in figures:
        figure = figure_named(row)
        texts = [figure.text(value) for value in row["values"]]
        if two:
            texts += [_difference(figure, row["values"][0], row["differences"][1]), row["verdicts"][1] or ""]
        else:
            for n, difference in enumerate(row["differences"]):
                if difference is not None:
                    texts[n] += f" ({_signed(figure, difference)})"
        rows.append([row["label"], *texts])
    columns = max(map(len, rows))
    rows = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(len(row[c]) for row in rows) for c in range(columns)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    if not two:
        lines.append(f"In brackets: difference from {runs[0]['label']}.")
    return "\n".join([*lines, *_paired_lines(comparison), *_setting_lines(comparison), *_missing_lines(comparison)])


def write_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write a comparison as JSON (atomic) and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_atomically(path, json.dumps(comparison, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


_KNOWN = {figure.name: figure for figure in FIGURES}


def figure_named(row: dict[str, Any]) -> Figure:
    """The figure of a comparison's row."""
    known = _KNOWN.get(row["name"])
    return known or Figure(row["name"], row["label"], row.get("meaning", ""), row.get("better", "lower"))


def figures_of(runs: list[RunFolder]) -> list[Figure]:
    """The usual figures, with the FVU of every prefix behind the held-out one."""
    figures = list(FIGURES)
    widths = sorted({w for run in runs for w in run.prefix_figures("evaluation/fvu_prefix")})
    prefixes = [
        Figure(f"evaluation/fvu_prefix_{w}", f"  prefix {number(w)}", "Held-out FVU of this prefix alone.", "lower")
        for w in widths
    ]
    return [figures[0], *(prefixes if len(prefixes) > 1 else []), *figures[1:]]


def _row(figure: Figure, runs: list[RunFolder]) -> dict[str, Any] | None:
    values = [figure.of(run) for run in runs]
    if all(value is None for value in values):
        return None
    first = values[0]
    differences = [None if first is None or v is None or n == 0 else v - first for n, v in enumerate(values)]
    return {
        "name": figure.name,
        "label": figure.label,
        "meaning": figure.meaning,
        "better": figure.better,
        "values": values,
        "differences": differences,
        "verdicts": [_verdict(figure, d) for d in differences],
    }


def _verdict(figure: Figure, difference: float | None) -> str | None:
    if difference is None or figure.better == "neither":
        return None
    if difference == 0:
        return "same"
    return "better" if (difference < 0) == (figure.better == "lower") else "worse"


def _paired_row(figure: Figure, runs: list[RunFolder]) -> dict[str, Any] | None:
    columns = [run.metrics.get(figure.name).at_steps() for run in runs]
    common = sorted(set.intersection(*(set(column) for column in columns)))
    late = common[len(common) // 2 :]
    if len(late) < 2:
        return None
    differences: list[dict[str, float | None] | None] = [None]
    for column in columns[1:]:
        differences.append(_interval([column[s] - columns[0][s] for s in late]))
    return {
        "name": figure.name,
        "label": figure.label,
        "steps": len(late),
        "from_step": late[0],
        "differences": differences,
    }


def _interval(differences: list[float]) -> dict[str, float | None]:
    """Mean and 95 % interval by batch means: neighbouring steps are correlated, blocks of them hardly."""
    count, mean = len(differences), statistics.fmean(differences)
    if count < LEAST_STEPS:
        return {"mean": mean, "low": None, "high": None}
    blocks = [statistics.fmean(differences[n * count // BLOCKS : (n + 1) * count // BLOCKS]) for n in range(BLOCKS)]
    half = STUDENT_95 * statistics.stdev(blocks) / math.sqrt(BLOCKS)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _labels(runs: list[RunFolder]) -> list[str]:
    """Folder names; where two are alike, with their parents' names until they differ."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        labels = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(labels)) == len(set(paths)):
            return labels
    return [str(p) for p in paths]


def _different_settings(runs: list[RunFolder]) -> dict[str, list[Any]]:
    flat = [_flatten(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = {name: [settings.get(name) for settings in flat] for name in names if name != "name"}
    return {name: values for name, values in rows.items() if any(v != values[0] for v in values)}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (int, float, str, list, type(None))) else str(value)
    return flat


def _signed(figure: Figure, difference: float) -> str:
    sign = "+" if difference > 0 else "-" if difference < 0 else "±"
    return sign + figure.text(abs(difference))


def _difference(figure: Figure, first: float | None, difference: float | None) -> str:
    if difference is None:
        return MISSING
    text = _signed(figure, difference)
    if figure.share or not first or not difference:
        return text
    relative = 100 * difference / abs(first)
    return f"{text} ({relative:+.1f} %)" if abs(relative) < 1000 else text


def _paired_lines(comparison: dict[str, Any]) -> list[str]:
    lines = []
    for row in comparison["paired"]:
        for run, d in zip(comparison["runs"], row["differences"], strict=True):
            if d is not None:
                interval = "" if d["low"] is None else f" [{d['low']:+.4g}, {d['high']:+.4g}]"
                pair = f"{run['label']} minus {comparison['runs'][0]['label']}"
                where = f"over {row['steps']} logged steps from {row['from_step']} on"
                lines.append(f"  {row['label']}: {pair} {d['mean']:+.4g}{interval} {where}")
    if not lines:
        return []
    head = "Paired by step, mean [95 % interval, from 20 steps on] (noise between batches; seeds are another matter):"
    return ["", head, *lines]


def _setting_lines(comparison: dict[str, Any]) -> list[str]:
    settings = comparison["settings"]
    if not settings:
        return ["", "The runs have the same settings."]
    rows = [f"  {name}: " + " | ".join(_setting(v) for v in values) for name, values in settings.items()]
    return ["", "Settings that differ:", *rows]


def _setting(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _missing_lines(comparison: dict[str, Any]) -> list[str]:
    lines = [f"  {run['label']}: {what} {why}" for run in comparison["runs"] for what, why in run["missing"]]
    return ["", f"Missing ({MISSING} above):", *lines] if lines else []
