"""Times other launch choices on the GPU at hand and prints the best as frozen data to paste.

    python -m bench.autotune [--list] [--only NAME] [--rows 4096] [--d 2304] [--latents 18432] [--k 48]

Nothing chooses at run time: what this prints goes into the config files by hand, with its reason. Each candidate must first
agree with the op's float64 reference (kernels/gpu_selftest.py) and only then is timed: medians, the second-level
cache flushed before every call, all candidates of a choice in one session. `--list` shows the candidates anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from transcoder.kernels import FeatureCorrelation, gather_config, gpu_selftest, nested_loss, topk_encode, use_backend
from transcoder.kernels.correlation import config as correlation_config
from transcoder.kernels.decode import config as decode_config
from transcoder.kernels.encode import config as encode_config
from transcoder.kernels.encode.config import ProductLaunch
from transcoder.kernels.gather_config import Gather

ROUNDS, WARM_UP = 15, 3
CHECKED = (128, 256, 2048, 32)
"""B, d, N, k of the comparison with the reference: several row blocks and tiles, small enough for float64."""


@dataclass(frozen=True)
class Size:
    rows: int
    d: int
    latents: int
    k: int


@dataclass(frozen=True)
class Choice:
    """One launch choice: its candidates, how to apply one, its check and the work that is timed."""

    name: str
    place: str
    candidates: tuple[Any, ...]
    current: Any
    use: Callable[[Any], AbstractContextManager[Any]]
    check: Callable[[torch.device], None]
    work: Callable[[Size, torch.device], Callable[[], object]]


def choices(architecture: str) -> list[Choice]:
    """Every choice for an architecture (`sm_90`, ...)."""
    found = []
    for inputs, dtype in (("half", torch.bfloat16), ("float", torch.float32)):
        found.append(_product(architecture, inputs, dtype))
    for dtype in (torch.float32, torch.bfloat16):
        found.append(_gather(dtype))
    return [*found, _slab(), _pairs()]


def _product(architecture: str, inputs: str, dtype: torch.dtype) -> Choice:
    current = encode_config.product_launch(architecture, inputs)
    candidates = tuple(
        replace(
            current, rows=rows, latents=latents, depth=depth, warps=warps, stages=stages, described=described, reason=""
        )
        for rows, latents, depth, warps, stages, described in itertools.product(
            (64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), (False, True) if current.described else (False,)
        )
        # 32 to 128 sums a thread: fewer leave the units idle, more do not fit its registers.
        if 32 <= rows * latents // (32 * warps) <= 128
    )

    def use(candidate: ProductLaunch) -> AbstractContextManager[Any]:
        known = encode_config.PRODUCT.get(architecture, {inputs: current})
        return mock.patch.dict(encode_config.PRODUCT, {architecture: {**known, inputs: candidate}})

    def check(device: torch.device) -> None:
        rows, d, latents, k = CHECKED
        x, W, b = (t.to(dtype) for t in _draw(device, (rows, d), (latents, d), (latents,)))
        gpu_selftest.check_encode(topk_encode, k, x, W / math.sqrt(d), b)

    def work(size: Size, device: torch.device) -> Callable[[], object]:
        x, W, b = (t.to(dtype) for t in _draw(device, (size.rows, size.d), (size.latents, size.d), (size.latents,)))
        return lambda: topk_encode(x, W, b, size.k)

    place = f"kernels/encode/config.py, PRODUCT[{architecture!r}][{inputs!r}]"
    return Choice(f"product-{inputs}", place, candidates, current, use, check, work)


def _gather(dtype: torch.dtype) -> Choice:
    size_of = dtype.itemsize
    candidates = tuple(
        Gather(columns, rows, warps)
        for columns, rows, warps in itertools.product((128, 256, 512), (4, 8, 16), (1, 2, 4))
        if 16 <= columns * rows // (32 * warps) <= 128
    )
    return Choice(
        f"gather-{size_of}",
        f"kernels/gather_config.py, CHOICES[{size_of}]",
        candidates,
        gather_config.CHOICES[size_of],
        lambda candidate: mock.patch.dict(gather_config.CHOICES, {size_of: candidate}),
        lambda device: _check_nested(device, dtype),
        lambda size, device: _nested_work(size, device, dtype),
    )


def _slab() -> Choice:
    return Choice(
        "nested-slab",
        "kernels/decode/config.py, SLAB_BYTES",
        tuple(n << 20 for n in (8, 16, 24, 32, 48)),
        decode_config.SLAB_BYTES,
        lambda candidate: mock.patch.object(decode_config, "SLAB_BYTES", candidate),
        lambda device: _check_nested(device, torch.float32),
        lambda size, device: _nested_work(size, device, torch.float32),
    )


def _pairs() -> Choice:
    names = ("PAIR_BLOCK", "PAIR_SLICES", "PAIR_WARPS")

    def check(device: torch.device) -> None:
        rows, d, _, k = CHECKED
        x, W, b = _draw(device, (rows, d), (512, d), (512,))
        gpu_selftest.check_correlation(topk_encode(x, W, b, k).detach())

    def work(size: Size, device: torch.device) -> Callable[[], object]:
        codes = _codes(size, device)
        monitor = FeatureCorrelation(size.latents, device=device)
        return lambda: monitor.update(codes)

    return Choice(
        "pairs",
        f"kernels/correlation/config.py, {', '.join(names)}",
        tuple(itertools.product((16, 32), (1, 2, 4, 8), (2, 4, 8))),
        tuple(getattr(correlation_config, name) for name in names),
        lambda candidate: mock.patch.multiple(correlation_config, **dict(zip(names, candidate, strict=True))),
        check,
        work,
    )


def _draw(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def _codes(size: Size, device: torch.device) -> Any:
    x, W, b = _draw(device, (size.rows, size.d), (size.latents, size.d), (size.latents,))
    return topk_encode(x, W, b, size.k).detach()


def _check_nested(device: torch.device, dtype: torch.dtype) -> None:
    rows, d, latents, k = CHECKED
    x, W, b, y = _draw(device, (rows, d), (latents, d), (latents,), (rows, d))
    codes = topk_encode(x, W / math.sqrt(d), b, k).detach()
    gpu_selftest.check_decode(codes, W.to(dtype), W.new_zeros(d, dtype=dtype), y)


def _nested_work(size: Size, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    codes = _codes(size, device)
    W, y = _draw(device, (size.latents, size.d), (size.rows, size.d))
    W, b = W.to(dtype).requires_grad_(), torch.zeros(size.d, dtype=dtype, device=device, requires_grad=True)
    values = codes.values.clone().requires_grad_()
    widths = [size.latents // 8, size.latents // 2, 7 * size.latents // 8, size.latents]

    def call() -> object:
        return torch.autograd.grad(nested_loss(codes.with_values(values), W, b, y, widths).value, (values, W, b))

    return call


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of ROUNDS calls, each with a cold second-level cache."""
    flush = torch.empty(1 << 26 if device.type == "cuda" else 1, dtype=torch.float32, device=device)
    taken = []
    for n in range(WARM_UP + ROUNDS):
        flush.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if n >= WARM_UP:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@dataclass(frozen=True)
class Outcome:
    candidate: Any
    seconds: float | None
    problem: str | None


def tune(choice: Choice, size: Size, device: torch.device) -> Iterator[Outcome]:
    """Check and time each candidate, the current one first."""
    others = [c for c in choice.candidates if not _same(c, choice.current)]
    for candidate in (choice.current, *others):
        try:
            with choice.use(candidate), use_backend("triton"):
                choice.check(device)
                yield Outcome(candidate, median_seconds(choice.work(size, device), device), None)
        except Exception as error:
            # Too large for the chip, or wrong: not a candidate.
            yield Outcome(candidate, None, f"{type(error).__name__}: {error}".splitlines()[0][:120])


def _same(a: Any, b: Any) -> bool:
    return replace(a, reason="") == replace(b, reason="") if isinstance(a, ProductLaunch) else bool(a == b)


def frozen(choice: Choice, outcomes: list[Outcome], where: str) -> str:
    """The line to paste: the best candidate with its reason."""
    timed = sorted((o for o in outcomes if o.seconds is not None), key=lambda o: o.seconds or 0)
    if not timed:
        return f"{choice.place}: no candidate is right on this device"
    best = timed[0]
    reason = f"median {1e3 * (best.seconds or 0):.3f} ms, {where}"
    if len(timed) > 1:
        reason += f"; next best {1e3 * (timed[1].seconds or 0):.3f} ms"
    candidate = replace(best.candidate, reason=reason) if isinstance(best.candidate, ProductLaunch) else best.candidate
    text = f"{candidate!r}" if isinstance(candidate, ProductLaunch) else f"{candidate!r}  # {reason}"
    kept = " (as it is)" if _same(best.candidate, choice.current) else ""
    return f"{choice.place}{kept}:\n    {text}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.autotune", description="times launch choices on this GPU")
    parser.add_argument("--list", action="store_true", help="show the candidates and time nothing")
    parser.add_argument("--architecture", default="sm_90", help="for --list without a GPU (default sm_90)")
    parser.add_argument("--only", help="only choices whose name contains this")
    for name, default in (("rows", 4096), ("d", 2304), ("latents", 18432), ("k", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(words)
    cuda = torch.cuda.is_available()
    if not cuda and not args.list:
        print("bench.autotune: no GPU here, so nothing can be timed (--list shows the candidates)")
        return 1
    architecture = args.architecture
    if cuda:
        from transcoder.kernels.encode.triton_backend import _architecture

        architecture = _architecture(torch.device("cuda"))
    wanted = [c for c in choices(architecture) if not args.only or args.only in c.name]
    if not wanted:
        parser.error(f"--only {args.only}: expected part of {', '.join(c.name for c in choices(architecture))}")
    size = Size(args.rows, args.d, args.latents, args.k)
    for choice in wanted:
        print(f"\n{choice.name}: {choice.place}")
        if args.list:
            for candidate in choice.candidates:
                print(f"  {candidate!r}{'  <- in force' if _same(candidate, choice.current) else ''}")
            continue
        outcomes = []
        for outcome in tune(choice, size, torch.device("cuda")):
            outcomes.append(outcome)
            took = outcome.problem if outcome.seconds is None else f"{1e3 * outcome.seconds:9.3f} ms"
            print(f"  {took}  {outcome.candidate!r}", flush=True)
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size}"
        print(f"paste into {frozen(choice, outcomes, where)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
