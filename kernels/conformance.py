"""Every op family against its float64 reference on fresh inputs, forward and gradients, twice for bitwise equality.

One definition of "right" for whoever asks on a device: `gpu_selftest` before `auto` trusts a GPU's kernels, `bench.gpu_check`
for its report, `bench.autotune` before it times a launch choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.adam.op import adam_step, one_op_for
from transcoder.kernels.adam.reference import AdamStep, adam_step_reference
from transcoder.kernels.backend import use_backend
from transcoder.kernels.correlation.op import FeatureCorrelation
from transcoder.kernels.correlation.reference import correlation_reference
from transcoder.kernels.decode.op import nested_loss, sparse_decode
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference
from transcoder.kernels.encode.op import batch_topk_encode, threshold_encode, topk_encode
from transcoder.kernels.sparse_codes import SparseCodes

FAMILIES = ("encode", "decode", "correlation", "adam")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 8, 16, 1), (33, 64, 257, 7), (128, 256, 2048, 32), (257, 130, 1000, 100), (64, 2304, 4096, 48)]
"""(B, d, d_sae, k): one row, odd sizes, one of several tiles, k large, the width of a real model."""
SMALL = SHAPES[:2]
WIDEST_COUNTED = 2048
"""Latents up to which all pairs are compared with a dense correlation."""


class Mismatch(AssertionError):
    """An op's result is not its reference's."""


def op_checks(
    backend: str,
    device: torch.device,
    shapes: list[tuple[int, int, int, int]],
    seed: int,
    families: tuple[str, ...] = FAMILIES,
) -> Iterator[tuple[str, str | None]]:
    """(name, None or what went wrong) of each check of the families, every dtype and shape."""
    g = torch.Generator().manual_seed(seed)
    for dtype, (rows, d, d_sae, k) in itertools.product(DTYPES, shapes):
        x, W = torch.randn(rows, d, generator=g), torch.randn(d_sae, d, generator=g) / math.sqrt(d)
        b, y = 0.1 * torch.randn(d_sae, generator=g), torch.randn(rows, d, generator=g)
        x, W, b, y = (t.to(device, dtype) for t in (x, W, b, y))
        for part, check in _parts(x, W, b, y, k, families).items():
            yield f"{part} {backend} {str(dtype)[6:]} B{rows} d{d} N{d_sae} k{k}", outcome(backend, check)


def outcome(backend: str, check: Callable[[], None]) -> str | None:
    """None where `check` passes on `backend`, else what went wrong."""
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
    """The selection is judged by the op's own accumulators: every kept value is right, none left out is larger."""
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
    """The sketch's pairs are decided exactly: of those that it proposes each correlation is right, and equal calls agree."""
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
            norm = adam_step(module, ps, first, second, steps, bad=bad, **by)
            unit = torch.finfo(torch.float32).eps
            expect_close("norm", norm, want.norm, sum(p.numel() for p in ps), unit)
            for name, mine, exact in zip(AdamStep._fields, (ps, first, second), want[:3], strict=False):
                for number, (a, b) in enumerate(zip(mine, exact, strict=True)):
                    # Adam divides by the root of what it averages: the rounding of a small difference comes back larger.
                    # Moments are judged by their own size: each step starts from the op's, and small ones would all pass.
                    size = 1.0 if mine is ps else max(float(b.abs().max()), torch.finfo(torch.float32).tiny)
                    expect_close(f"{name}[{number}]", a.double() / size, b / size, 64, unit)
        before = [t.clone() for t in (*ps, *first, *second, *steps)]
        _with_gradients(ps, 4)[0].grad[0] = float("nan")  # type: ignore[index]
        adam_step(module, ps, first, second, steps, bad=bad, **by)
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
