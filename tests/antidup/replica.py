"""One data-parallel replica, as torchrun would start it: counts its own share of a stream, reports over all of them.

python replica.py RANK SIZE FOLDER SKETCH_DIM: writes what it found to FOLDER/replica_RANK.json. With SIZE 1 it sees every
share, and no process group is made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup import ActivationSampleCollector, CorrelationMonitor, Replicas, UsageLedger
from transcoder.config import MonitorSection, SamplesSection
from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.counter_rng import uniform
from transcoder.usage import REQUIRED_EFFECTS

SHARES, STEPS, TOKENS, PAIRS, NOISE = 2, 12, 400, 4, 12
LATENTS = 2 * PAIRS + NOISE
RHOS = torch.tensor([0.6, 0.95, 0.98, 1.0])


def share(rank: int, step: int) -> SparseCodes:
    """What the replica `rank` sees at `step`: random counters keyed by (rank, step, token)."""

    def draw(columns: int, what: int) -> torch.Tensor:
        return uniform(torch.arange(TOKENS * columns), 7, what, rank, step).view(TOKENS, columns)

    events, together = [draw(PAIRS, n) < 0.06 for n in range(3)], draw(PAIRS, 3) < RHOS
    amplitude = 0.5 + draw(PAIRS, 4)
    z = torch.zeros(TOKENS, LATENTS, dtype=torch.float64)
    z[:, 0 : 2 * PAIRS : 2] = ((events[0] & together) | (events[1] & ~together)) * amplitude
    z[:, 1 : 2 * PAIRS : 2] = ((events[0] & together) | (events[2] & ~together)) * amplitude
    z[:, 2 * PAIRS :] = (draw(NOISE, 5) < 0.06) * (0.5 + draw(NOISE, 6))
    return SparseCodes.from_dense(z.float())


def batch_of(rank: int, step: int) -> ActivationBatch:
    number = (step * SHARES + rank) * TOKENS + torch.arange(TOKENS)
    nothing = torch.zeros(TOKENS, 1)
    return ActivationBatch(nothing, nothing, number % 50, number % 32, number // 32)


def run(rank: int, size: int, folder: Path, sketch_dim: int | None) -> dict:
    replicas = Replicas() if size > 1 else None
    shares = [rank] if size > 1 else list(range(SHARES))
    section = MonitorSection(block_tokens=3 * SHARES * TOKENS, sketch_dim=sketch_dim)
    own = folder / f"of_{size}_{rank}"
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), own / "usage.json")
    monitor = CorrelationMonitor(section, LATENTS, "cpu", folder / f"logs_{size}", ledger, replicas)
    samples = ActivationSampleCollector(
        SamplesSection(collect_every=1, top_per_latent=6), LATENTS, "cpu", 0, folder / f"samples_{size}", (), 32, ledger,
        replicas,
    )  # fmt: skip
    for step in range(1, STEPS + 1):
        for n in shares:
            batch = batch_of(n, step)
            monitor.update_correlations(share(n, step), step, sequences=batch.sequences)
            samples.collect(share(n, step), batch, step, micro=n if size == 1 else 0)
        if step == 1:
            monitor.refresh_targets()
        report = monitor.report(step)
    samples.save(STEPS, lambda ids: [str(i) for i in ids])
    i, j = monitor.target_pairs(100)
    return {"report": report, "targets": [i.tolist(), j.tolist()], "metrics": monitor.metrics()}


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    folder, sketch_dim = Path(sys.argv[3]), int(sys.argv[4]) or None
    if size > 1:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = run(rank, size, folder, sketch_dim)
    (folder / f"replica_{size}_{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
