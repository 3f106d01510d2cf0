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
        "held_bytes": 2 * peak,
    }


def total(value: float, width: float = 0.02) -> dict[str, float]:
    return {"total": value, "low": value * (1 - width), "high": value * (1 + width)}


def example() -> dict:
    """A result file as bench.measure writes it, small."""
    section = {
        "date": "2026-01-02 03:04 UTC",
        "commit": {"hash": "abcdef0123456789", "clean": True},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "load": 0.1,
        "machine_rates": {"copy_bytes_per_second": 1e10, "product_operations_per_second": 1e11},
    }
    size = {"rows": 1024, "d": 128, "d_sae": 2048, "k": 16}
    floor = {"bytes": 1e6, "operations": 1e9, "copy_seconds": 1e-3, "product_seconds": 5e-3, "seconds": 5e-3}
    rates = {
        "copy_bytes_per_second": 1e10,
        "product_operations_per_second": 1e11,
        "fastest_operations_per_second": 2e11,
        "fastest": "1024 x 1024 in bfloat16",
    }
    shared = {
        "activation": "topk",
        "widths": [2048],
        "size": size,
        "rates": rates,
        "floor": {"forward": floor},
        "product_seconds": 8e-3,
    }
    step = {
        **shared,
        "operation": "step",
        "variants": {
            "ours (cpp)": variant(0.010, True, 1.0, 50_000_000),
            "eager PyTorch": variant(0.040, False, 4.0, 200_000_000),
        },
    }
    encode = {**copy.deepcopy(step), "operation": "encode"}
    kinds = {}
    for kind, ratio in (("off", 1.0), ("all", 1.2)):
        kinds[kind] = {
            "seconds": 5 * ratio,
            "seconds_per_step": total(0.01 * ratio),
            "tokens_per_second": 102_400 / ratio,
            "ratio": total(ratio, 0.0 if kind == "off" else 0.02),
        }
    training = {"operation": "training", "size": size, "rounds": 5, "steps_per_round": 100, "kinds": kinds}
    peer = copy.deepcopy(step)
    peer["floor"]["forward"]["seconds"] = 10e-3
    peer["product_seconds"] = 20e-3
    peer["variants"]["ours (cpp)"] = variant(0.0125, True, 1.0, 50_000_000)
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
            "seconds_per_step": total(0.012 * r),
            "ratio": total(r, 0.0 if kind == "monitoring off" else 0.02),
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
        "rows": {
            **section,
            "exit_status": 0,
            "skipped": {"sparsify": "not here"},
            "failed": {},
            "rows": [step, encode, training],
        },
        "peers": {"saelens": {**section, "peer": "saelens", "rows": [peer]}, "sparsify": {"skipped": "no environment"}},
        "scaling": {**section, "points": points},
        "whole_run": {
            **section,
            "size": size,
            "lost_run": {"rows": 1024, "d": 2048, "d_sae": 18432, "k": 48},
            "steps": 4882,
            "chunk": 500,
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
    assert named or "earlier version" in page
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
        "| variant | part | ms [quartiles] | x ours [quartiles] | x limit | x product | peak MB | kept MB | differs in |",
        "| eager PyTorch |  | 40.00 [39.20, 40.80] | 4.00 [3.92, 4.08] | 8.00 | 5.00 | 200.0 | 400.0 | no projection |",
        # Of another run: its ratios are to ours, the floor and the product of that one.
        "| ours (cpp), in the saelens run |  | 12.50 [12.25, 12.75] | 1.00 | 1.25 | 0.62 | 50.0 | 100.0 |  |",
        "| SAELens TopK |  | 50.00 [49.00, 51.00] | 5.00 [4.90, 5.10] | 5.00 | 2.50 | 300.0 | 600.0 | no projection |",
        "| B1024-d128-N2048-k16 | all | 500 | 12.00 [11.76, 12.24] | 85,333 | 1.200 [1.176, 1.224] |",
        "| monitoring on | 66.0 | 72,727 | 13.20 [12.94, 13.46] | 1.100 [1.078, 1.122] |",
        "4882 steps at 1/16 of d, latents and k",
        "- step at B 1024, d 128, N 2048, k 512: eager PyTorch takes 0.50 [0.49, 0.51] of ours",
        "| peer: sparsify | skipped |  |  | no environment |",
    ):
        assert words in page, words
    assert "busy" not in page
    assert "first edition" not in page
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


def test_what_was_wrong_or_failed_is_on_the_page() -> None:
    found = example()
    found["rows"]["rows"][0]["variants"]["torch.compile"] = {"ours": False, "wrong": "codes: off by 0.3 | of it"}
    found["rows"]["failed"] = {"bench_step[x]": "torch.compile: codes: off"}
    found["whole_run"] = {"failed": "exit code 1"}
    page = report.render([report.merged(found)])
    assert "| torch.compile | **wrong** |  |  |  |  |  |  | codes: off by 0.3 / of it |" in page
    assert "**Failed** (rows): bench_step[x]: torch.compile: codes: off" in page
    assert "| whole_run | failed |  |  | exit code 1 |" in page
    assert plots.peers(found) is not None


def test_peers_stand_alone_where_our_own_rows_failed() -> None:
    found = example()
    found["rows"] = {"failed": "exit code 2"}
    page = report.render([report.merged(found)])
    assert "| rows | failed |" in page
    assert "<summary>step topk, B1024-d128-N2048-k16, in the saelens run</summary>" in page
    assert "| SAELens TopK |  | 50.00" in page


def test_figures_of_an_earlier_edition_are_not_shown(tmp_path: Path) -> None:
    old = {**example(), "format": 1}
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    found = report.read(tmp_path)
    page = report.render(found)
    assert "## Example CPU" in page
    assert "earlier version of the benchmark (format 1)" in page
    assert "ours (cpp)" not in page.split("## Example CPU")[1]
    assert plots.draw(found, tmp_path / "plots") == []


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bench\.measure makes one"):
        report.read(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format": 0, "device": {"name": "x"}})])
def test_what_is_no_result_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: expected a result file"):
        results.load(path)


STEP = "step topk, B1024-d128-N2048-k16, ours (cpp)"


def moved(before: dict, after: dict) -> dict[str, str]:
    return {c.what: c.verdict for c in compare.compare(before, after) if c.verdict != "same"}


def changed(factor: float, width: float = 0.02, machine: float = 1.0) -> dict[str, str]:
    """Our step `factor` times as long, on a machine that was `machine` times as slow."""
    before, after = example(), example()
    row = after["rows"]["rows"][0]
    row["variants"]["ours (cpp)"]["seconds"]["forward"] = spread(0.010 * factor * machine, width)
    row["floor"]["forward"]["seconds"] *= machine
    return moved(before, after)


def slowed(factor: float, copy_speed: float = 1.0, product_speed: float = 1.0) -> dict:
    """All that the trainer, the whole run and the scaling say, `factor` times as long; no ratio moves."""
    after = example()
    kinds = [row["kinds"] for row in after["rows"]["rows"] if "kinds" in row] + [after["whole_run"]["kinds"]]
    times = [one["seconds_per_step"] for each in kinds for one in each.values()]
    times += [one["seconds"] for point in after["scaling"]["points"] for one in point["variants"].values()]
    for one in times:
        for name in one:
            one[name] *= factor
    for section in ("rows", "scaling", "whole_run"):
        after[section]["machine_rates"] = {
            "copy_bytes_per_second": 1e10 * copy_speed,
            "product_operations_per_second": 1e11 * product_speed,
        }
    return after


def test_slower_beyond_the_spread_is_a_regression() -> None:
    assert changed(1.2) == {f"{STEP}, forward": "slower"}
    assert changed(0.8) == {f"{STEP}, forward": "faster"}
    worse = {
        verdict: compare.Change("x", 1, 2, "x", verdict).worse for verdict in ("slower", "faster", "missing", "new")
    }
    assert worse == {"slower": True, "faster": False, "missing": True, "new": False}


def test_what_the_spread_covers_is_no_change() -> None:
    assert changed(1.2, width=0.25) == {}
    assert changed(1.04, width=0.001) == {}


def test_a_slower_hour_of_the_machine_is_no_regression() -> None:
    assert changed(1.0, machine=3.0) == {}
    assert changed(1.5, machine=3.0) == {f"{STEP}, forward": "slower"}
    assert moved(example(), slowed(1.5, 1 / 1.5, 1 / 1.5)) == {}
    # Either of the two may be what it hung on.
    assert moved(example(), slowed(1.5, 1 / 1.5, 1.0)) == {}


def test_a_uniform_slowdown_is_seen_on_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything slower alike: no ratio to the parts switched off says it, the seconds do."""
    found = moved(example(), slowed(1.3))
    for what in ("trainer, off, N2048, a step", "whole run, monitoring off, a step", "step at d_sae 2048, ours (cpp)"):
        assert found[what] == "slower"
    assert "trainer, all, N2048" not in found
    assert found[compare.TOGETHER] == "slower"
    faster = moved(example(), slowed(0.7))
    assert set(faster.values()) == {"faster"}
    assert compare.TOGETHER in faster


def test_a_small_slowdown_of_everything_is_seen() -> None:
    """Four hundredths, within the spread of every single figure."""
    after = slowed(1.04)
    for row in after["rows"]["rows"][:2]:
        times = row["variants"]["ours (cpp)"]["seconds"]["forward"]
        times.update({name: 1.04 * value for name, value in times.items()})
    assert moved(example(), after) == {compare.TOGETHER: "slower"}
    assert moved(example(), slowed(1.04, 1 / 1.04, 1 / 1.04)) == {}


def test_of_two_machines_only_ratios_are_compared_and_that_is_said() -> None:
    before, after = example(), slowed(1.3)
    after["device"]["threads"] = 4
    changes = compare.compare(before, after)
    assert [c for c in changes if c.verdict != "same"] == []
    assert not [c for c in changes if c.unit == "s"]
    said = "\n".join(compare.machines(before, after))
    assert "Two machines: only ratios" in said
    assert "threads 4" in said
    same = "\n".join(compare.machines(before, slowed(1.3, 0.5)))
    assert "one machine: Example CPU" in same
    assert "when whole_run was measured: a copy at 0.50x of the speed before, a product at 1.00x" in same


def test_memory_and_missing_rows_are_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before, after = example(), example()
    for kind in ("peak", "held"):
        after["rows"]["rows"][0]["variants"]["ours (cpp)"][f"{kind}_bytes"] *= 2
    del after["rows"]["rows"][1]
    encode = STEP.replace("step", "encode")
    assert moved(before, after) == {
        f"{STEP}, peak memory": "more memory",
        f"{STEP}, held memory": "more memory",
        f"{encode}, forward": "missing",
        f"{encode}, peak memory": "missing",
        f"{encode}, held memory": "missing",
    }
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, found in zip(files, (before, after), strict=True):
        results.save(found, file)
    assert report.main([str(f) for f in files]) == 1
    said = capsys.readouterr().out
    assert "more memory" in said
    assert "one machine: Example CPU" in said
    assert report.main([str(files[0]), str(files[0])]) == 0
    assert "measurements within their spread" in capsys.readouterr().out
