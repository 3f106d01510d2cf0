"""All kernel families under ttsem, on sizes of several blocks with broken edges, and a self-test by planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

G = torch.Generator()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def same(what: str, got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to rounding; NaN, with which fresh memory is filled, is never right."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    near = torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=False)
    assert near, f"{what}: a wrong value"


def compare(run: Callable[[], list[Tensor]], tolerance: float = 1e-4) -> None:
    """Backend `triton` against backend `torch`."""
    from transcoder.kernels import use_backend

    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found.append(run())
    for n, (want, got) in enumerate(zip(*found, strict=True)):
        same(f"result {n}", got, want, tolerance)


def encoder(rows: int, d: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """One tile's latents are larger than the others': it keeps too few, and is computed again for many tokens."""
    x, W, b = draw(rows, d).abs(), draw(latents, d) / math.sqrt(d), 0.1 * draw(latents)
    W[:: -(-latents // 64)] += 0.5
    return x, W, b


def selected(codes: Any) -> list[Tensor]:
    return [codes.values, codes.indices, codes.row_ptr]


def topk(rows: int = 70, k: int = 7) -> None:
    from transcoder.kernels import topk_encode
    from transcoder.kernels.encode import triton_backend

    x, W, b = encoder(rows, 20, 330)
    triton_backend.counters("cpu", reset=True)
    compare(lambda: selected(topk_encode(x, W, b, k)))
    assert triton_backend.counters("cpu").rescanned > 0, "no row was computed again"


def described() -> None:
    """Blocks of x and W_enc by descriptors: the bits that pointers give, the last block of rows broken."""
    from transcoder.kernels import batch_topk_encode, topk_encode, use_backend
    from transcoder.kernels.encode import config, triton_backend

    plain = config.product_launch
    x, W, b = encoder(21, 64, 64)
    found = []
    for by_descriptors in (False, True):
        config.product_launch = lambda *kind, by=by_descriptors: replace(
            plain(*kind), rows=16, latents=32, depth=32, described=by
        )
        try:
            assert triton_backend.Product(x, W, b, "topk_encode").described == by_descriptors
            triton_backend.counters("cpu", reset=True)
            with use_backend("triton"):
                found.append(selected(topk_encode(x, W, b, 7)) + selected(batch_topk_encode(x, W, b, 3)))
            assert triton_backend.counters("cpu").rescanned > 0, "nothing was computed again"
        finally:
            config.product_launch = plain
    for want, got in zip(*found, strict=True):
        assert torch.equal(want, got), "by descriptors: a wrong value"


def batch_topk() -> None:
    from transcoder.kernels import batch_topk_encode
    from transcoder.kernels.encode import triton_backend

    x, W, b = encoder(70, 20, 330)
    x[3] = x[5]  # ties, which are decided by position
    triton_backend.counters("cpu", reset=True)
    compare(lambda: selected(batch_topk_encode(x, W, b, 3)))
    assert triton_backend.counters("cpu").rescanned > 0, "no cell was computed again"


def threshold() -> None:
    from transcoder.kernels import threshold_encode

    x, W, b = encoder(70, 20, 330)
    limits = 1 + draw(330).abs()
    compare(lambda: selected(threshold_encode(x, W, b, limits)))


def codes(rows: int, latents: int, k: int) -> Any:
    """The k largest of each row and, in every row, one hot latent: a segment that is split."""
    from transcoder.kernels import SparseCodes, use_backend

    dense = draw(rows, latents).relu()
    kept = torch.zeros_like(dense).scatter(1, dense.topk(k).indices, 1) * dense
    kept[:, latents // 3] = 1 + dense[:, 0]
    with use_backend("torch"):
        return SparseCodes.from_dense(kept)


def encode_backward() -> None:
    from transcoder.kernels import topk_encode

    x, W, b = encoder(150, 33, 300)
    b[7] += 99  # hot

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        found = topk_encode(*leaves, 3)
        return list(torch.autograd.grad((found.values * (torch.arange(found.nnz) * 0.01 - 1)).sum(), leaves))

    compare(run, 1e-3)


def decode(columns: int = 300) -> None:
    from transcoder.kernels import sparse_decode

    z, W, b = codes(150, 90, 4), draw(90, columns), draw(columns)

    def run() -> list[Tensor]:
        values, W_, b_ = (t.detach().clone().requires_grad_() for t in (z.values, W, b))
        out = sparse_decode(z.with_values(values), W_, b_)
        return [out.detach(), *torch.autograd.grad((out * out).sum(), (values, W_, b_))]

    compare(run, 1e-3)


def nested(columns: int = 300) -> None:
    from transcoder.kernels import nested_loss

    z, W, b, y, weights = codes(150, 90, 4), draw(90, columns), draw(columns), draw(150, columns), draw(150).abs()

    def run() -> list[Tensor]:
        values, W_, b_ = (t.detach().clone().requires_grad_() for t in (z.values, W, b))
        # Latents from 80 on take no part.
        loss = nested_loss(z.with_values(values), W_, b_, y, [20, 50, 80], [1.0, 0.5, 0.25], token_weights=weights)
        return [
            loss.per_prefix.detach(),
            loss.residual,
            *torch.autograd.grad(1000 * loss.value, (values, W_, b_)),
        ]

    compare(run, 1e-3)


def correlation(latents: int = 70, rows: int = 40, sketch: int | None = None) -> None:
    from transcoder.kernels import FeatureCorrelation

    z, weights = codes(rows, latents, min(6, latents)), draw(rows).abs().double()
    weights[3] = 0
    i, j = torch.triu_indices(latents, latents, 1)

    def run() -> list[Tensor]:
        monitor = FeatureCorrelation(latents, sketch, device=z.values.device)
        for _ in range(2):
            monitor.update(z.detach(), weights)
        pairs = monitor.pairs(0.5, 1)
        key, order = (pairs.i * latents + pairs.j).sort()
        return [monitor.correlation(i, j), monitor.counts(), key, pairs.correlation[order]]

    compare(run, 1e-3 if sketch else 1e-5)


def correlation_by_entry() -> None:
    correlation(400, 6)


def sketch() -> None:
    correlation(150, 40, 130)


def adam(columns: int = 33) -> None:
    from transcoder.kernels.adam.op import AdamUpdate, adam_step, one_op_for
    from transcoder.kernels.adam.reference import adam_step_reference

    unit = torch.nn.functional.normalize(draw(9, columns))
    parameters = [draw(9, columns), draw(70), unit, draw(4100)]
    gradients = [draw(*p.shape) for p in parameters]
    by: dict[str, Any] = {"unit_rows": 2, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "max_norm": 1.0}

    def run() -> list[Tensor]:
        mine = [p.clone() for p in parameters]
        for p, g in zip(mine, gradients, strict=True):
            p.grad = g.clone()
        first, second = ([torch.zeros_like(p) for p in mine] for _ in range(2))
        module = one_op_for(mine)
        if module is None:
            step = adam_step_reference(mine, gradients, first, second, 1, **by)
            return [t.float() for part in step[:3] for t in part]
        bad = torch.zeros((), dtype=torch.bool)
        adam_step(module, AdamUpdate(mine, first, second, [torch.zeros(()) for _ in mine], bad=bad, **by))
        return [*mine, *first, *second]

    compare(run)


def adam_of_long_rows() -> None:
    adam(4100)


def layouts() -> None:
    """b_enc whose numbers lie apart, as one that is expanded."""
    from transcoder.kernels import topk_encode

    x, W, _ = encoder(20, 20, 330)
    for b in (draw(660)[::2], torch.zeros(1).expand(330)):
        compare(lambda b=b: selected(topk_encode(x, W, b, 5)))


FAMILIES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        topk, described, batch_topk, threshold, encode_backward, decode, nested,
        correlation, correlation_by_entry, sketch, adam, adam_of_long_rows, layouts,
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that take one turn at these sizes take several, and tiles keep too few entries."""
    from transcoder.kernels.encode import config

    G.manual_seed(1)
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: 2)
    smaller = {"RADIX_BLOCK": 256, "COLLECT_BLOCK": 128, "SELECT_CHUNK": 8, "RESCAN_CHUNK": 64, "ORDER_CHUNK": 4}
    for name, size in smaller.items():
        monkeypatch.setattr(config, name, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_fault_and_no_race(family: str, session: Any) -> None:
    before = session.launches
    FAMILIES[family]()
    assert session.launches > before, "nothing was launched"
    assert session.races_unchecked == 0, "a launch is too large for the race check"


VALUE = "a wrong value"
PLANTED: list[tuple[str, str, str, str, str, Callable[[], None]]] = [
    # (what is said: a kind of fault or VALUE, where, module, right, wrong, family). `where` is "" for the planted line itself.
    (
        "oob_read", "tl.load(b + latents)", "encode.kernel",
        "tl.minimum(rows, rows_total - 1), tl.minimum(latents, d_sae - 1)", "tl.minimum(rows, rows_total - 1), latents", topk,
    ),
    (
        "oob_read", "tl.load(x_at", "encode.kernel",
        "tl.minimum(rows, rows_total - 1), tl.minimum(latents, d_sae - 1)", "rows, tl.minimum(latents, d_sae - 1)", topk,
    ),
    ("oob_write", "", "encode.kernel", "kept_key + at + i, best, mask=rows < rows_total)", "kept_key + at + i, best)", topk),
    (
        "oob_read", "tl.load(b + latents)", "encode.kernel",
        "x, W, b, rows, tl.minimum(latents, d_sae - 1), d_in", "x, W, b, rows, latents, d_in", topk,
    ),
    ("oob_read", "tl.load(W_at", "encode.kernel", "inside = depth < d_in - start", "inside = depth <= d_in - start", topk),
    (VALUE, "", "encode.kernel", "is_open = wanted & (slot % kept == kept - 1)", "is_open = wanted & (slot < 0)", topk),
    (
        "race", "tl.store(failed_count", "encode.kernel",
        "tl.store(failed + tl.atomic_add(failed_count, 1, sem=\"relaxed\"), row.to(tl.int32))",
        "n = tl.load(failed_count)\n        tl.store(failed_count, n + 1)\n        tl.store(failed + n, row.to(tl.int32))",
        topk,
    ),
    (VALUE, "", "encode.kernel", "            count += BN\n", "            count += BN // 2\n", topk),
    (VALUE, "", "encode.kernel", "tl.int32) % tiles == tile\n", "tl.int32) % tiles == tile + 1\n", topk),
    ("", "", "encode.kernel", "row * k + place, value, mask=start + lane < count)", "row * k + place, value)", topk),
    ("", "+ place,", "encode.kernel", "[None, :] & (rows < rows_total)[:, None]", "[None, :]", threshold),
    (
        "race", "", "encode.batch_kernel",
        "tl.atomic_add(histogram + LEVEL * BINS + bins, number, mask=number > 0, sem=\"relaxed\")",
        "tl.store(histogram + LEVEL * BINS + bins, tl.load(histogram + LEVEL * BINS + bins) + number)", batch_topk,
    ),
    (VALUE, "", "encode.batch_kernel", "dtype=tl.int32), mask=places < kept)", "dtype=tl.int32), mask=places < 0)", batch_topk),
    (
        "oob_read", "", "encode.batch_kernel", "key = tl.load(kept_key + cell * kept + kept - 1, mask=inside, other=-1)",
        "key = tl.load(kept_key + cell * kept + kept - 1)", batch_topk,
    ),
    (
        "race", "tl.store(found_count", "encode.batch_kernel",
        "at = tl.atomic_add(found_count, total, sem=\"relaxed\") + tl.cumsum",
        "tl.store(found_count, tl.load(found_count) + total)\n        at = tl.load(found_count) - total + tl.cumsum",
        batch_topk,
    ),
    (
        "race", "tl.store(open_count", "encode.batch_kernel", "first = tl.atomic_add(open_count, number, sem=\"relaxed\")",
        "first = tl.load(open_count)\n        tl.store(open_count, first + number)", batch_topk,
    ),
    (
        "oob_read", "key = tl.load(kept_key + entry", "encode.batch_kernel",
        "    inside = entry < entries\n    key = tl.load(kept_key",
        "    inside = entry >= 0\n    key = tl.load(kept_key", batch_topk,
    ),
    ("oob_read", "", "segments_triton", "mask=live[:, None] & inside[None, :]", "mask=live[:, None]", decode),
    (VALUE, "", "segments_triton", "(2 * block + 1) * columns", "2 * block * columns", decode),
    (
        "race", "tl.store(partial", "segments_triton",
        "    partial += tl.program_id(1).to(tl.int64) * entries\n", "", decode,
    ),
    (
        "", "", "segments_triton", "values + j + lane, mask=j + lane < end", "values + j + lane, mask=j + lane <= end",
        encode_backward,
    ),
    (
        "", "tl.store(out + m", "segments_triton",
        "out_column, total, mask=inside)\n\n\n@triton.jit\ndef split", "out_column, total)\n\n\n@triton.jit\ndef split", decode,
    ),
    ("oob_write", "", "decode.kernel", "tl.store(cuts + place, low, mask=live)", "tl.store(cuts + place, low)", nested),
    ("race", "tl.store(errors", "decode.kernel", "errors += tile.to(tl.int64) * rows + b", "errors += b", nested),
    (VALUE, "", "decode.kernel", "ACC), mask=j + lane < end)", "ACC), mask=j + lane < start)", nested),
    ("oob_write", "", "decode.kernel", "tl.store(out_rows + place, row, mask=live)", "tl.store(out_rows + place, row)", nested),
    ("", "tl.load(token_weights", "decode.kernel", "live = first + lane < rows", "live = first + lane <= rows", nested),
    (
        "race", "", "correlation.kernel", 'tl.atomic_add(product + key, amount, mask=both, sem="relaxed")',
        "tl.store(product + key, tl.load(product + key, mask=both, other=0) + amount, mask=both)", correlation,
    ),
    (
        "race", "+ latent, tl.load(", "correlation.kernel",
        "end = tl.where(start == program, tl.load(latent_ptr + latent + 1), start)", "end = tl.load(latent_ptr + latent + 1)",
        correlation_by_entry,
    ),
    (
        "race", "tl.store(found_", "correlation.kernel", 'base = tl.atomic_add(found, count.to(tl.int64), sem="relaxed")',
        'base = tl.atomic_add(found, count.to(tl.int64), sem="relaxed") * 0', sketch,
    ),
    ("oob_write", "", "correlation.kernel", "x.to(tl.int32), mask=place < count)", "x.to(tl.int32))", sketch),
    (
        "", "tl.store(place", "correlation.kernel",
        "columns + column\n        tl.store(place, tl.load(place, mask=inside, other=0) + total, mask=inside)",
        "columns + column\n        tl.store(place, tl.load(place, mask=inside, other=0) + total)", sketch,
    ),
    ("oob_write", "", "adam.kernel", "tl.store(parameter + place, p, mask=inside)\n        tl.store(first",
     "tl.store(parameter + place, p)\n        tl.store(first", adam),
    (
        "oob_read", "", "adam.kernel", "products += g * tl.load(parameter + place, mask=inside, other=0)",
        "products += g * tl.load(parameter + place)", adam,
    ),
    (
        "oob_read", "", "adam.kernel", "g = tl.load(gradient + place, mask=place < count, other=0)",
        "g = tl.load(gradient + place)", adam,
    ),
    (VALUE, "", "encode.triton_backend", "x, W, b.contiguous()", "x, W, b", layouts),
    (VALUE, "", "encode.kernel", "W.load([0, tile * d_in + start])", "W.load([0, tile + start])", described),
    (VALUE, "", "encode.kernel", "tl.arange(0, BM) == 0)[:, None], order", "tl.arange(0, BM) == 1)[:, None], order", described),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_planted_fault_is_found(number: int, plant: Callable[[str, str, str], int]) -> None:
    from ttsem.sanitize import KernelFault

    kind, where, module, right, wrong, family = PLANTED[number]
    line = plant(module, right, wrong)
    with pytest.raises((KernelFault, AssertionError)) as caught:
        family()
    found = caught.value
    if isinstance(found, KernelFault):
        assert kind in ("", found.fault.kind), str(found)
        assert where in found.fault.source_text if where else found.fault.source_line == line, str(found)
    else:
        assert kind in ("", VALUE), str(found)
        assert VALUE in str(found), str(found)


def test_warps_of_a_program_wait_for_each_other(watching: Callable[[set[str]], Any]) -> None:
    """In the kernels whose threads hand each other data through memory."""
    with watching({"rescan_rows", "order_rows", "adam_rows"}) as found:
        topk(4)
        adam_of_long_rows()
    assert found == {"rescan_rows": {}, "order_rows": {}, "adam_rows": {}}


def test_a_missing_barrier_is_found(
    plant: Callable[[str, str, str], int], watching: Callable[[set[str]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = "            tl.debug_barrier()\n            count += BN"
    plant("encode.kernel", after, after.replace("tl.debug_barrier()", "pass"))
    with watching({"rescan_rows"}) as found:
        topk(4)
    assert any("tl.store(mine + count + places" in a for a, _ in found["rescan_rows"]), found
