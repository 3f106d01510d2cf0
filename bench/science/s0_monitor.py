"""S0: does the monitor find exactly the planted pairs, and the same ones for any division of the stream?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.science.planted import Stream, batches
from bench.science.table import Line, at_least, at_most, holds, told
from bench.statistics import of_share
from transcoder.antidup import CorrelationMonitor, UsageLedger
from transcoder.antidup.pair_errors import PairJackknife, correlation_bounds, most_pairs
from transcoder.config import MonitorSection
from transcoder.kernels import FeatureCorrelation

BATCH = 4096
RANKS = 8
MOST_LISTED = 1 << 17
"""Every flag is counted, not only the strongest that a report lists by default."""
STRANGERS = 500
"""Pairs drawn at random, checked together with the planted ones."""
SEARCHES = 4
"""Reports in each block: from then on, pairs that a sketch proposes are counted exactly and listed pairs get their own
error."""
PARTS = ("diversity_regularizer", "position_sampler", "correlation_monitor", "activation_samples")


def run(quick: bool, seed: int) -> list[Line]:
    size = {"replicas": 6 if quick else 40, "tokens": 1 << 17 if quick else 1 << 19, "blocks": 4, "seed": seed}
    stream = Stream(**size)
    blocks = [stream.block(n) for n in range(stream.blocks)]
    truth = stream.truth()
    i = torch.arange(0, 2 * stream.pairs, 2)
    with tempfile.TemporaryDirectory() as folder:
        flagged, report = _monitored(stream, blocks, Path(folder))
        again, report_again = _monitored(stream, blocks, Path(folder), resume_at=stream.blocks // 2)
        by_sketch, _ = _monitored(stream, blocks, Path(folder), sketch_dim=128)
    whole = FeatureCorrelation(stream.d_sae)
    ranks = [FeatureCorrelation(stream.d_sae, rank=rank) for rank in range(RANKS)]
    for block in blocks:
        for n, (_, codes) in enumerate(batches(block, BATCH)):
            whole.update(codes)
            ranks[n % RANKS].update(codes)
    for other in ranks[1:]:
        ranks[0].merge(other)
    extra = torch.Generator().manual_seed(seed)
    others = torch.randint(0, stream.d_sae, (2, STRANGERS), generator=extra)
    others = others[:, others[0] != others[1]]
    left, right = torch.cat([i, others.amin(0)]), torch.cat([i + 1, others.amax(0)])
    exact = two_pass(blocks, left, right)
    measured = whole.statistics(left, right).correlation
    merged = ranks[0].statistics(left, right).correlation
    return [
        at_most("S0", "largest error of r against two-pass float64", float((measured - exact).abs().max()), 1e-4),
        at_most(
            "S0",
            f"one rank against {RANKS} merged, difference of r",
            float((measured - merged).abs().max()),
            1e-5,
        ),
        holds("S0", "resumed in the middle: the same report", flagged == again and report == report_again, "identical"),
        *_flags(flagged, truth, stream, ""),
        *_flags(by_sketch, truth, stream, "sketch: "),
        *_sketch(blocks, exact[: stream.pairs], stream),
        *_calibration(blocks, stream, "exponential amplitudes"),
        *_heavy(Stream(**size, heavy=True)),
    ]


def _heavy(stream: Stream) -> list[Line]:
    """The same with amplitudes of a far heavier tail. How often pairs at the threshold itself get a flag is told: rho = 0.80 is
    the edge of what a test of rho <= 0.8 must not flag, and the worst case of it."""
    blocks = [stream.block(n) for n in range(stream.blocks)]
    with tempfile.TemporaryDirectory() as folder:
        flagged, _ = _monitored(stream, blocks, Path(folder))
    rho, support, _ = stream.truth()
    got = torch.tensor([(2 * p, 2 * p + 1) in flagged for p in range(stream.pairs)])
    cells = [f"{at:.2f}: {_percent(got[(rho == at) & (support >= 100)].tolist())}" for at in rho.unique().tolist()]
    low = {pair for pair in flagged if pair[0] + 1 != pair[1] or pair[0] >= 2 * stream.pairs}
    wrong = int((got & (rho <= torch.tensor(0.7))).sum()) + len(low)
    return [
        at_most("S0", "heavy tails: flags at rho <= 0.70 or between unrelated latents", wrong, 0),
        told("S0", "heavy tails: pairs flagged, support >= 100, by rho", ", ".join(cells)),
        *_calibration(blocks, stream, "heavy tails"),
    ]


def two_pass(blocks: list[Any], i: Tensor, j: Tensor, newest: int | None = None) -> Tensor:
    """[P] float64 Pearson correlation of latents i and j over the `newest` tokens of all blocks (None: over all), means first.
    Tokens on which neither fires are identical and are computed once, weighted by their number."""
    tokens = sum(block.shape[0] for block in blocks)
    first = 0 if newest is None else tokens - newest
    asked = torch.zeros(blocks[0].shape[1], dtype=torch.bool).index_fill_(0, torch.cat([i, j]), True)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    before = 0
    for block in blocks:
        row = block.rows() + before
        chosen = asked[block.indices] & (row >= first)
        columns.append((block.indices[chosen], row[chosen], block.values[chosen].double()))
        before += block.shape[0]
    latent, row, value = (torch.cat(column) for column in zip(*columns, strict=True))
    latent, order = latent.sort(stable=True)
    row, value = row[order], value[order]
    ends = torch.searchsorted(latent, torch.arange(asked.numel() + 1)).tolist()
    found = torch.zeros(i.numel(), dtype=torch.float64)
    for n, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        own, other = slice(ends[a], ends[a + 1]), slice(ends[b], ends[b + 1])
        fires, place = torch.unique(torch.cat([row[own], row[other]]), return_inverse=True)
        z = torch.zeros(2, fires.numel(), dtype=torch.float64)
        z[0, place[: row[own].numel()]] = value[own]
        z[1, place[row[own].numel() :]] = value[other]
        mean = z.sum(1) / (tokens - first)
        silent = tokens - first - fires.numel()
        z -= mean[:, None]
        product = (z[0] * z[1]).sum() + silent * mean[0] * mean[1]
        square = z.square().sum(1) + silent * mean.square()
        scale = square.prod().sqrt()
        found[n] = product / scale if scale > 0 else 0
    return found


def _monitored(
    stream: Stream,
    blocks: list[Any],
    folder: Path,
    resume_at: int | None = None,
    sketch_dim: int | None = None,
) -> tuple[set[tuple[int, int]], dict[str, Any]]:
    """(flagged pairs, last report) of a monitor that reports `SEARCHES` times a block; thrown away and restored from its
    state in the middle of block `resume_at`."""
    ledger = UsageLedger(dict.fromkeys(PARTS, False) | {"correlation_monitor": True}, folder / "usage.json")
    section = MonitorSection(block_tokens=stream.tokens, sketch_dim=sketch_dim, max_reported_pairs=MOST_LISTED)

    def fresh() -> CorrelationMonitor:
        return CorrelationMonitor(section, stream.d_sae, "cpu", folder, ledger)

    monitor, report = fresh(), {}
    for n, block in enumerate(blocks):
        sequences = stream.sequences(n)
        for a, codes in batches(block, BATCH):
            if n == resume_at and a == (stream.tokens // BATCH // 2) * BATCH:
                state = monitor.state_dict()
                monitor = fresh()
                monitor.load_state_dict(state)
            monitor.update_correlations(codes, n, sequences[a : a + codes.shape[0]])
            if (a + codes.shape[0]) % (stream.tokens // SEARCHES) == 0:
                report = monitor.report(n)
    flagged = {(entry["i"], entry["j"]) for entry in report["pairs"] if entry["flagged"]}
    assert len(flagged) == report["pairs_flagged"]
    return flagged, report


def _flags(
    flagged: set[tuple[int, int]], truth: tuple[Tensor, Tensor, Tensor], stream: Stream, prefix: str
) -> list[Line]:
    rho, support, _ = truth
    hit = torch.tensor([(2 * p, 2 * p + 1) in flagged for p in range(stream.pairs)])
    planted = {(2 * p, 2 * p + 1) for p in range(stream.pairs)}
    false = int(hit[rho <= 0.8].sum()) + len(flagged - planted)
    high = (rho >= 0.95) & (support >= 100)
    middle = (rho >= 0.9) & (support >= 300)
    return [
        at_most(
            "S0",
            f"{prefix}flags at rho <= 0.70 or between unrelated latents",
            int(hit[rho <= 0.7].sum()) + len(flagged - planted),
            0,
        ),
        at_most(
            "S0",
            f"{prefix}false discoveries (rho <= 0.8) of {len(flagged)} flags",
            100 * false / max(1, len(flagged)),
            1,
            " %",
            of_share(false, len(flagged), 100),
        ),
        at_least(
            "S0",
            f"{prefix}recall at rho >= 0.95, support >= 100 ({int(high.sum())})",
            float(hit[high].float().mean()),
            0.99,
            span=of_share(int(hit[high].sum()), int(high.sum())),
        ),
        at_least(
            "S0",
            f"{prefix}recall at rho >= 0.90, support >= 300 ({int(middle.sum())})",
            float(hit[middle].float().mean()),
            0.99,
            span=of_share(int(hit[middle].sum()), int(middle.sum())),
        ),
    ]


def _sketch(blocks: list[Any], r: Tensor, stream: Stream) -> list[Line]:
    """A sketch over the whole stream, searched as the monitor does; its exact recent tokens are half a block."""
    sketch = FeatureCorrelation(stream.d_sae, sketch_dim=128, ring_tokens=stream.tokens // 2)
    for block in blocks:
        for a, codes in batches(block, BATCH):
            sketch.update(codes)
            if (a + codes.shape[0]) % (stream.tokens // SEARCHES) == 0:
                proposed = sketch.survey(0.8, 100).candidates
                assert proposed is not None
                sketch.watch(*proposed)
    found = sketch.pairs(0.8, 100)
    seen = set(zip(found.i.tolist(), found.j.tolist(), strict=True))
    _, support, _ = stream.truth()
    # The measured correlation, not the planted one: a planted 0.85 may come out at 0.79.
    wanted = ((r >= 0.85) & (support >= 100)).nonzero().flatten().tolist()
    hits = sum((2 * p, 2 * p + 1) in seen for p in wanted)
    recall, span = hits / max(1, len(wanted)), of_share(hits, len(wanted))
    error = 0.0
    for newest in found.weight.unique().tolist():
        over = found.weight == newest
        exact = two_pass(blocks, found.i[over], found.j[over], int(newest))
        error = max(error, float((found.correlation[over] - exact).abs().max()))
    return [
        at_least("S0", f"sketch: recall at r >= 0.85, support >= 100 ({len(wanted)} pairs)", recall, 0.99, span=span),
        at_most("S0", f"sketch: largest error of r over the tokens it rests on ({len(found)} pairs)", error, 1e-9),
    ]


def _calibration(blocks: list[Any], stream: Stream, amplitudes: str) -> list[Line]:
    """How often a block's 95 % bounds hold the planted rho: by the rule of thumb, and by each pair's own error."""
    rho, support, _ = stream.truth()
    i = torch.arange(0, 2 * stream.pairs, 2)
    inside: dict[tuple[str, float], list[bool]] = {}
    chosen = ((support >= 100) & (rho < 1)).nonzero().flatten()
    for n, block in enumerate(blocks):
        one, own = FeatureCorrelation(stream.d_sae), PairJackknife(stream.d_sae, torch.device("cpu"))
        one.update(block)
        stats = one.statistics(i, i + 1)
        errors = torch.full(i.shape, torch.nan, dtype=torch.float64)
        for part in chosen.split(most_pairs(stream.d_sae)):
            own.watch(i[part], i[part] + 1)
            for a, codes in batches(block, BATCH):
                own.update(codes, stream.sequences(n)[a : a + codes.shape[0]], None)
            errors[part] = own.errors(i[part], i[part] + 1).fisher
        for p in chosen.tolist():
            r, union, at = float(stats.correlation[p]), int(stats.support[p]), float(rho[p])
            for kind, error in (("the rule of thumb", None), ("the pair's own error", float(errors[p]))):
                low, high = correlation_bounds(r, union, error)
                inside.setdefault((kind, round(at, 2)), []).append(low <= at <= high)
    return [
        told(
            "S0",
            f"{amplitudes}: 95 % bounds of a block by {kind} hold rho, by rho",
            ", ".join(f"{at:.2f}: {_percent(v)}" for (k, at), v in sorted(inside.items()) if k == kind),
        )
        for kind in ("the rule of thumb", "the pair's own error")
    ]


def _percent(cases: list[bool]) -> str:
    return f"{100 * sum(cases) / len(cases):.0f} %{of_share(sum(cases), len(cases), 100, 3)}"
