"""Steps whose loss or gradients are no numbers: nothing of them is kept, each is recorded, too many end the run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.antidup import DiversityRegularizer, UsageLedger
from transcoder.antidup.merge_cost_streaming import Measured
from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.async_scalar import DeferredSize
from transcoder.model import Transcoder

HELD_STEPS = 2
"""Steps whose verdict may still be on its way from the device. Their codes and batches are held meanwhile; the device always
has that many steps of work queued when the host waits for the oldest."""
SAID_OF_EACH = 20
"""Bad steps that a state remembers one by one; the log has all of them."""
_SEQUENCES = 8
"""Sequence ids recorded of a bad batch."""
_TRACKED = ("threshold", "tokens_since_fired")
"""What the forward pass of a transcoder changes."""


class TrainingDivergedError(RuntimeError):
    """Too many steps were NaN or Inf. None of them touched the weights; the state of the last good step is saved."""


class Verdict(Protocol):
    """Whether a step was bad, as a number that may still be on its way."""

    def arrived(self) -> bool: ...
    def read(self) -> int: ...


class _Known:
    def __init__(self, bad: Tensor) -> None:
        self._bad = int(bad)

    def arrived(self) -> bool:
        return True

    def read(self) -> int:
        return self._bad


def host_is_device(tensor: Tensor) -> bool:
    """Where the host is the device, reading a flag waits for nobody."""
    return tensor.is_cpu


def verdict_of(bad: Tensor) -> Verdict:
    """The host's view of a 0-dim flag. Waits for no device."""
    return _Known(bad) if host_is_device(bad) else DeferredSize(bad.long())


@dataclass(frozen=True, eq=False)
class Observed:
    """What monitor, samples, baseline and meters are shown of a micro-batch, once its step is known to be good."""

    codes: SparseCodes
    batch: ActivationBatch
    values: dict[str, Tensor]
    micro: int
    measured: Measured | None = None
    """Of the merge test's evidence."""


@dataclass(frozen=True, eq=False)
class HeldStep:
    """A step that was computed and not yet counted."""

    step: int
    seen: list[Observed]
    norm: Tensor
    records: list[Callable[[], None]]
    """What the regularizer reported to the ledger."""
    verdict: Verdict


class StepLedger(UsageLedger):
    """A ledger that keeps the regularizer's reports of a step until somebody knows that the step was good."""

    _held: list[Callable[[], None]] | None = None

    def hold(self) -> None:
        self._held = []

    def release(self) -> list[Callable[[], None]]:
        """Ends holding. Returns the reports; each one, called, is recorded."""
        held, self._held = self._held or [], None
        return held

    def record_call(self, name: str) -> None:
        self._record(name, functools.partial(super().record_call, name))

    def record_effect(self, name: str, **numbers: float | Tensor) -> None:
        self._record(name, functools.partial(super().record_effect, name, **numbers))

    def _record(self, name: str, record: Callable[[], None]) -> None:
        # The others report from other threads, or after the step.
        if self._held is not None and name == "diversity_regularizer":
            self._held.append(record)
        else:
            record()


def before_step(transcoder: Transcoder, regularizer: DiversityRegularizer | None) -> dict[str, Any]:
    """Copies of what forward pass and penalties change beside the gradients: a few numbers a latent."""
    return {
        **{name: getattr(transcoder, name).clone() for name in _TRACKED},
        "regularizer": None if regularizer is None else regularizer.state_dict(),
        "metrics": {} if regularizer is None else regularizer.metrics(),
    }


@torch.no_grad()
def take_back(
    bad: Tensor, before: Mapping[str, Any], transcoder: Transcoder, regularizer: DiversityRegularizer | None
) -> None:
    """Where `bad` (0-dim bool) holds, what `before_step` gave is put back. Waits for no device.

    The regularizer's count of steps goes on: in a bad step nothing fired.
    """
    if host_is_device(bad) and not bool(bad):
        return
    for name in _TRACKED:
        now = getattr(transcoder, name)
        now.copy_(torch.where(bad, before[name], now))
    if regularizer is not None:
        regularizer.load_state_dict(_chosen(bad, before["regularizer"], regularizer.state_dict()))
        # A term that is not evaluated at every step is logged with its last figures.
        known: dict[str, Tensor] = before["metrics"]
        now = regularizer.metrics()
        regularizer.set_metrics({n: torch.where(bad, known[n], t) if n in known else t for n, t in now.items()})


def _chosen(bad: Tensor, before: Any, now: Any) -> Any:
    if isinstance(now, Tensor):
        return torch.where(bad, before, now)
    if isinstance(now, dict):
        return {key: _chosen(bad, before[key], value) for key, value in now.items()}
    return now


class BadSteps:
    """The record of a run's bad steps: how many, which, and what their batches were."""

    def __init__(self) -> None:
        self.count = 0
        self.last: list[dict[str, Any]] = []
        """The last `SAID_OF_EACH`, as `add` made them."""

    def add(self, held: HeldStep, accumulation: int, cursor: Mapping[str, float]) -> dict[str, Any]:
        """Count a bad step. Reads the device. Returns its record: JSON values only."""
        record = {
            "step": held.step + 1,
            "batches": [
                {"number": held.step * accumulation + seen.micro, **identity(seen.batch)} for seen in held.seen
            ],
            "cursor": dict(cursor),
        }
        self.count += 1
        self.last = [*self.last, record][-SAID_OF_EACH:]
        return record

    def diagnosis(self) -> str:
        """Which steps and why, for a person."""
        fields = [sorted({name for b in record["batches"] for name in b["not_finite"]}) for record in self.last]
        data = [f"step {r['step']}: {', '.join(names)}" for r, names in zip(self.last, fields, strict=True) if names]
        clean = [str(r["step"]) for r, names in zip(self.last, fields, strict=True) if not names]
        said = []
        if data:
            said.append(
                f"{len(data)} had NaN or Inf in their batches ({'; '.join(data[:3])}{'; ...' if len(data) > 3 else ''}): "
                "look for it in the activations"
            )
        if clean:
            said.append(
                f"{len(clean)} had finite batches and a loss or gradients that overflowed (steps {', '.join(clean[:5])}"
                f"{', ...' if len(clean) > 5 else ''}): lower training.lr, or look for huge activations"
            )
        return f"of the last {len(self.last)}, {'; '.join(said)}"

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.last = int(state["count"]), list(state["last"])


def identity(batch: ActivationBatch) -> dict[str, Any]:
    """What finds a batch again: its sequences, a hash of its token ids and positions, and which rows are no numbers. Reads
    the device."""
    places = torch.stack([batch.tokens, batch.positions]).cpu().contiguous()
    sequences: Sequence[int] = [] if batch.sequences is None else batch.sequences.unique().tolist()
    not_finite = {}
    for name in ("source", "target", "weights"):
        value: Tensor | None = getattr(batch, name)
        if value is None:
            continue
        rows = (~torch.isfinite(value.reshape(len(batch), -1))).any(1).nonzero().flatten().tolist()
        if rows:
            first = rows[0]
            not_finite[name] = {
                "rows": len(rows),
                "first_row": first,
                "token": int(batch.tokens[first]),
                "position": int(batch.positions[first]),
                "sequence": None if batch.sequences is None else int(batch.sequences[first]),
            }
    return {
        "tokens": len(batch),
        "sha256": hashlib.sha256(places.numpy().tobytes()).hexdigest(),
        "sequences": list(sequences[:_SEQUENCES]),
        "sequences_in_all": len(sequences),
        "not_finite": not_finite,
    }
