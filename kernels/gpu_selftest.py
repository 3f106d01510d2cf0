"""Checks of a device's kernels against their references, and the verdict that backend `auto` uses.

The checks: every op family against its float64 reference on fresh inputs, forward and gradients, twice for bitwise equality.
`bench.gpu_check` reports them, `bench.autotune` runs them before it times a launch choice.

The verdict: kernels that a compiler accepts can still be wrong on a chip or under a compiler that was never tried. So before
`auto` uses a family's Triton kernels on a GPU for the first time, a separate process runs the family's checks there: an illegal
access or a hang cannot affect this process. The verdict is kept in the user's cache, under the chip, the versions of torch and
triton, and the kernels' sources. Without a good verdict `auto` uses backend `torch` and says so. The check also fills Triton's
cache on disk, so most of its time is saved in the first step.

`TRANSCODER_BACKEND=triton` or `torch` chooses without a check.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.adam.op import AdamUpdate, adam_step, one_op_for
from transcoder.kernels.adam.reference import AdamStep, adam_step_reference
from transcoder.kernels.backend import use_backend
from transcoder.kernels.correlation.op import FeatureCorrelation
from transcoder.kernels.correlation.reference import correlation_reference
from transcoder.kernels.decode.op import nested_loss, sparse_decode
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference
from transcoder.kernels.encode.op import batch_topk_encode, threshold_encode, topk_encode
from transcoder.kernels.extension import RETRY_AFTER, cache_folder, only_one, passes
from transcoder.kernels.sparse_codes import SparseCodes
from transcoder.kernels.triton_support import interpreted

FAMILIES = ("encode", "decode", "correlation", "adam")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 8, 16, 1), (33, 64, 257, 7), (128, 256, 2048, 32), (257, 130, 1000, 100), (64, 2304, 4096, 48)]
"""(B, d, d_sae, k): one row, odd sizes, one of several tiles, k large, the width of a real model."""
SMALL = SHAPES[:2]
WIDEST_COUNTED = 2048
"""Latents up to which all pairs are compared with a dense correlation."""

SECONDS = 600.0
"""Time limit of a check in seconds. Nearly all of the time is compilation; about a minute is expected, not measured."""
GRACE = 10.0
"""Seconds to wait until a killed check has exited."""


@dataclass(frozen=True)
class Verdict:
    """The result of the checks of one op family on one kind of device."""

    family: str
    device: str
    passed: int
    """Number of checks that passed."""
    problem: str | None
    """None if all passed, else the first failure, or how the process ended."""
    seconds: float
    file: str | None = None
    """The cached verdict; delete the file to check again."""

    @property
    def good(self) -> bool:
        return self.problem is None and self.passed > 0

    def __str__(self) -> str:
        how = f"{self.passed} checks passed" if self.good else f"failed: {self.problem}"
        return f"{self.family} on {self.device}: {how}"


def proven(family: str, device: torch.device) -> bool:
    """Whether `auto` may run an op family on this CUDA device by Triton. False where Triton interprets."""
    return not interpreted() and _proof_here(family, device).good


def why_not(family: str, device: torch.device) -> str:
    """The reason of a `proven` that is False."""
    return "TRITON_INTERPRET is set" if interpreted() else str(_proof_here(family, device))


def _proof_here(family: str, device: torch.device) -> Verdict:
    return proof(family, torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


@functools.cache
def proof(family: str, device: torch.device, seconds: float = SECONDS, small: bool = False) -> Verdict:
    """The cached verdict of this device; without one, run the checks (other processes wait for the first).

    Args:
        family: `encode`, `decode`, `correlation` or `adam`.
        device: where the checks run.
        seconds: time limit of the checking process.
        small: small shapes only.
    """
    name = _device_name(device)
    file = cache_folder() / "native" / f"{family}-{_key(name, small)}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with only_one(file.with_suffix(".lock")):
            kept = _read(file)
            if kept is None:
                said = f"transcoder: checking the Triton kernels of {family} natively on {name} (once)"
                print(said, file=sys.stderr, flush=True)
                kept = _check(family, device, name, seconds, small, file)
                # A GPU that other processes occupy, a kill, a full disk: they say nothing about the kernels.
                if not passes(kept.problem or ""):
                    _write(file, kept)
    except OSError as error:
        # Without a cache every process would run the checks, which costs too much: Triton is not used.
        kept = Verdict(family, name, 0, f"cannot write a verdict: {error}", 0.0)
    if not kept.good:
        print(f"transcoder: backend auto does not use Triton: {kept}", file=sys.stderr, flush=True)
    return kept


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _key(name: str, small: bool) -> str:
    """Everything that the verdict depends on."""
    import triton  # with a torch for AMD its package has another name, the module does not

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
    # The child process imports this package, installed or not.
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
        except BaseException:
            child.kill()
            raise
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
    """The exception that ended the child process, without the advice that CUDA prints after it, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"[\w.]*Error: ", line)] or lines
    return said[-1][:300] if said else "no message"


def _read(file: Path) -> Verdict | None:
    """The cached verdict; None if there is none, if it cannot be read, or if it failed long ago and the reason may be gone."""
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


class Mismatch(AssertionError):
    """An op's result differs from its reference."""


def op_checks(
    backend: str,
    device: torch.device,
    shapes: list[tuple[int, int, int, int]],
    seed: int,
    families: tuple[str, ...] = FAMILIES,
) -> Iterator[tuple[str, str | None]]:
    """(name, problem or None) of each check of the families, every dtype and shape."""
    g = torch.Generator().manual_seed(seed)
    for dtype, (rows, d, d_sae, k) in itertools.product(DTYPES, shapes):
        x, W = torch.randn(rows, d, generator=g), torch.randn(d_sae, d, generator=g) / math.sqrt(d)
        b, y = 0.1 * torch.randn(d_sae, generator=g), torch.randn(rows, d, generator=g)
        x, W, b, y = (t.to(device, dtype) for t in (x, W, b, y))
        for part, check in _parts(x, W, b, y, k, families).items():
            yield f"{part} {backend} {str(dtype)[6:]} B{rows} d{d} N{d_sae} k{k}", outcome(backend, check)


def outcome(backend: str, check: Callable[[], None]) -> str | None:
    """None if `check` passes on `backend`, else the problem."""
    try:
        with use_backend(backend):
            check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _parts(
    x: Tensor, W: Tensor, b: Tensor, y: Tensor, k: int, families: tuple[str, ...]
) -> dict[str, Callable[[], None]]:
    def codes() -> SparseCodes:
        with use_backend("torch"):
            return batch_topk_encode(x, W, b, k).detach()

    parts: dict[str, Callable[[], None]] = {}
    if "encode" in families:
        parts |= {
            "topk_encode": lambda: check_encode(topk_encode, k, x, W, b),
            "batch_topk_encode": lambda: check_encode(batch_topk_encode, k, x, W, b),
            "threshold_encode": lambda: check_encode(threshold_encode, 1.0, x, W, b),
        }
    if "decode" in families:
        parts["decode"] = lambda: check_decode(codes(), W, W.new_zeros(W.shape[1]), y.float())
    if "correlation" in families and x.dtype == torch.float32 and W.shape[0] <= WIDEST_COUNTED:
        parts |= {
            "correlation": lambda: check_correlation(codes()),
            "correlation sketch": lambda: check_sketch(codes()),
        }
    if "adam" in families and x.dtype == torch.float32:
        parts["optimizer step"] = lambda: check_step([W, b, torch.nn.functional.normalize(W), x[0]])
    return parts


def expect_close(what: str, got: Tensor, want: Tensor, length: int, unit: float) -> None:
    """Off by at most 8 standard deviations of the rounding of a sum of `length` terms in units of eps = `unit`."""
    got, want = got.double(), want.double()
    scale = float(want.abs().max()) if want.numel() else 0.0
    worst = float((got - want).abs().max()) if want.numel() else 0.0
    allowed = 8 * unit * math.sqrt(max(1, length)) * max(scale, 1.0)
    if not worst <= allowed:
        raise Mismatch(f"{what}: off by {worst:.3e}, allowed {allowed:.3e}")


def same_bits(what: str, first: list[Tensor], second: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(a, b):
            raise Mismatch(f"{what}: result {i} differs between two equal calls")


def check_encode(op: Callable[..., SparseCodes], argument: Any, x: Tensor, W: Tensor, b: Tensor) -> None:
    """Check that every selected value is right and that no activation that was left out is larger."""
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    codes = op(*leaves, argument)
    unit = torch.finfo(torch.float32).eps
    pre = x.double() @ W.double().T + b.double()
    rows = codes.rows()
    at = pre[rows, codes.indices].clamp_min(0)
    expect_close("values", codes.values.detach(), at, x.shape[1], unit)
    kept = torch.zeros_like(pre, dtype=torch.bool)
    kept[rows, codes.indices] = True
    if int(kept.sum()) != codes.nnz:
        raise Mismatch("an entry is listed twice")
    slack = 8 * unit * math.sqrt(x.shape[1]) * float(pre.abs().max())
    left_out = torch.where(kept, torch.zeros_like(pre), pre.clamp_min(0))
    if op is topk_encode and argument < pre.shape[1]:
        smallest = codes.values.detach().double().view(len(x), -1).min(1).values
        if bool((left_out.max(1).values > smallest + slack).any()):
            raise Mismatch("a larger activation was left out of a row")
    if op is batch_topk_encode and float(left_out.max()) > float(codes.values.detach().min()) + slack:
        raise Mismatch("a larger activation was left out of the batch")
    if op is threshold_encode and bool((left_out > argument + slack).any()):
        raise Mismatch("an activation above the threshold was left out")
    weight = torch.randn_like(codes.values)
    grads = torch.autograd.grad((codes.values * weight).sum(), leaves)
    dense = torch.zeros_like(pre)
    dense[rows, codes.indices] = torch.where(codes.values > 0, weight, 0 * weight).double()
    wants = (dense @ W.double(), dense.T @ x.double(), dense.sum(0))
    for name, got, want in zip(("dx", "dW_enc", "db_enc"), grads, wants, strict=True):
        grad_unit = max(unit, torch.finfo(got.dtype).eps)
        expect_close(name, got, want, max(x.shape[0], x.shape[1]), grad_unit)
    again = op(*leaves, argument)
    same_bits("encode", [codes.values, codes.indices], [again.values, again.indices])
    same_bits("encode gradients", list(grads), list(torch.autograd.grad((again.values * weight).sum(), leaves)))


def check_decode(codes: SparseCodes, W: Tensor, b: Tensor, y: Tensor) -> None:
    """`nested_loss` over three prefixes and `sparse_decode`, with their gradients."""
    d_sae = codes.shape[1]
    widths = sorted({max(1, d_sae // 8), max(1, d_sae // 2), d_sae})
    unit = torch.finfo(torch.float32).eps

    def run() -> list[Tensor]:
        values, W_, b_ = (t.detach().clone().requires_grad_() for t in (codes.values, W, b))
        mine = codes.with_values(values)
        loss = nested_loss(mine, W_, b_, y, widths, [1.0] * len(widths))
        out = sparse_decode(mine, W_, b_)
        grads = torch.autograd.grad(loss.value + (out * out).mean(), (values, W_, b_))
        return [loss.per_prefix.detach(), loss.residual, out.detach(), *grads]

    got = run()
    same_bits("decode", got, run())
    z = codes.to_dense().detach().double().requires_grad_()
    W64, b64 = W.double().requires_grad_(), b.double().requires_grad_()
    losses, residual = nested_loss_reference(z, W64, b64, y.double(), widths)
    out = sparse_decode_reference(z, W64, b64)
    grads = torch.autograd.grad(losses.sum() + (out * out).mean(), (z, W64, b64))
    grads = (grads[0][codes.rows(), codes.indices], *grads[1:])
    names = ("losses", "residual", "y_hat", "d values", "dW_dec", "db_dec")
    for name, mine, want in zip(names, got, (losses, residual, out, *grads), strict=True):
        mine_unit = max(unit, torch.finfo(mine.dtype).eps)
        expect_close(name, mine, want.detach(), d_sae + y.numel(), mine_unit)


def check_correlation(codes: SparseCodes) -> None:
    """Exact statistics of two updates, one of them masked, and the pairs above a threshold: none missing, none too many."""
    d_sae = codes.shape[1]
    mask = torch.arange(codes.shape[0], device=codes.device) % 3 != 1
    z = codes.to_dense().detach()
    want = correlation_reference(torch.cat([z, z[mask]])).correlation
    i, j = torch.triu_indices(d_sae, d_sae, 1, device=codes.device)

    def run() -> FeatureCorrelation:
        monitor = FeatureCorrelation(d_sae, device=codes.device)
        monitor.update(codes)
        monitor.update(codes, mask)
        return monitor

    got = run().correlation(i, j)
    expect_close("correlation", got, want[i, j], 1, 1e-6)
    same_bits("correlation", [got], [run().correlation(i, j)])
    _check_pairs("pairs", run(), want, 0.5)


def check_sketch(codes: SparseCodes) -> None:
    """The correlation of each pair that the sketch proposes is exact, and equal calls give equal bits."""
    d_sae = codes.shape[1]
    want = correlation_reference(codes.to_dense().detach()).correlation

    def run() -> FeatureCorrelation:
        monitor = FeatureCorrelation(d_sae, 128, device=codes.device)
        monitor.update(codes)
        return monitor

    _check_pairs("sketched pairs", run(), want, 0.9)
    i, j = torch.triu_indices(d_sae, d_sae, 1, device=codes.device)
    first, second = run().correlation(i, j), run().correlation(i, j)
    same_bits("estimates", [first], [second])
    # Standard deviation (1 - r^2) / sqrt(128) each; the mean of many, without those that never fired.
    alive = (want.diagonal()[i] > 0) & (want.diagonal()[j] > 0)
    error = (first.double() - want[i, j].double())[alive]
    if error.numel() > 100 and not float(error.square().mean().sqrt()) < 2 / math.sqrt(128):
        raise Mismatch(f"estimates: off by {float(error.square().mean().sqrt()):.3f} (root mean square)")


def check_step(parameters: list[Tensor]) -> None:
    """Three steps of Adam, clipped, the third parameter's rows of unit length; then one with a NaN, which changes nothing."""

    def run() -> list[Tensor]:
        ps = [p.detach().clone() for p in parameters]
        module = one_op_for(_with_gradients(ps, 0))
        if module is None:
            return []  # backend `torch` leaves the step to torch.optim.Adam
        first, second = ([torch.zeros_like(p) for p in ps] for _ in range(2))
        steps = [torch.zeros((), device=p.device) for p in ps]
        bad = torch.zeros((), dtype=torch.bool, device=ps[0].device)
        by: dict[str, Any] = {"unit_rows": 2, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "max_norm": 1.0}
        for step in (1, 2, 3):
            gradients = [p.grad for p in _with_gradients(ps, step) if p.grad is not None]
            want = adam_step_reference(ps, gradients, first, second, step, **by)
            norm = adam_step(module, AdamUpdate(ps, first, second, steps, bad=bad, **by))
            unit = torch.finfo(torch.float32).eps
            expect_close("norm", norm, want.norm, sum(p.numel() for p in ps), unit)
            for name, mine, exact in zip(AdamStep._fields, (ps, first, second), want[:3], strict=False):
                for number, (a, b) in enumerate(zip(mine, exact, strict=True)):
                    # Adam divides by the root of the second moment, which amplifies the rounding of small numbers.
                    # Moments are compared relative to their own size: an absolute tolerance would accept any small ones.
                    size = 1.0 if mine is ps else max(float(b.abs().max()), torch.finfo(torch.float32).tiny)
                    expect_close(f"{name}[{number}]", a.double() / size, b / size, 64, unit)
        before = [t.clone() for t in (*ps, *first, *second, *steps)]
        _with_gradients(ps, 4)[0].grad[0] = float("nan")  # type: ignore[index]
        adam_step(module, AdamUpdate(ps, first, second, steps, bad=bad, **by))
        if not bool(bad):
            raise Mismatch("a NaN in a gradient was not seen")
        same_bits("a step with a NaN", before, [*ps, *first, *second, *steps])
        return before

    same_bits("optimizer step", run(), run())


def _with_gradients(parameters: list[Tensor], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g).to(p.device) * 10.0**-seed
    return parameters


def _check_pairs(what: str, monitor: FeatureCorrelation, want: Tensor, above: float) -> None:
    """Every pair clearly above the threshold is listed, none that is clearly below, and each with its correlation."""
    found = monitor.pairs(above, 1)
    expect_close(f"{what}: correlation", found.correlation, want[found.i, found.j], 1, 1e-5)
    listed = torch.zeros_like(want, dtype=torch.bool)
    listed[found.i, found.j] = True
    upper = torch.ones_like(listed).triu(1)
    if bool((listed & ~upper).any()) or int(listed.sum()) != len(found.i):
        raise Mismatch(f"{what}: a pair is listed twice or not as i < j")
    missing = (want > above + 1e-5) & upper & ~listed
    if bool(missing.any()):
        i, j = missing.nonzero()[0].tolist()
        raise Mismatch(f"{what}: ({i}, {j}) of correlation {float(want[i, j]):.4f} is missing")
    if bool((want[found.i, found.j] < above - 1e-5).any()):
        raise Mismatch(f"{what}: a pair below the threshold is listed")


def main(words: list[str]) -> None:
    """The child process: print one JSON object a line as each check ends, so that the parent knows the last one before a
    crash."""
    family, device, *small = words
    found: list[dict[str, Any]] = []
    for check, problem in op_checks("triton", torch.device(device), SMALL if small else SHAPES, 0, (family,)):
        found.append({"check": check, "problem": problem})
        print(json.dumps(found[-1]), flush=True)
        if problem is not None and "CUDA error" in problem:
            break  # later results are not reliable
    print(json.dumps({"passed": sum(f["problem"] is None for f in found)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
