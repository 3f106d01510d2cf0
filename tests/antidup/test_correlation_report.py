"""The correlation report: its fields, its check, its cosines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.antidup.test_monitor import BATCH, SECTION, feed, last_report, monitor, planted
from transcoder.antidup import validate_correlation_report
from transcoder.antidup.correlation_report import connected_components
from transcoder.antidup.row_cosines import cosine_tail, random_cosine_tail
from transcoder.kernels import SparseCodes, use_backend


def test_effective_dictionary_size_counts_copies_once(tmp_path: Path) -> None:
    independent = planted(6000, 14, rhos=(), noise=24)
    part = monitor(tmp_path / "a", 24)
    feed(part, independent)
    assert last_report(tmp_path / "a")["effective_dictionary_size"] == pytest.approx(24, rel=0.03)
    part = monitor(tmp_path / "b", 24)
    feed(part, independent[:, :6].repeat(1, 4))
    assert last_report(tmp_path / "b")["effective_dictionary_size"] == pytest.approx(6, rel=0.03)


def test_an_empty_run_reports_nothing(tmp_path: Path) -> None:
    part = monitor(tmp_path, 8)
    report = part.report(0, torch.randn(8, 4))
    validate_correlation_report(report)
    assert report["pairs"] == []
    assert report["decoder_cosine"] is not None
    assert part.target_pairs(5)[0].numel() == 0


def test_reports_list_at_most_the_configured_number(tmp_path: Path) -> None:
    z = planted(1000, 15, rhos=(1.0,), rate=0.3, noise=0).repeat(1, 5)
    part = monitor(tmp_path, 10, replace(SECTION, max_reported_pairs=7))
    feed(part, z)
    report = last_report(tmp_path)
    validate_correlation_report(report)
    assert len(report["pairs"]) == 7
    assert report["pairs_total"] == 45
    # No pair is flagged yet: what is known of candidates has its own fields.
    assert report["components"] == []
    assert report["candidate_components"] == [list(range(10))]
    assert report["distinct_latents"] == 10
    assert report["distinct_latents_candidates"] == 1
    assert part.metrics()["duplicates/largest_component"] == 0.0
    assert part.metrics()["duplicates/largest_candidate_component"] == 10.0


def test_components_are_joined_through_any_chain() -> None:
    assert connected_components([(5, 9), (1, 2), (9, 7), (2, 3), (7, 5), (3, 4)]) == [[1, 2, 3, 4], [5, 7, 9]]
    assert connected_components([]) == []


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_cosine_tail_is_the_dense_one(backend: str) -> None:
    w = torch.randn(50, 6, generator=torch.Generator().manual_seed(17))
    w[3], w[4], w[40] = w[20] * 2, w[20] * 3, w[20]  # a row need not be the first of those like it
    u = torch.nn.functional.normalize(w, dim=1)
    best = (u @ u.T).fill_diagonal_(-1).max(1).values.sort().values
    with use_backend(backend):
        tail = cosine_tail(w)
        assert tail is not None
        assert tail["median"] == pytest.approx(float(best[24]), abs=1e-6)
        assert tail["p999"] == pytest.approx(float(best[-1]), abs=1e-6)
        assert cosine_tail(w[:1]) is None
        opposite = cosine_tail(torch.tensor([[1.0, 0], [-2, 0]]))
    assert opposite is not None
    assert opposite["median"] == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize(("count", "width"), [(300, 2), (300, 3), (1000, 24), (64, 512), (2, 8)])
def test_the_random_cosine_tail_is_that_of_random_rows(count: int, width: int) -> None:
    g = torch.Generator().manual_seed(3)
    tails = [cosine_tail(torch.randn(count, width, generator=g)) for _ in range(40)]
    found = random_cosine_tail(count, width)
    assert found is not None
    # Of two rows the "quantiles" are one number, and of few the highest rank is a maximum: the median is the fair one there.
    for name in ("median", "p99") if count > 200 else ("median",):
        seen = torch.tensor([tail[name] for tail in tails if tail is not None])
        error = float(seen.std()) / 40**0.5
        assert abs(float(seen.mean()) - found[name]) < 5 * error + 0.004
    assert found["median"] < found["p99"] < found["p999"] <= 1
    assert random_cosine_tail(1, 8) is None
    assert random_cosine_tail(5, 1) == {"median": 1.0, "p99": 1.0, "p999": 1.0}


def test_the_cosine_tail_of_many_rows_is_that_of_some_against_all(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(301, 16, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr("transcoder.antidup.row_cosines.MOST_ROWS", 43)
    monkeypatch.setattr("transcoder.antidup.row_cosines.TILE_ROWS", 20)
    unit = torch.nn.functional.normalize(W, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).max(1).values
    some = nearest[torch.arange(43) * 301 // 43].sort().values
    found = cosine_tail(W)
    assert found is not None
    assert found["median"] == pytest.approx(float(some[21]), abs=1e-6)
    assert found["p99"] == pytest.approx(float(some[42]), abs=1e-6)


def test_cosines_of_both_sides_wait_for_a_block_where_asked(tmp_path: Path) -> None:
    part = monitor(tmp_path, 32, replace(SECTION, block_tokens=1500))
    g = torch.Generator().manual_seed(5)
    W_dec, W_enc = torch.randn(32, 8, generator=g), torch.randn(32, 6, generator=g)
    z = planted(1000, 18, rate=0.3)
    seen = []
    for step in (1, 2, 3):
        part.update_correlations(SparseCodes.from_dense(z), step)
        report = part.report(step, W_dec, W_enc=W_enc, cosines_by_block=True)
        validate_correlation_report(report)
        seen.append(report["decoder_cosine"] is not None)
        assert (report["encoder_cosine"] is not None) == seen[-1]
    assert seen == [False, True, False]
    report = part.report(4, W_dec, W_enc=W_enc)
    assert report["decoder_cosine"] == {**(cosine_tail(W_dec) or {}), "random": random_cosine_tail(32, 8)}
    assert report["encoder_cosine"] == {**(cosine_tail(W_enc) or {}), "random": random_cosine_tail(32, 6)}
    assert "duplicates/encoder_cosine_p99" in part.metrics()


def good_report(tmp_path: Path) -> dict:
    part = monitor(tmp_path, 32)
    feed(part, planted(1000, 18, rate=0.3))
    return last_report(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 4, "schema_version: expected 5"),
        (("pairs", 0, "bounds"), "exact", "bounds: expected one of"),
        (("step",), "7", r"report.step"),
        (("pairs", 0, "i"), 31, "expected 0 <= i < j"),
        (("pairs", 0, "upper"), 0.5, "lower <= correlation <= upper"),
        (("pairs", 0, "flagged"), 1, "flagged"),
        (("pairs", 0, "mergeable"), 1, "mergeable"),
        (("pairs", 0, "merge_share"), True, "merge_share"),
        (("pairs", 0, "correlation"), float("nan"), "correlation"),
        (("thresholds",), {}, "lacking correlation"),
        (("pairs_total",), 0, "pairs_total: expected at least"),
        (("components",), [[1]], "report.components.0.: expected two or more latents"),
        (("candidate_components",), [[1, 2], [2, 3]], "report.candidate_components.1.: expected two or more"),
        (("distinct_latents_candidates",), None, "distinct_latents_candidates"),
        (("histogram",), {"edges": [0], "counts": [1]}, "histogram"),
        (("decoder_cosine",), {"median": 1}, "lacking p99"),
        (("encoder_cosine",), {"median": 1, "p99": 1, "p999": 1, "random": {}}, "lacking median"),
        (("extra",), 1, "unknown extra"),
    ],
)
def test_malformed_reports_are_refused(path: tuple, value: object, message: str, tmp_path: Path) -> None:
    report = good_report(tmp_path)
    validate_correlation_report(report)
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        validate_correlation_report(report)


def test_pairs_out_of_order_are_refused(tmp_path: Path) -> None:
    report = good_report(tmp_path)
    report["pairs"].reverse()
    with pytest.raises(ValueError, match="sorted by falling correlation"):
        validate_correlation_report(report)


def test_a_report_that_cannot_be_written_changes_nothing_else(tmp_path: Path) -> None:
    z = planted(4000, 23)
    parts = [monitor(tmp_path / name, z.shape[1]) for name in ("whole", "blocked")]
    blocked = tmp_path / "blocked" / "anti_duplication_logs" / "correlation_step_00000004.json"
    blocked.mkdir(parents=True)  # a folder in the file's place: it cannot be moved there
    for step, a in enumerate(range(0, 4000, BATCH), 1):
        for part in parts:
            part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step)
        parts[0].report(step)
        if step == 4:
            with pytest.raises(IsADirectoryError):
                parts[1].report(step)
            assert list((tmp_path / "blocked").rglob("*.tmp")) == []
            assert parts[1].metrics() == parts[0].metrics()
        else:
            parts[1].report(step)
    assert last_report(tmp_path / "whole") == last_report(tmp_path / "blocked")
    files = parts[1]._ledger.record()["components"]["correlation_monitor"]["files"]
    assert len(files) == 7
    assert not any("00000004" in f for f in files)
