"""latents.parquet: counts against the codes, promoted tokens against the product, and what is lacking by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.planted import Planted, config
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.reporting.latent_table import read_latents
from transcoder.training import latent_facts, train_transcoder
from transcoder.training.firings import BINS, Firings
from transcoder.training.latent_facts import TOKENS_SHOWN, write_latent_facts


@pytest.fixture
def transcoder() -> Transcoder:
    batch = next(Planted())
    shape = config().transcoder
    sizes = TranscoderConfig(d_in=batch.source.shape[1], d_out=batch.target.shape[1], d_sae=shape.d_sae, k=shape.k)
    return Transcoder(sizes, seed=0)


def test_counts_and_histograms_are_those_of_the_codes(tmp_path: Path, transcoder: Transcoder) -> None:
    source = Planted()
    heldout = [next(source), next(source)]
    table = read_latents(write_latent_facts(tmp_path, transcoder, Firings.of(transcoder, heldout, 10**6)))
    codes = torch.cat([transcoder.eval().encode(batch.source).to_dense() for batch in heldout]).detach()
    assert table.tokens == len(codes)
    assert table.fired.tolist() == (codes > 0).sum(0).tolist()
    assert table.peak == pytest.approx(codes.max(0).values.double().numpy())
    for latent, lists in table.details([0, 3, 17]).items():
        own = codes[:, latent]
        wanted = torch.histc(own[own > 0], BINS, 0, float(own.max())) if (own > 0).any() else torch.zeros(BINS)
        assert sum(lists["histogram"]) == int((own > 0).sum())
        # A value at the edge of two bins may be counted in either.
        assert sum(abs(a - b) for a, b in zip(lists["histogram"], wanted.tolist(), strict=True)) <= 2
    assert table.why == {"promoted and suppressed tokens": "the run had no language model at hand"}


def nothing(transcoder: Transcoder) -> Firings:
    return Firings.of(transcoder, [], 0)


def test_promoted_tokens_are_those_of_the_product(
    tmp_path: Path, transcoder: Transcoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_facts, "LOGITS", 40 * 5)
    unembedding = torch.randn(transcoder.config.d_out, 40, generator=torch.Generator().manual_seed(1))
    shown = torch.tensor([1, 2, 5, 9, 11, 30, 63])
    write_latent_facts(
        tmp_path, transcoder, nothing(transcoder), shown, unembedding, lambda ids: [f"<{i}>" for i in ids]
    )
    table = read_latents(tmp_path / "latents.parquet")
    logits = transcoder.W_dec.detach() @ unembedding
    logits -= logits.mean(1, keepdim=True)
    found = table.details(list(range(64)))
    for latent in range(64):
        if latent not in shown:
            assert found[latent]["promoted"] == []
            continue
        values, ids = logits[latent].topk(TOKENS_SHOWN)
        assert found[latent]["promoted"] == [f"<{i}>" for i in ids.tolist()]
        assert found[latent]["promoted_logits"] == pytest.approx(values.tolist(), abs=1e-5)
        assert found[latent]["suppressed"] == [f"<{i}>" for i in (-logits[latent]).topk(TOKENS_SHOWN).indices.tolist()]
    assert table.why == {"activation histograms": "no token was looked at"}
    assert table.fired.sum() == 0


def test_a_cpu_is_not_given_minutes_of_work(
    tmp_path: Path, transcoder: Transcoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unembedding = torch.randn(transcoder.config.d_out, 40)
    monkeypatch.setattr(latent_facts, "MOST_PRODUCTS", 10 * unembedding.numel())
    write_latent_facts(tmp_path, transcoder, nothing(transcoder), None, unembedding, lambda ids: [str(i) for i in ids])
    table = read_latents(tmp_path / "latents.parquet")
    assert [latent for latent, lists in table.details(list(range(64))).items() if lists["promoted"]] == list(range(10))
    assert "minutes on a CPU" in table.why["promoted and suppressed tokens of some latents"]


def test_a_run_that_cannot_write_its_report_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders stand where the files must be."""
    for name in ("report.html", "latents.parquet"):
        (tmp_path / "run" / name).mkdir(parents=True)
    result = train_transcoder(config(logging__report=True), tmp_path / "run", batches=Planted())
    assert result.finished
    assert result.report is None
    assert "report.html could not be written" in caplog.text
    assert "the final weights could not be looked at" in caplog.text
