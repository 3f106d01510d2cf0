"""`transcoder profile`: the trainer's own steps, their phases add up, and the run is left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import synthetic
from bench.cases import Size
from bench.monitoring_overhead import PARTS, config
from transcoder.config import ConfigError, RunConfig
from transcoder.phases import PhaseClock, phase
from transcoder.training import train_transcoder
from transcoder.training.profile import REST, TRACED, WARM_UP, profile_run
from transcoder.training.train import opened_run

TINY = Size(64, 16, 128, 4)
STEPS = 8


def made(count: int = 8) -> list[Any]:
    return synthetic.batches(TINY.rows, TINY.d, 32, torch.device("cpu"), count=count)


def settings(parts: tuple[str, ...] = ("monitor", "samples", "regularizer"), steps: int = 100) -> RunConfig:
    own = {
        "training.steps": steps,
        "training.seed": 3,
        "antidup.samples.collect_every": 1,
        "transcoder.widths": [32, 128],
    }
    return config(TINY, parts, own)


def test_phases_add_up_to_the_step_and_the_trace_names_them(tmp_path: Path) -> None:
    trace = tmp_path / "deep" / "trace.json"
    found = profile_run(
        settings(),
        STEPS,
        trace,
        batches=synthetic.endless(made()),
        heldout=synthetic.batches(64, 16, 32, torch.device("cpu"), 1),
    )
    assert found.steps == len(found.step_seconds) == STEPS
    assert found.tokens_per_step == TINY.rows
    # No second is counted twice: the phases lie within the steps, and none within another.
    assert sum(found.phases.values()) <= sum(found.step_seconds) / STEPS
    for name in ("batch", "encode", "loss", "backward", "optimizer", "logging", REST):
        assert found.phases[name] > 0, name
    for part in ("penalty", "monitor", "samples", "target pairs"):
        assert found.phases[f"anti-duplication: {part}"] > 0, part
    assert found.calls["backward"] == found.calls["optimizer"] == found.calls["batch"] == 1
    assert set(found.periodic) == {"anti-duplication: report", "anti-duplication: sample files", "checkpoint"}
    text = found.format()
    assert "share" in text
    assert str(trace) in text
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    named = [event.get("name") for event in events]
    assert named.count("optimizer") >= TRACED
    assert "anti-duplication: monitor" in named


def test_a_part_that_is_off_has_no_phase() -> None:
    found = profile_run(
        settings(()),
        2,
        batches=synthetic.endless(made()),
        heldout=synthetic.batches(64, 16, 32, torch.device("cpu"), 1),
    )
    assert not [name for name in found.phases if name.startswith("anti-duplication")]
    assert set(found.periodic) == {"checkpoint"}


def test_the_steps_under_the_clock_are_training_s_own_to_the_bit(tmp_path: Path) -> None:
    """As many steps by `train_transcoder` end in the same weights."""
    heldout = made(1)
    steps = 12
    trained = train_transcoder(
        settings(steps=steps), tmp_path / "a", batches=synthetic.endless(made()), heldout=heldout
    )
    with (
        opened_run(settings(steps=steps), tmp_path / "b", synthetic.endless(made()), heldout) as run,
        PhaseClock(torch.device("cpu")).running(),
    ):
        for _ in range(steps):
            run.advance()
    for name, value in trained.transcoder.state_dict().items():
        assert torch.equal(value, run.layers[0].transcoder.state_dict()[name]), name


def test_a_phase_is_no_work_unless_a_clock_or_a_profiler_listens() -> None:
    idle = phase("encode")
    assert phase("loss") is idle
    with PhaseClock(torch.device("cpu")).running() as clock, phase("outer"), phase("inner"):
        pass
    assert clock.calls == {"outer": 1, "inner": 1}
    assert phase("loss") is idle
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, phase("marked"):
        pass
    assert "marked" in {event.key for event in profiler.key_averages()}


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.steps: expected at least 46"):
        profile_run(settings(steps=45), 30, batches=synthetic.endless(made()))
    with pytest.raises(ConfigError, match="--steps: expected at least 1, got 0"):
        profile_run(settings(), 0, batches=synthetic.endless(made()))
    assert WARM_UP + 30 + TRACED + 1 == 46


def test_every_part_of_the_configuration_is_switched() -> None:
    off = settings(())
    assert not any(getattr(off.antidup, part).enabled for part in PARTS)
