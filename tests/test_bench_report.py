"""bench.report: the page is what the committed files say, two files are compared by their spread, result files are whole."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import compare, plots, report, results

ROOT = Path(__file__).resolve().parent.parent


def spread(median: float, width: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def variant(seconds: float, ours: bool, ratio: float, peak: int) -> dict:
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    return {
        "ours": ours,
        "note": "" if ours else "no projection",
        "rounds": 9,
        "seconds": {"forward": spread(seconds)},
        "ratio": {"forward": one if ours else spread(ratio)},
        "peak_bytes": peak,
    }


def example() -> dict:
    """A result file as bench.measure writes it, small."""
    section = {
        "date": "2026-01-02 03:04 UTC",
        "commit": {"hash": "abcdef0123456789", "clean": True},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "load": 0.1,
    }
    size = {"rows": 1024, "d": 128, "d_sae": 2048, "k": 16}
    floor = {"bytes": 1e6, "operations": 1e9, "copy_seconds": 1e-3, "product_seconds": 5e-3, "seconds": 5e-3}
    rates = {"copy_bytes_per_second": 1e10, "product_operations_per_second": 2e11}
    shared = {"activation": "topk", "widths": [2048], "size": size, "rates": rates, "floor": {"forward": floor}}
    step = {
        **shared,
        "operation": "step",
        "to_floor": {"forward": 2.0},
        "variants": {
            "ours (cpp)": variant(0.010, True, 1.0, 50_000_000),
            "eager PyTorch": variant(0.040, False, 4.0, 200_000_000),
        },
    }
    encode = {**copy.deepcopy(step), "operation": "encode"}
    kinds = {}
    for kind, ratio in (("off", 1.0), ("all", 1.2)):
        kinds[kind] = {
            "seconds_per_step": spread(0.01 * ratio),
            "mean_seconds_per_step": 0.01 * ratio,
            "tokens_per_second": 102_400 / ratio,
            "ratio": spread(ratio, 0.0 if kind == "off" else 0.02),
        }
    training = {"operation": "training", "size": size, "steps": 120, "kinds": kinds}
    peer = copy.deepcopy(step)
    peer["variants"]["SAELens TopK"] = variant(0.050, False, 5.0, 300_000_000)
    points = [
        {
            "axis": axis,
            "value": value,
            "operation": "step",
            "size": {**size, axis: value},
            "variants": copy.deepcopy(step["variants"]),
        }
        for axis, values in (("d_sae", (2048, 4096)), ("k", (16, 512)))
        for value in values
    ]
    points[-1]["variants"]["eager PyTorch"]["ratio"]["forward"] = spread(0.5)
    for point in points:
        for one in point["variants"].values():
            one["seconds"], one["ratio"] = one["seconds"]["forward"], one["ratio"]["forward"]
    run = {
        kind: {
            "seconds": 60.0 * r,
            "tokens_per_second": 8e4 / r,
            "seconds_per_chunk": spread(1.2 * r),
            "ratio": spread(r),
        }
        for kind, r in (("monitoring off", 1.0), ("monitoring on", 1.1))
    }
    return {
        "format": results.FORMAT,
        "device": {
            "name": "Example CPU",
            "slug": "example-cpu",
            "kind": "cpu",
            "cores": 2,
            "threads": 2,
            "cache_bytes": 32 << 20,
            "memory_bytes": 24 << 30,
            "system": "Linux x86_64",
        },
        "rows": {**section, "exit_status": 0, "skipped": {"sparsify": "not here"}, "rows": [step, encode, training]},
        "peers": {"saelens": {**section, "peer": "saelens", "rows": [peer]}, "sparsify": {"skipped": "no environment"}},
        "scaling": {**section, "points": points},
        "whole_run": {
            **section,
            "size": size,
            "lost_run": {"rows": 1024, "d": 2048, "d_sae": 18432, "k": 48},
            "steps": 4882,
            "chunk": 100,
            "compute_dtype": "float32",
            "kinds": run,
        },
    }


@pytest.mark.skipif(not any(results.FOLDER.glob("*.json")), reason="no result file is committed")
def test_the_page_is_what_the_files_say() -> None:
    """`python -m bench.report` was run after the last measurement, and nobody edited the page."""
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.render(report.read())


@pytest.mark.skipif(not any(results.FOLDER.glob("*.json")), reason="no result file is committed")
def test_the_page_s_plots_are_there() -> None:
    page = report.DOCUMENT.read_text(encoding="utf-8")
    named = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert named
    for name in named:
        text = (report.DOCUMENT.parent / name).read_text(encoding="utf-8")
        assert "</svg>" in text, name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the example; its results lie beside its folder."""
    folder = tmp_path_factory.mktemp("report")
    results.save(example(), folder / "results" / "example-cpu.json")
    return report.write(folder / "one" / "performance.md", folder / "results")


def test_a_page_of_every_section(written: Path) -> None:
    page = written.read_text(encoding="utf-8")
    for words in (
        "## Example CPU",
        "`abcdef0123`",
        "| eager PyTorch |  | 40.00 [39.20, 40.80] | 4.00 [3.92, 4.08] | 8.00 | 200.0 | no projection |",
        # Its time is of another run, so that the floor of this one says nothing of it.
        "| SAELens TopK |  | 50.00 [49.00, 51.00] | 5.00 [4.90, 5.10] |  | 300.0 | no projection |",
        "4882 steps at 1/16 of d, latents and k",
        "- step at B 1024, d 128, N 2048, k 512: eager PyTorch takes 0.50 [0.49, 0.51] of ours",
        "| peer: sparsify | skipped |  |  | no environment |",
    ):
        assert words in page, words
    assert "busy" not in page
    for name in plots.PLOTS:
        assert f"]({report.PLOTS}/example-cpu-{name}.svg)" in page
        assert (written.parent / report.PLOTS / f"example-cpu-{name}.svg").is_file()


def test_page_and_plots_are_the_same_bytes_twice(written: Path) -> None:
    folder = written.parent.parent
    again = report.write(folder / "two" / "performance.md", folder / "results")
    made = [
        {p.relative_to(page.parent): p.read_bytes() for p in page.parent.rglob("*") if p.is_file()}
        for page in (written, again)
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 1 + len(plots.PLOTS)


def test_a_busy_machine_is_named() -> None:
    busy = example()
    busy["rows"]["load"] = 7.0
    page = report.render([report.merged(busy)])
    assert "**The machine was busy with other work** while these were measured: rows." in page


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bench\.measure makes one"):
        report.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format": 0, "device": {}})])
def test_what_is_no_result_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: expected a result file"):
        results.load(path)


def changed(factor: float, width: float = 0.02, machine: float = 1.0) -> list[compare.Change]:
    """Our step `factor` times as long, on a machine that was `machine` times as slow."""
    before, after = example(), example()
    row = after["rows"]["rows"][0]
    row["variants"]["ours (cpp)"]["seconds"]["forward"] = spread(0.010 * factor * machine, width)
    row["floor"]["forward"]["seconds"] *= machine
    return [c for c in compare.compare(before, after) if c.verdict != "same"]


def test_slower_beyond_the_spread_is_a_regression() -> None:
    (change,) = changed(1.2)
    assert change.verdict == "slower"
    assert change.worse
    assert change.what == "step topk, B1024-d128-N2048-k16, ours (cpp), forward"
    (change,) = changed(0.8)
    assert change.verdict == "faster"
    assert not change.worse


def test_what_the_spread_covers_is_no_change() -> None:
    assert changed(1.2, width=0.25) == []
    assert changed(1.04, width=0.001) == []


def test_a_slower_hour_of_the_machine_is_no_regression() -> None:
    assert changed(1.0, machine=3.0) == []
    (change,) = changed(1.5, machine=3.0)
    assert change.verdict == "slower"


def test_memory_and_missing_rows_are_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before, after = example(), example()
    after["rows"]["rows"][0]["variants"]["ours (cpp)"]["peak_bytes"] *= 2
    del after["rows"]["rows"][1]
    verdicts = {c.what: c.verdict for c in compare.compare(before, after) if c.verdict != "same"}
    assert verdicts == {
        "step topk, B1024-d128-N2048-k16, ours (cpp), memory": "more memory",
        "encode topk, B1024-d128-N2048-k16, ours (cpp), forward": "missing",
        "encode topk, B1024-d128-N2048-k16, ours (cpp), memory": "missing",
    }
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, found in zip(files, (before, after), strict=True):
        results.save(found, file)
    assert report.main([str(f) for f in files]) == 1
    assert "more memory" in capsys.readouterr().out
    assert report.main([str(files[0]), str(files[0])]) == 0
    assert "figures within their spread" in capsys.readouterr().out
