"""The result files: bench/results/<device>.json, one a device, replaced by every measurement."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import machine

FOLDER = Path(__file__).resolve().parent / "results"
FORMAT = 1
SECTIONS = ("rows", "scaling", "whole_run")


def about() -> dict[str, Any]:
    """What every section says of itself: when, by which code and versions, beside how much other work."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "load": machine.load(),
    }


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file where it is no result file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a result file of bench.measure, got no JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "device" not in found:
        raise ValueError(f"{path}: expected a result file of bench.measure, format {FORMAT}, with a device")
    return found


def save(found: dict[str, Any], path: Path) -> None:
    """Replaces what was there, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def rounded(value: Any) -> Any:
    """Six digits: what is below is noise, and would make two files hard to compare by eye."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def label(row: dict[str, Any]) -> str:
    """`step batch_topk nested, B1024-d512-N8192-k32`: what finds a row again in another file."""
    size = row["size"]
    shape = f"B{size['rows']}-d{size['d']}-N{size['d_sae']}-k{size['k']}"
    words = [row["operation"], row.get("activation", ""), "nested" if len(row.get("widths", ())) > 1 else ""]
    return f"{' '.join(filter(None, words))}, {shape}"


def merge_rows(rows: list[dict[str, Any]], more: Iterable[dict[str, Any]], environment: str) -> None:
    """Adds the variants of `more` that `rows` lack, each with the ratio to ours of its own run. Changes `rows`."""
    by_label = {label(row): row for row in rows}
    for row in more:
        known = by_label.get(label(row))
        if known is None or "variants" not in known:
            continue
        for name, variant in row["variants"].items():
            if name not in known["variants"]:
                known["variants"][name] = {**variant, "environment": environment}


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines for the terminal: ours, its distance to the floor, and every other variant as a multiple of it."""
    for row in rows:
        yield ""
        yield label(row)
        for kind, one in row.get("kinds", {}).items():
            middle, low, high = (1e3 * one["seconds_per_step"][name] for name in ("median", "low", "high"))
            ratio = one["ratio"]
            yield (
                f"  {kind:<40} step     {middle:10.3f} ms [{low:.2f}, {high:.2f}]  {ratio['median']:.2f} x off "
                f"[{ratio['low']:.2f}, {ratio['high']:.2f}]  {one['tokens_per_second']:,.0f} tokens/s"
            )
        for name, variant in row.get("variants", {}).items():
            for direction, seconds in variant["seconds"].items():
                ratio, spread = (
                    variant["ratio"][direction],
                    f"[{1e3 * seconds['low']:.2f}, {1e3 * seconds['high']:.2f}]",
                )
                peak = variant["peak_bytes"]
                held = "" if peak is None else f"  {peak / 1e6:8.1f} MB"
                to_floor = (
                    f"  {row['to_floor'][direction]:6.2f} x floor" if ratio["median"] == 1 == ratio["low"] else ""
                )
                yield (
                    f"  {name:<40} {direction:<9}{1e3 * seconds['median']:10.3f} ms {spread:<20}"
                    f"{ratio['median']:7.2f} x ours [{ratio['low']:.2f}, {ratio['high']:.2f}]{held}{to_floor}"
                )
