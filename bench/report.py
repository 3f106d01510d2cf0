"""python -m bench.report: bench/results/*.json into docs/performance.md and its plots; or two result files compared.

    python -m bench.report                 # writes the page
    python -m bench.report A.json B.json   # what became slower or larger from A to B; exit code 1 where anything did

Nobody types a figure by hand: the page says only what the files say, and a test writes it again and compares.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.compare import compare, said
from bench.results import label

DOCUMENT = machine.ROOT / "docs" / "performance.md"
PLOTS = "performance"
INTRODUCTION = """# Performance

Written by `python -m bench.report` from `bench/results/*.json`; `python -m bench.measure` makes such a file for the machine
it runs on (about twelve minutes on two cores). `python -m bench.report A.json B.json` compares two. No figure here is typed
by hand.

How to read it:

- **Every variant was checked first**: the same weights and the same small input must give the same codes, losses and gradients
  (relative error below 1e-4 in fp32), or the row fails. What a variant computes differently is said beside it.
- **Variants of a row take turns in the same rounds**, each on the next of several inputs that together do not fit the cache. A
  ratio is taken within each round; given are its median and quartiles. Peers that need an environment of their own ran there,
  with ours beside them: their ratio is to ours of that run.
- **Peers.** `eager PyTorch` and `torch.compile` are the dense layer as anyone would write it. `original project` is its step
  written anew from its description. SAELens, sparsify and dictionary_learning are the released libraries, called as their own
  trainers call them; `python -m bench.peers saelens` (or `sparsify`, `dictionary-learning`) makes the library's environment
  (`tests/interop/environment.py`) and times it there. SAELens and dictionary_learning train autoencoders only, so every step
  here has the source as its target. A library that is installed beside us takes part in `pytest bench/` itself.
- **Times** are medians with quartiles. `forward` and `backward` are two parts of one run, `both` is their sum. A step is
  everything from the batch to the updated weights. Times of another day or machine say little; ratios within a row say much.
- **x floor** is the time as a multiple of what this very machine, in the same rounds, needs to copy as many bytes as any exact
  implementation must move, or to do as many operations as the encoder's bare product does a second, whichever is longer
  (`bench/roofline.py` counts both). Small sizes live in the cache and are ruled by the cost of calls.
- **Memory** is the most that one run holds beyond what was held before it (weights and moments are there already).
- **What the first edition gets wrong** (files measured up to 2026-11-21, until they are measured again): a correlation
  row of 8192 latents and more does not hold, in its median, the flush of waiting pairs every 64 updates (by its
  quartiles about 3.2 ms an update, 236x and not 2745x below the dense product); short training rows hide what happens
  every 25 to 100 steps in their median (the whole run does not); eager PyTorch's Adam ran as a plain loop instead of
  fused, about 28 of its 360 ms a step; rows of peers with an environment of their own are beside ours of that run,
  which is not shown; inputs are Gaussian noise.
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
    return [merged(results.load(file)) for file in files]


def merged(found: dict[str, Any]) -> dict[str, Any]:
    """With the peers' variants in their rows."""
    for library, section in found.get("peers", {}).items():
        if "rows" in section and "rows" in found:
            results.merge_rows(found["rows"]["rows"], section["rows"], library)
    return found


def render(found: Sequence[dict[str, Any]]) -> str:
    lines = [INTRODUCTION]
    for one in found:
        lines += _device(one)
    return "\n".join(lines).rstrip() + "\n"


def _device(found: dict[str, Any]) -> Iterator[str]:
    about = found["device"]
    yield f"## {about['name']}"
    yield ""
    yield _machine_line(about)
    yield ""
    yield from _sections(found)
    if "rows" in found:
        yield from _rows(found)
    if "whole_run" in found:
        yield from _whole_run(found["whole_run"])
    if "scaling" in found:
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
    yield from _head("part", "measured", "commit", "load before the writing", "versions")
    sections = {name: found[name] for name in results.SECTIONS if name in found}
    sections |= {f"peer: {name}": section for name, section in found.get("peers", {}).items()}
    for name, section in sections.items():
        if "date" not in section:
            yield _line(name, "skipped", "", "", section.get("skipped", ""))
            continue
        commit = section["commit"]
        dirty = "" if commit["clean"] else " and changes"
        versions = ", ".join(f"{k} {v}" for k, v in section["versions"].items() if k != "pytest-benchmark")
        yield _line(name, section["date"], f"`{(commit['hash'] or 'none')[:10]}`{dirty}", section["load"], versions)
    yield ""
    busy = [n for n, s in sections.items() if s.get("load") and s["load"] > 1.25 * found["device"]["threads"]]
    if busy:
        yield f"**The machine was busy with other work** while these were measured: {', '.join(busy)}. The spread shows it."
        yield ""


def _rows(found: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in found["rows"]["rows"] if row["operation"] != "training"]
    slug = found["device"]["slug"]
    yield "### The whole training step"
    yield ""
    yield f"![Step: ratio to peers]({PLOTS}/{slug}-peers.svg)"
    yield ""
    for row in rows:
        if row["operation"] == "step":
            yield from _table(row)
    training = [row for row in found["rows"]["rows"] if row["operation"] == "training"]
    if training:
        yield from _training(training, slug)
    yield "### Its parts"
    yield ""
    yield f"![Distance to the floor]({PLOTS}/{slug}-floor.svg)"
    yield ""
    for row in rows:
        if row["operation"] != "step":
            yield from _table(row)
    for name, why in {**found["rows"]["skipped"]}.items():
        if name not in found.get("peers", {}):
            yield f"Skipped: {name}: {why}."
    yield ""


def _table(row: dict[str, Any]) -> Iterator[str]:
    yield f"**{label(row)}**: {_floor_line(row)}"
    yield ""
    yield from _head("variant", "part", "ms [quartiles]", "x ours [quartiles]", "x floor", "peak MB", "differs in")
    for name, one in row["variants"].items():
        for n, (direction, seconds) in enumerate(one["seconds"].items()):
            ratio, floor = one["ratio"].get(direction), row["floor"][direction]["seconds"]
            own = one.get("environment") is None
            yield _line(
                name if n == 0 else "",
                direction if len(one["seconds"]) > 1 else "",
                _spread(seconds, 1e3),
                "" if ratio is None else _spread(ratio, 1.0),
                f"{seconds['median'] / floor:.2f}" if own else "",
                "" if one["peak_bytes"] is None or n else f"{one['peak_bytes'] / 1e6:.1f}",
                one["note"] if n == 0 else "",
            )
    yield ""


def _floor_line(row: dict[str, Any]) -> str:
    parts = []
    for direction, floor in row["floor"].items():
        parts.append(
            f"{direction} at least {floor['bytes'] / 1e6:.1f} MB and {floor['operations'] / 1e9:.2f} Gop, "
            f"{1e3 * floor['seconds']:.3f} ms here"
        )
    rates = row["rates"]
    return (
        f"{'; '.join(parts)} (copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, product "
        f"{rates['product_operations_per_second'] / 1e9:.0f} Gop/s)."
    )


def _training(rows: list[dict[str, Any]], slug: str) -> Iterator[str]:
    yield "### The trainer with its anti-duplication parts on and off"
    yield ""
    yield "Steps of the trainer itself on batches that lie ready, logs and reports included. `all`: monitor, samples, penalty."
    yield ""
    yield f"![Overhead of anti-duplication]({PLOTS}/{slug}-monitoring.svg)"
    yield ""
    yield from _head("size", "parts", "ms a step [quartiles]", "tokens/s", "x off [quartiles]")
    for row in rows:
        size = row["size"]
        for kind, one in row["kinds"].items():
            yield _line(
                f"B{size['rows']}-d{size['d']}-N{size['d_sae']}-k{size['k']}",
                kind,
                _spread(one["seconds_per_step"], 1e3),
                f"{one['tokens_per_second']:,.0f}",
                _spread(one["ratio"], 1.0),
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
        + f" Products in {section['compute_dtype']}; logs, reports and checkpoints included."
    )
    yield ""
    yield from _head(
        "", "seconds", "tokens/s", f"seconds per {section['chunk']} steps [quartiles]", "x off [quartiles]"
    )
    for kind, one in section["kinds"].items():
        yield _line(
            kind,
            f"{one['seconds']:.1f}",
            f"{one['tokens_per_second']:,.0f}",
            _spread(one["seconds_per_chunk"], 1.0),
            _spread(one["ratio"], 1.0),
        )
    yield ""


def _scaling(found: dict[str, Any]) -> Iterator[str]:
    slug, points = found["device"]["slug"], found["scaling"]["points"]
    yield "### Scaling"
    yield ""
    for name, what in (("scaling", "Cost against N, B, k and d"), ("memory", "Memory against N")):
        yield f"![{what}]({PLOTS}/{slug}-{name}.svg)"
        yield ""
    yield from _head(
        "axis", "value", "operation", "ours ms", "best other", "its ms", "x ours [quartiles]", "ours peak MB"
    )
    beaten = []
    for point in points:
        first, *others = point["variants"].items()
        best = min(others, key=lambda item: item[1]["ratio"]["median"], default=None)
        peak = first[1]["peak_bytes"]
        size = point["size"]
        yield _line(
            {"d_sae": "N", "rows": "B"}.get(point["axis"], point["axis"]),
            f"{point['value']:,}",
            point["operation"],
            f"{1e3 * first[1]['seconds']['median']:.2f}",
            "" if best is None else best[0],
            "" if best is None else f"{1e3 * best[1]['seconds']['median']:.2f}",
            "" if best is None else _spread(best[1]["ratio"], 1.0),
            "" if peak is None else f"{peak / 1e6:.1f}",
        )
        if best is not None and best[1]["ratio"]["high"] < 1:
            shape = f"B {size['rows']}, d {size['d']}, N {size['d_sae']}, k {size['k']}"
            beaten.append(
                f"- {point['operation']} at {shape}: {best[0]} takes {_spread(best[1]['ratio'], 1.0)} of ours"
            )
    yield ""
    if beaten:
        yield "Where another path was faster than our default (three quarters of the rounds or more):"
        yield ""
        yield from beaten
    else:
        yield "At no point measured was another path faster than our default in three quarters of the rounds."
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


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="two result files to compare, or none to write the page")
    options = parser.parse_args(words)
    if not options.files:
        print(write())
        return 0
    if len(options.files) != 2:
        parser.error(f"expected two result files to compare, or none, got {len(options.files)}")
    before, after = (merged(results.load(file)) for file in options.files)
    changes = compare(before, after)
    print(said(changes))
    return int(any(change.worse for change in changes))


if __name__ == "__main__":
    sys.exit(main())
