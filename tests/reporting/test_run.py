"""Run: what a notebook reads of a run's folder, and what it says where something is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.reporting.conftest import write_latents
from transcoder import Run, Transcoder, TranscoderConfig
from transcoder.config import CheckpointSection
from transcoder.reporting import RunPartMissingError
from transcoder.reporting.latents import Latents
from transcoder.reporting.samples import whole_characters
from transcoder.training.checkpoint import CheckpointStore

WIDTHS, TOKENS = (64, 192, 448, 512), 3 * 256
MakeRun = Callable[..., Path]


def small_transcoder() -> Transcoder:
    return Transcoder(TranscoderConfig(d_in=12, d_out=12, d_sae=WIDTHS[-1], k=4, widths=list(WIDTHS)), seed=3)


def add_checkpoint(run_dir: Path, step: int) -> None:
    """A checkpoint as a trainer writes it."""
    model = small_transcoder()
    with torch.no_grad():
        # Latent 9 points where latent 4 does, so that each is the other's nearest.
        model.W_dec[9] = 3 * model.W_dec[4]
    summary = {"transcoder": model.config.to_dict()}
    CheckpointStore(run_dir, CheckpointSection(keep_last=5)).save(step, model.state_dict(), {}, summary)


@pytest.fixture(scope="module")
def folder(make_run: MakeRun) -> Path:
    path = make_run(hostile=True)
    add_checkpoint(path, 600)
    write_latents(path, [i % 90 for i in range(512)], TOKENS)
    return path


@pytest.fixture
def run(folder: Path) -> Run:
    return Run(folder)


def test_figures_settings_and_columns(run: Run) -> None:
    assert run.config["transcoder"]["d_sae"] == 512
    assert run.summary["finished"] is True
    assert run.status == "finished"
    assert run.missing == []
    steps, values = run.metrics["metrics/fvu"]
    assert steps.dtype == np.int64
    assert list(steps[:3]) == [10, 20, 30]
    assert values.dtype == np.float64
    assert values[-1] == run.metrics.get("metrics/fvu").last()
    assert np.isinf(run.metrics["details/gradient_norm"].values[3])
    assert run.metrics.events[0]["event"] == "checkpoint"
    with pytest.raises(KeyError, match="near are metrics/fvu"):
        run.metrics["metrics/fvuu"]
    assert run.metric("evaluation/fvu") == run.summary["evaluation/fvu"]


def test_nothing_is_read_before_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    for damaged in ("activation_samples/samples.parquet", "metrics.jsonl", "anti_duplication_logs", "checkpoints"):
        target = copy / damaged
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    run = Run(copy)
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    assert len(run.latents) == 512
    assert run.latents[3].contexts
    assert run.checkpoint.step == 600


def test_a_latent(run: Run, folder: Path) -> None:
    samples = run.samples
    assert samples is not None
    latent = run.latents[3]
    assert (latent.id, latent.prefix, latent.prefix_width) == (3, 0, 64)
    assert (run.latents[64].prefix, run.latents[511].prefix) == (1, 3)
    assert latent.max_activation == pytest.approx(samples.activation[samples.latent == 3].max())
    assert [c.kind for c in latent.top] == ["top"] * 8
    assert [c.kind for c in latent.stratified] == ["stratified"] * 8
    strengths = [c.activation for c in latent.contexts]
    assert strengths == sorted(strengths, reverse=True)
    assert sorted(latent.positions) == sorted(samples.position[samples.latent == 3])
    for context in latent.contexts:
        assert len(context.activations) == len(context.tokens)
        assert context.activations[context.anchor] == context.activation
        assert context.tokens[0] != ""
    assert latent.pairs[0].other(3) == 5
    assert latent.group is None, "it is in a pair, but in no group of duplicates"
    assert latent.mergeable == {5: None}
    assert run.latents[10].mergeable == {12: True}
    assert run.duplicates.groups[run.latents[10].group] == [10, 12]
    unpaired = run.latents[510]
    assert (unpaired.group, len(unpaired.pairs)) == (None, 0)


def test_every_token_of_a_context_has_its_activation(run: Run) -> None:
    for context in run.latents[3].contexts:
        assert context.activations[context.anchor - 2] == pytest.approx(context.activation / 4)
        assert context.firing_on(context.tokens[context.anchor]) == pytest.approx(context.activation)


def test_density_is_that_of_the_final_weights_and_neighbours_are_the_checkpoints(make_run: MakeRun) -> None:
    path, fired = make_run(steps=100), [i % 7 for i in range(512)]
    add_checkpoint(path, 100)
    write_latents(path, fired, TOKENS)
    run = Run(path)
    np.testing.assert_array_equal(run.latents.firings, fired)
    np.testing.assert_allclose(run.latents.density, np.asarray(fired) / TOKENS)
    assert "dead: did not fire" in repr(run.latents[7])
    decoder = run.checkpoint.decoder
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    near = run.latents[4].neighbours(5)
    assert near[0] == (9, pytest.approx(1.0, abs=1e-5))
    cosine = unit @ unit[4]
    cosine[4] = -1
    assert [n for n, _ in near] == np.argsort(-cosine)[:5].tolist()
    assert [c for _, c in near] == sorted((c for _, c in near), reverse=True)
    assert 4 not in dict(near)
    assert len(run.latents[4].neighbours(10_000)) == 511
    assert run.latents[4].neighbours(0) == []
    with torch.no_grad():
        found = run.transcoder()
        assert found.config.d_sae == 512
        torch.testing.assert_close(found.W_dec, torch.from_numpy(decoder))


def test_the_table_filters_sorts_and_searches(run: Run) -> None:
    every = run.latents
    assert every.filter(prefix=1).id.tolist() == list(range(64, 192))
    paired = every.filter(group=True)
    assert set(paired.id) == {x for p in run.duplicates.mergeable for x in (p.i, p.j)}
    assert every.filter(group=0).id.tolist() == run.duplicates.groups[0]
    assert len(every.filter(group=False)) + len(paired) == 512
    dense = every.filter(density=(0.01, None))
    assert (dense.density >= 0.01).all()
    assert len(dense) + len(every.filter(density=(None, np.nextafter(0.01, 0)))) == 512
    np.testing.assert_array_equal(dense.id, every[every.density >= 0.01].id)
    strongest = every.sort("max_activation")
    assert strongest[0].max_activation == np.nanmax(every.max_activation)
    assert np.isnan(strongest.max_activation[-1])
    assert every.sort("id", descending=True)[0].id == 511
    assert paired.filter(prefix=0)[0].id == 10
    assert every[5:8].id.tolist() == [5, 6, 7]
    assert every[[3, 2]].id.tolist() == [3, 2]
    assert len(every[[]]) == 0
    assert every[-1].id == 511
    assert set(every.frame()) == {"prefix", "firings", "density", "max_activation", "group"}
    word = next(c for c in run.latents[3].contexts).tokens[-1].strip() or "import"
    texts = {latent.id: [c.text.lower() for c in latent.contexts] for latent in sampled(run)}
    for found in (every.search(word), every.search(word.upper())):
        assert set(found.id) == {n for n, some in texts.items() if any(word.lower() in text for text in some)}
    scores = [
        sum(c.firing_on(word) for c in latent.contexts) / len(latent.contexts) / latent.max_activation
        for latent in found
    ]
    assert scores == pytest.approx(sorted(scores, reverse=True))
    assert len(paired.search(word)) <= len(found)
    assert len(every.search("no such text anywhere")) == 0
    with pytest.raises(ValueError, match=r"prefix: expected one of 0 \(width 64\)"):
        every.filter(prefix=64)
    with pytest.raises(ValueError, match="group: expected 0 to"):
        every.filter(group=99)
    with pytest.raises(ValueError, match="by: expected one of id"):
        every.sort("size")
    with pytest.raises(IndexError, match="below 512"):
        every[512]
    with pytest.raises(IndexError, match="0 to 511"):
        every.by_id(512)


def test_duplicates(run: Run) -> None:
    found = run.duplicates
    report = run.heldout_duplicates
    assert found.final
    assert len(found) == found.total == report["pairs_total"]
    assert [p.correlation for p in found] == sorted((p["correlation"] for p in report["pairs"]), reverse=True)
    first = found[0]
    assert first.lower < first.correlation < first.upper
    assert [p.said for p in found[:3]] == ["undecided", "twin", "correlated"]
    assert len(found.mergeable) == report["verdicts"]["duplicate"]
    assert found.of(5)[0] == first
    assert found.groups == report["components"]
    assert len(found.histogram.edges) == len(found.histogram.counts) + 1
    left, right = first.latents
    assert (left.id, right.id) == (first.i, first.j)
    assert left.top[0].tokens


def test_tables_are_data_frames(run: Run) -> None:
    prefixes = run.prefixes
    assert prefixes.index.tolist() == list(WIDTHS)
    assert prefixes.added.tolist() == [64, 128, 256, 64]
    assert prefixes.attrs["heldout"] is True
    assert np.isnan(prefixes.gain[64])
    assert prefixes.gain[192] == pytest.approx(prefixes.fvu[64] - prefixes.fvu[192])
    assert [v.state for v in run.ledger] == ["used", "not proven", "used", "off"]
    samples = run.samples
    assert samples is not None
    assert run.positions.strongest.sum() == samples.top.sum()
    assert run.positions.stratified.sum() == (~samples.top).sum()
    assert run.positions.attrs["edges"][-1] == 128
    assert run.positions.attrs["sink_share"] == 0.013
    metrics = run.metrics.frame()
    assert metrics.index[-1] == 600
    assert metrics["metrics/fvu"].iloc[-1] == run.metrics["metrics/fvu"].values[-1]
    assert metrics["evaluation/fvu"].count() == 6
    pairs = run.duplicates.frame()
    assert (len(pairs), pairs.correlation.max()) == (len(run.duplicates), run.duplicates[0].correlation)
    latents = run.latents.frame()
    assert latents.loc[3, "max_activation"] == run.latents[3].max_activation


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"found neither config\.yaml nor"):
        Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are runs inside: synthetic"):
        Run(folder.parent)


def test_what_is_missing_says_why(make_run: MakeRun) -> None:
    off = {"antidup.samples.enabled": False, "antidup.monitor.enabled": False}
    path = make_run(steps=200, interrupted=True, overrides=off)
    shutil.rmtree(path / "activation_samples")
    shutil.rmtree(path / "anti_duplication_logs")
    run = Run(path)
    with pytest.raises(RunPartMissingError, match=r"no summary: .*interrupted or is still going"):
        run.summary["evaluation/fvu"]
    with pytest.raises(RunPartMissingError, match="no contexts: the sample collector was switched off"):
        run.latents[3].contexts  # noqa: B018
    with pytest.raises(RunPartMissingError, match="no positions: the sample collector was switched off"):
        run.positions  # noqa: B018
    with pytest.raises(RunPartMissingError, match="no duplicates: the correlation monitor was switched off"):
        run.duplicates  # noqa: B018
    with pytest.raises(RunPartMissingError, match="no checkpoint: checkpoints/ holds none"):
        run.transcoder()
    with pytest.raises(RunPartMissingError, match=r"no firing counts: .*written when a run finishes"):
        run.latents.density  # noqa: B018
    # What is there is there, and every representation draws what it can.
    assert len(run.latents) == 512
    assert "512 latents" in repr(run.latents)
    assert "prefix 1 (width 192)" in repr(run.latents[100])
    assert "no contexts" in repr(run)
    assert run.latents[100]._repr_html_()
    add_checkpoint(path, 90)
    run.refresh()
    assert run.transcoder().config.d_sae == 512
    assert list(run.latents.frame()) == ["prefix"]


def test_a_damaged_newest_checkpoint_falls_back_to_the_good_one(make_run: MakeRun) -> None:
    path = make_run(steps=100)
    for step in (50, 100):
        add_checkpoint(path, step)
    weights = path / "checkpoints" / "step_00000100" / "transcoder.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with pytest.warns(UserWarning, match="not usable, trying the one before it"):
        assert Run(path).checkpoint.step == 50


def test_a_checkpoint_that_goes_away_says_so(make_run: MakeRun) -> None:
    path = make_run(steps=100)
    add_checkpoint(path, 50)
    run = Run(path)
    assert run.checkpoint.step == 50
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(RunPartMissingError, match=r"run\.refresh\(\)"):
        run.latents[4].neighbours()


def test_a_running_run_is_read_again_when_asked(make_run: MakeRun) -> None:
    run = Run(make_run(steps=100, interrupted=True))
    assert run.last_step == 40
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 50, "time": 1.0, "metrics/fvu": 0.5}) + "\n")
    assert run.metrics["metrics/fvu"].steps[-1] == 40
    assert run.refresh().metrics["metrics/fvu"].steps[-1] == 50


def sampled(run: Run) -> Latents:
    """The latents that have samples."""
    assert run.samples is not None
    return run.latents[np.unique(run.samples.latent)]


def representations(run: Run) -> list[object]:
    pair = run.duplicates[0]
    views = [run, run.metrics, run.latents, run.latents.search("<"), run.latents.filter(group=True)]
    views += [run.duplicates, run.duplicates.flagged, run.ledger, pair]
    return views + list(sampled(run)[:3]) + run.latents[3].contexts


def test_hostile_tokens_stay_text(run: Run) -> None:
    spiked = sampled(run)[0]
    assert any("<script>" in c.text for c in spiked.contexts)
    pages = []
    for view in representations(run):
        html = view._repr_html_()  # type: ignore[attr-defined]
        assert re.findall(r"<(?!/?(?:div|p|b|table|thead|tbody|tr|td|th|span)\b)[^>]*>", html) == []
        # No attribute but ours: a quote in a token must not open one.
        assert set(re.findall(r"\s([\w-]+)=", "".join(re.findall(r"<[^>]*>", html)))) <= {
            "class",
            "style",
            "tabindex",
            "title",
        }
        pages.append(html)
        text = repr(view)
        assert all(c.isprintable() or c == "\n" for c in text), [c for c in text if not c.isprintable()]
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in page for page in pages)
    assert any("&amp;lt;i&amp;gt;" in page for page in pages)
    assert any("\\x00\\x07" in page for page in pages)


def test_escape_sequences_and_direction_marks_never_reach_a_terminal(make_run: MakeRun) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = make_run(steps=100)
    file = path / "activation_samples" / "samples.parquet"
    table = pq.read_table(file)
    tokens = [["\x1b[2J", "\u202e", "\r", *row[3:]] for row in table.column("tokens").to_pylist()]
    column = table.column_names.index("tokens")
    pq.write_table(table.set_column(column, "tokens", pa.array(tokens)), file)
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace("name: synthetic", 'name: "<b>\\e[31mred"', 1))
    run = Run(path)
    assert run.name == "<b>\x1b[31mred"
    latent = run.latents.filter(group=True)[0]
    for view in (run, run.latents, latent, *latent.contexts):
        assert all(c.isprintable() or c == "\n" for c in repr(view))
        html = view._repr_html_()  # type: ignore[attr-defined]
        assert "\x1b" not in html
        assert "\u202e" not in html
    assert "<b>\\x1b" not in run._repr_html_()


@pytest.mark.parametrize("name", ["loss", "fvu", "duplicates", "density", "positions"])
def test_plots_draw_the_runs_own_figures(run: Run, name: str) -> None:
    pytest.importorskip("matplotlib")
    figure = getattr(run, f"plot_{name}")()
    assert figure._repr_png_().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert axes.get_title()
    if name == "fvu":
        lines = {line.get_label(): line for line in axes.lines}
        np.testing.assert_array_equal(lines["held-out"].get_ydata(), run.metrics["evaluation/fvu"].values)
        assert {"training", "width 64", "linear map"} <= set(lines)
    if name == "density":
        assert f"{(run.latents.density > 0).sum()} latents fired" in axes.get_title()


def test_a_plot_without_its_part_says_what_is_missing(make_run: MakeRun) -> None:
    run = Run(make_run(steps=100))
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(RunPartMissingError, match="not in the folder: there are no curves"):
        run.plot_loss()
    with pytest.raises(RunPartMissingError, match="no metrics: not in the folder"):
        run.metrics["metrics/fvu"]
    assert "there are no curves" in repr(run.metrics)
    with pytest.raises(RunPartMissingError, match="no firing counts"):
        run.plot_density()


def test_plots_without_matplotlib_name_the_line_that_installs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        run.plot_loss()


def test_characters_of_several_tokens_are_shown_and_found(make_run: MakeRun) -> None:
    assert whole_characters(["a <0xE6>", "<0x97>", "<0xA5>", "<0xE6>"]) == ["a <0xE6>", "<0x97>", "日", "<0xE6>"]
    assert whole_characters(["<0x97>", "<0xF0><0x9F>", "<0x99><0x82>!", "<"]) == ["<0x97>", "<0xF0><0x9F>", "🙂!", "<"]
    path = make_run(steps=100, latents=3)
    file = path / "activation_samples" / "samples.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[4]["tokens"][2:7] = [" <0xE6>", "<0x97>", "<0xA5>", "<0xE6><0x9C>", "<0xAC>"]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)
    (latent,) = Run(path).latents.search("日本")
    assert latent.id == rows[4]["latent"]
    assert any("<0xE6><0x97>日<0xE6><0x9C>本" in repr(context) for context in latent.contexts)
