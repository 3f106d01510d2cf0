"""report.html: whole, self-contained, bounded, and deaf to whatever stands in the data. What a browser makes of it is
tests/browser's matter."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from transcoder.antidup.sequence_counts import SequenceCounts
from transcoder.kernels import SparseCodes
from transcoder.reporting import Run, latent_cards, plotly_bundle, write_report
from transcoder.reporting import report as report_module
from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.sections.duplicates import SEQUENCES_COUNTABLE

VOID = {"meta", "link", "input", "br", "img"}
SECTIONS = ["overview", "curves", "prefixes", "duplicates", "positions", "latents", "settings"]


class Page(HTMLParser):
    """Elements and their nesting, scripts by id, and what the packed ones hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def script(self, name: str) -> str:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return text

    @property
    def core(self) -> dict[str, Any]:
        return json.loads(self.script("data"))

    def blocks(self, section: str) -> list[dict[str, Any]]:
        (found,) = [s["blocks"] for s in self.core["sections"] if s["id"] == section]
        return found

    @property
    def words(self) -> str:
        return " ".join(" ".join(_texts([self.core["header"], *self.core["sections"]])).split())

    @property
    def index(self) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.script("latent-index"))))

    @property
    def cards(self) -> dict[int, dict[str, Any]]:
        """Latent -> {"rows", "facts", "words"}."""
        found = {}
        for attributes, text in self.scripts:
            if str(attributes.get("id")).startswith("chunk-"):
                chunk = json.loads(gzip.decompress(base64.b64decode(text)))
                for latent, rows, facts in chunk["cards"]:
                    found[latent] = {"rows": rows, "facts": facts, "words": chunk["words"]}
        return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def blocks_of(value: Any, kind: str) -> list[dict[str, Any]]:
    """Every block of a kind, however deep."""
    found = [value] if isinstance(value, dict) and value.get("is") == kind else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found + [b for part in inside for b in blocks_of(part, kind)]


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    assert "cannot be drawn" not in page.words
    return page


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return read(write_report(finished_run))


def test_every_section_is_there(page: Page) -> None:
    assert [s["id"] for s in page.core["sections"]] == SECTIONS
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_overview_tells_figures_baselines_and_verdicts(page: Page, finished_run: Path) -> None:
    run = Run(finished_run)
    assert page.core["header"]["pill"] == ["finished", "good"]
    assert "600 of 600 steps" in page.core["header"]["facts"]
    own = run.metric("evaluation/fvu")
    assert own is not None
    assert f"{own:.4g}" in page.words
    assert "is below the best linear map's" in page.words
    (tiles,) = (block for block in page.core["sections"][0]["blocks"] if block["is"] == "tiles")
    told = {name: value for name, value, _ in tiles["rows"]}
    assert "Cross-entropy recovered" not in told, "no language model was at hand"
    assert int(told["Mergeable pairs"]) == run.correlation["pairs_mergeable"]
    assert "it had no measured effect; anti_duplication_logs/positions.json is not there" in page.words
    for verdict in ("used", "not proven", "off"):
        assert verdict in page.words
    assert run.missing == []
    missing = {m.what for m in run.lacking}
    assert missing == {"held-out facts of each latent", "checkpoint"}, "what the synthetic folder really lacks"
    assert all(what in page.words for what in missing)


def test_curves_have_values_and_a_text(page: Page) -> None:
    charts = {c["title"]: c for c in blocks_of(page.core["sections"], "chart")}
    assert set(charts) >= {
        "Loss",
        "Fraction of variance unexplained",
        "FVU per prefix",
        "L0",
        "Dead latents",
        "Duplicate pairs",
        "Throughput",
        "FVU by prefix width",
        "Correlation of latent pairs",
        "Groups of correlated latents",
    }
    prefixes = charts["FVU per prefix"]
    assert [s["label"] for s in prefixes["series"]] == ["64", "192", "448", "512"]
    assert prefixes["x"] == "step"
    assert all(len(s["x"]) == len(s["y"]) == 60 for s in prefixes["series"])
    assert all(c["spoken"] for c in charts.values())
    assert "1 value not finite" in page.words


def test_duplicates_are_sorted_and_link_to_their_latents(page: Page, finished_run: Path) -> None:
    pairs = Run(finished_run).correlation["pairs"]
    (block,) = blocks_of(page.core["sections"], "pairs")
    expected = sorted(pairs, key=lambda p: -p["correlation"])
    assert [(p["i"], p["j"]) for p in block["rows"]] == [(p["i"], p["j"]) for p in expected]
    tests = {None: "not tested", True: "duplicate", False: "no duplicate"}
    assert [p["test"] for p in block["rows"]] == [tests[p["mergeable"]] for p in expected]
    index, cards = page.index, page.cards
    for pair in pairs:
        assert pair["j"] in index["partners"][str(pair["i"])]
        assert {pair["i"], pair["j"]} <= cards.keys()
    (graph,) = [c for c in blocks_of(page.core["sections"], "chart") if c["kind"] == "graph"]
    assert {tuple(e[:2]) for e in graph["edges"]} == {(p["i"], p["j"]) for p in pairs}


def test_nothing_is_loaded_and_only_the_own_scripts_may_run(page: Page, finished_run: Path) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form", "b onmouseover"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "action", "srcset", "poster"}:
                assert str(value).startswith(("#", "data:,")), (tag, name, value)
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [str(a["content"]) for tag, a in page.elements if tag == "meta" and a.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    ((_, script),) = [s for s in page.scripts if not s[0]]
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
    (licence,) = page.core["licences"]
    assert licence["name"].startswith("plotly.js")
    assert "Permission is hereby granted, free of charge" in licence["text"]
    assert b"Licensed under the MIT license" in gzip.decompress(base64.b64decode(page.script("plotly")))[:400]


def test_without_the_chart_library_there_is_a_page(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.reporting.page.bundle", lambda: None)
    page = read(write_report(finished_run))
    assert page.core["licences"] == []
    assert [s["id"] for s in page.core["sections"]] == SECTIONS
    assert plotly_bundle.bundle() is not None, "the development extras have it"


def test_hostile_tokens_stay_text(page: Page, finished_run: Path) -> None:
    assert len([s for s in page.scripts if not s[0]]) == 1, "a token opened or closed a script element"
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
    assert len([s for s in page.scripts if not s[0]]) == 1
    names = [tag for tag, _ in page.elements]
    assert names[: names.index("body")].count("title") == 1
    assert "svg" not in names
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
    assert page.core["header"]["progress"] == 0.45


def test_an_empty_folder_gets_a_page_that_names_everything(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "usage.json",
        "summary.json",
        "correlation report",
        "activation samples",
        "held-out facts of each latent",
        "checkpoint",
    ):
        assert name in page.words
    assert "there are no curves" in page.words
    assert page.index["count"] == 0
    shown = [tile[1] for b in blocks_of(page.core["sections"], "tiles") for tile in b["rows"]]
    assert shown
    assert "0" not in shown, "what is missing is never 0"


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
    assert sum(len(t) for a, t in page.scripts if str(a.get("id")).startswith("chunk-")) <= 20_000
    assert f"of the {page.index['count']} with samples" in page.words


def test_a_latent_that_is_not_sampled_is_still_listed(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=200)
    rows = range(512)
    columns = {
        "latent": pa.array(rows, pa.int32()),
        "tokens_fired": pa.array([i % 7 for i in rows], pa.int64()),
        "max_activation": pa.array([0.5] * 512, pa.float32()),
        "histogram": pa.array([[i % 7] + [0] * 19 for i in rows], pa.list_(pa.int32())),
        **{name: pa.array([["<b>up</b>"]] * 512, pa.list_(pa.string())) for name in ("promoted", "suppressed")},
        **{f"{n}_logits": pa.array([[1.5]] * 512, pa.list_(pa.float32())) for n in ("promoted", "suppressed")},
    }
    about = {b"transcoder": json.dumps({"tokens": 70, "why": {"something": "a reason"}}).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), run / "latents.parquet")
    page = read(write_report(run))
    index, cards = page.index, page.cards
    assert index["ids"] is None
    assert index["count"] == 512
    assert index["density"][:8] == [0, 0.0143, 0.0286, 0.0429, 0.0571, 0.0714, 0.0857, 0]
    assert sum(c >= 0 for c in index["chunk"]) == len(cards) < 512
    assert all(card["facts"]["up"] == [["<b>up</b>", 1.5]] for card in cards.values())
    (block,) = blocks_of(page.core["sections"], "latents")
    assert block["lacking"]["something"] == "a reason"


def test_one_broken_part_does_not_cost_the_others(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")

    def broken(run: Run) -> str:
        raise KeyError("<b>no such key</b>")

    monkeypatch.setattr(report_module.positions, "section", broken)
    page = Page(write_report(path).read_text())
    assert "This section cannot be drawn: KeyError: '<b>no such key</b>'" in page.words
    assert [s["id"] for s in page.core["sections"]] == SECTIONS


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


def test_contexts_shade_what_other_samples_say(page: Page) -> None:
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
    assert escape('<a href="x">&\'\x00\x1b') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;␀␛"
    value = {"</script>": ["<!--", "\u2028", "&amp;", "\x00"]}
    text = embedded_json(value)
    assert json.loads(text) == value
    assert not re.search("[<>&\u2028\u2029\x00]", text)
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded_json([float("nan")])


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
    assert "never evaluated: correlation" in words


def test_sequences_beyond_what_can_be_counted_are_said_to_be_more(make_run: Callable[..., Path]) -> None:
    run = make_run()
    file = sorted(run.glob("anti_duplication_logs/correlation_step_*.json"))[-1]
    report = json.loads(file.read_text())
    every = torch.arange(10**5)
    counts = SequenceCounts(2, torch.device("cpu"))
    counts.update(SparseCodes.from_dense(torch.ones(len(every), 2)), every)
    full = int(counts.distinct(torch.tensor([0]), torch.tensor([1])))
    assert full == SEQUENCES_COUNTABLE
    for pair, number in zip(report["pairs"], (full, full - 1), strict=False):
        pair["sequences"] = number
    file.write_text(json.dumps(report))
    (block,) = blocks_of(read(write_report(run)).core["sections"], "pairs")
    assert [p["cells"][3] for p in block["rows"]][:2] == ["≥ 1,420", "1,419"]


def test_groups_of_flagged_and_of_candidate_pairs_are_told_apart(page: Page) -> None:
    assert "latents joined by flagged pairs" in page.words
    assert "latents joined by candidate or flagged pairs" in page.words
    assert "Distinct latents, flagged pairs merged" in page.words
