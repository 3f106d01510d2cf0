"""python -m bench.overhead [--pairs 5] [--only demo,trainer,roofline] [--sizes 2048,8192] [--json FILE] [--document README.md]

The price of everything against duplicates, which the README quotes. Runs take their turns one after the other, in the other
order each time, so that a slow machine affects both; a ratio is that of total times, in brackets its 95 % interval over turns.

demo      whole runs of `transcoder demo --training.steps 400` up to report.html, everything on and off
trainer   the trainer on batches that lie ready: turns of 500 steps, which hold five reports, a write of sample files, a
          checkpoint and a block's close each, after one turn that is not counted. In a turn the runs change places every
          50 steps: the speed of a machine drifts by more in four seconds than what is measured
roofline  predicted for an H100 at the lost run's shape, with the language model's pass up to the layer

Each row has the ratio of wall-clock time and that of processor time, which other work on the machine disturbs less. About
20 minutes on two idle cores: four for the demo, two and twelve for the two sizes of the trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import results, roofline
from bench.cases import Size
from bench.document import replace_between
from bench.monitoring_overhead import PARTS, RARE, runs, seconds_of
from bench.statistics import whole_ratio

SIZES = (Size(1024, 128, 2048, 16), Size(1024, 512, 8192, 32))
KINDS: dict[str, tuple[str, ...]] = {"off": (), "monitor": ("monitor",), "all": PARTS[:4]}
LEAST_PAIRS = 5
SLICE = 50
"""Steps that a run takes before the next run's."""
DEMO_STEPS = 400
LOST = roofline.Shape(1024, 2304, 18432, 48)
LAYERS = 9
"""Of Gemma-2-2b up to the output of the MLP of layer 8."""
LAYER_PARAMETERS = 2304 * (2 * 2048 + 2 * 1024) + 3 * 2304 * 9216
"""Attention (queries and output, keys and values) and MLP of one of them."""


def _seconds(work: Callable[[], object]) -> dict[str, float]:
    """Wall-clock and processor seconds of this process and of those that it has waited for."""
    # os.times() counts this process in ticks of 10 ms, longer than a tiny step.
    start, processor, before = time.perf_counter(), time.process_time(), os.times()
    work()
    wall, processor, after = time.perf_counter() - start, time.process_time() - processor, os.times()
    return {"wall": wall, "processor": processor + sum(after[2:4]) - sum(before[2:4])}


def _compared(taken: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, turns in taken.items():
        for clock in ("wall", "processor"):
            samples, base = ([turn[clock] for turn in side] for side in (turns, taken["off"]))
            found.setdefault(kind, {})[clock] = {"seconds": samples, "ratio": whole_ratio(samples, base)}
    return found


def demo(pairs: int, steps: int = DEMO_STEPS) -> dict[str, Any]:
    """{kind: its seconds and ratios} of whole runs."""
    from transcoder import RunConfig, train_transcoder

    def run(kind: str) -> None:
        on = {f"antidup.{part}.enabled": part in KINDS[kind] for part in PARTS}
        quiet = {"training.steps": steps, "logging.progress": False}
        with tempfile.TemporaryDirectory(prefix="transcoder-bench-") as folder:
            train_transcoder(RunConfig.load("demo", {**on, **quiet}), Path(folder) / "run")

    run("all")  # libraries are imported, caches are warm
    taken: dict[str, list[dict[str, float]]] = {"off": [], "all": []}
    for turn in range(pairs):
        for kind in ("off", "all") if turn % 2 == 0 else ("all", "off"):
            taken[kind].append(_seconds(lambda kind=kind: run(kind)))  # type: ignore[misc]
        print(f"demo, pair {turn + 1} of {pairs}", flush=True)
    return _compared(taken)


def trainer(size: Size, pairs: int, steps: int = RARE) -> dict[str, Any]:
    """{kind: its seconds and ratios} of turns of `steps` steps of the trainer."""
    with runs(size, KINDS, {"antidup.verify_at_step": 10_000}) as opened:
        for run in opened.values():
            seconds_of(run, steps)
        taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in opened}
        for turn in range(pairs):
            whole = {kind: {"wall": 0.0, "processor": 0.0} for kind in opened}
            for slice_ in range(steps // min(SLICE, steps)):
                order = list(opened) if (turn + slice_) % 2 == 0 else list(reversed(opened))
                for kind in order:
                    part = _seconds(lambda kind=kind: seconds_of(opened[kind], min(SLICE, steps)))  # type: ignore[misc]
                    whole[kind] = {clock: seconds + part[clock] for clock, seconds in whole[kind].items()}
            for kind in opened:
                taken[kind].append(whole[kind])
            print(f"trainer {size}, turn {turn + 1} of {pairs}", flush=True)
    return _compared(taken)


def predicted(shape: roofline.Shape = LOST) -> dict[str, float]:
    """Seconds of a step on an H100 without a GPU at hand, and what the monitor's update adds."""
    chip = roofline.CHIPS[0]
    # In a process of its own: there Triton is recorded, here the backends of this CPU are in use already.
    found = f"list(roofline.rows([roofline.{shape!r}], roofline.CHIPS[:1]))"
    program = f"import json; from bench import roofline; print(json.dumps({found}))"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    seconds = {row["kernel"]: row["planned"]["predicted_seconds"] for row in rows}
    model = chip.seconds(roofline.Cost(matrix=2.0 * shape.rows * LAYERS * LAYER_PARAMETERS))
    step, monitor = seconds["whole step, batch_topk"], seconds["correlation exact"]
    return {
        "language_model_seconds": model,
        "step_seconds": step,
        "monitor_seconds": monitor,
        "ratio": 1 + monitor / (model + step),
        "ratio_without_language_model": 1 + monitor / step,
    }


def measure(only: list[str], pairs: int, sizes: list[Size]) -> dict[str, Any]:
    found: dict[str, Any] = {**results.about(), "pairs": pairs}
    if "demo" in only:
        found["demo"] = demo(pairs)
    if "trainer" in only:
        found["trainer"] = {str(size): trainer(size, pairs) for size in sizes}
    if "roofline" in only:
        found["roofline"] = predicted()
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"{'':<38}{'wall clock':>24}{'processor time':>24}"]
    parts = {"demo, end to end": found.get("demo", {})}
    parts |= {f"trainer {size}": kinds for size, kinds in found.get("trainer", {}).items()}
    for name, kinds in parts.items():
        for kind, clocks in kinds.items():
            ratios = [clocks[clock]["ratio"] for clock in ("wall", "processor")]
            cells = (f"{r['total']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in ratios)
            if kind != "off":
                lines.append(f"{f'{name}: {kind} on':<38}" + "".join(f"{cell:>24}" for cell in cells))
    if "roofline" in found:
        r = found["roofline"]
        lines.append(
            f"predicted, H100, {LOST}: {r['ratio']:.3f} (language model {1e3 * r['language_model_seconds']:.2f} ms, step "
            f"{1e3 * r['step_seconds']:.2f} ms, monitor {1e3 * r['monitor_seconds']:.2f} ms)"
        )
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help=f"turns of each kind, at least {LEAST_PAIRS}")
    parser.add_argument("--only", default="demo,trainer,roofline", help="parts, with commas between")
    parser.add_argument("--sizes", default=",".join(str(s.d_sae) for s in SIZES), help="trainer: numbers of latents")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--document", type=Path, help="write the table into this document, between its marks")
    options = parser.parse_args(words)
    only, sizes = options.only.split(","), [s for s in SIZES if str(s.d_sae) in options.sizes.split(",")]
    if not set(only) <= {"demo", "trainer", "roofline"} or not sizes:
        parser.error(f"expected parts among demo, trainer, roofline and sizes among {[s.d_sae for s in SIZES]}")
    if options.pairs < LEAST_PAIRS:
        parser.error(f"--pairs: expected at least {LEAST_PAIRS}, got {options.pairs}")
    found = measure(only, options.pairs, sizes)
    print("\n".join(table(found)))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.document is not None:
        replace_between(options.document, "bench.overhead", "```\n" + "\n".join(table(found)) + "\n```")
    return 0


if __name__ == "__main__":
    sys.exit(main())
