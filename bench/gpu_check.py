"""One command for a machine with a GPU: every op natively against its reference, then the benchmarks, one JSON.

    python -m bench.gpu_check [--out FILE] [--quick] [--seed N]

1. Each op, each backend that this device has, each dtype, fresh inputs (the seed is printed and recorded), forward and
   gradients against the float64 reference, and twice for bitwise equality.
2. Whole training steps, each backend: compiled in one graph they are the eager step bit for bit; on a GPU they run without
   one wait for it, and captured in a CUDA graph and replayed on new batches they are again the eager step bit for bit.
3. The memory and race checker (`compute-sanitizer`, where it is installed) over the same checks on small shapes.
4. `pytest bench/`, its figures taken into the JSON.

Writes bench/results/<device>.json. Exit status 1 if any check failed; benchmarks run only after green checks. Without a GPU
it does the same on the CPU (no checker), so that the command itself stays tested.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.config import TrainingSection
from transcoder.kernels.backend import NAMES, has_backend
from transcoder.kernels.conformance import SHAPES, SMALL, Mismatch, op_checks, outcome, same_bits
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step

ROOT = Path(__file__).resolve().parent.parent


def checks(
    device: torch.device, shapes: list[tuple[int, int, int, int]], seed: int, steps: bool = True
) -> Iterator[tuple[str, str | None]]:
    """(name, None or what went wrong) of each check."""
    backends = [n for n in NAMES[1:] if all(has_backend(n, family) for family in ("encode", "decode"))]
    if device.type == "cuda":
        backends = [n for n in backends if n != "cpp"]
    for backend in backends:
        yield from op_checks(backend, device, shapes, seed)
    for backend, activation in itertools.product(backends, ("topk", "batch_topk") if steps else ()):
        for part, check_step in step_checks(device).items():
            name = f"{part} {backend} {activation}"
            yield name, outcome(backend, lambda c=check_step, a=activation: c(device, a, seed))


Step = Callable[[Tensor, Tensor], Tensor]


def step_checks(device: torch.device) -> dict[str, Callable[[torch.device, Any, int], None]]:
    checks = {"compiled step": check_compiled}
    if device.type == "cuda":
        checks |= {"step without a wait": check_no_wait, "step in a CUDA graph": check_capture}
    return checks


def a_run(device: torch.device, activation: Any, seed: int) -> tuple[Transcoder, Step]:
    """A model and one training step of it, under autocast as in a run: equal for equal seeds."""
    widths = [64, 256, 512]
    model = Transcoder(
        TranscoderConfig(96, 80, 512, 12, activation=activation, widths=widths), seed=seed, device=device
    )
    optimizer = make_optimizer(model.train(), TrainingSection(), 1e-3)
    for group in optimizer.param_groups:
        group["capturable"] = device.type == "cuda"

    def step(x: Tensor, y: Tensor) -> Tensor:
        # The cache of casts would keep what belongs to a graph.
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
    # The kernels that eager mode runs, behind one graph: so to the bit. Inductor fuses what lies between and rounds otherwise.
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


def check_capture(device: torch.device, activation: Any, seed: int) -> None:
    (eager, step), (model, captured_step) = a_run(device, activation, seed), a_run(device, activation, seed)
    warm, fresh = batches(device, seed, 3), batches(device, seed + 1, 4)
    x, y = (t.clone() for t in warm[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in warm:
            x.copy_(batch[0])
            y.copy_(batch[1])
            captured_step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    for batch in warm:
        step(*batch)
    same_state("warm-up", model, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured_step(x, y)
    for batch in fresh:
        x.copy_(batch[0])
        y.copy_(batch[1])
        graph.replay()
        same_bits("loss of a replayed step", [loss], [step(*batch)])
        same_state("replayed step", model, eager)


def sanitizer(seed: int) -> dict[str, Any]:
    """compute-sanitizer over the checks on small shapes, one entry a tool."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_check"]
        run = subprocess.run(
            [*command, "--checks-only", "--quick", "--ops-only", "--seed", str(seed)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        found[tool] = {"exit": run.returncode, "tail": run.stdout[-1000:]}
    return found


def benchmarks() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", f"--benchmark-json={file}", "-p", "no:cacheprovider"]
        run = subprocess.run(command, cwd=ROOT, text=True)
        if not file.is_file():
            raise RuntimeError(f"pytest bench/ ended with {run.returncode} and wrote no figures")
        rows = json.loads(file.read_text())["benchmarks"]
    keep = ("min", "median", "max", "stddev", "rounds")
    return [{"name": r["name"], **{k: r["stats"][k] for k in keep}, **r["extra_info"]} for r in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/<device>.json)")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--checks-only", action="store_true", help="no checker, no benchmarks, no file")
    parser.add_argument(
        "--ops-only", action="store_true", help="no whole steps (they compile, which a checker slows down)"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    title = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU {torch.get_num_threads()} threads"
    print(f"{title}, torch {torch.__version__}, seed {args.seed}")
    failures, count = {}, 0
    for name, problem in checks(device, SMALL if args.quick or not cuda else SHAPES, args.seed, not args.ops_only):
        count += 1
        if problem is not None:
            failures[name] = problem
            print(f"FAILED {name}: {problem}")
    print(f"{count - len(failures)} of {count} checks passed")
    if args.checks_only:
        return bool(failures)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "device": title,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "seed": args.seed,
        "checks": {"passed": count - len(failures), "failed": failures},
        "sanitizer": sanitizer(args.seed) if cuda else {"skipped": "no GPU"},
        "benchmarks": [] if failures else benchmarks(),
    }
    out = args.out or ROOT / "bench" / "results" / f"{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
