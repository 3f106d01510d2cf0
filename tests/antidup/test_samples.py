"""The sample collector against a slow collector that keeps everything in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from transcoder.activations import ActivationBatch
from transcoder.antidup import ActivationSampleCollector, UsageLedger
from transcoder.antidup.ledger import REQUIRED_EFFECTS
from transcoder.config import SamplesSection
from transcoder.kernels import SparseCodes

LENGTH, WIDTH, D_SAE, SPECIAL = 20, 4, 12, 3


def batch(seed: int, rows: int = 80, density: float = 0.3) -> tuple[SparseCodes, ActivationBatch]:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(rows, D_SAE, generator=g) * (torch.rand(rows, D_SAE, generator=g) < density)
    number = torch.randperm(400, generator=g)[:rows]
    tokens = torch.randint(0, 30, (rows,), generator=g)
    contexts = torch.randint(0, 30, (rows, WIDTH), generator=g, dtype=torch.int32)
    contexts[:, 2] = tokens.int()
    made = ActivationBatch(
        source=torch.zeros(rows, 2),
        target=torch.zeros(rows, 2),
        tokens=tokens,
        positions=number % LENGTH,
        sequences=number // LENGTH + 100 * seed,
        contexts=contexts,
        context_anchor=2,
    )
    return SparseCodes.from_dense(z), made


def collector(folder: Path, **settings: object) -> ActivationSampleCollector:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    section = SamplesSection(
        **{"collect_every": 1, "context_tokens": WIDTH, "top_per_latent": 4, "min_activation": 0.1, **settings}
    )
    out = folder / "activation_samples"
    return ActivationSampleCollector(section, D_SAE, "cpu", 0, out, [SPECIAL], LENGTH, ledger)


def words(ids: list[int]) -> list[str]:
    return [f"w{i}" for i in ids]


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / "activation_samples" / "samples.parquet").to_pylist()


def overlap(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and abs(a[2] - b[2]) < WIDTH


def test_top_samples_are_the_strongest_without_overlap(tmp_path: Path) -> None:
    """One batch: exact. (Over several, a sample that fell out cannot come back when a stronger one is dropped for overlap.)"""
    part = collector(tmp_path, top_per_latent=3)
    codes, made = batch(0)
    part.collect(codes, made, 0)
    part.save(1, words)
    found = table(tmp_path)
    z = codes.to_dense()
    for latent in range(D_SAE):
        strongest = sorted(
            (
                (float(z[r, latent]), int(made.sequences[r]), int(made.positions[r]), r)
                for r in range(len(made))
                if z[r, latent] >= 0.1
            ),
            reverse=True,
        )[:3]
        kept: list[tuple] = []
        for candidate in strongest:
            if not any(overlap(candidate, other) for other in kept):
                kept.append(candidate)
        mine = [s for s in found if s["latent"] == latent and s["kind"] == "top"]
        assert [s["activation"] for s in mine] == pytest.approx([c[0] for c in kept])
        for sample, (_, sequence, position, row) in zip(mine, kept, strict=True):
            assert (sample["sequence"], sample["position"]) == (sequence, position)
            assert sample["context"] == made.contexts[row].tolist()
            assert sample["tokens"] == words(sample["context"])
            assert sample["context"][sample["anchor"]] == sample["token"] == int(made.tokens[row])


def test_over_many_batches_the_strongest_of_all_is_first(tmp_path: Path) -> None:
    part = collector(tmp_path)
    strongest = torch.zeros(D_SAE)
    for step in range(12):
        codes, made = batch(step)
        part.collect(codes, made, step)
        strongest = torch.maximum(strongest, codes.to_dense().amax(0))
    part.save(12, words)
    tops = [s for s in table(tmp_path) if s["kind"] == "top"]
    for latent in range(D_SAE):
        mine = [s["activation"] for s in tops if s["latent"] == latent]
        assert mine == sorted(mine, reverse=True)
        assert mine[0] == pytest.approx(float(strongest[latent]))
        assert len(mine) <= 4


def test_stratified_samples_cover_the_bins_whatever_their_share(tmp_path: Path) -> None:
    """Nine tenths of the tokens stand in the first fifth of the sequence; the reservoir must not."""
    part = collector(tmp_path, position_bins=5, min_per_bin=2, stratified_per_latent=10)
    for step in range(60):
        codes, made = batch(step)
        g = torch.Generator().manual_seed(step)
        early = torch.rand(len(made), generator=g) < 0.9
        positions = torch.where(early, made.positions % 4, made.positions)
        moved = ActivationBatch(
            made.source,
            made.target,
            made.tokens.clamp(min=4),
            positions,
            torch.arange(80) + 1000 * step,
            None,
            made.contexts,
            2,
        )
        part.collect(codes, moved, step)
    part.save(60, words)
    summary = json.loads((tmp_path / "activation_samples" / "summary.json").read_text())
    assert summary["latents_followed"] == summary["latents_with_samples"] == D_SAE
    assert summary["position_bins"] == [2 * D_SAE] * 5
    assert summary["sink_fraction"] == 0


def test_the_reservoir_is_uniform_within_a_bin(tmp_path: Path) -> None:
    """Every token of a bin is kept with the same probability, early or late in the stream, strong or weak."""
    steps, kept = 40, torch.zeros(40)
    strong = 0.0
    for seed in range(60):
        ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
        section = SamplesSection(
            collect_every=1, position_bins=1, min_per_bin=4, stratified_per_latent=4, min_activation=0.0
        )
        part = ActivationSampleCollector(section, 1, "cpu", seed, tmp_path / "s", [], LENGTH, ledger)
        for step in range(steps):
            z = torch.tensor([[0.2], [0.9]])
            ids = torch.tensor([5, 6])
            made = ActivationBatch(torch.zeros(2, 1), torch.zeros(2, 1), ids, ids, torch.tensor([2, 3]) + 10 * step)
            part.collect(SparseCodes.from_dense(z), made, step)
        part.save(steps, words)
        chosen = [s for s in pq.read_table(tmp_path / "s" / "samples.parquet").to_pylist() if s["kind"] == "stratified"]
        assert len(chosen) == 4
        for s in chosen:
            kept[s["step"]] += 1
            strong += s["activation"] > 0.5
    assert float(kept[:20].sum()) == pytest.approx(120, abs=5 * 60**0.5)
    assert strong == pytest.approx(120, abs=5 * 60**0.5)


def test_special_tokens_stay_below_their_share(tmp_path: Path) -> None:
    part = collector(tmp_path, position_bins=4, max_sink_fraction=0.2)
    for step in range(20):
        codes, made = batch(step, density=0.8)
        ids = torch.where(torch.arange(80) % 2 == 0, SPECIAL, made.tokens.clamp(min=4))
        part.collect(
            codes,
            ActivationBatch(made.source, made.target, ids, made.positions, made.sequences, None, made.contexts, 2),
            step,
        )
    part.save(20, words)
    spread = [s for s in table(tmp_path) if s["kind"] == "stratified"]
    for latent in range(D_SAE):
        mine = [s for s in spread if s["latent"] == latent]
        assert 0 < sum(s["token"] == SPECIAL for s in mine) <= 0.2 * len(mine) + 1e-9


def test_weak_and_unfollowed_latents_are_left_out(tmp_path: Path) -> None:
    part = collector(tmp_path, max_latents=3, min_activation=0.5)
    for step in range(5):
        part.collect(*batch(step), step)
    part.save(5, words)
    assert part.latents.tolist() == [0, 4, 8]
    found = table(tmp_path)
    assert {s["latent"] for s in found} == {0, 4, 8}
    assert min(s["activation"] for s in found) >= 0.5


def test_steps_between_are_passed_over_and_use_is_recorded(tmp_path: Path) -> None:
    part = collector(tmp_path, collect_every=3)
    for step in range(7):
        part.collect(*batch(step), step)
    part.save(7, words)
    assert {s["step"] for s in table(tmp_path)} == {0, 3, 6}
    record = part._ledger.record()["components"]["activation_samples"]
    assert record["calls"] == 3
    assert record["effect"]["samples_kept"] > 0
    assert record["files"] == ["activation_samples/samples.parquet", "activation_samples/summary.json"]


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    whole, first, second = (collector(tmp_path / name) for name in ("whole", "first", "second"))
    for step in range(6):
        whole.collect(*batch(step), step)
        (first if step < 3 else second).collect(*batch(step), step)
        if step == 2:
            second.load_state_dict(first.state_dict())
    whole.save(6, words)
    second.save(6, words)
    assert table(tmp_path / "whole") == table(tmp_path / "second")


def test_codes_of_another_shape_are_refused(tmp_path: Path) -> None:
    _, made = batch(0)
    with pytest.raises(ValueError, match="codes: expected shape"):
        collector(tmp_path).collect(SparseCodes.from_dense(torch.ones(80, D_SAE + 1)), made, 0)
