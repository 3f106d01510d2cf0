"""`pytest bench/`: every row is checked against its reference, then timed together with its peers and its floor.

    pytest bench/ [--bench-size cpu|cuda|tiny] [--bench-seconds 8] [--bench-json FILE] [--bench-peers eager,compiled,...]

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

# `bench` is imported from the checkout without the checkout on sys.path, where it would offer its folders to everyone.
_bench = ModuleSpec("bench", None, is_package=True)
_bench.submodule_search_locations = [str(Path(__file__).resolve().parent)]
if not getattr(sys.modules.get("bench"), "__path__", None):
    sys.modules["bench"] = module_from_spec(_bench)

from bench import machine, peers, results  # noqa: E402
from bench.cases import SIZES, Activation, Case, Size  # noqa: E402
from bench.race import rounds_for  # noqa: E402
from bench.rows import prepare, row  # noqa: E402

_rows: list[dict[str, Any]] = []
_skipped: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench/")
    group.addoption("--bench-size", choices=sorted(SIZES), default=machine.device().type, help="which sizes to run")
    group.addoption("--bench-seconds", type=float, default=6.0, help="seconds of rounds a row (at least 5 rounds)")
    group.addoption("--bench-json", type=Path, help="write what was measured to this file")
    group.addoption("--bench-peers", default=",".join(peers.NAMES), help="peers to run, with commas between")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", SIZES[metafunc.config.option.bench_size], ids=str)


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """compare(operation, size, activation, nested): check, time and note one row."""

    def run(operation: str, size: Size, activation: Activation = "topk", nested: bool = False) -> None:
        options = request.config.option
        names = [name for name in options.bench_peers.split(",") if name]
        case = Case(size, activation, nested)
        race, floors, skipped = prepare(operation, case, names)
        rounds = rounds_for(race.warm_up(), options.bench_seconds)
        # pytest-benchmark times ours; the others run in the same rounds, just before it.
        benchmark.pedantic(race.first, setup=race.others, rounds=rounds, iterations=1, warmup_rounds=0)
        found = row(operation, case, race, floors)
        benchmark.extra_info.update(floor=found["floor"], to_floor=found["to_floor"])
        record(found, skipped)

    return run


@pytest.fixture
def record_row() -> Callable[[dict[str, Any]], None]:
    return lambda found: record(found, {})


def record(found: dict[str, Any], skipped: dict[str, str]) -> None:
    _rows.append(found)
    _skipped.update(skipped)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.option.bench_json
    if target is not None and _rows:
        section = {
            **results.about(),
            "exit_status": int(exitstatus),
            "skipped": dict(sorted(_skipped.items())),
            "rows": _rows,
        }
        target.write_text(json.dumps(section, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in results.table(_rows):
        terminalreporter.write_line(line)
    for name, why in sorted(_skipped.items()):
        terminalreporter.write_line(f"skipped {name}: {why}")
