"""Where a step's time goes: the trainer's own steps with a clock around the calls that they make.

Nothing of the trainer is repeated here, and nothing of it knows of profiles: while one runs, the parts of a run are wrapped
from outside.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import transcoder.model as model_module
from transcoder.activations import ActivationBatch
from transcoder.config import ConfigError, RunConfig
from transcoder.training import trainer as trainer_module
from transcoder.training.run_folder import RunStart

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


@contextmanager
def opened_run(
    config: RunConfig,
    out: Path,
    batches: Iterable[ActivationBatch] | None = None,
    heldout: Sequence[ActivationBatch] | None = None,
) -> Iterator[Any]:
    """A run as `train_transcoder` makes it, whose steps the caller takes: `run.advance()`. Arguments and errors as there."""
    trainer_module._check_switches(config, batches, heldout)
    device = trainer_module._device(config.model.device)
    with ExitStack() as stack:
        start = stack.enter_context(RunStart(out))
        trainer_module._check_folder(out, config, resume=False)
        run = trainer_module._Run(config, out, device, batches, heldout, stack)
        run.prepare(resume=False)
        start.begun()
        run.transcoder.train()
        yield run


class Phases:
    """Seconds by phase, each without those of the phases inside it. Counts the thread that made it: others run beside steps."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._thread = device, threading.get_ident()
        self._open: list[float] = []
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.synchronise = True

    def clear(self) -> None:
        self.seconds, self.calls = {}, {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        start = self._now()
        self._open.append(0.0)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            taken = self._now() - start
            inside = self._open.pop()
            if self._open:
                self._open[-1] += taken
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - inside
            self.calls[name] = self.calls.get(name, 0) + 1

    def wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*words: Any, **named: Any) -> Any:
            with self.phase(name):
                return call(*words, **named)

        return run

    def _now(self) -> float:
        if self.synchronise and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _TimedSource:
    """The run's source; `next` looks a method up on the type, so that it cannot be wrapped in place."""

    def __init__(self, source: Any, phases: Phases) -> None:
        self._source, self._phases = source, phases

    def __next__(self) -> ActivationBatch:
        with self._phases.phase("batch"):
            batch: ActivationBatch = next(self._source)
            return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


@contextmanager
def phases_of(run: Any) -> Iterator[Phases]:
    """The clock around the calls of `run`, which is from `opened_run`."""
    phases = Phases(run.device)
    calls: list[tuple[Any, str, str]] = [
        (run, "advance", REST),
        (run.transcoder, "_encode_normalized", "encode"),
        (run.transcoder, "training_step", "loss"),
        (run.transcoder, "_track", "dead counts, threshold"),
        (run.transcoder, "refresh_dead", "dead counts, threshold"),
        (model_module, "auxk_loss", "AuxK"),
        (torch.Tensor, "backward", "backward"),
        (trainer_module, "optimizer_step", "optimizer"),
        (trainer_module, "before_step", "bad-step guard"),
        (trainer_module, "take_back", "bad-step guard"),
        (run, "_observed", "logging"),
        (run.meters, "add", "logging"),
        (run, "_log", "logging"),
        (run.baseline, "update", "linear baseline"),
        (trainer_module, "evaluate", "evaluation"),
        (run.store, "save", "checkpoint"),
        (run.ledger, "write", "anti-duplication: ledger"),
        (run.regularizer, "apply_penalty", "anti-duplication: penalty"),
        (run.positions, "sample_positions", "anti-duplication: positions"),
        (run.monitor, "update_correlations", "anti-duplication: monitor"),
        (run.monitor, "target_pairs", "anti-duplication: target pairs"),
        (run.monitor, "refresh_targets", "anti-duplication: target pairs"),
        (run, "_report_antidup", "anti-duplication: report"),
        (run.samples, "collect", "anti-duplication: samples"),
        (run.samples, "save", "anti-duplication: sample files"),
    ]
    with ExitStack() as stack:
        for owner, name, label in calls:
            if owner is not None:
                stack.enter_context(mock.patch.object(owner, name, phases.wrapped(label, getattr(owner, name))))
        stack.enter_context(mock.patch.object(run, "source", _TimedSource(run.source, phases)))
        yield phases


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
            f"{self.steps} steps on {self.device}: median {1e3 * median:.2f} ms a step ({self.tokens_per_step / median:,.0f} "
            f"tokens/s), mean {1e3 * total:.2f} ms",
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
    (batches made ahead, files written beside training) is no part of a step unless a step waits for it.

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
        phases_of(run) as phases,
    ):
        for _ in range(WARM_UP):
            run.advance()
        phases.clear()
        taken, before = [], run.tokens
        for _ in range(steps):
            start = time.perf_counter()
            run.advance()
            taken.append(time.perf_counter() - start)
        found = {name: seconds / steps for name, seconds in phases.seconds.items()}
        calls = {name: count / steps for name, count in phases.calls.items()}
        tokens = (run.tokens - before) / steps
        if trace is not None:
            _write_trace(run, phases, trace)
        periodic = _periodic(run, phases, found)
    return StepProfile(steps, taken, tokens, found, calls, periodic, str(run.device), trace)


def _write_trace(run: Any, phases: Phases, trace: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # The trace shows the device as it is, not as the clock makes it wait.
    phases.synchronise = False
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED):
            run.advance()
    phases.synchronise = True
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


def _periodic(run: Any, phases: Phases, seen: dict[str, float]) -> dict[str, tuple[float, int]]:
    """What did not come up in the steps under the clock, done once."""
    due: list[tuple[str, Callable[[], object], int]] = []
    anti = run.config.antidup
    if run.monitor is not None:
        due.append(("anti-duplication: report", run._report_antidup, anti.monitor.correlation_save_frequency))
    if run.samples is not None and run.samples.opened:
        due.append(
            (
                "anti-duplication: sample files",
                lambda: run.samples.save(run.step, run.source.decode_tokens),
                anti.samples.save_frequency,
            )
        )
    due.append(("checkpoint", lambda: run.saver.save(wait=True), run.config.checkpoint.every))
    run._settle()
    found = {}
    for name, call, every in due:
        if name in seen:
            continue
        start = phases._now()
        call()
        found[name] = (phases._now() - start, every)
    return found
