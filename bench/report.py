"""python -m bench.report: bench/results/*.json into docs/performance.md and its plots; or two result files compared.

    python -m bench.report                 # writes the page
    python -m bench.report A.json B.json   # what became slower or larger from A to B; exit code 1 where anything did

The page shows only the content of the files: a test writes it again and compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.compare import compare, machines, said
from bench.results import label

DOCUMENT = machine.ROOT / "docs" / "performance.md"
PLOTS = "performance"
INTRODUCTION = """# Performance

"""
READING = """## How to read the tables

- **Every variant was checked first**, on 64 rows and on as many as are timed (fewer, 8 at least, where dense codes would be
  large): the same weights and inputs must give the same codes, losses, gradients and two optimizer steps, all of them (relative
  error below 1e-4 in fp32). One that does not is shown as wrong, without a time. What a variant computes differently, or what
  of it could not be compared, stands in its row.
- **Variants of a row take turns in the same rounds**, each on another of several inputs that together are twice the last cache.
  A ratio is taken within each round; given are its median and quartiles.
- **Peers.** `eager PyTorch` and `torch.compile` are the dense layer as anyone would write it. `original project` is its step,
  reimplemented from its description. SAELens, sparsify and dictionary_learning are the released libraries, called as their own
  trainers call them; `python -m bench.peers saelens` (or `sparsify`, `dictionary-learning`) makes the library's environment
  (`tests/interop/environment.py`) and times it there, with ours in the same rounds: `ours (cpp), in the saelens run` is that
  time, and what the rows below it are ratios to. SAELens and dictionary_learning train autoencoders only, so every step here
  has the source as its target. A library that is installed in the same environment takes part in `pytest bench/` itself.
- **Times** are medians with quartiles. `forward` and `backward` are two parts of one run, `both` is their sum. A step is
  everything from the batch to the updated weights. Times of another day or machine say little; ratios within a row say much.
- **x limit**: how many times slower than the hardware limit. The limit is what this very machine, in the same rounds, needs to
  copy as many bytes as any exact implementation must move, or to do as many operations at the rate of the fastest product seen
  (in fp32 or bf16), whichever is longer. Both are counted in `bench/roofline.py`. What changes memory in place (the optimizer)
  may come below 1: a copy also reads the lines that it writes.
- **x product** is a yardstick, not a limit: PyTorch's fp32 product of the batch with the encoder alone, into memory that is
  there. What screens candidates, or keeps only what it selects, may be faster than that.
- **Peak MB** is the peak of one run beyond the memory held before it; **kept MB** the memory that a variant keeps between runs:
  weights, moments, statistics. The inputs are in neither.

### What these numbers do not show

- Inputs are Gaussian noise and weights those of the beginning: codes spread evenly over the latents, where those of a trained
  dictionary do not. The trainer's rows and the whole run learn sparse sums of planted directions.
- Small sizes live in the cache and are ruled by the cost of calls. A row's size stands in its title; what it says of another
  size, look up under Scaling.
- SAELens, sparsify and dictionary_learning are made for GPUs. Where a device below is a CPU, nothing here compares us on a GPU.
- On fewer activations than a batch here has, or with a model whose forward pass is the larger part, a training run gains less.

### What can be set

- `TRANSCODER_BACKEND` (`auto`, `cpp`, `torch`, `triton`) chooses the ops' backend.
- `TRANSCODER_SCREEN=bf16` lets a CPU with bf16 units propose TopK's candidates in bf16; the selection stays exact, in fp32.
- `python -m bench.autotune` prints the fastest launch choices of your GPU as data: paste them into the `config.py` of the op in
  `kernels/`.

`python -m bench.report` writes this page from `bench/results/*.json`; `python -m bench.measure` makes such a file for the
machine it runs on (under twenty minutes on two cores). `python -m bench.report A.json B.json` compares two machines or commits.
No number is typed by hand.
"""


def write(document: Path = DOCUMENT, folder: Path = results.FOLDER) -> Path:
    """Write the page and its plots from every result file of `folder`. Raises FileNotFoundError where there is none."""
    from bench import plots

    found = read(folder)
    document.parent.mkdir(parents=True, exist_ok=True)
    plots.draw(found, document.parent / PLOTS)
    document.write_text(render(found), encoding="utf-8")
    return document


def read(folder: Path = results.FOLDER) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: expected result files, found none; python -m bench.measure makes one")
    return [_read(file) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        return merged(results.load(file))
    except results.OtherFormatError as error:
        return {"device": error.found["device"], "format": error.found["format"]}


def merged(found: dict[str, Any]) -> dict[str, Any]:
    """With the peers' variants in their rows. Where our own rows failed, theirs stand alone."""
    for library, section in found.get("peers", {}).items():
        if section.get("rows"):
            rows = found.setdefault("rows", {}).setdefault("rows", [])
            results.merge_rows(rows, section["rows"], library)
    return found


def render(found: Sequence[dict[str, Any]]) -> str:
    lines = [INTRODUCTION.rstrip(), ""]
    for one in found:
        lines += _short(one)
    if all(one["device"].get("kind", "cpu") == "cpu" for one in found):
        lines += [
            "No GPU has been measured yet: there, `python -m bench.measure` adds its measurements to this page.",
            "",
        ]
    lines.append(READING)
    for one in found:
        lines += _device(one)
    return "\n".join(lines).rstrip() + "\n"


def _short(found: dict[str, Any]) -> Iterator[str]:
    """What most readers want of a device, in a few lines and one picture."""
    from bench.plots import of_libraries

    kinds = of_libraries(found) if found["format"] == results.FORMAT else {}
    if not kinds:
        return
    about = found["device"]
    yield f"**{about['name']}, {about['cores']} cores**"
    yield ""
    yield f"![Time of a training step compared with other libraries]({PLOTS}/{about['slug']}-speed.svg)"
    yield ""
    for kind, bars in kinds.items():
        ours = bars.pop("this package", None)
        others = sorted(bars.items(), key=lambda item: item[1]["ratio"]["forward"]["median"])
        slower = ", ".join(f"{who} {one['ratio']['forward']['median']:.1f}" for who, one in others)
        if ours is not None and slower:
            milliseconds = 1e3 * ours["seconds"]["forward"]["median"]
            yield f"- A training step with {kind}: {milliseconds:.0f} ms. Times as long: {slower}."
    rows = [row for row in found["rows"]["rows"] if row["operation"] == "step"]
    slower = [
        row["variants"][name]["seconds"]["forward"]["median"] / row["floor"]["forward"]["seconds"]
        for row in rows
        for name in list(row["variants"])[:1]
        if "wrong" not in row["variants"][name]
    ]
    if slower:
        yield f"- A step takes {min(slower):.1f} to {max(slower):.1f} times the hardware's limit (of memory or arithmetic)."
    watched = found.get("whole_run", {}).get("kinds", {}).get("monitoring on")
    if watched:
        ratio = watched["ratio"]
        yield (
            f"- A whole run with monitoring, samples and penalty takes {100 * (ratio['total'] - 1):.0f} % longer than without "
            f"(95 % interval {100 * (ratio['low'] - 1):.0f} to {100 * (ratio['high'] - 1):.0f} %)."
        )
    yield ""


def _folded(title: str, lines: Iterator[str]) -> Iterator[str]:
    """A part that a click opens, on GitHub as in the documentation site."""
    yield f'<details markdown="1"><summary>{title}</summary>'
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def _device(found: dict[str, Any]) -> Iterator[str]:
    about = found["device"]
    yield f"## {about['name']}"
    yield ""
    yield _machine_line(about)
    yield ""
    if found["format"] != results.FORMAT:
        yield (
            f"Measured by an earlier version of the benchmark (format {found['format']}), whose results mean something else: "
            "they are not shown. `python -m bench.measure` measures again."
        )
        yield ""
        return
    yield from _folded("When and with what it was measured", _sections(found))
    if found.get("rows", {}).get("rows"):
        yield from _rows(found)
    if "kinds" in found.get("whole_run", {}):
        yield from _whole_run(found["whole_run"])
    if found.get("scaling", {}).get("points"):
        yield from _scaling(found)


def _machine_line(about: dict[str, Any]) -> str:
    parts = [
        f"{about['cores']} cores, {about['threads']} threads",
        f"last cache {about['cache_bytes'] / 2**20:.0f} MiB",
    ]
    if about.get("memory_bytes"):
        parts.append(f"{about['memory_bytes'] / 2**30:.0f} GiB")
    parts += [str(about[name]) for name in ("instructions", "capability", "system") if about.get(name)]
    return "; ".join(parts) + "."


def _sections(found: dict[str, Any]) -> Iterator[str]:
    yield from _head("part", "measured", "commit", "machine load", "versions")
    sections = {name: found[name] for name in results.SECTIONS if name in found}
    sections |= {f"peer: {name}": section for name, section in found.get("peers", {}).items()}
    for name, section in sections.items():
        if "date" not in section:
            word = "failed" if "failed" in section else "skipped"
            yield _line(name, word, "", "", _cell(section.get(word, "")))
            continue
        commit = section["commit"]
        dirty = "" if commit["clean"] else " and changes"
        versions = ", ".join(f"{k} {v}" for k, v in section["versions"].items() if k != "pytest-benchmark")
        yield _line(name, section["date"], f"`{(commit['hash'] or 'none')[:10]}`{dirty}", section["load"], versions)
    yield ""
    for name, section in sections.items():
        if "date" in section:
            for what, why in section.get("failed", {}).items():
                yield f"**Failed** ({name}): {what}: {_cell(why)}"
                yield ""
    busy = [n for n, s in sections.items() if s.get("load") and s["load"] > 1.25 * found["device"]["threads"]]
    if busy:
        yield f"**The machine was busy with other work** while these were measured: {', '.join(busy)}. The spread shows it."
        yield ""


def _rows(found: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in found["rows"]["rows"] if "variants" in row]
    slug = found["device"]["slug"]
    yield "### The whole training step"
    yield ""
    yield f"![Step: ratio to peers]({PLOTS}/{slug}-peers.svg)"
    yield ""
    for row in rows:
        if row["operation"] == "step":
            yield from _folded(_title(row), _table(row))
    training = [row for row in found["rows"]["rows"] if row["operation"] == "training"]
    if training:
        yield from _training(training, slug)
    yield "### Its parts"
    yield ""
    yield f"![Times slower than the hardware limit]({PLOTS}/{slug}-floor.svg)"
    yield ""
    for row in rows:
        if row["operation"] != "step":
            yield from _folded(_title(row), _table(row))
    for name, why in found["rows"].get("skipped", {}).items():
        if name not in found.get("peers", {}):
            yield f"Skipped: {name}: {why}."
    yield ""


def _title(row: dict[str, Any]) -> str:
    there = f", in the {row['environment']} run" if "environment" in row else ""
    return f"{label(row)}{there}"


def _table(row: dict[str, Any]) -> Iterator[str]:
    yield f"Hardware limit: {_floor_line(row)}"
    yield ""
    # The product of batch and encoder is a yardstick only for operations that contain it.
    product = ["x product"] if row["operation"] in ("step", "encode") else []
    yield from _head(
        "variant",
        "part",
        "ms [quartiles]",
        "x ours [quartiles]",
        "x limit",
        *product,
        "peak MB",
        "kept MB",
        "differs in",
    )
    for name, one in row["variants"].items():
        if "wrong" in one:
            yield _line(name, "**wrong**", "", "", "", *("" for _ in product), "", "", _cell(one["wrong"]))
            continue
        # A variant of a peer's run is compared with the floor and product of that run.
        source = one if "environment" in one else row
        for n, (direction, seconds) in enumerate(one["seconds"].items()):
            ratio, floor = one["ratio"].get(direction), source["floor"][direction]["seconds"]
            timed = direction in ("forward", "both")
            yield _line(
                name if n == 0 else "",
                direction if len(one["seconds"]) > 1 else "",
                _spread(seconds, 1e3),
                "" if ratio is None else _spread(ratio, 1.0),
                f"{seconds['median'] / floor:.2f}",
                *(f"{seconds['median'] / source['product_seconds']:.2f}" if timed else "" for _ in product),
                "" if one["peak_bytes"] is None or n else f"{one['peak_bytes'] / 1e6:.1f}",
                "" if n else f"{one['held_bytes'] / 1e6:.1f}",
                one["note"] if n == 0 else "",
            )
    yield ""


def _floor_line(row: dict[str, Any]) -> str:
    parts = []
    for direction, floor in row["floor"].items():
        parts.append(
            f"{direction} at least {floor['bytes'] / 1e6:.1f} MB and {floor['operations'] / 1e9:.2f} GFLOP, "
            f"{1e3 * floor['seconds']:.3f} ms here"
        )
    rates = row["rates"]
    return (
        f"{'; '.join(parts)} (copies {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, fastest product "
        f"{rates['fastest_operations_per_second'] / 1e9:.0f} GFLOP/s, {rates['fastest']}; the encoder's fp32 product "
        f"{1e3 * row['product_seconds']:.3f} ms, {rates['product_operations_per_second'] / 1e9:.0f} GFLOP/s)."
    )


def _training(rows: list[dict[str, Any]], slug: str) -> Iterator[str]:
    yield "### The trainer with its anti-duplication parts on and off"
    yield ""
    first = rows[0]
    yield (
        "Steps of the trainer itself on batches made in advance, logs and reports included, in turns of "
        f"{first['steps_per_round']} steps from one report to the next; sample files and checkpoints come at their default "
        "rate, every 500 steps, and as often the monitor closes a block (by default every 4,000,000 tokens). A "
        "value is that of all steps together; in brackets the 95 % interval that the turns give. `all`: monitor, samples, "
        "penalty."
    )
    yield ""
    yield f"![Overhead of anti-duplication]({PLOTS}/{slug}-monitoring.svg)"
    yield ""
    yield from _head("size", "parts", "steps", "ms a step [95 %]", "tokens/s", "x off [95 %]")
    for row in rows:
        size = row["size"]
        for kind, one in row["kinds"].items():
            yield _line(
                f"B{size['rows']}-d{size['d']}-N{size['d_sae']}-k{size['k']}",
                kind,
                row["rounds"] * row["steps_per_round"],
                _interval(one["seconds_per_step"], 1e3),
                f"{one['tokens_per_second']:,.0f}",
                _interval(one["ratio"], 1.0),
            )
    yield ""


def _whole_run(section: dict[str, Any]) -> Iterator[str]:
    size, lost = section["size"], section["lost_run"]
    scaled = size != lost
    yield "### A whole run"
    yield ""
    yield (
        f"The lost run's steps (4882 of batch {lost['rows']}, d {lost['d']}, {lost['d_sae']} latents, k {lost['k']}), "
        f"transcoder part only, synthetic activations: {section['steps']} steps"
        + (
            f" at 1/{lost['d'] // size['d']} of d, latents and k (d {size['d']}, {size['d_sae']} latents, k {size['k']})."
            if scaled
            else " at its shape."
        )
        + f" Products in {section['compute_dtype']}; logs, reports, sample files and checkpoints included. The two runs take "
        f"turns of {section['chunk']} steps; in brackets the 95 % interval that these give."
    )
    yield ""
    yield from _head("", "seconds", "tokens/s", "ms a step [95 %]", "x off [95 %]")
    for kind, one in section["kinds"].items():
        yield _line(
            kind,
            f"{one['seconds']:.1f}",
            f"{one['tokens_per_second']:,.0f}",
            _interval(one["seconds_per_step"], 1e3),
            _interval(one["ratio"], 1.0),
        )
    yield ""


def _scaling(found: dict[str, Any]) -> Iterator[str]:
    slug, points = found["device"]["slug"], found["scaling"]["points"]
    yield "### Scaling"
    yield ""
    for name, what in (("scaling", "Cost against N, B, k and d"), ("memory", "Memory against N")):
        yield f"![{what}]({PLOTS}/{slug}-{name}.svg)"
        yield ""
    table = list(
        _head(
            "axis",
            "value",
            "operation",
            "ours ms",
            "best other",
            "its ms",
            "x ours [quartiles]",
            "ours peak MB",
            "ours kept MB",
        )
    )
    beaten = []
    for point in points:
        first, *others = point["variants"].items()
        best = min(others, key=lambda item: item[1]["ratio"]["median"], default=None)
        peak = first[1]["peak_bytes"]
        size = point["size"]
        table.append(
            _line(
                {"d_sae": "N", "rows": "B"}.get(point["axis"], point["axis"]),
                f"{point['value']:,}",
                point["operation"],
                f"{1e3 * first[1]['seconds']['median']:.2f}",
                "" if best is None else best[0],
                "" if best is None else f"{1e3 * best[1]['seconds']['median']:.2f}",
                "" if best is None else _spread(best[1]["ratio"], 1.0),
                "" if peak is None else f"{peak / 1e6:.1f}",
                f"{first[1]['held_bytes'] / 1e6:.1f}",
            )
        )
        if best is not None and best[1]["ratio"]["high"] < 1:
            shape = f"B {size['rows']}, d {size['d']}, N {size['d_sae']}, k {size['k']}"
            beaten.append(
                f"- {point['operation']} at {shape}: {best[0]} takes {_spread(best[1]['ratio'], 1.0)} of ours"
            )
    yield from _folded("Every size that was measured", iter([*table, ""]))
    if beaten:
        yield "Where another path was faster than our default (three quarters of the rounds or more):"
        yield ""
        yield from beaten
    else:
        yield (
            "At no point measured here was another of our paths, eager PyTorch or torch.compile (while they take less than a "
            "second) faster than our default in three quarters of the rounds. The screened paths, which are opt-in, and the "
            "other libraries are in the tables above only."
        )
    yield ""


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*("---" for _ in names))


def _line(*cells: object) -> str:
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def _spread(values: dict[str, float], scale: float) -> str:
    digits = 3 if scale == 1e3 and scale * values["median"] < 1 else 2
    middle, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "low", "high"))
    return middle if middle == low == high else f"{middle} [{low}, {high}]"


def _interval(values: dict[str, float], scale: float) -> str:
    middle, low, high = (f"{scale * values[name]:.{2 if scale > 1 else 3}f}" for name in ("total", "low", "high"))
    return middle if middle == low == high or low == "nan" else f"{middle} [{low}, {high}]"


def _cell(text: str) -> str:
    """`text` on one line, for a table."""
    return " ".join(text.replace("|", "/").split())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="two result files to compare, or none to write the page")
    options = parser.parse_args(words)
    if not options.files:
        print(write())
        return 0
    if len(options.files) != 2:
        parser.error(f"expected two result files to compare, or none, got {len(options.files)}")
    before, after = (results.load(file) for file in options.files)
    changes = compare(before, after)
    print("\n".join(machines(before, after)))
    print(said(changes))
    return int(any(change.worse for change in changes))


if __name__ == "__main__":
    sys.exit(main())
