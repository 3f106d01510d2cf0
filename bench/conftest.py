"""`pytest bench/`: every row is checked against its reference, then timed together with its peers and its floor.

    pytest bench/ [--bench-size cpu|cuda|tiny] [--bench-seconds 2] [--bench-json FILE] [--bench-peers eager,compiled,...]

Sizes follow the device unless they are given. What is written to FILE is read by `python -m bench.measure` and
`python -m bench.report`; docs/performance.md says how to read it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest

# `bench` is imported from the checkout without adding the checkout to sys.path, which would expose its other folders.
_bench = ModuleSpec("bench", None, is_package=True)
_bench.submodule_search_locations = [str(Path(__file__).resolve().parent)]
if not getattr(sys.modules.get("bench"), "__path__", None):
    sys.modules["bench"] = module_from_spec(_bench)

from bench import machine, peers, results  # noqa: E402
from bench.cases import SIZES, Activation, Case, Size  # noqa: E402
from bench.interleaved_timing import WrongResultError, rounds_for  # noqa: E402
from bench.rows import Contest  # noqa: E402

_rows: list[dict[str, Any]] = []
_skipped: dict[str, str] = {}
_failed: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench/")
    group.addoption("--bench-size", choices=sorted(SIZES), default=machine.device().type, help="which sizes to run")
    group.addoption("--bench-seconds", type=float, default=2.0, help="seconds of rounds a row (at least 5 rounds)")
    group.addoption("--bench-json", type=Path, help="write what was measured to this file")
    group.addoption("--bench-peers", default=",".join(peers.NAMES), help="peers to run, with commas between")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", SIZES[metafunc.config.option.bench_size], ids=str)


@pytest.fixture
def compare(benchmark, record_row, request: pytest.FixtureRequest) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """compare(operation, size, activation, nested): check, time and note one row."""

    def run(operation: str, size: Size, activation: Activation = "topk", nested: bool = False) -> None:
        options = request.config.option
        names = [name for name in options.bench_peers.split(",") if name]
        contest = Contest(operation, Case(size, activation, nested), names)
        rounds = rounds_for(contest.race.warm_up(), options.bench_seconds)
        # pytest-benchmark times ours; the others run in the same rounds, just before it.
        race = contest.race
        benchmark.pedantic(race.first, setup=race.others, rounds=rounds, iterations=1, warmup_rounds=0)
        found = contest.row()
        benchmark.extra_info.update(floor=found["floor"], ratios=results.ratios_of(found))
        record_row(found)
        _skipped.update(contest.skipped)
        if contest.wrong:
            # The row keeps the times of the other variants and records the wrong ones.
            raise WrongResultError("; ".join(contest.wrong.values()))

    return run


@pytest.fixture
def record_row(pytestconfig: pytest.Config) -> Callable[[dict[str, Any]], None]:
    """Notes a row for the file and the end of the session, and shows it at once."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def record(found: dict[str, Any]) -> None:
        _rows.append(found)
        if pytestconfig.option.bench_json is not None:
            # `bench.measure` runs for many minutes: its rows are shown as they pass.
            with capture.global_and_fixture_disabled():
                reporter.write_line("\n".join(results.table([found])))

    return record


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and report.longrepr is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        _failed[report.nodeid.rpartition("::")[2]] = crash.message if crash is not None else str(report.longrepr)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.option.bench_json
    if target is not None:
        section = {
            **results.about(),
            "exit_status": int(exitstatus),
            "skipped": dict(sorted(_skipped.items())),
            "failed": _failed,
            "rows": _rows,
        }
        target.write_text(json.dumps(section, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in (*results.table(_rows), *results.closing_table(_rows)):
        terminalreporter.write_line(line)
    for name, why in sorted(_skipped.items()):
        terminalreporter.write_line(f"skipped {name}: {why}")
