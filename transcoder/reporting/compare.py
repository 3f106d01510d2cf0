"""Runs, or methods over seeds, side by side: final metrics, differences from the first, and their intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transcoder.files import local_path, replace_atomically
from transcoder.reporting.charts import interval_words
from transcoder.reporting.format import MISSING, number
from transcoder.reporting.run import Run
from transcoder.reporting.statistics import half_width, interval
from transcoder.reporting.summary_metrics import (
    DEAD,
    DUPLICATES,
    HELDOUT_FVU,
    L0,
    SUMMARY_METRICS,
    TRAINING_FVU,
    SummaryMetric,
)
from transcoder.reporting.tables import ruled_table

SCHEMA_VERSION = 1
PAIRED = (TRAINING_FVU, HELDOUT_FVU, L0)
SUMMARY = (HELDOUT_FVU, L0, DUPLICATES, DEAD)
BLOCKS = 10
MARKS = {"better": " +", "worse": " -"}
LEAST_STEPS = 2 * BLOCKS
"""Steps that a paired interval needs; with fewer there is a mean only."""


def compare_runs(run_a: str | Path, run_b: str | Path, *more: str | Path) -> dict[str, Any]:
    """Compare run folders; every difference is a run's value minus the first run's.

    Returns JSON values:
        {"schema_version": 1,
         "runs": [{"label", "path", "status", "step", "missing": [[what, why], ...]}, ...],
         "figures": [{"name", "label", "meaning", "better": "lower" | "higher" | "neither",
                      "values": [number | null per run], "differences": [null, number | null, ...],
                      "verdicts": [null, "better" | "worse" | "same" | null, ...]}, ...],
         "paired": [{"name", "label", "steps", "from_step", "differences": [null, {"mean", "low", "high"}, ...]}, ...],
         "settings": {dotted name: [value per run]}}

    A metric that a run lacks is null, never 0; a metric that every run lacks is left out. "verdicts" only compare the two
    numbers. "paired" are mean differences at the steps that all runs logged, in the second half of those, with a 95 percent
    interval from the means of ten consecutive blocks (null below 20 steps). It covers the noise between batches, not between
    seeds: a claim about a method needs several seeds.

    Raises:
        FileNotFoundError: one of the paths is no folder.
    """
    runs = [Run(path, empty_ok=True) for path in (run_a, run_b, *more)]
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
        "figures": [row for metric in metrics_of(runs) if (row := _row(metric, runs)) is not None],
        "paired": [row for metric in PAIRED if (row := _paired_row(metric, runs)) is not None],
        "settings": _different_settings(runs),
    }


def compare_methods(methods: Mapping[str, Sequence[str | Path]]) -> dict[str, Any]:
    """Compare methods by runs that differ in the seed only; the n-th run of each method is paired with the n-th of the first.

    Args:
        methods: name -> run folders, as many in each, in the same order of seeds.

    Returns JSON values:
        {"schema_version": 1, "methods": [name, ...], "seeds": number of runs of each,
         "figures": [{"name", "label", "meaning", "better",
                      "means": [number | null a method], "differences": [null, {"mean", "low", "high"} | null, ...],
                      "relative": [null, {"mean", "low", "high"} | null, ...],
                      "verdicts": [null, "better" | "worse" | "no difference seen" | null, ...]}, ...]}

    A difference is a method's value minus the first method's, seed by seed; "low" and "high" are the 95 % interval of its
    mean by Student's t, null for one seed. "relative" divides it by the first method's mean. "better" and "worse" are
    said only where the interval leaves 0 out. A metric that a run lacks makes its method's entry null.

    Raises:
        ValueError: fewer than two methods, or methods of unequal numbers of runs; a seed twice in a method, or paired runs
            whose seeds differ.
        FileNotFoundError: one of the paths is no folder.
    """
    if len(methods) < 2 or len({len(runs) for runs in methods.values()}) > 1 or not all(methods.values()):
        counts = ", ".join(f"{name}: {len(runs)}" for name, runs in methods.items())
        raise ValueError(f"compare: expected two or more methods of equally many runs (seeds), got {counts or 'none'}")
    folders = [[Run(path, empty_ok=True) for path in runs] for runs in methods.values()]
    _check_seeds(dict(zip(methods, folders, strict=True)))
    rows = [_method_row(metric, folders) for metric in metrics_of([run for runs in folders for run in runs])]
    return {
        "schema_version": SCHEMA_VERSION,
        "methods": list(methods),
        "seeds": len(folders[0]),
        "figures": [row for row in rows if any(mean is not None for mean in row["means"])],
    }


def format_comparison(comparison: dict[str, Any]) -> str:
    """The comparison as a table for a terminal. What a run lacks is '–', explained below the table."""
    runs = comparison["runs"]
    two = len(runs) == 2
    extra = ["", ""] if two else []
    rows = [["status", *(run["status"] for run in runs), *extra]]
    rows.append(["steps", *(number(run["step"]) for run in runs), *extra])
    for row in comparison["figures"]:
        metric, differences = metric_named(row), row["differences"]
        texts = [metric.text(value) for value in row["values"]]
        if two:
            texts += [_difference(metric, row["values"][0], differences[1]), row["verdicts"][1] or ""]
        else:
            signed = ("" if d is None else f" ({metric.signed(d)})" for d in differences)
            texts = [text + difference for text, difference in zip(texts, signed, strict=True)]
        rows.append([row["label"], *texts])
    head = ["", *(run["label"] for run in runs), *(["difference", ""] if two else [])]
    lines = [ruled_table(head, rows)]
    if not two:
        lines.append(f"In brackets: difference from {runs[0]['label']}.")
    return "\n".join(
        [
            *summary_lines(comparison),
            "",
            *lines,
            *_paired_lines(comparison),
            *_setting_lines(comparison),
            *_missing_lines(comparison),
        ]
    )


def summary_lines(comparison: dict[str, Any]) -> list[str]:
    """What changed from the first run to each other one, in a sentence."""
    first, *others = (run["label"] for run in comparison["runs"])
    rows = {row["name"]: row for row in comparison["figures"]}
    lines = []
    for n, label in enumerate(others, 1):
        said = []
        for metric in SUMMARY:
            row = rows.get(metric.name)
            if row is not None and row["differences"][n] is not None:
                verdict = row["verdicts"][n]
                change = f"{metric.text(row['values'][0])} to {metric.text(row['values'][n])}"
                said.append(f"{metric.label} {change}" + (f" ({verdict})" if verdict else ""))
        lines.append(f"From {first} to {label}: {'; '.join(said) or 'no metric in common'}.")
    return lines


def format_methods(comparison: dict[str, Any]) -> str:
    """The comparison as a table for a terminal: means, and for the others the difference with its interval."""
    rows = []
    for row in comparison["figures"]:
        cells = []
        for mean, d, verdict in zip(row["means"], row["differences"], row["verdicts"], strict=True):
            difference = "" if d is None else f" ({interval_words(d)}){MARKS.get(verdict, '')}"
            cells.append(f"{mean_text(mean)}{difference}")
        rows.append([row["label"], *cells])
    note = (
        f"In brackets: mean difference from {comparison['methods'][0]} over {comparison['seeds']} seeds, paired, with its 95 % "
        "interval; + better, - worse, nothing where the interval holds 0. About 1 in 20 of these intervals is wrong by chance."
    )
    return f"{ruled_table(['', *comparison['methods']], rows)}\n{note}"


def write_comparison(comparison: dict[str, Any], path: str | Path) -> Path:
    """Write a comparison as JSON (atomic) and return the path."""
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_atomically(path, json.dumps(comparison, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


_KNOWN = {metric.name: metric for metric in SUMMARY_METRICS}


def metric_named(row: dict[str, Any]) -> SummaryMetric:
    """The metric of a comparison's row."""
    known = _KNOWN.get(row["name"])
    return known or SummaryMetric(row["name"], row["label"], row.get("meaning", ""), row.get("better", "lower"))


def metrics_of(runs: Sequence[Run]) -> list[SummaryMetric]:
    """The usual metrics, with the FVU of every prefix behind the held-out one."""
    first, *others = SUMMARY_METRICS
    widths = sorted({w for run in runs for w in run.prefix_metrics("evaluation/fvu_prefix")})
    prefixes = [
        SummaryMetric(
            f"evaluation/fvu_prefix_{w}", f"  prefix {number(w)}", "Held-out FVU of this prefix alone.", "lower"
        )
        for w in widths
    ]
    return [first, *(prefixes if len(prefixes) > 1 else []), *others]


def _row(metric: SummaryMetric, runs: list[Run]) -> dict[str, Any] | None:
    values = [metric.of(run) for run in runs]
    if all(value is None for value in values):
        return None
    first = values[0]
    differences = [None if first is None or v is None or n == 0 else v - first for n, v in enumerate(values)]
    return {
        **metric.described(),
        "values": values,
        "differences": differences,
        "verdicts": ["same" if d == 0 and metric.better != "neither" else metric.verdict(d, d) for d in differences],
    }


def _paired_row(metric: SummaryMetric, runs: list[Run]) -> dict[str, Any] | None:
    columns = [run.metrics.get(metric.name).at_steps() for run in runs]
    common = sorted(set.intersection(*(set(column) for column in columns)))
    late = common[len(common) // 2 :]
    if len(late) < 2:
        return None
    differences = [_interval([column[s] - columns[0][s] for s in late]) for column in columns[1:]]
    return {
        "name": metric.name,
        "label": metric.label,
        "steps": len(late),
        "from_step": late[0],
        "differences": [None, *differences],
    }


def _interval(differences: list[float]) -> dict[str, float | None]:
    """Mean and 95 % interval by batch means: neighbouring steps are correlated, blocks of them hardly."""
    count, mean = len(differences), statistics.fmean(differences)
    if count < LEAST_STEPS:
        return {"mean": mean, "low": None, "high": None}
    bounds = [n * count // BLOCKS for n in range(BLOCKS + 1)]
    half = half_width([statistics.fmean(differences[a:b]) for a, b in pairwise(bounds)])
    return {"mean": mean, "low": mean - half, "high": mean + half}


def mean_text(mean: float | None) -> str:
    return MISSING if mean is None else f"{mean:.4g}"


def _check_seeds(methods: Mapping[str, list[Run]]) -> None:
    seeds = {name: [run.setting("training.seed") for run in runs] for name, runs in methods.items()}
    first, expected = next(iter(seeds.items()))
    for name, found in seeds.items():
        if len(set(found)) != len(found):
            raise ValueError(f"compare: {name}: expected runs of different seeds, got training.seed = {found}")
        if found != expected:
            raise ValueError(
                f"compare: expected the same seeds in the same order, got {expected} for {first} and {found} for {name}"
            )


def _method_row(metric: SummaryMetric, folders: list[list[Run]]) -> dict[str, Any]:
    columns = [[value for run in runs if (value := metric.of(run)) is not None] for runs in folders]
    known = [column if len(column) == len(runs) else None for column, runs in zip(columns, folders, strict=True)]
    first, *others = known
    means = [None if column is None else statistics.fmean(column) for column in known]
    differences = [
        None if first is None or column is None else interval([b - a for a, b in zip(first, column, strict=True)])
        for column in others
    ]
    scale = abs(means[0]) if means[0] else None
    relative = [
        None if d is None or scale is None else {k: None if v is None else v / scale for k, v in d.items()}
        for d in differences
    ]
    return {
        **metric.described(),
        "means": means,
        "differences": [None, *differences],
        "relative": [None, *relative],
        "verdicts": [None, *(_interval_verdict(metric, d) for d in differences)],
    }


def _interval_verdict(metric: SummaryMetric, d: dict[str, float | None] | None) -> str | None:
    if d is None or d["low"] is None or metric.better == "neither":
        return None
    return metric.verdict(d["low"], d["high"]) or "no difference seen"


def _labels(runs: list[Run]) -> list[str]:
    """Folder names; where two are alike, with their parents' names until they differ."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        labels = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(labels)) == len(set(paths)):
            return labels
    return [str(p) for p in paths]


def _different_settings(runs: list[Run]) -> dict[str, list[Any]]:
    flat = [flattened(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = {name: [settings.get(name) for settings in flat] for name in names if name != "name"}
    return {name: values for name, values in rows.items() if any(v != values[0] for v in values)}


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (int, float, str, list, type(None))) else str(value)
    return flat


def _difference(metric: SummaryMetric, first: float | None, difference: float | None) -> str:
    if difference is None:
        return MISSING
    text = metric.signed(difference)
    if metric.share or not first or not difference:
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
    head = "Paired by step, mean [95 % interval; needs at least 20 logged steps] (does not include seed-to-seed variation):"
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
