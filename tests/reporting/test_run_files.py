"""The files of a run: reads what is there, says what is not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reporting.conftest import write_latents
from transcoder.reporting import Run
from transcoder.reporting.samples import read_samples
from transcoder.reporting.verdict import meaning


def missing(run: Run) -> dict[str, str]:
    return {m.what: m.why for m in run.missing}


def test_a_whole_run(finished_run: Path) -> None:
    run = Run(finished_run)
    assert run.missing == []
    assert run.name == "synthetic"
    assert run.status == "finished"
    assert run.last_step == 600
    assert run.setting("transcoder.widths") == [64, 192, 448, 512]
    assert run.setting("transcoder.nothing", 7) == 7
    assert list(run.prefix_metrics("evaluation/fvu_prefix")) == [64, 192, 448, 512]
    assert run.metric("no/such") is None
    assert run.correlation["step"] == 600
    assert [step for step, _ in run.correlation_files] == [100, 200, 300, 400, 500, 600]
    assert run.part_enabled("activation_samples") is False
    assert [e["event"] for e in run.metrics.events] == ["checkpoint"]


def test_series_keep_what_is_not_finite(finished_run: Path) -> None:
    series = Run(finished_run).metrics.get("details/gradient_norm")
    assert len(series) == 60
    assert series.values[3] == math.inf
    assert 40 not in series.at_steps()
    tail = series.tail_mean()
    assert tail == pytest.approx(np.mean(series.values[-10:]))
    finite = [v for v in series.values[1:] if math.isfinite(v)]
    assert series.rate() == pytest.approx(1 / np.mean([1 / v for v in finite]))
    assert math.isfinite(series.last() or math.inf)


def test_the_summary_wins_over_the_last_line(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=100)
    run = Run(path)
    (path / "summary.json").write_text('{"metrics/l0": 12.5, "evaluation/fvu": NaN, "seconds": 3}')
    assert run.metric("metrics/l0") == 12.5
    assert run.metric("evaluation/fvu") == run.metrics.get("evaluation/fvu").last()
    assert run.metric("seconds") is None


def test_an_empty_folder_names_everything(tmp_path: Path) -> None:
    run = Run(tmp_path, empty_ok=True)
    assert set(missing(run)) == {
        "config.yaml",
        "metrics.jsonl",
        "usage.json",
        "summary.json",
        "correlation report",
        "activation samples",
    }
    assert run.status == "interrupted or still running"
    assert run.last_step is None
    assert run.samples is None
    assert run.correlation == {}
    assert run.prefix_metrics("evaluation/fvu_prefix") == {}
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Run(tmp_path / "nothing")


def test_an_interrupted_run(make_run: Callable[..., Path]) -> None:
    run = Run(make_run(steps=600, interrupted=True))
    assert run.last_step == 270
    assert list(missing(run)) == ["summary.json"]
    assert run.status == "interrupted or still running"
    assert not run.finished
    assert run.metric("evaluation/fvu") is not None, "the last evaluation in metrics.jsonl counts"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"a: [unclosed"),
        ("config.yaml", b"- a list"),
        ("summary.json", b"{"),
        ("summary.json", b"[1]"),
        ("usage.json", b"\xff\xfe"),
        ("usage.json", b'{"components": 3}'),
        ("metrics.jsonl", b""),
        ("activation_samples/samples.parquet", b"PAR1 not really"),
    ],
)
def test_damage_is_named_and_read_past(
    name: str, content: bytes, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    (path / name).write_bytes(content)
    run = Run(path)
    told = missing(run)
    assert len(told) == 1
    assert next(iter(told)).split(".")[0] in (name.split(".")[0], "activation samples")


def test_a_damaged_newest_report_falls_back(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(make_run(steps=300, latents=3), tmp_path / "run")
    (path / "anti_duplication_logs" / "correlation_step_00000300.json").write_text('{"pairs": [')
    run = Run(path)
    assert run.correlation["step"] == 200
    assert list(missing(run)) == ["anti_duplication_logs/correlation_step_00000300.json"]


def test_samples_by_row(finished_run: Path) -> None:
    samples = Run(finished_run).samples
    assert samples is not None
    (rows,) = np.nonzero(samples.latent == samples.latent[0])
    contexts = samples.read_contexts(rows)
    assert contexts[0].tokens[contexts[0].anchor] == "<script>alert(1)</script>"
    assert len(contexts[5].tokens) == len(contexts[0].tokens) - 3, "padding is left out"


def test_windows_are_contexts_cut_around_the_token(finished_run: Path) -> None:
    samples = Run(finished_run).samples
    assert samples is not None
    rows = np.random.default_rng(0).permutation(len(samples))[:200]
    before, after = 3, 2
    windows = samples.read_windows(rows, before, after)
    assert windows.known.all()
    for n, context in enumerate(samples.read_contexts(rows)):
        there = windows.word[n] >= 0
        begin, end = max(0, context.anchor - before), context.anchor + after + 1
        assert [windows.words[i] for i in windows.word[n][there]] == context.tokens[begin:end]
        assert windows.words[windows.word[n, before]] == context.tokens[context.anchor]
        np.testing.assert_array_equal(windows.activation[n][there], context.activations[begin:end])


def test_characters_of_several_tokens_are_whole_in_windows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokens = [["a", " <0xE6>", "<0x97>", "<0xA5>", "b"], ["a", "b", "c", "d", "e"]]
    columns: dict[str, Any] = {name: [1, 2] for name in ("latent", "position", "sequence", "step", "token")}
    columns |= {"anchor": [3, 9], "kind": ["top", "top"], "activation": [1.0, 2.0]}
    columns |= {"context": [[1, 2, 3, 4, 5]] * 2, "tokens": tokens}
    pq.write_table(pa.table(columns), tmp_path / "samples.parquet")
    windows = read_samples(tmp_path / "samples.parquet").read_windows(np.array([0, 1]), 2, 1)
    assert [windows.words[i] for i in windows.word[0]] == [" <0xE6>", "<0x97>", "日", "b"]
    assert windows.known.tolist() == [True, False], "the second one's token is not in its context"


def test_the_last_line_names_latents_that_fire_on_words(make_run: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    own = {0: " cat", 1: "\n", 2: " dog"}
    rows = [(latent, n, token) for latent, token in own.items() for n in range(12)]
    columns: dict[str, Any] = {name: [7] * len(rows) for name in ("position", "sequence", "step", "token")}
    columns |= {"latent": [latent for latent, _, _ in rows], "kind": ["top"] * len(rows), "anchor": [1] * len(rows)}
    columns |= {"activation": [1.0 + n for _, n, _ in rows], "context": [[n, 5, 6] for _, n, _ in rows]}
    columns["tokens"] = [[f"word{n}", token, " end"] for _, n, token in rows]
    pq.write_table(pa.table(columns), path / "activation_samples" / "samples.parquet")
    # The third fires on nearly every token.
    write_latents(path, [10, 10, 900], 1000)
    assert meaning(Run(path)).text == "3 of 3 latents fire on 1,000 tokens. For example 0 on ' cat'."


def test_status_is_the_newest_truth(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=100, latents=1)
    assert Run(path).finished
    (path / "summary.json").write_text('{"step": 100, "finished": false, "interrupted_by": "SIGTERM"}')
    assert Run(path).status == "stopped by SIGTERM"
    (path / "summary.json").write_text('{"step": 50, "finished": true}')
    assert Run(path).status == "interrupted or still running", "the summary is older than the metrics"


RESUME = '{"step": %d, "time": 1, "event": "resume", "payload": {"from_step": %d}}\n'
LINE = '{"step": %d, "time": 2, "evaluation/fvu": 0.125, "details/n_training_samples": 7}\n'


@pytest.mark.parametrize(
    ("back_to", "now"), [(100, 110), (40, 60)], ids=["goes on", "went back to an older checkpoint"]
)
def test_the_summary_of_an_earlier_session_gives_no_figures(
    make_run: Callable[..., Path], back_to: int, now: int
) -> None:
    path = make_run(steps=100, latents=1)
    assert Run(path).metric("evaluation/fvu") != 0.125
    (path / "metrics.jsonl").write_text(RESUME % (back_to, back_to) + LINE % now)
    run = Run(path)
    assert run.earlier_session == 100
    assert run.metric("evaluation/fvu") == 0.125
    assert run.metric("evaluation/baseline_linear_fvu") is None, (
        "no figure of the earlier session is shown as this one's"
    )
    assert (run.status, run.last_step, run.tokens) == ("interrupted or still running", now, 7)
    assert "ended at step 100" in missing(run)["summary.json"]


def test_a_resumed_run_that_ended_has_its_summary_back(make_run: Callable[..., Path]) -> None:
    path = make_run(steps=100, latents=1)
    (path / "metrics.jsonl").write_text(RESUME % (40, 40) + LINE % 95)
    run = Run(path)
    assert (run.earlier_session, run.status, run.last_step) == (None, "finished", 100)
    assert run.metric("evaluation/fvu") != 0.125


@pytest.mark.parametrize("step", ["null", '"x"', "[1]", "NaN", "1" + "0" * 400])
def test_a_summary_without_a_step_is_no_reason_to_fail(make_run: Callable[..., Path], step: str) -> None:
    path = make_run(steps=100, latents=1)
    (path / "summary.json").write_text(f'{{"step": {step}, "finished": true, "tokens": {step}, "a/b": {step}}}')
    run = Run(path)
    assert (run.status, run.last_step, run.metric("a/b")) == ("finished", 100, None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"interrupted": True}, "written when a run finishes"),
        ({}, "could not write it"),
    ],
)
def test_why_there_are_no_heldout_facts(make_run: Callable[..., Path], options: dict[str, Any], why: str) -> None:
    lacking = {m.what: m.why for m in Run(make_run(steps=100, latents=1, **options)).lacking}
    assert why in lacking["facts of each latent"]
