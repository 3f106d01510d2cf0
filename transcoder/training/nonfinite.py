"""Steps whose loss or gradients are NaN or Inf: they change nothing, each is recorded, too many end the run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.antidup import DiversityRegularizer, UsageLedger
from transcoder.kernels.correlation.async_scalar import DeferredSize
from transcoder.model import Transcoder

REMEMBERED = 20
"""Bad steps that a state describes; metrics.jsonl has all of them."""
_SEQUENCES = 8
"""Sequence ids recorded of a bad batch."""
_TRACKED = ("threshold", "tokens_since_fired")
"""What the forward pass of a transcoder changes."""


class TrainingDivergedError(RuntimeError):
    """Too many steps were NaN or Inf. None of them touched the weights; the state of the last good step is saved."""


class _OnHost:
    """A `DeferredSize` of a flag that is on the host already."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = int(flag)

    def arrived(self) -> bool:
        return True

    def read(self) -> int:
        return self._flag


def host_is_device(tensor: Tensor) -> bool:
    """Whether reading the tensor needs no sync."""
    return tensor.is_cpu


Flag: TypeAlias = DeferredSize | _OnHost
"""A number, 0 or 1, that may still be on its way to the host."""


def flag_of(bad: Tensor) -> Flag:
    """The host's view of a 0-dim flag. Never waits for a device."""
    return _OnHost(bad) if host_is_device(bad) else DeferredSize(bad.long())


class StepLedger(UsageLedger):
    """A ledger for training: the regularizer reports before its step is known to be finite, so its reports wait in `take`."""

    def __init__(self, enabled: Mapping[str, bool], path: Path) -> None:
        super().__init__(enabled, path)
        self._waiting: list[Callable[[], None]] = []

    def take(self) -> list[Callable[[], None]]:
        """The regularizer's reports since the last call; each one, called, is recorded."""
        taken, self._waiting = self._waiting, []
        return taken

    def record_call(self, name: str) -> None:
        self._record(name, functools.partial(super().record_call, name))

    def record_effect(self, name: str, **numbers: float | Tensor) -> None:
        self._record(name, functools.partial(super().record_effect, name, **numbers))

    def _record(self, name: str, record: Callable[[], None]) -> None:
        if name == "diversity_regularizer":
            self._waiting.append(record)
        else:
            record()


class StateBefore:
    """What forward pass and penalties change (a few numbers a latent), as it is before a step."""

    def __init__(self, transcoder: Transcoder, regularizer: DiversityRegularizer | None) -> None:
        self._transcoder, self._regularizer = transcoder, regularizer
        self._tracked = {name: getattr(transcoder, name).clone() for name in _TRACKED}
        self._state = None if regularizer is None else regularizer.state_dict()
        self._metrics = {} if regularizer is None else regularizer.metrics()

    @torch.no_grad()
    def put_back_where(self, bad: Tensor) -> None:
        """Where `bad` (0-dim bool) holds, everything is as it was. Reads nothing from the device.

        The regularizer's count of steps goes on: in a bad step nothing fired.
        """
        if host_is_device(bad) and not bool(bad):
            return
        for name, before in self._tracked.items():
            now = getattr(self._transcoder, name)
            now.copy_(torch.where(bad, before, now))
        regularizer, known = self._regularizer, self._metrics
        if regularizer is not None:
            regularizer.load_state_dict(_chosen(bad, self._state, regularizer.state_dict()))
            # A term that is not evaluated at every step is logged with its last values.
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
        """The last `REMEMBERED`, as `add` made them."""

    def add(self, step: int, batches: Sequence[ActivationBatch], cursor: Mapping[str, float]) -> dict[str, Any]:
        """Count the bad step of index `step`. Reads the device. Returns its record: JSON values only."""
        first = step * len(batches)
        record = {
            "step": step + 1,
            "batches": [{"number": first + micro, **identity(batch)} for micro, batch in enumerate(batches)],
            "cursor": dict(cursor),
        }
        self.count += 1
        self.last = [*self.last, record][-REMEMBERED:]
        return record

    def check(self, allowed: int, steps: int) -> None:
        """TrainingDivergedError where more than `allowed` of `steps` steps were bad."""
        if self.count > allowed:
            raise TrainingDivergedError(
                f"{self.count} of {steps} steps were NaN or Inf, more than training.max_bad_steps = {allowed}: "
                f"{self.diagnosis()}. They changed nothing, and each is in metrics.jsonl with its batch; the state "
                f"of step {steps} is saved, and --resume goes on from it with a larger training.max_bad_steps"
            )

    def diagnosis(self) -> str:
        """Which steps were bad, and why, as text."""
        data, clean = [], []
        for record in self.last:
            fields = sorted({name for batch in record["batches"] for name in batch["not_finite"]})
            if fields:
                data.append(f"step {record['step']}: {', '.join(fields)}")
            else:
                clean.append(str(record["step"]))
        said = []
        if data:
            shown = "; ".join([*data[:3], *["..."] * (len(data) > 3)])
            said.append(f"{len(data)} had NaN or Inf in their batches ({shown}): look for it in the activations")
        if clean:
            shown = ", ".join([*clean[:5], *["..."] * (len(clean) > 5)])
            overflow = "had finite batches and a loss or gradients that overflowed"
            said.append(f"{len(clean)} {overflow} (steps {shown}): lower training.lr, or look for huge activations")
        return f"of the last {len(self.last)}, {'; '.join(said)}"

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.last = int(state["count"]), list(state["last"])


def identity(batch: ActivationBatch) -> dict[str, Any]:
    """What finds a batch again: its sequences, a hash of its token ids and positions, and its rows of NaN or Inf. Reads the
    device."""
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
