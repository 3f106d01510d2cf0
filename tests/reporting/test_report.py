"""report.html: whole, self-contained, bounded, and deaf to whatever stands in the data. What a browser makes of it is
tests/browser's matter."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.reporting.conftest import write_latents
from tests.reporting.page_tree import Page, read
from transcoder.reporting import Run, latent_cards, sections, write_report
from transcoder.reporting.page import environment, plotly
from transcoder.reporting.verdict import verdicts

SECTIONS = ["overview", "curves", "prefixes", "duplicates", "positions", "latents", "settings"]


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return read(write_report(finished_run))


def test_every_section_is_there(page: Page) -> None:
    assert list(page.sections) == SECTIONS
    ids = [e.attributes["id"] for e in page.root if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_overview_tells_figures_baselines_and_verdicts(page: Page, finished_run: Path) -> None:
    run = Run(finished_run)
    assert page.root.one("header").one("span", "good").words == "finished"
    assert "600 of 600 steps" in page.root.one("header").words
    own = run.metric("evaluation/fvu")
    assert own is not None
    assert f"{own:.4g}" in page.words
    assert [a.words for a in page.sections["overview"].one("dl", "answers").all("dd")] == [
        v.text for v in verdicts(run)
    ]
    told = page.tiles
    assert "Cross-entropy recovered" not in told, "no language model was at hand"
    assert int(told["Duplicate pairs"]) == run.heldout_duplicates["verdicts"]["duplicate"]
    assert "no effect (positions_resampled is 0); file anti_duplication_logs/positions.json is not there" in page.words
    for verdict in ("used", "not proven", "off"):
        assert verdict in page.words
    assert run.missing == []
    missing = {m.what for m in run.lacking}
    assert missing == {"facts of each latent", "checkpoint"}, "what the synthetic folder really lacks"
    assert all(what in page.words for what in missing)


def test_curves_have_values_and_a_text(page: Page) -> None:
    charts = page.charts
    assert set(charts) >= {
        "Loss",
        "Fraction of variance unexplained",
        "FVU per prefix",
        "L0",
        "Dead latents",
        "Candidate pairs",
        "Throughput",
        "FVU by prefix width",
        "Correlation of latent pairs",
        "What merging the listed pairs would cost",
    }
    prefixes = charts["FVU per prefix"]
    lines = prefixes.figure["data"]
    assert [line["name"] for line in lines] == ["64", "192", "448", "512"]
    assert all(len(line["x"]) == len(line["y"]) == 60 for line in lines)
    assert [th.words for th in prefixes.all("th")] == ["step", "64", "192", "448", "512"]
    assert len(prefixes.rows) == 24
    assert all(c.one("div", "plot").attributes["aria-label"].startswith(f"{title}: ") for title, c in charts.items())
    assert "1 value not finite" in page.words


def test_duplicates_are_sorted_and_link_to_their_latents(page: Page, finished_run: Path) -> None:
    pairs = Run(finished_run).heldout_duplicates["pairs"]
    rows = [row.attributes for row in page.sections["duplicates"].all("tr") if "data-pair" in row.attributes]
    expected = sorted(pairs, key=lambda p: -p["correlation"])
    assert [row["data-pair"] for row in rows] == [f"{p['i']}-{p['j']}" for p in expected]
    assert [row["data-verdict"] for row in rows] == [p["verdict"] for p in expected]
    index, cards = page.index, page.cards
    for pair in pairs:
        assert [pair["j"], pair["kind"] or pair["verdict"]] in index["partners"][str(pair["i"])]
        assert {pair["i"], pair["j"]} <= cards.keys()


def test_nothing_is_loaded_and_only_the_own_scripts_may_run(page: Page, finished_run: Path) -> None:
    for element in page.root:
        assert element.tag not in {"img", "iframe", "object", "embed", "base", "form", "b onmouseover"}
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "action", "srcset", "poster"}:
                assert value.startswith(("#", "data:,")), (element.tag, name, value)
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [e.attributes["content"] for e in page.root.all("meta") if "http-equiv" in e.attributes]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    (script,) = page.own_scripts
    library = gzip.decompress(base64.b64decode(page.script("plotly")))
    digests = [base64.b64encode(hashlib.sha256(t).digest()).decode() for t in (script.encode(), library)]
    assert f"script-src 'sha256-{digests[0]}' 'sha256-{digests[1]}';" in policy
    for parser in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "XMLHttp",
    ):
        assert parser not in script


def test_the_chart_library_keeps_its_licence(page: Page) -> None:
    assert "Licences of what is in this page plotly.js (plotly " in page.words
    assert "Permission is hereby granted, free of charge" in page.words
    assert b"Licensed under the MIT license" in gzip.decompress(base64.b64decode(page.script("plotly")))[:400]


def test_without_the_chart_library_there_is_a_page(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.reporting.page.plotly", lambda: None)
    page = read(write_report(finished_run))
    assert "Licences" not in page.words
    assert list(page.sections) == SECTIONS
    monkeypatch.undo()
    assert plotly() is not None, "the development extras have it"


def test_hostile_tokens_stay_text(page: Page, finished_run: Path) -> None:
    assert len(page.own_scripts) == 1, "a token opened or closed a script element"
    shown = {word for card in page.cards.values() for word in card["words"]}
    for token in (
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(2)>",
        "<!-- <script>",
        "\u2028\u2029",
    ):
        assert token in shown
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "\u2028" not in text


def test_hostile_words_everywhere_else(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    evil = "</title><script>alert(9)</script>%%data%%\ud800"
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["name"] = evil.encode("utf-8", "replace").decode()
    config["model"]["name"] = "'\"><svg onload=alert(8)>"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    usage = {"components": {"position_sampler": {"enabled": True, "calls": 3, "effect": {evil: 1.0}, "files": [evil]}}}
    (path / "usage.json").write_text(json.dumps(usage))
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 100, "data/" + evil: 1.5}) + "\n")
        file.write(json.dumps({"step": 100, "event": evil, "payload": {evil: evil}}) + "\n")
    page = read(write_report(path))
    assert len(page.own_scripts) == 1
    assert len(page.root.one("head").all("title")) == 1
    assert not [e.tag for e in page.root for name in e.attributes if name.startswith("on")]
    assert "alert(9)" in page.words
    assert "%%data%%" in page.words


def test_written_twice_it_is_the_same_and_leaves_nothing_behind(finished_run: Path) -> None:
    before = {p.name for p in finished_run.iterdir()} | {"report.html"}
    first = write_report(finished_run).read_bytes()
    assert write_report(str(finished_run)).read_bytes() == first
    assert {p.name for p in finished_run.iterdir()} == before
    assert (finished_run / "report.html").stat().st_mode & 0o077 == (
        finished_run / "config.yaml"
    ).stat().st_mode & 0o077


def test_a_failed_write_keeps_the_old_page(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(finished_run).read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report(finished_run)
    assert (finished_run / "report.html").read_bytes() == old
    assert list(finished_run.glob(".report.html*")) == []


def test_an_interrupted_run_says_so(make_run: Callable[..., Path]) -> None:
    page = read(write_report(make_run(interrupted=True)))
    assert "interrupted or still running" in page.words
    assert "summary.json not in the folder: the run was interrupted or is still going" in page.words
    assert "270 of 600 steps" in page.words
    assert page.root.one("div", "progress").attributes["aria-valuenow"] == "45.0"


def test_weights_that_were_only_measured_are_no_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    made = make_run(steps=100, latents=3)
    for name in ("config.yaml", "heldout_duplicates.json"):
        shutil.copy(made / name, tmp_path)
    measured = {
        "evaluated": "other/weights",
        "step": 0,
        "finished": True,
        "evaluation/fvu": 1.2,
        "evaluation/tokens": 256,
    }
    (tmp_path / "summary.json").write_text(json.dumps(measured))
    text = read(write_report(tmp_path)).words
    assert "other/weights" in text
    assert "256 held-out tokens" in text
    assert "Nothing of the variance of held-out tokens is explained (FVU 1.2)." in text
    for untrue in ("Transcoder run", "0 of", "metrics.jsonl", "usage.json", "Linear map", "really used"):
        assert untrue not in text


def test_an_empty_folder_gets_a_page_that_names_everything(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "usage.json",
        "summary.json",
        "correlation report",
        "activation samples",
        "facts of each latent",
        "checkpoint",
    ):
        assert name in page.words
    assert "there are no curves" in page.words
    assert page.index["count"] == 0
    assert page.tiles
    assert "0" not in page.tiles.values(), "what is missing is never 0"


@pytest.mark.parametrize("wanted", [0, 1, 7])
def test_the_setting_bounds_the_latents(wanted: int, make_run: Callable[..., Path]) -> None:
    path = make_run(steps=200, overrides={"logging.report_latents": wanted})
    page = read(write_report(path))
    cards = page.cards
    assert len(cards) == wanted
    if wanted == 7:
        strongest = Run(path).correlation["pairs"][0]
        assert {strongest["i"], strongest["j"]} <= cards.keys()


def test_the_byte_bound_holds_whatever_the_setting(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(steps=200, overrides={"logging.report_latents": 10_000})
    page = read(write_report(path))
    assert (path / "report.html").stat().st_size < 10_000_000
    assert len(page.cards) == page.index["count"]
    monkeypatch.setattr(latent_cards, "MAX_BYTES", 20_000)
    monkeypatch.setattr(latent_cards, "CHUNK", 4)
    page = read(write_report(path))
    assert 3 <= len(page.cards) < page.index["count"]
    assert sum(map(len, page.chunks)) <= 20_000
    assert f"of the {page.index['count']} with samples" in page.words


def test_a_latent_that_is_not_sampled_is_still_listed(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=200)
    write_latents(run, [i % 7 for i in range(512)], 70)
    page = read(write_report(run))
    index, cards = page.index, page.cards
    assert index["ids"] is None
    assert index["count"] == 512
    assert index["density"][:8] == [0, 0.0143, 0.0286, 0.0429, 0.0571, 0.0714, 0.0857, 0]
    assert sum(c >= 0 for c in index["chunk"]) == len(cards) < 512
    assert all(card["facts"]["up"] == [["<b>up</b>", 1.5]] for card in cards.values())
    assert "something: a reason" in page.sections["latents"].words


def test_one_broken_part_does_not_cost_the_others(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")

    def broken(run: Run) -> str:
        raise KeyError("<b>no such key</b>")

    monkeypatch.setattr(sections, "positions", broken)
    page = Page(write_report(path).read_text())
    assert "This section cannot be drawn: KeyError: '<b>no such key</b>'" in page.words
    assert list(page.sections) == SECTIONS


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"pairs": 3, "histogram": [], "components": {}, "thresholds": None},
        {"pairs": [{"i": 1}, {"i": "x", "j": 2, "correlation": 0.9}, 7], "histogram": {"edges": [0], "counts": [1, 2]}},
        {"pairs": [{"i": 1, "j": 2, "correlation": 0.9}], "components": [[1, 2, "x"], 5], "step": "many"},
        {"histogram": {"edges": [0, 1], "counts": [0]}, "decoder_cosine": {"median": None}},
    ],
)
def test_a_report_of_another_shape_is_drawn_as_far_as_it_goes(
    report: dict[str, Any], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    (path / "anti_duplication_logs" / "correlation_step_00000100.json").write_text(json.dumps(report))
    read(write_report(path))


def test_every_token_of_a_context_is_shaded(page: Page) -> None:
    index, cards = page.index, page.cards
    ids = index["ids"] or list(range(index["count"]))
    shaded = 0
    for latent, card in cards.items():
        peak = index["peak"][ids.index(latent)]
        for is_top, activation, position, _, column, tokens, shades in card["rows"]:
            assert is_top in (0, 1)
            assert 0 <= column < len(tokens)
            assert activation <= peak * 1.001
            assert position >= 0
            own = dict(shades)[column]
            assert own == pytest.approx(activation / peak, abs=0.011)
            assert all(0 <= strength <= 1 for _, strength in shades)
            shaded += len(shades) > 1
    assert shaded


def test_contexts_are_those_of_the_file(page: Page, finished_run: Path) -> None:
    table = pq.read_table(finished_run / "activation_samples" / "samples.parquet").to_pylist()
    latent = next(iter(page.cards))
    card = page.cards[latent]
    rows = sorted((r for r in table if r["latent"] == latent and r["kind"] == "top"), key=lambda r: -r["activation"])
    for row, (_, activation, position, sequence, column, tokens, _) in zip(rows, card["rows"], strict=False):
        assert activation == pytest.approx(row["activation"], rel=1e-3)
        assert (position, sequence) == (row["position"], row["sequence"])
        words = [card["words"][n] for n in tokens]
        wanted = ["" if i < 0 else w for i, w in zip(row["context"], row["tokens"], strict=True)]
        assert words == wanted[row["anchor"] - column : row["anchor"] - column + len(words)]


def test_escaping() -> None:
    value = {"</script>": ["<!--", "\u2028", "&amp;", "\x00", "\ud800"]}
    template = environment().from_string("{{ text }} {{ value | tojson }} {{ absent.of.all | number }}")
    shown, data, absent = template.render(text='<a href="x">&\'\x00\x1b', value=value).split(" ")[-3:]
    assert shown == "href=&#34;x&#34;&gt;&amp;&#39;␀␛"
    assert json.loads(data) == value
    assert data.isascii()
    assert not set(data) & set("<>&'\x00")
    assert absent == "–"
    with pytest.raises(ValueError, match="JSON compliant"):
        environment().from_string("{{ value | tojson }}").render(value=[float("nan")])


def changed_regularizer(run: Path, **effect: object) -> str:
    """The page's words when the regularizer's effect is another one."""
    usage = json.loads((run / "usage.json").read_text())
    usage["components"]["diversity_regularizer"]["effect"] = effect
    (run / "usage.json").write_text(json.dumps(usage))
    return read(write_report(run)).words


def test_a_penalty_of_nothing_is_a_finding_and_a_term_not_evaluated_a_fault(make_run: Callable[..., Path]) -> None:
    run = make_run()
    nothing = {"penalty": 0.0, "gradient_norm": 0.0, "orthogonality_evaluations": 60.0, "orthogonality_rows": 9.0}
    words = changed_regularizer(run, **nothing, finding="nothing to penalise: it looked")
    assert "nothing to penalise: it looked" in words
    assert "never evaluated" not in words
    words = changed_regularizer(run, **{**nothing, "penalty": 1.0, "correlation_evaluations": 0.0})
    assert "the correlation term was never evaluated" in words


@pytest.mark.parametrize("chooses", ["samples", "training", None])
def test_the_page_says_what_positions_were_drawn_for_and_what_that_cost(
    finished_run: Path, tmp_path: Path, chooses: str | None
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    drawn = {"seen": [30] * 10, "drawn": [14] * 10, "special_seen": 20, "special_drawn": 20}
    if chooses is not None:  # files of earlier versions do not say it: they chose what trains
        drawn["chooses"] = chooses
    (run_dir / "anti_duplication_logs" / "positions.json").write_text(json.dumps(drawn))
    section = sections.positions(Run(run_dir))
    chart = repr(section["charts"][-1])
    tiles = dict(sections.data_facts(Run(run_dir)))
    if chooses == "samples":
        assert "drawn for samples" in chart
        assert "Training keeps every token" in chart
        assert "Language-model tokens for each one drawn" not in tiles
    else:
        assert "drawn for training" in chart
        assert "Only the drawn tokens train" in chart
        assert tiles["Language-model tokens for each one drawn"] == "2"
