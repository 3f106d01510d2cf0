"""report.html: whole, self-contained, bounded, and deaf to whatever stands in the data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from transcoder.antidup.sequence_counts import SequenceCounts
from transcoder.kernels import SparseCodes
from transcoder.reporting import RunFolder, write_report
from transcoder.reporting import report as report_module
from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.sections import latents
from transcoder.reporting.sections.duplicates import SEQUENCES_COUNTABLE

VOID = {"meta", "link", "input", "br", "img"}
SECTIONS = ["overview", "curves", "prefixes", "duplicates", "positions", "latents", "settings"]


class Page(HTMLParser):
    """Elements, their nesting, and the text of each id; scripts by type."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def with_id(self, name: str) -> tuple[str, dict[str, str | None]]:
        (found,) = [e for e in self.elements if e[1].get("id") == name]
        return found

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def data(self) -> dict:
        (text,) = [t for kind, t in self.scripts if kind == "application/json"]
        return json.loads(text)


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [], "every element is closed"
    assert "cannot be drawn" not in page.words
    return page


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return read(write_report(finished_run))


def test_every_section_is_there(page: Page) -> None:
    assert [a["id"] for tag, a in page.elements if tag == "section"] == SECTIONS
    assert [a["href"] for tag, a in page.elements if tag == "a" and not a.get("class")] == [f"#{s}" for s in SECTIONS]
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_overview_tells_figures_baselines_and_verdicts(page: Page, finished_run: Path) -> None:
    run = RunFolder(finished_run)
    assert "finished 600 of 600 steps" in page.words.replace("finished600", "finished 600")
    own = run.figure("evaluation/fvu")
    assert own is not None
    assert f"{own:.4g}" in page.words
    assert "is below the best linear map's" in page.words
    assert "it had no measured effect; anti_duplication_logs/positions.json is not there" in page.words
    for verdict in ("used", "not proven", "off"):
        assert verdict in page.words
    assert "What is missing" not in page.words


def test_curves_have_labels_and_hover_values(page: Page) -> None:
    svgs = [a for tag, a in page.elements if tag == "svg"]
    charts = {str(a["aria-label"]).split(":")[0]: a for a in svgs if a.get("data-chart")}
    assert set(charts) >= {
        "Loss",
        "Fraction of variance unexplained",
        "FVU per prefix",
        "L0",
        "Dead latents",
        "Duplicate pairs",
        "Throughput",
        "FVU by prefix width",
    }
    prefixes = json.loads(str(charts["FVU per prefix"]["data-chart"]))
    assert [s["label"] for s in prefixes["series"]] == ["64", "192", "448", "512"]
    assert prefixes["x"] == "step"
    assert all(len(s["px"]) == len(s["py"]) == len(s["yt"]) == 60 for s in prefixes["series"])
    assert all(a.get("aria-label") for a in svgs)
    assert "1 value not finite" in page.words


def test_duplicates_are_sorted_and_link_to_their_latents(page: Page, finished_run: Path) -> None:
    pairs = RunFolder(finished_run).correlation["pairs"]
    rows = [(a["data-i"], a["data-j"]) for tag, a in page.elements if tag == "tr" and "data-i" in a]
    expected = sorted(pairs, key=lambda p: -p["correlation"])
    assert rows == [(str(p["i"]), str(p["j"])) for p in expected]
    known = {latent["id"]: latent for latent in page.data["latents"]}
    for pair in pairs:
        assert pair["j"] in known[pair["i"]]["pairs"]


def test_nothing_is_loaded_and_only_the_own_script_may_run(page: Page, finished_run: Path) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "base", "form", "b onmouseover"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "action", "srcset", "poster"}:
                assert str(value).startswith(("#", "data:,")), (tag, name, value)
            if name == "style":
                assert "url(" not in str(value)
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [str(a["content"]) for tag, a in page.elements if tag == "meta" and a.get("http-equiv")]
    assert "default-src 'none'" in policy
    ((_, script),) = [s for s in page.scripts if s[0] is None]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    for parser in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert parser not in script


def test_hostile_tokens_stay_text(page: Page, finished_run: Path) -> None:
    assert len(page.scripts) == 2, "a token opened or closed a script element"
    shown = page.data["strings"]
    for token in (
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(2)>",
        "<!-- <script>",
        "\u2028\u2029",
    ):
        assert token in shown
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "\u2028" not in text


def test_hostile_words_everywhere_else(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    evil = "</title><script>alert(9)</script>%%data%%\ud800"
    import yaml

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
    assert len(page.scripts) == 2
    names = [tag for tag, _ in page.elements]
    assert names[: names.index("body")].count("title") == 1
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


def test_an_empty_folder_gets_a_page_that_names_everything(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "usage.json",
        "summary.json",
        "correlation report",
        "activation samples",
    ):
        assert name in page.words
    assert "there are no curves" in page.words
    assert page.data["latents"] == []
    assert ">0<" not in (tmp_path / "report.html").read_text(), "what is missing is never 0"


@pytest.mark.parametrize("wanted", [0, 1, 7])
def test_the_setting_bounds_the_latents(wanted: int, make_run: Callable[..., Path]) -> None:
    path = make_run(steps=200, overrides={"logging.report_latents": wanted})
    page = read(write_report(path))
    assert len(page.data["latents"]) == wanted
    if wanted == 7:
        strongest = RunFolder(path).correlation["pairs"][0]
        assert {strongest["i"], strongest["j"]} <= {latent["id"] for latent in page.data["latents"]}


def test_the_byte_bound_holds_whatever_the_setting(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(steps=200, overrides={"logging.report_latents": 10_000})
    whole = write_report(path).stat().st_size
    assert whole < 10_000_000
    monkeypatch.setattr(latents, "MAX_BYTES", 20_000)
    page = read(write_report(path))
    assert 3 <= len(page.data["latents"]) < page.data["total"]
    assert len(json.dumps(page.data, ensure_ascii=False)) < 25_000
    assert f"of the {page.data['total']} latents" in page.words


def test_one_broken_part_does_not_cost_the_others(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(finished_run, tmp_path / "run")

    def broken(run: RunFolder) -> str:
        raise KeyError("<b>no such key</b>")

    monkeypatch.setattr(report_module.positions, "section", broken)
    page = Page(write_report(path).read_text())
    assert "This section cannot be drawn: KeyError: '<b>no such key</b>'" in page.words
    assert [a["id"] for tag, a in page.elements if tag == "section"] == SECTIONS


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
    report: dict, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(make_run(steps=100, latents=3), tmp_path / "run")
    (path / "anti_duplication_logs" / "correlation_step_00000100.json").write_text(json.dumps(report))
    read(write_report(path))


def test_contexts_shade_what_other_samples_say(page: Page) -> None:
    for latent in page.data["latents"]:
        for is_top, activation, position, _, column, tokens, shades in latent["rows"]:
            assert is_top in (0, 1)
            assert 0 <= column < len(tokens)
            assert activation <= latent["max"] * 1.001
            assert position >= 0
            own = dict(shades)[column]
            assert own == pytest.approx(activation / latent["max"], abs=0.011)
            assert all(0 <= strength <= 1 for _, strength in shades)
    assert any(len(row[6]) > 1 for latent in page.data["latents"] for row in latent["rows"])


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
    page = write_report(run).read_text()
    assert page.count("<td class=n>≥ 1,420</td>") == 1
    assert "<td class=n>1,419</td>" in page


def test_groups_of_flagged_and_of_candidate_pairs_are_told_apart(page: Page) -> None:
    assert "latents joined by flagged pairs" in page.words
    assert "latents joined by candidate or flagged pairs" in page.words
    assert "Distinct latents, flagged pairs merged" in page.words
