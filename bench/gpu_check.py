"""One command for a machine with a GPU: every op natively against its reference, then the benchmarks, one JSON.

    python -m bench.gpu_check [--only checks,verdicts,graph,checker,benchmarks] [--minutes 9] [--out FILE] [--quick] [--seed N]

checks      Each op, each backend that this device has, each dtype, fresh inputs (the seed is printed and recorded), forward and
            gradients against the float64 reference, and twice for bitwise equality. Then whole training steps: compiled in one
            graph they equal the eager step bit for bit; on a GPU they run without waiting for the device, and captured in a
            CUDA graph and replayed on new batches they again equal the eager step bit for bit.
verdicts    The backends that `auto` selects on this GPU (`transcoder.kernels.gpu_selftest`).
graph       A whole training step at the reference size, launched by the host and replayed as one CUDA graph: milliseconds until
            the host has launched it and until the device has done it.
checker     The memory and race checker (`compute-sanitizer`, where it is installed) over the Triton checks on small shapes.
benchmarks  `pytest bench/`, its rows taken into the JSON; after checks that passed, or with `--only benchmarks`.

Every part is a separate process with a time limit, several at a time on a GPU: most of their time is compilation. A crash
or a hang loses only its part, and results before it are kept. The JSON (bench/results/native/<device>.json) is written
after every part, so that a machine that is taken away leaves what it had; stages that `--only` leaves out stay in it where
code and versions are the same. Exit status 1 if any check failed or did not end, or the benchmarks could not run. Without a
GPU it does the same on the CPU (no verdicts, no checker), so that the command itself stays tested.

On a bare machine with PyTorch: `pip install --no-deps --no-build-isolation -e .` first; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from transcoder.config import TrainingSection
from transcoder.kernels.backend import NAMES, has_backend
from transcoder.kernels.gpu_selftest import FAMILIES, SHAPES, SMALL, Mismatch, op_checks, outcome, proof, same_bits
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("checks", "verdicts", "graph", "checker", "benchmarks")
LIMITS = {"checks": 240.0, "verdicts": 120.0, "graph": 60.0, "checker": 120.0}
"""Time limit of a part in seconds, cut to the rest of `--minutes`, so that one hang does not use up the time on the machine.
Estimates; the benchmarks get the rest."""
STOPPED = "stopped at the time limit"
NO_PYTEST = "pytest is not installed: install it (or a wheel that you bring), or leave the benchmarks out by --only"
STEP_SIZES = {"B 1024": (1024, 2304, 18432, 48), "B 4096": (4096, 2304, 18432, 48)}
"""B, d, N, k of the steps that stage `graph` times: those of bench.roofline's predictions."""
TIMED_STEPS = 10
GRACE = 20.0
"""Seconds for a stopped process to write its results before it is killed."""


def parts(device: torch.device) -> list[str]:
    """Parts that are checked in separate processes: on a GPU each family of Triton kernels."""
    if device.type == "cuda":
        triton = [f"triton {what}" for what in (*FAMILIES, "steps")] if has_backend("triton", "encode") else []
        return [*triton, "torch ops", "torch steps"]
    return [n for n in NAMES[1:] if all(has_backend(n, family) for family in ("encode", "decode"))]


def part_checks(
    part: str, device: torch.device, shapes: list[tuple[int, int, int, int]], seed: int
) -> Iterator[tuple[str, str | None]]:
    """(name, problem or None) of each check of a part."""
    backend, _, what = part.partition(" ")
    if what != "steps":
        yield from op_checks(backend, device, shapes, seed, (what,) if what in FAMILIES else FAMILIES)
    if what in ("steps", ""):
        for activation, (name, check) in itertools.product(("topk", "batch_topk"), step_checks(device).items()):
            yield (
                f"{name} {backend} {activation}",
                outcome(backend, lambda c=check, a=activation: c(device, a, seed)),
            )


def checks(
    device: torch.device, shapes: list[tuple[int, int, int, int]], seed: int
) -> Iterator[tuple[str, str | None]]:
    """All parts, in this process."""
    for part in parts(device):
        yield from part_checks(part, device, shapes, seed)


Step = Callable[[Tensor, Tensor], Tensor]


def step_checks(device: torch.device) -> dict[str, Callable[[torch.device, Any, int], None]]:
    checks = {"compiled step": check_compiled}
    if device.type == "cuda":
        checks |= {"step without a wait": check_no_wait, "step in a CUDA graph": check_capture}
    return checks


SHAPE = TranscoderConfig(96, 80, 512, 12, widths=[64, 256, 512])


def a_run(device: torch.device, activation: Any, seed: int, shape: TranscoderConfig = SHAPE) -> tuple[Transcoder, Step]:
    """A model and one training step of it, under autocast as in a run: equal for equal seeds."""
    model = Transcoder(replace(shape, activation=activation), seed=seed, device=device)
    optimizer = make_optimizer(model.train(), TrainingSection(), 1e-3)
    for group in optimizer.param_groups:
        group["capturable"] = device.type == "cuda"

    def step(x: Tensor, y: Tensor) -> Tensor:
        # The cache of casts would keep tensors of a captured graph.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            loss = model.training_step(x, y).loss
        loss.backward()
        optimizer_step(model, optimizer, 1e-3, 1.0)
        return loss.detach()

    return model, step


def batches(device: torch.device, seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(128, 96, generator=g).to(device), torch.randn(128, 80, generator=g).to(device))
        for _ in range(number)
    ]


def same_state(what: str, one: Transcoder, other: Transcoder) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        if not torch.equal(value, theirs[name]):
            raise Mismatch(f"{what}: {name} differs from the eager step's")


def check_compiled(device: torch.device, activation: Any, seed: int) -> None:
    torch._dynamo.reset()
    (eager, _), (model, _) = a_run(device, activation, seed), a_run(device, activation, seed)
    # The graph runs the kernels of eager mode, so results are bitwise equal; Inductor would fuse operations and round
    # differently.
    compiled = torch.compile(lambda x, y: model.training_step(x, y).loss, fullgraph=True, backend="aot_eager")
    x, y = batches(device, seed, 1)[0]
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        want, got = eager.training_step(x, y).loss, compiled(x, y)
    want.backward()
    got.backward()
    grads = [[p.grad for p in m.parameters() if p.grad is not None] for m in (eager, model)]
    same_bits("compiled gradients", *grads)
    same_state("compiled step", model, eager)


def check_no_wait(device: torch.device, activation: Any, seed: int) -> None:
    _, step = a_run(device, activation, seed)
    first, second = batches(device, seed, 2)
    step(*first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Step, x: Tensor, y: Tensor, warm: list[tuple[Tensor, Tensor]]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The step on (x, y) as a graph, and its loss, after the warm-up batches went through x and y."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in warm:
            x.copy_(batch[0])
            y.copy_(batch[1])
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)
    return graph, loss


def check_capture(device: torch.device, activation: Any, seed: int) -> None:
    (eager, step), (model, captured_step) = a_run(device, activation, seed), a_run(device, activation, seed)
    warm, fresh = batches(device, seed, 3), batches(device, seed + 1, 4)
    x, y = (t.clone() for t in warm[0])
    graph, loss = capture(captured_step, x, y, warm)
    for batch in warm:
        step(*batch)
    same_state("warm-up", model, eager)
    for batch in fresh:
        x.copy_(batch[0])
        y.copy_(batch[1])
        graph.replay()
        same_bits("loss of a replayed step", [loss], [step(*batch)])
        same_state("replayed step", model, eager)


def step_times(device: torch.device, activation: Any, size: tuple[int, int, int, int], seed: int) -> dict[str, float]:
    """Milliseconds a step, launched one operation after the other and, on a GPU, replayed as one graph: `host`, until the last
    launch returns, and `step`, until the device has done all."""
    rows, d, latents, k = size
    shape = TranscoderConfig(d, d, latents, k, widths=[latents // 8, latents // 2, 7 * latents // 8, latents])
    _, step = a_run(device, activation, seed, shape)
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=g).to(device) for _ in range(2))
    found = {}
    for how in ("eager", "graph") if device.type == "cuda" else ("eager",):
        call: Callable[[], object] = lambda: step(x, y)  # noqa: E731
        if how == "graph":
            call = capture(step, x, y, [(x.clone(), y.clone())])[0].replay
        for _ in range(3):
            call()
        wait(device)
        start = time.perf_counter()
        for _ in range(TIMED_STEPS):
            call()
        launched = time.perf_counter()
        wait(device)
        for name, end in (("host", launched), ("step", time.perf_counter())):
            found[f"{how} {name} ms"] = round(1e3 * (end - start) / TIMED_STEPS, 4)
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tell_times(device: torch.device, sizes: dict[str, tuple[int, int, int, int]], seed: int) -> None:
    """The process of stage `graph`."""
    for activation, (name, size) in itertools.product(("topk", "batch_topk"), sizes.items()):
        start, measured = time.monotonic(), dict[str, float]()
        timed = lambda a=activation, s=size, m=measured: m.update(step_times(device, a, s, seed))  # noqa: E731
        problem = outcome("triton" if device.type == "cuda" else "torch", timed)
        found = {"check": f"{activation} {name}", "problem": problem, "measured": measured}
        print(json.dumps(found | {"seconds": round(time.monotonic() - start, 2)}), flush=True)
    print(json.dumps({"ended": True}), flush=True)


def tell(part: str, device: torch.device, shapes: list[tuple[int, int, int, int]], seed: int) -> None:
    """The process of one part: a JSON object a line as each check ends."""
    start = time.monotonic()
    for name, problem in part_checks(part, device, shapes, seed):
        seconds, start = time.monotonic() - start, time.monotonic()
        print(json.dumps({"check": name, "problem": problem, "seconds": round(seconds, 2)}), flush=True)
        if problem is not None and "CUDA error" in problem:
            break  # later results are not reliable
    print(json.dumps({"ended": True}), flush=True)


def have_pytest() -> bool:
    return importlib.util.find_spec("pytest") is not None


def hear_interrupts() -> None:
    """Handle SIGINT again: a shell's background processes and their children ignore it, and interrupted benchmarks would lose
    their rows."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ended(process: subprocess.Popen[Any], limit: float, ask: int | None = None) -> bool:
    """Wait for it. At its limit the process, with all that it started, is asked by a signal, then killed, then left behind."""
    for number, seconds in ((ask, limit), (signal.SIGKILL, GRACE), (None, GRACE)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return seconds is limit
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
    return False


def run_part(words: list[str], limit: float, **environment: str) -> dict[str, Any]:
    """Run a process of `tell`: returns the number of passed checks, the failures, the slowest three, and an abnormal end."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        in_time = ended(process, limit)
        lines, log = (file.seek(0) or file.read().splitlines() for file in (said, errors))
    found: list[dict[str, Any]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    done = [f for f in found if "check" in f]
    result: dict[str, Any] = {
        "passed": sum(f["problem"] is None for f in done),
        "failed": {f["check"]: f["problem"] for f in done if f["problem"] is not None},
        "seconds": round(time.monotonic() - start, 1),
        "slowest": {f["check"]: f["seconds"] for f in sorted(done, key=lambda f: -f["seconds"])[:3]},
        "exit": process.returncode,
    }
    measured = {f["check"]: f["measured"] for f in done if f.get("measured")}
    if measured:
        result["measured"] = measured
    if not (found and "ended" in found[-1]):
        how = f"exit {process.returncode}" if in_time else f"stopped after {limit:.0f} s"
        result["unfinished"] = f"{how}, after {done[-1]['check'] if done else 'its start'}"
        result["log"] = "\n".join([*log, *lines])[-2000:]
    return result


def green(results: dict[str, Any]) -> bool:
    """Whether every part of a stage ended and nothing failed."""
    return "skipped" in results or all(
        not r["failed"] and "unfinished" not in r and r["exit"] == 0 for r in results.values()
    )


class Check:
    """One run of the command: its results so far and its time limit."""

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        self.device, self.args = device, args
        self.deadline = time.monotonic() + 60 * args.minutes
        self.out = args.out or ROOT / "bench" / "results" / "native" / f"{machine.slug()}.json"
        about = {"device": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(self.out.read_text(encoding="utf-8"))
        same = all(before.get(key) == value for key, value in about.items())
        kept = {s: before[s] for s in STAGES if same and s in before and s not in args.only}
        self.found: dict[str, Any] = {**about, "seed": args.seed, **kept}

    def limit(self, stage: str) -> float:
        """Seconds that a part of this stage has."""
        return max(1.0, min(LIMITS.get(stage, 1e9), self.deadline - time.monotonic()))

    def note(self, stage: str, name: str | None, result: Any) -> None:
        """Record a result and write the file at once."""
        if name is None:
            self.found[stage] = result
        else:
            self.found.setdefault(stage, {})[name] = result
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out)

    def run(self, stage: str, commands: dict[str, list[str]], **environment: str) -> None:
        """Run parts in parallel; each is printed and recorded as it ends."""
        side_by_side = max(1, min(8, (os.cpu_count() or 1) // 2)) if self.device.type == "cuda" else 1
        with ThreadPoolExecutor(side_by_side) as pool:
            running = {
                pool.submit(lambda w=words: run_part(w, self.limit(stage), **environment)): name
                for name, words in commands.items()
            }
            for future in as_completed(running):
                name, result = running[future], future.result()
                for check, problem in result["failed"].items():
                    print(f"FAILED {check}: {problem}")
                count = result["passed"] + len(result["failed"])
                how = result.get("unfinished", "done")
                print(
                    f"{stage} {name}: {result['passed']} of {count} passed, {result['seconds']} s, {how}",
                    flush=True,
                )
                self.note(stage, name, result)

    def words(self, part: str, *prefix: str, small: bool = False) -> list[str]:
        command = [*prefix, sys.executable, "-m", "bench.gpu_check", "--part", part, "--seed", str(self.args.seed)]
        return [*command, *(["--quick"] if small or self.args.quick else [])]

    def checks(self) -> None:
        self.run("checks", {part: self.words(part) for part in parts(self.device)})

    def verdicts(self) -> None:
        """Verdicts of all families, in parallel; the checks have filled Triton's cache on disk."""
        if self.device.type != "cuda":
            return self.note("verdicts", None, {"skipped": "no GPU"})
        device = torch.device("cuda", torch.cuda.current_device())
        with ThreadPoolExecutor(len(FAMILIES)) as pool:
            limit = self.limit("verdicts")
            for family, verdict in zip(FAMILIES, pool.map(lambda f: proof(f, device, limit), FAMILIES), strict=True):
                print(f"verdict {verdict}", flush=True)
                self.note("verdicts", family, asdict(verdict))
        return None

    def graph(self) -> None:
        if self.device.type != "cuda":
            return self.note("graph", None, {"skipped": "no GPU"})
        return self.run("graph", {"triton step": self.words("graph")})

    def checker(self) -> None:
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if self.device.type != "cuda" or program is None:
            why = "no GPU" if self.device.type != "cuda" else "compute-sanitizer is not installed"
            return self.note("checker", None, {"skipped": why})
        commands = {
            f"{tool} triton {family}": self.words(
                f"triton {family}", program, "--tool", tool, "--error-exitcode", "9", small=True
            )
            for tool, family in itertools.product(("memcheck", "racecheck"), FAMILIES)
        }
        # One allocation a tensor: inside the caching allocator's blocks no access is out of bounds.
        return self.run("checker", commands, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def benchmarks(self) -> None:
        bad = [s for s in ("checks", "checker") if not green(self.found.get(s, {}))]
        if bad and len(self.args.only) > 1:
            why = f"not after {' and '.join(bad)} that failed; --only benchmarks runs them all the same"
            return self.note("benchmarks", None, {"skipped": why})
        if not have_pytest():
            return self.note("benchmarks", None, {"ended": NO_PYTEST})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            words = [sys.executable, "-m", "pytest", "bench", "-q", f"--bench-json={file}", "-p", "no:cacheprovider"]
            process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
            # After SIGINT, pytest still writes the rows measured so far.
            in_time = ended(process, self.limit("benchmarks"), signal.SIGINT)
            rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        how = f"exit {process.returncode}" if in_time else STOPPED
        return self.note("benchmarks", None, {"ended": how, **rows})


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=lambda words: words.split(","), default=STAGES, help="stages, commas between")
    parser.add_argument("--minutes", type=float, default=9.0, help="parts that have not ended by then are stopped")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/native/<device>.json)")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not set(args.only) <= set(STAGES):
        parser.error(f"--only: expected of {', '.join(STAGES)}, got {', '.join(args.only)}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if args.part == "graph":
        tell_times(device, STEP_SIZES, args.seed)
        return 0
    if args.part is not None:
        tell(args.part, device, SMALL if args.quick or not cuda else SHAPES, args.seed)
        return 0
    hear_interrupts()
    print(f"{machine.name()}, {machine.versions()}, seed {args.seed}", flush=True)
    if "benchmarks" in args.only and not have_pytest():
        print(f"benchmarks: {NO_PYTEST}", flush=True)
    check = Check(device, args)
    for stage in STAGES:
        if stage in args.only:
            getattr(check, stage)()
    print(f"written: {check.out}")
    measured = check.found.get("benchmarks", {}) if "benchmarks" in args.only else {}
    # Stopped at the time limit they have written what they had.
    broken = measured.get("ended", "exit 0") not in ("exit 0", STOPPED)
    if broken:
        print(f"FAILED benchmarks: {measured['ended']}", flush=True)
    return int(broken or not all(green(check.found.get(stage, {})) for stage in ("checks", "graph", "checker")))


if __name__ == "__main__":
    sys.exit(main())
