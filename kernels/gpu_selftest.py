"""Whether this machine's GPU runs the Triton kernels right: checked natively, once, before backend `auto` uses them.

Kernels that a compiler accepts can still be wrong on a chip or under a compiler that nobody has tried. So the first time that
`auto` would use a family of them, a process of its own runs the family's checks (`conformance`) on that GPU: an illegal
access or a hang there cannot hurt this process. The verdict is kept in the user's cache, under the chip, the versions of
torch and triton, and the kernels' sources. Without a good verdict `auto` uses backend `torch` and says so. The check also fills
Triton's cache on disk, so its seconds are mostly those that the first step would have waited.

`TRANSCODER_BACKEND=triton` or `torch` chooses without a check.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from transcoder.kernels.extension import RETRY_AFTER, cache_folder, only_one
from transcoder.kernels.triton_support import interpreted

SECONDS = 600.0
"""A check that has not ended by then has failed. Compiling takes nearly all of it: about a minute is expected, not measured."""
GRACE = 10.0
"""Seconds that a killed check is given to end; then it is left behind."""
_OF_THE_MOMENT = ("out of memory", "busy or unavailable")
"""Says a GPU that others fill or hold: nothing about the kernels, so it is not kept for the next process."""


@dataclass(frozen=True)
class Verdict:
    """What the check of one family on one kind of device said."""

    family: str
    device: str
    passed: int
    """Checks that passed."""
    problem: str | None
    """None where all did, else the first that did not, or how the process ended."""
    seconds: float
    file: str | None = None
    """Where it is kept; delete it to check again."""

    @property
    def good(self) -> bool:
        return self.problem is None and self.passed > 0

    def __str__(self) -> str:
        how = f"{self.passed} checks passed" if self.good else f"failed: {self.problem}"
        return f"{self.family} on {self.device}: {how}"


def proven(family: str, device: torch.device) -> bool:
    """Whether `auto` may run an op family on this CUDA device by Triton: False too where Triton only interprets."""
    if interpreted():
        return False
    return proof(family, torch.device("cuda", torch.cuda.current_device()) if device.index is None else device).good


@functools.cache
def proof(family: str, device: torch.device, seconds: float = SECONDS, small: bool = False) -> Verdict:
    """The verdict that is kept for this device, or the check, if there is none (other processes wait for the first).

    Args:
        family: `encode`, `decode`, `correlation` or `adam`.
        device: where the checks run.
        seconds: the process is killed after them.
        small: small shapes only.
    """
    name = _device_name(device)
    file = cache_folder() / "native" / f"{family}-{_key(name, small)}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with only_one(file.with_suffix(".lock")):
            kept = _read(file)
            if kept is None:
                print(
                    f"transcoder: checking the Triton kernels of {family} natively on {name} (once)",
                    file=sys.stderr,
                    flush=True,
                )
                kept = _check(family, device, name, seconds, small, file)
                if not any(words in (kept.problem or "") for words in _OF_THE_MOMENT):
                    _write(file, kept)
    except OSError as error:
        # No cache to write to. Without a verdict nothing is trusted, and a check by every process would cost too much.
        kept = Verdict(family, name, 0, f"no place to keep a verdict: {error}", 0.0)
    if not kept.good:
        print(f"transcoder: backend auto leaves Triton alone: {kept}", file=sys.stderr, flush=True)
    return kept


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _key(name: str, small: bool) -> str:
    """Everything that the verdict depends on."""
    import triton  # its package has other names beside a torch for AMD, this one everywhere

    digest = hashlib.sha256()
    for part in (name, torch.__version__, triton.__version__, sys.version, str(small)):
        digest.update(part.encode() + b"\0")
    here = Path(__file__).resolve().parent
    for source in sorted(here.rglob("*.py")):
        digest.update(source.relative_to(here).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _check(family: str, device: torch.device, name: str, seconds: float, small: bool, file: Path) -> Verdict:
    words = [
        sys.executable,
        "-m",
        "transcoder.kernels.gpu_selftest",
        family,
        str(device),
        *(["small"] if small else []),
    ]
    start = time.monotonic()
    log = file.with_suffix(".log")
    # The child imports this very package, installed or not.
    home = str(Path(sys.modules["transcoder"].__file__ or "").resolve().parent.parent)
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), home) if p)
    problem: str | None = None
    passed, ended, last = 0, False, "its start"
    with log.open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TRANSCODER_BACKEND": "triton"},
        )
        try:
            out, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            try:
                out, _ = child.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:  # held in the driver, or what it started keeps the pipe open
                out = ""
                child.stdout.close()  # type: ignore[union-attr]
            problem = f"not ended after {seconds:.0f} s"
    for line in out.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if "passed" in said:
                ended = True
            else:
                last = said["check"]
                passed += said["problem"] is None
                if said["problem"] is not None and problem is None:
                    problem = f"{said['check']}: {said['problem']}"
    if problem is None and not ended:
        problem = f"the process ended with {child.returncode} after {last}: {_last_words(log)}"
    return Verdict(family, name, passed, problem, time.monotonic() - start, str(file))


def _last_words(log: Path) -> str:
    """The exception that ended the child (CUDA's go on for lines of advice after it), else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"[\w.]*Error: ", line)] or lines
    return said[-1][:300] if said else "no message"


def _read(file: Path) -> Verdict | None:
    """None too for a verdict that cannot be read, and for a bad one of long ago: the reason may be gone."""
    try:
        verdict = Verdict(**json.loads(file.read_text(encoding="utf-8")))
        old = time.time() - file.stat().st_mtime > RETRY_AFTER
    except (OSError, ValueError, TypeError):
        return None
    return None if old and not verdict.good else verdict


def _write(file: Path, verdict: Verdict) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(verdict), indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def main(words: list[str]) -> None:
    """The child: one JSON object a line as each check ends, so that the parent knows the last one before a crash."""
    from transcoder.kernels.conformance import SHAPES, SMALL, op_checks

    family, device, *small = words
    found: list[dict[str, Any]] = []
    for check, problem in op_checks("triton", torch.device(device), SMALL if small else SHAPES, 0, (family,)):
        found.append({"check": check, "problem": problem})
        print(json.dumps(found[-1]), flush=True)
        if problem is not None and "CUDA error" in problem:
            break  # nothing after it can be believed
    print(json.dumps({"passed": sum(f["problem"] is None for f in found)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
