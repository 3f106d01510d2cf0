"""Where a step's time goes: the trainer's own steps, with a clock that its phases report to."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from transcoder.activations import ActivationBatch
from transcoder.config import ConfigError, RunConfig
from transcoder.phases import PhaseClock
from transcoder.training.observers import Checkpoints, CorrelationReports, Samples
from transcoder.training.train import opened_run
from transcoder.training.trainer import Trainer

WARM_UP = 10
"""Steps before the clock starts: first calls compile, allocate, and fill the buffers of data."""
TRACED = 5
"""Steps in the trace."""
QUIET = {
    "logging.progress": False,
    "logging.wandb": "off",
    "logging.tensorboard": False,
    "checkpoint.second_location": None,
    "checkpoint.reserve": False,
}
"""Settings of a run that is thrown away."""
REST = "other"


@dataclass(frozen=True)
class StepProfile:
    """Where the time of `steps` steps went."""

    steps: int
    step_seconds: list[float]
    tokens_per_step: float
    phases: dict[str, float]
    """Seconds a step, mean."""
    calls: dict[str, float]
    """Calls a step, mean."""
    periodic: dict[str, tuple[float, int]]
    """What is not due in every step: (seconds once, steps between)."""
    device: str
    trace: Path | None = field(default=None)

    def format(self) -> str:
        total = sum(self.phases.values())
        median = statistics.median(self.step_seconds)
        lines = [
            f"{self.steps} steps on {self.device}: {1e3 * total:.2f} ms a step ({self.tokens_per_step / total:,.0f} tokens/s), "
            f"median {1e3 * median:.2f} ms",
            "",
            f"{'phase':<34}{'ms a step':>10}{'share':>8}{'calls':>8}",
        ]
        for name, seconds in sorted(self.phases.items(), key=lambda item: (item[0] == REST, -item[1])):
            lines.append(f"{name:<34}{1e3 * seconds:>10.3f}{seconds / total:>8.1%}{self.calls[name]:>8.2f}")
        if self.periodic:
            lines += ["", f"{'not due in every step':<34}{'ms once':>10}{'every':>8}{'ms a step':>11}"]
            for name, (seconds, every) in self.periodic.items():
                lines.append(f"{name:<34}{1e3 * seconds:>10.3f}{every:>8}{1e3 * seconds / every:>11.3f}")
        if "cuda" in self.device:
            lines += ["", "The device was waited for at the ends of every phase: a step without the clock is faster."]
        if self.trace is not None:
            lines += ["", f"trace: {self.trace} (open it at https://ui.perfetto.dev or chrome://tracing)"]
        return "\n".join(lines)


def profile_run(
    config: RunConfig,
    steps: int = 30,
    trace: Path | None = None,
    *,
    batches: Iterable[ActivationBatch] | None = None,
    heldout: Sequence[ActivationBatch] | None = None,
) -> StepProfile:
    """Take `steps` of the trainer's steps under the clock, then a few more under torch.profiler.

    The run's files go to a temporary folder. A phase does not contain the phases inside it, so that they add up to the step;
    `other` is what no phase covers. The penalty's share of the backward pass is part of `backward`. Work of other threads
    (batches made ahead, files written in the background) is no part of a step unless a step waits for it.

    Args:
        config: the run; its logs are quiet and its files few while it is profiled (`QUIET`).
        trace: file for the chrome trace (.json); None writes none.
        batches, heldout: as in `train_transcoder`.

    Raises: ConfigError where `steps` is below 1 or the run is too short; what `train_transcoder` raises.
    """
    if steps < 1:
        raise ConfigError(f"profile: --steps: expected at least 1, got {steps}")
    # Neither warm-up nor trace may meet the end of the run, which is no step.
    needed = WARM_UP + steps + TRACED + 1
    if config.training.steps < needed:
        raise ConfigError(
            f"profile: training.steps: expected at least {needed} ({WARM_UP} to warm up, {steps} under the clock, {TRACED} "
            f"traced, and no end of the run among them), got {config.training.steps}"
        )
    with (
        tempfile.TemporaryDirectory(prefix="transcoder-profile-") as folder,
        opened_run(config, Path(folder) / "run", batches, heldout) as run,
        PhaseClock(run.device).running() as clock,
    ):
        for _ in range(WARM_UP):
            run.advance()
        clock.clear()
        taken, before = [], run.tokens
        for _ in range(steps):
            start = time.perf_counter()
            with clock.phase(REST):
                run.advance()
            taken.append(time.perf_counter() - start)
        found = {name: seconds / steps for name, seconds in clock.seconds.items()}
        calls = {name: count / steps for name, count in clock.calls.items()}
        tokens = (run.tokens - before) / steps
        if trace is not None:
            _write_trace(run, clock, trace)
        periodic = _periodic(run, clock, found)
    return StepProfile(steps, taken, tokens, found, calls, periodic, str(run.device), trace)


def _write_trace(run: Trainer, clock: PhaseClock, trace: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # The profiler's own lines of progress on stderr are not for users of the command.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # The trace shows the device as it is, not as the clock makes it wait.
    clock.synchronise = False
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED):
            run.advance()
    clock.synchronise = True
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


def _periodic(run: Trainer, clock: PhaseClock, seen: Mapping[str, float]) -> dict[str, tuple[float, int]]:
    """What did not come up in the steps under the clock, done once."""
    config = run.config
    intervals = {
        CorrelationReports: config.antidup.monitor.correlation_save_frequency,
        Samples: config.antidup.samples.save_frequency,
        Checkpoints: config.checkpoint.every,
    }
    run.catch_up()
    found = {}
    for observer in run.observers:
        every, name = intervals.get(type(observer)), observer.act_phase
        if every is None or name in seen:
            continue
        start = clock.now()
        observer.act(run)
        run.saver.flush()
        found[name] = (clock.now() - start, every)
    return found
