"""What the first call on a machine costs: seconds spent compiling kernels, and where the results are kept for the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transcoder.kernels.extension import cache_folder


@dataclass
class CompileTime:
    """Triton kernels that a piece of the program asked for."""

    compiled: int = 0
    """Kernels that had to be compiled."""
    loaded: int = 0
    """Kernels that Triton's cache on disk had."""
    compile_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def kernels(self) -> int:
        return self.compiled + self.loaded


@contextmanager
def watched() -> Iterator[CompileTime]:
    """Counts what Triton compiles or finds in its cache inside the block. A kernel that this process has is not asked for."""
    from triton import knobs

    found, before = CompileTime(), knobs.compilation.listener

    def note(*, times: Any, cache_hit: bool, **others: Any) -> None:
        seconds = 1e-6 * times.total
        if cache_hit:
            found.loaded += 1
            found.load_seconds += seconds
        else:
            found.compiled += 1
            found.compile_seconds += seconds
        if before is not None:
            before(times=times, cache_hit=cache_hit, **others)

    knobs.compilation.listener = note
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels ($TRITON_CACHE_DIR moves it)."""
    from triton import knobs

    return Path(knobs.cache.dir)


def compile_every_kernel(device: torch.device) -> CompileTime:
    """Run each op once on `device` with backend `triton`, as a bf16 training step would: every kernel is then compiled."""
    from transcoder.kernels.backend import use_backend
    from transcoder.kernels.correlation.op import FeatureCorrelation
    from transcoder.kernels.decode.op import nested_loss, sparse_decode
    from transcoder.kernels.encode.op import batch_topk_encode, threshold_encode, topk_encode

    rows, d, d_sae, k = 256, 256, 2048, 16
    x, W_enc, W_dec, b_enc, b_dec = (
        torch.randn(*shape, device=device).requires_grad_()
        for shape in ((rows, d), (d_sae, d), (d_sae, d), (d_sae,), (d,))
    )
    with watched() as found, use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        for codes in (topk_encode(x, W_enc, b_enc, k), batch_topk_encode(x, W_enc, b_enc, k)):
            loss = nested_loss(codes, W_dec, b_dec, x.detach(), [d_sae // 4, d_sae]).value
            (loss + sparse_decode(codes, W_dec, b_dec).mean()).backward()
        threshold_encode(x, W_enc, b_enc, 1.0)
        for dim in (None, 64):
            monitor = FeatureCorrelation(d_sae, dim, device=device)
            monitor.update(codes.detach())
            monitor.pairs(0.9)
    return found


def remember_first(what: str, found: CompileTime) -> CompileTime | None:
    """The first time that `what` (a chip and a version of Triton) was compiled whole on this machine, noted on disk."""
    file = cache_folder() / "first_call.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if found.compiled and not found.loaded:
        known[what] = {"compiled": found.compiled, "compile_seconds": found.compile_seconds}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    return CompileTime(**known[what]) if what in known else None
