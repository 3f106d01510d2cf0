"""The result files: bench/results/<device>.json, one a device, replaced by every measurement."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import machine
from bench.reference_rates import machine_rates

FOLDER = Path(__file__).resolve().parent / "results"
FORMAT = 2
SECTIONS = ("rows", "scaling", "whole_run")


def about() -> dict[str, Any]:
    """The origin of a section: date, commit, versions, load, and the machine's rates at that time."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "load": machine.load(),
        "machine_rates": machine_rates(),
    }


class OtherFormatError(ValueError):
    """A result file of another version of the benchmark, whose measurements have another meaning."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        super().__init__(
            f"{path}: expected a result file of format {FORMAT}, got format {found.get('format')}; measure again, "
            f"or compare by the commit that wrote it"
        )
        self.found = found


def load(path: Path) -> dict[str, Any]:
    """Read a result file. Raises ValueError naming a file that is none, OtherFormatError for one of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a result file of bench.measure, got no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int) or not found.get("device"):
        raise ValueError(f"{path}: expected a result file of bench.measure, with a format and a device")
    if found["format"] != FORMAT:
        raise OtherFormatError(path, found)
    return found


def save(found: dict[str, Any], path: Path) -> None:
    """Write a result file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".writing")
    partial.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Numbers rounded to six digits: further digits are noise and make files hard to compare by eye."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def label(row: dict[str, Any]) -> str:
    """`step batch_topk nested, B1024-d512-N8192-k32`: identifies a row across files."""
    if "shape" in row:
        return f"{row['operation']}, {row['shape']}"
    size = row["size"]
    shape = f"B{size['rows']}-d{size['d']}-N{size['d_sae']}-k{size['k']}"
    words = [row["operation"], row.get("activation", ""), "nested" if len(row.get("widths", ())) > 1 else ""]
    return f"{' '.join(filter(None, words))}, {shape}"


def merge_rows(rows: list[dict[str, Any]], more: Iterable[dict[str, Any]], environment: str) -> None:
    """Add to `rows`, in place, the rows and variants of `more` that it lacks. Added variants follow our time in their run, to
    which their ratios refer."""
    by_label = {label(row): row for row in rows}
    for row in more:
        known = by_label.get(label(row))
        if known is None:
            rows.append({**row, "environment": environment})
            by_label[label(row)] = rows[-1]
            continue
        variants = known["variants"]
        there = {"environment": environment, "floor": row["floor"], "product_seconds": row["product_seconds"]}
        added = {n: {**one, **there} for n, one in row["variants"].items() if not one["ours"] and n not in variants}
        if added:
            ours, first = next(iter(row["variants"].items()))
            variants[f"{ours}, in the {environment} run"] = {**first, **there}
            variants.update(added)


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines for the terminal: ours, its distance to the floor, and every other variant as a multiple of it."""
    for row in rows:
        yield ""
        yield label(row)
        for kind, one in row.get("kinds", {}).items():
            step, ratio = one["seconds_per_step"], one["ratio"]
            yield (
                f"  {kind:<40} step     {1e3 * step['total']:10.3f} ms [{1e3 * step['low']:.2f}, {1e3 * step['high']:.2f}]"
                f"  {ratio['total']:.3f} x {row.get('of', 'off')} [{ratio['low']:.3f}, {ratio['high']:.3f}]  "
                f"{one['tokens_per_second']:,.0f} tokens/s"
            )
        for name, variant in row.get("variants", {}).items():
            if "wrong" in variant:
                yield f"  {name:<40} WRONG: {variant['wrong']}"
                continue
            for direction, seconds in variant["seconds"].items():
                ratio, floor = variant["ratio"][direction], row["floor"][direction]["seconds"]
                spread = f"[{1e3 * seconds['low']:.2f}, {1e3 * seconds['high']:.2f}]"
                peak = variant["peak_bytes"]
                memory = "" if peak is None else f"  peak {peak / 1e6:.1f} MB"
                memory += f", holds {variant['held_bytes'] / 1e6:.1f} MB"
                yield (
                    f"  {name:<40} {direction:<9}{1e3 * seconds['median']:10.3f} ms {spread:<20}"
                    f"{ratio['median']:7.2f} x ours [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                    f"{seconds['median'] / floor:8.2f} x floor{memory}"
                )


def ratios_of(row: Mapping[str, Any]) -> dict[str, float]:
    """{variant: its time as a multiple of ours, "floor": ours as a multiple of the floor}, forward and backward together where
    there are both; medians."""
    found: dict[str, float] = {}
    for name, variant in row.get("variants", {}).items():
        if "wrong" in variant:
            continue
        direction = "both" if "both" in variant["seconds"] else "forward"
        if direction in variant["ratio"]:
            found[name] = variant["ratio"][direction]["median"]
        if "floor" not in found and variant["ours"]:
            found["floor"] = variant["seconds"][direction]["median"] / row["floor"][direction]["seconds"]
    return found


def closing_table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line a row: ours as a multiple of the floor, each other variant as a multiple of ours."""
    yield ""
    yield "In all (x: times as long as ours, forward and backward together; the trainer: as long as with everything off):"
    for row in rows:
        kinds = {kind: one["ratio"]["total"] for kind, one in row.get("kinds", {}).items()}
        cells = [f"{name} {ratio:.2f}x" for name, ratio in (kinds or ratios_of(row)).items() if ratio != 1]
        yield f"  {label(row):<50} " + ", ".join(cell.replace("floor ", "of the floor: ours ") for cell in cells)
