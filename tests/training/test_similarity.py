"""CKA of prefixes and of runs: against dense float64, from files, and refused where it would mean nothing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder import ActivationBatch, RunConfig, Transcoder, TranscoderConfig, cli, train_transcoder
from transcoder.training.similarity import (
    CODES_FILE,
    HeldoutCodes,
    prefix_similarity,
    run_similarity,
    similarity_metrics,
)

D, WIDTHS = 12, (8, 24, 40)


def heldout(tokens: int, seed: int) -> list[ActivationBatch]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g)
    ids = torch.randint(0, 50, (tokens,), generator=g)
    batch = ActivationBatch(x, x @ torch.randn(D, D, generator=g), ids, torch.arange(tokens) % 32)
    return [batch]


def model(seed: int) -> Transcoder:
    return Transcoder(TranscoderConfig(d_in=D, d_out=D, d_sae=WIDTHS[-1], k=6, widths=WIDTHS), seed=seed)


def dense_cka(x: Tensor, y: Tensor, batches: list[slice]) -> float:
    def hsic(a: Tensor, b: Tensor) -> float:
        k, el = (t @ t.T for t in (a, b))
        k, el = k.fill_diagonal_(0), el.fill_diagonal_(0)
        n = len(k)
        rest = k.sum() * el.sum() / ((n - 1) * (n - 2)) - 2 * (k @ el).sum() / (n - 2)
        return float(((k * el).sum() + rest) / (n * (n - 3)))

    mean = {
        pair: sum(hsic(p[s], q[s]) for s in batches)
        for pair, (p, q) in {"xy": (x, y), "xx": (x, x), "yy": (y, y)}.items()
    }
    return mean["xy"] / math.sqrt(mean["xx"] * mean["yy"])


def test_prefixes_are_compared_as_in_dense_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.training.similarity.BATCH_TOKENS", 50)
    codes = HeldoutCodes.of(model(0), heldout(230, 0), 210)
    assert codes is not None
    assert len(codes) == 200  # whole mini-batches of those asked for
    z = torch.cat([part.to_dense() for part in codes.codes]).double()
    batches = [slice(a, a + 50) for a in range(0, 200, 50)]
    W = model(0).W_dec.detach()
    report = prefix_similarity(codes, W)
    assert report is not None
    assert report["schema_version"] == 1
    assert (report["tokens"], report["batch_tokens"], report["widths"]) == (200, 50, list(WIDTHS))
    ends = [0, *WIDTHS]
    for a in range(3):
        for b in range(3):
            groups = [z[:, ends[n] : ends[n + 1]] for n in (a, b)]
            outputs = [z[:, : WIDTHS[n]] @ W[: WIDTHS[n]].double() for n in (a, b)]
            assert report["codes"]["cka"][a][b] == pytest.approx(dense_cka(*groups, batches), abs=1e-5)
            assert report["reconstructions"]["cka"][a][b] == pytest.approx(dense_cka(*outputs, batches), abs=1e-5)
    assert similarity_metrics(report) == {
        f"similarity/cka_prefix_{w}": report["reconstructions"]["cka"][n][2] for n, w in enumerate(WIDTHS[:2])
    }


def test_mini_batches_take_tokens_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.training.similarity.BATCH_TOKENS", 10)
    batch = heldout(30, 1)[0]
    codes = HeldoutCodes.of(model(0), [batch], 30)
    assert codes is not None
    assert torch.equal(codes.tokens[:10], batch.tokens[0::3])
    assert HeldoutCodes.of(model(0), [batch], 3) is None
    assert HeldoutCodes.of(model(0), [], 30) is None


def test_a_run_keeps_what_comparing_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        config = RunConfig().replace(
            {
                "transcoder.d_sae": WIDTHS[-1],
                "transcoder.widths": list(WIDTHS),
                "transcoder.k": 6,
                "training.steps": 4,
                "training.batch_size": 64,
                "training.seed": seed,
                "logging.progress": False,
                **{f"antidup.{part}.enabled": False for part in ("regularizer", "positions", "monitor", "samples")},
            }
        )
        training = (heldout(64, 100 + n)[0] for n in range(100))
        result = train_transcoder(config, tmp_path / f"run{seed}", batches=training, heldout=heldout(900, 5))
        summary = json.loads((tmp_path / f"run{seed}" / "summary.json").read_text())
        report = json.loads((tmp_path / f"run{seed}" / "similarity.json").read_text())
        assert set(report) == {"schema_version", "tokens", "batch_tokens", "widths", "codes", "reconstructions"}
        assert summary["similarity/cka_prefix_8"] == report["reconstructions"]["cka"][0][2]
    runs = [tmp_path / "run0", tmp_path / "run1"]
    found = run_similarity(runs)
    # From the files: what the second run's model says of the same tokens.
    loaded = HeldoutCodes.load(runs[1] / CODES_FILE)
    direct = HeldoutCodes.of(result.transcoder, heldout(900, 5), 4096)
    assert direct is not None
    assert loaded.matches(direct)
    assert torch.equal(loaded.codes[0].to_dense(), direct.codes[0].to_dense())
    assert found["codes"]["cka"][0][0] == pytest.approx(1)
    assert 0 < found["codes"]["cka"][0][1] < 0.99
    assert 0 < found["reconstructions"]["cka"][0][1] < 0.99
    assert cli.main(["compare", *map(str, runs)]) == 0
    assert f"run1, codes: {found['codes']['cka'][0][1]:.3f}" in capsys.readouterr().out
    same = shutil.copytree(runs[0], tmp_path / "same")
    assert run_similarity([runs[0], same])["reconstructions"]["cka"][0][1] == pytest.approx(1)
    assert cli.main(["compare", f"a={runs[0]},{runs[1]}", f"b={runs[0]},{runs[1]}"]) == 0
    assert "a: CKA across seeds" in capsys.readouterr().out


def test_other_tokens_and_broken_files_are_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        codes = HeldoutCodes.of(model(0), heldout(40, seed), 40)
        assert codes is not None
        codes.save(tmp_path / name / CODES_FILE)
    with pytest.raises(ValueError, match="different held-out tokens"):
        run_similarity([tmp_path / "a", tmp_path / "b"])
    alone = run_similarity([tmp_path / "a", tmp_path / "a"])
    assert alone["reconstructions"] is None  # there is no checkpoint
    (tmp_path / "b" / CODES_FILE).write_bytes((tmp_path / "a" / CODES_FILE).read_bytes()[:-40])
    with pytest.raises(ValueError, match=CODES_FILE):
        run_similarity([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="kept no codes"):
        run_similarity([tmp_path / "a", tmp_path])
