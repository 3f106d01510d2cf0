"""MetricsWriter: the file comes first, stays strict JSON, and is cut back exactly on resume."""

from __future__ import annotations

import errno
import json
import logging
import math
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter, jsonl
from transcoder.reporting.jsonl import JsonlFile, parse_record

CONFIG = RunConfig(name="metrics-test")


def read_records(path: Path) -> list[dict[str, Any] | None]:
    return [parse_record(line) for line in path.read_bytes().splitlines() if line.strip()]


def strict(line: str) -> dict:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(run_dir: Path) -> list[dict]:
    return [strict(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_its_way_before_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, CONFIG)
    writer.write(10, {"losses/overall_loss": 0.5, "sparsity/dead_features": 3})
    (line,) = lines(tmp_path)
    assert line["step"] == 10
    assert line["time"] >= 0
    assert line["losses/overall_loss"] == 0.5
    assert isinstance(line["sparsity/dead_features"], int)
    writer.close()
    writer.close()


def test_nan_and_inf_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, CONFIG) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(2.5), "e": 1e-300})
        writer.write_event("stopped", {"why": "a\nnewline", "loss": math.nan, "where": Path("x"), "n": [1, math.inf]})
    first, event = lines(tmp_path)
    assert (first["a"], first["b"], first["c"], first["d"], first["e"]) == (None, None, None, 2.5, 1e-300)
    assert first["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    assert event["event"] == "stopped"
    assert event["step"] == 1
    assert event["payload"] == {"why": "a\nnewline", "loss": "nan", "where": "x", "n": [1, "inf"]}


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, CONFIG) as writer:
        with pytest.raises(TypeError, match=r"metrics/l0: expected a number, got str"):
            writer.write(1, {"metrics/l0": "many"})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="expected a number, got Tensor"):
            writer.write(1, {"x": torch.zeros(2)})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="'time' is the line's own"):
            writer.write(1, {"time": 3.0})
        assert lines(tmp_path) == []
    with pytest.raises(ValueError, match="resume_step"):
        MetricsWriter(tmp_path, CONFIG, resume_step=-1)


def test_resume_drops_exactly_what_lies_beyond_the_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, CONFIG) as writer:
        for step in range(0, 100, 10):
            writer.write(step, {"losses/overall_loss": 1 / (step + 1)})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 100, "losses/overa')  # killed in the middle of a line

    with MetricsWriter(tmp_path, CONFIG, resume_step=50) as writer:
        writer.write(60, {"losses/overall_loss": 7.0})
    raw = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert raw[:6] == before[:6]
    resumed, after = (strict(line.decode()) for line in raw[6:])
    assert resumed["event"] == "resume"
    assert resumed["payload"] == {"from_step": 50, "lines_dropped": 5}
    assert after["losses/overall_loss"] == 7.0
    assert after["time"] >= json.loads(before[5])["time"], "time goes on from the last line kept"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_without_an_earlier_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new", CONFIG, resume_step=0) as writer:
        writer.write(1, {"x": 1.0})
    assert [line.get("x") for line in lines(tmp_path / "new")] == [None, 1.0]


def test_a_new_run_never_overwrites_an_old_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in (1.0, 2.0, 3.0):
        with MetricsWriter(tmp_path, CONFIG) as writer:
            writer.write(0, {"x": value})
    found = {p.name: json.loads(p.read_text())["x"] for p in tmp_path.iterdir()}
    assert found == {"metrics.jsonl.1": 1.0, "metrics.jsonl.2": 2.0, "metrics.jsonl": 3.0}
    assert "metrics.jsonl.2" in caplog.text


def test_damage_in_the_middle_is_read_past(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe garbage\n[1]\n\n{"step": 2}')
    assert read_records(path) == [{"step": 1}, None, None, {"step": 2}]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
def test_a_full_disk_costs_no_line_and_leaves_no_torn_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = JsonlFile(tmp_path / "m.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel itself refuses to let the file grow, as a full disk does; the second line fits in part.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
        for step in range(4):
            file.append({"step": step, "x": 1.5})
        assert (tmp_path / "m.jsonl").read_bytes() == b'{"step": 0, "x": 1.5}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("cannot write") == 1
    file.append({"step": 4})
    file.close()
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl") if r] == [0, 1, 2, 3, 4]


def test_a_file_that_is_deleted_is_made_again_with_what_was_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricsWriter(tmp_path / "run", CONFIG)
    writer.write(1, {"x": 1.0})
    shutil.rmtree(tmp_path / "run")
    writer.write(2, {"x": 2.0})
    writer.write(3, {"x": 3.0})
    writer.close()
    assert [line["x"] for line in lines(tmp_path / "run")] == [1.0, 2.0, 3.0]
    assert caplog.text.count("was deleted") == 1


def test_a_file_does_not_grow_beyond_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Events and what is recent stay; older figures get sparser."""
    file, limit = JsonlFile(tmp_path / "m.jsonl", max_bytes=4000), 4000
    for step in range(2000):
        file.append({"step": step, "x": 1.5})
        if step % 400 == 0:
            file.append({"step": step, "event": "checkpoint"})
        assert (tmp_path / "m.jsonl").stat().st_size <= limit
    found = [r for r in read_records(tmp_path / "m.jsonl") if r]
    assert [r["step"] for r in found if "event" in r] == [0, 400, 800, 1200, 1600]
    steps = [r["step"] for r in found if "event" not in r]
    assert steps == sorted(steps)
    assert steps[-60:] == list(range(1940, 2000))
    assert len(steps) > 80
    assert steps[0] < 600
    assert "thinned from" in caplog.text
    for number in range(500):
        file.append({"step": 2000, "event": f"nothing but events {number}"})
        assert (tmp_path / "m.jsonl").stat().st_size <= limit
    file.append({"step": 3000})
    file.close()
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl") if r][-1] == 3000


def test_a_copy_that_finds_no_place_is_not_made_for_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy reads the whole file: at a gigabyte a logging interval would take seconds."""
    tries, full = 0, True

    def thinned(found: list[bytes]) -> list[bytes]:
        nonlocal tries
        tries += 1
        if full:
            raise OSError(errno.ENOSPC, "no room for the copy")
        return right(found)

    right = jsonl._thinned
    monkeypatch.setattr(jsonl, "_thinned", thinned)
    file = JsonlFile(tmp_path / "m.jsonl", max_bytes=4000)
    for step in range(1000):
        file.append({"step": step})
    assert 2 <= tries <= 20
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl") if r] == list(range(1000))
    full = False
    while (tmp_path / "m.jsonl").stat().st_size > 4000:
        file.append({"step": 1000})
    file.close()


def test_a_line_of_brackets_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 2}\n')
    assert read_records(tmp_path / "m.jsonl") == [{"step": 1}, None, {"step": 2}]


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = CONFIG.replace({"logging.tensorboard": True})
    with MetricsWriter(tmp_path, config) as writer:
        writer.write(3, {"metrics/fvu": 0.25})
        writer.flush()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("metrics/fvu")
    assert (scalar.step, scalar.value) == (3, 0.25)
    with MetricsWriter(tmp_path, config, resume_step=2) as writer:
        writer.write(4, {"metrics/fvu": 0.125})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(s.step, s.value) for s in events.Scalars("metrics/fvu")] == [(4, 0.125)], "step 3 was purged"


def test_tensorboard_absent_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fake" / "tensorboard").mkdir(parents=True)
    (tmp_path / "fake" / "tensorboard" / "__init__.py").write_text("raise ImportError('no tensorboard here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with MetricsWriter(tmp_path, CONFIG.replace({"logging.tensorboard": True})) as writer:
        for step in range(5):
            writer.write(step, {"x": 1.0})
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "pip install tensorboard" in warnings[0].getMessage()
    assert len(lines(tmp_path)) == 5
