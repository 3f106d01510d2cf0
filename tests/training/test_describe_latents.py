"""After training, what is kept of latents is of the final weights: samples, counts and duplicates against a recomputation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.training.planted import SEQUENCE, Planted, config
from transcoder.activations import ActivationBatch, build_stream
from transcoder.activations.batch import take_rows
from transcoder.config import RunConfig
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.reporting.latent_table import read_latents
from transcoder.training import train_transcoder
from transcoder.training.describe_latents import describe_latents, tokens_to_look_at
from transcoder.training.firings import Firings
from transcoder.training.heldout_pairs import find_pairs, report_metrics


def transcoder_of(d_sae: int = 64, seed: int = 0) -> Transcoder:
    batch = next(Planted())
    return Transcoder(TranscoderConfig(batch.source.shape[1], batch.target.shape[1], d_sae, k=4), seed=seed)


def in_order(count: int) -> list[ActivationBatch]:
    source = Planted()
    return [next(source) for _ in range(count)]


def samples_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "activation_samples" / "samples.parquet").to_pylist()
    return rows


def strongest(
    codes: torch.Tensor, batch_of: list[ActivationBatch], latent: int, window: int
) -> list[tuple[float, int]]:
    """(activation, token) of a latent's ten strongest tokens, each `window` or more from a stronger one of its sequence."""
    tokens, positions, sequences = (
        torch.cat([getattr(b, name) for b in batch_of]) for name in ("tokens", "positions", "sequences")
    )
    kept: list[int] = []
    for row in codes[:, latent].argsort(descending=True, stable=True).tolist():
        if codes[row, latent] < 0.05 or len(kept) == 10:
            break
        near = (
            int(sequences[k]) == int(sequences[row]) and abs(int(positions[k] - positions[row])) < window for k in kept
        )
        if not any(near):
            kept.append(row)
    return [(float(codes[row, latent]), int(tokens[row])) for row in kept]


def test_contexts_and_counts_are_those_of_these_weights(tmp_path: Path) -> None:
    model, batches = transcoder_of(), in_order(40)
    describe_latents(tmp_path, config(), model, batches, step=7, tokens=10**6)
    codes = torch.cat([model.eval().encode(b.source).to_dense() for b in batches]).detach()
    rows = samples_of(tmp_path)
    assert {row["step"] for row in rows} == {7}
    for latent in range(64):
        top = [(row["activation"], row["token"]) for row in rows if row["latent"] == latent and row["kind"] == "top"]
        wanted = strongest(codes, batches, latent, window=6)
        assert [token for _, token in top] == [token for _, token in wanted]
        assert [value for value, _ in top] == pytest.approx([value for value, _ in wanted])
    table = read_latents(tmp_path / "latents.parquet")
    assert table.fired.tolist() == (codes > 0).sum(0).tolist()
    assert table.peak == pytest.approx(codes.max(0).values.double().numpy())


def test_every_token_of_a_context_has_its_activation(tmp_path: Path) -> None:
    model, batches = transcoder_of(), in_order(12)
    describe_latents(tmp_path, config(), model, batches, step=1, tokens=10**6)
    codes = torch.cat([model.eval().encode(b.source).to_dense() for b in batches]).detach()
    looked = 0
    for row in samples_of(tmp_path):
        for n, value in enumerate(row["activations"]):
            position = row["position"] + n - row["anchor"]
            if 0 <= position < SEQUENCE:
                looked += 1
                assert value == pytest.approx(
                    float(codes[row["sequence"] * SEQUENCE + position, row["latent"]]), abs=1e-6
                )
            else:
                assert value != value
    assert looked > 1000


def test_quantiles_and_histograms(tmp_path: Path) -> None:
    model, batches = transcoder_of(), in_order(20)
    counts = Firings.of(model, batches, 10**6).counts()
    codes = torch.cat([model.eval().encode(b.source).to_dense() for b in batches]).detach()
    for latent in range(64):
        own = codes[:, latent][codes[:, latent] > 0].sort().values
        assert int(counts.histogram[latent].sum()) == len(own)
        if len(own) > 20:
            assert (
                float(own[0])
                <= float(counts.quantiles[latent, 0])
                <= float(counts.quantiles[latent, 3])
                <= float(own[-1])
            )
            assert float((own <= counts.quantiles[latent, 1]).float().mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("count", [0, 1])
def test_too_little_to_look_at(tmp_path: Path, count: int) -> None:
    found = describe_latents(tmp_path, config(), transcoder_of(), in_order(count), step=1, tokens=10**6)
    assert bool(found) == bool(count)
    assert (tmp_path / "latents.parquet").exists()


def test_a_batch_without_contexts_or_sequences(tmp_path: Path) -> None:
    bare = [ActivationBatch(b.source, b.target, b.tokens, b.positions) for b in in_order(3)]
    describe_latents(tmp_path, config(), transcoder_of(), bare, step=1, tokens=100)
    rows = samples_of(tmp_path)
    assert rows
    assert all(row["activations"] == [row["activation"]] for row in rows)
    assert json.loads((tmp_path / "activation_samples" / "summary.json").read_text())["tokens"] == 100


def test_a_dead_latent_has_no_contexts_of_the_past(tmp_path: Path) -> None:
    """It was strong in training (its contexts were kept) and does not fire under the final weights."""
    result = train_transcoder(config(), tmp_path / "run", batches=Planted())
    before = {row["latent"] for row in samples_of(tmp_path / "run")}
    model = result.transcoder
    latent = min(before)
    with torch.no_grad():
        model.b_enc[latent] = -1e3
    describe_latents(tmp_path / "run", config(), model, result.heldout, step=30, tokens=10**6)
    assert latent not in {row["latent"] for row in samples_of(tmp_path / "run")}
    assert read_latents(tmp_path / "run" / "latents.parquet").fired[latent] == 0


def test_a_finished_run_has_one_count_of_duplicates(tmp_path: Path) -> None:
    result = train_transcoder(config(), tmp_path / "run", batches=Planted())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    report = json.loads((tmp_path / "run" / "heldout_duplicates.json").read_text())
    again = find_pairs(result.transcoder, lambda: result.heldout, config().antidup.monitor, step=30)
    assert {name: value for name, value in summary.items() if name.startswith("heldout_duplicates/")} == report_metrics(
        report
    )
    assert report_metrics(again) == report_metrics(report)
    assert {row["step"] for row in samples_of(tmp_path / "run")} == {30}


def test_each_pair_has_one_verdict_and_a_twin_is_told_from_a_split(tmp_path: Path) -> None:
    """Latent 1 is a copy of latent 0 with the same decoder row, 3 of 2 with another one; all fire on every token."""
    model = Transcoder(TranscoderConfig(6, 5, 8, k=4, activation="jumprelu"), seed=0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (model.W_enc, model.b_enc):
            parameter.zero_()
        model.b_enc += -5.0
        for pair, (i, j) in enumerate(((0, 1), (2, 3))):
            for latent in (i, j):
                model.W_enc[latent, pair] = 1.0
                model.b_enc[latent] = 0.0
        model.W_dec[1] = model.W_dec[0]
        model.W_dec[3] = torch.nn.functional.normalize(torch.randn(5, generator=g), dim=0)
    batches = []
    for n in range(16):
        x = torch.rand(64, 6, generator=g) + 0.1
        first = n * 64 + torch.arange(64)
        codes = model.eval().encode(x)
        batches.append(ActivationBatch(x, model.decode(codes).detach(), first * 0, first % 16, first // 16))
    report = find_pairs(model, lambda: batches, config().antidup.monitor)
    said = {(p["i"], p["j"]): (p["verdict"], p["kind"]) for p in report["pairs"]}
    assert said[0, 1] == ("duplicate", "twin")
    assert said[2, 3] == ("duplicate", "split")
    assert report["verdicts"] == {"duplicate": 2, "twin": 1, "split": 1, "correlated": 0, "undecided": 0}
    assert report["distinct_latents"] == report["live_latents"] - 2
    assert report["share_judged"] == 1.0


@pytest.mark.slow
def test_a_demo_card_is_what_the_final_checkpoint_says(tmp_path: Path) -> None:
    """The issue's must-hold: overlap of a card's top ten with an independent recomputation >= 0.95 in the median."""
    small = {
        "training.steps": 60,
        "training.batch_size": 512,
        "transcoder.d_sae": 256,
        "transcoder.widths": [64, 256],
        "training.warmup_steps": 5,
        "training.evaluation_tokens": 4096,
        "training.evaluation_ce_tokens": 0,
        "logging.report": False,
        "logging.progress": False,
        "antidup.verify_at_step": 60,
    }
    run = RunConfig.load("demo", small)
    result = train_transcoder(run, tmp_path / "run")
    model = Transcoder.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000060").eval()
    left = tokens = tokens_to_look_at(run, 60 * 512)
    seen, values = [], []
    with build_stream(run, torch.device("cpu")) as stream:
        for batch in stream.passes(heldout=False):
            seen.append(take_rows(batch, slice(0, left)))
            values.append(model.encode(seen[-1].source).to_dense().detach())
            left -= len(seen[-1])
            if left <= 0:
                break
    codes, window = torch.cat(values), run.antidup.samples.context_tokens
    assert len(codes) == tokens
    rows = samples_of(result.run_dir)
    overlaps = []
    for latent in range(256):
        top = Counter(row["token"] for row in rows if row["latent"] == latent and row["kind"] == "top")
        true = Counter(token for _, token in strongest(codes, seen, latent, window))
        if not true:
            assert not top, "a latent that does not fire has no contexts of the past"
            continue
        overlaps.append((top & true).total() / true.total())
    assert len(overlaps) > 100
    assert sorted(overlaps)[len(overlaps) // 2] >= 0.95
