"""Methods side by side, each run with several seeds: paired differences with intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transcoder.reporting.compare import metrics_of
from transcoder.reporting.format import MISSING
from transcoder.reporting.run import Run
from transcoder.reporting.statistics import interval
from transcoder.reporting.summary_metrics import SummaryMetric
from transcoder.reporting.tables import ruled_table

SCHEMA_VERSION = 1


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
    _check_seeds(methods, folders)
    rows = [_row(metric, folders) for metric in metrics_of([run for runs in folders for run in runs])]
    return {
        "schema_version": SCHEMA_VERSION,
        "methods": list(methods),
        "seeds": len(folders[0]),
        "figures": [row for row in rows if any(mean is not None for mean in row["means"])],
    }


def format_methods(comparison: dict[str, Any]) -> str:
    """The comparison as a table for a terminal: means, and for the others the difference with its interval."""
    rows = []
    for row in comparison["figures"]:
        cells = [_text(row["means"][0])]
        for mean, d, verdict in zip(row["means"][1:], row["differences"][1:], row["verdicts"][1:], strict=True):
            cells.append(_text(mean) if d is None else f"{_text(mean)} ({_interval_text(d)}){_mark(verdict)}")
        rows.append([row["label"], *cells])
    note = (
        f"In brackets: mean difference from {comparison['methods'][0]} over {comparison['seeds']} seeds, paired, with its 95 % "
        "interval; + better, - worse, nothing where the interval holds 0. Of twenty such intervals one misses by chance."
    )
    return f"{ruled_table(['', *comparison['methods']], rows)}\n{note}"


def _check_seeds(methods: Mapping[str, Sequence[str | Path]], folders: list[list[Run]]) -> None:
    seeds = {
        name: [run.config.get("training", {}).get("seed") for run in runs]
        for name, runs in zip(methods, folders, strict=True)
    }
    first = next(iter(seeds))
    for name, found in seeds.items():
        if len(set(found)) != len(found):
            raise ValueError(f"compare: {name}: expected runs of different seeds, got training.seed = {found}")
        if found != seeds[first]:
            raise ValueError(
                f"compare: expected the same seeds in the same order, got {seeds[first]} for {first} and {found} for {name}"
            )


def _row(metric: SummaryMetric, folders: list[list[Run]]) -> dict[str, Any]:
    known: list[list[float] | None] = []
    for runs in folders:
        values = [value for run in runs if (value := metric.of(run)) is not None]
        known.append(values if len(values) == len(runs) else None)
    means = [None if column is None else statistics.fmean(column) for column in known]
    first = known[0]
    differences: list[dict[str, float | None] | None] = [None]
    for column in known[1:]:
        if first is None or column is None:
            differences.append(None)
        else:
            differences.append(interval([b - a for a, b in zip(first, column, strict=True)]))
    scale = abs(means[0]) if means[0] else None
    relative = [
        None if d is None or scale is None else {k: None if v is None else v / scale for k, v in d.items()}
        for d in differences
    ]
    return {
        **metric.described(),
        "means": means,
        "differences": differences,
        "relative": relative,
        "verdicts": [_verdict(metric, d) for d in differences],
    }


def _verdict(metric: SummaryMetric, difference: dict[str, float | None] | None) -> str | None:
    if difference is None or difference["low"] is None or metric.better == "neither":
        return None
    return metric.verdict(difference["low"], difference["high"]) or "no difference seen"


def _mark(verdict: str | None) -> str:
    return {"better": " +", "worse": " -"}.get(verdict or "", "")


def _text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _interval_text(d: dict[str, float | None]) -> str:
    return f"{d['mean']:+.3g}" if d["low"] is None else f"{d['mean']:+.3g}: {d['low']:+.3g} to {d['high']:+.3g}"
