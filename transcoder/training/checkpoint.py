"""Checkpoints that are whole or absent: `checkpoints/step_00000500/`.

Each holds transcoder.safetensors (the weights), trainer.safetensors and state.json (the rest of the run's state).

Where a write fails, in this order: checkpoints that the retention lets go are deleted and the write is tried again, and again
after each pause of `BACK_OFF`; then `checkpoint.second_location` takes it, if set; then it takes the space of the reserve, then
the essential state alone does; then `save` raises `CheckpointError`. The newest good checkpoint stays good in any case. The
reserve is for the last state: an earlier one takes it only where the retention then frees enough to hold it again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.checkpoint_folder import (
    FORMAT,
    MODEL_FILE,
    STATE_FILE,
    TRAINER_FILE,
    VERSION,
    CheckpointError,
    candidates,
    content_digest,
    newest,
    read_state,
    verify_checkpoint,
)
from transcoder.config import CheckpointSection
from transcoder.files import (
    DELETING,
    REPLACED,
    WRITING,
    local_path,
    remove_folder,
    replace_atomically,
    replacing_folder,
)
from transcoder.tensor_file import read_tensors, tensor_bytes, write_tensors
from transcoder.training.disk_space import (
    CHECKPOINT_SLACK,
    Reserve,
    checkpoint_bytes,
    free_bytes,
    human_bytes,
    refuse_what_cannot_fit,
    room_for,
)
from transcoder.training.state_tree import pack_state, unpack_state

BACK_OFF = (1.0, 4.0)
"""Seconds before each further try of a write that failed."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint in memory, verified. All tensors are on the CPU."""

    step: int
    model: dict[str, Tensor]
    trainer_tree: Any
    """What `save` was given: nested, tensors at the leaves."""
    summary: dict[str, Any]
    metric: float | None
    path: Path


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        run_dir: the run's folder. One process may write to it at a time: hold a `FolderLock` on it.
        section: retention and second location. Kept are the last `keep_last`, the one of the lowest metric (`keep_best`),
            those whose step is a multiple of `keep_every`. The second location keeps the newest only.
    """

    def __init__(self, run_dir: Path | str, section: CheckpointSection | None = None) -> None:
        self.run_dir = local_path(run_dir)
        self.section = section or CheckpointSection()
        self.folder = self.run_dir / "checkpoints"
        self.reserve = Reserve(self.run_dir, 0)
        self.degraded = False
        """The last `save` could keep the essential state only."""
        self._run_id: str | None = None

    def hold_reserve(self, size: int) -> None:
        """Hold `size` bytes for the last state; CheckpointError where they are not to be had. They are given up when nothing
        else is left, and held again when there is room."""
        self.reserve = Reserve(self.run_dir, size)
        try:
            self.reserve.make()
        except OSError as error:
            raise CheckpointError(
                f"{self.reserve.path}: {human_bytes(size)} could not be held for the last state: {error}; free space, or set "
                "checkpoint.reserve to false"
            ) from error

    def save(
        self,
        step: int,
        model: dict[str, Tensor],
        trainer_tree: Any,
        summary: dict[str, Any],
        metric: float | None = None,
        essential: Callable[[Any], Any] | None = None,
        last: bool = False,
    ) -> Path:
        """Write one checkpoint durably and apply the retention. Returns its folder.

        Args:
            step: optimizer steps done; names the folder.
            model: the transcoder's tensors by name, any device and layout.
            trainer_tree: everything else that a bitwise resume needs, see `pack_state`.
            summary: JSON values for people and reports; no tensors.
            metric: lower is better (held-out FVU); None or NaN never counts as best.
            essential: gives what of `trainer_tree` is kept where not all of it fits; None: all of it or nothing.
            last: no later state will come: the reserve is for this one.

        Raises: CheckpointError, older ones untouched. TypeError for a leaf that cannot be stored, before anything is written.
        """
        summary_tensors, packed_summary = pack_state(summary)
        if summary_tensors:
            names = ", ".join(summary_tensors)
            raise TypeError(f"summary: expected JSON values, got tensors at {names}; read them with .item()")
        metric = None if metric is None or math.isnan(metric) else float(metric)

        def packed(tree: Any) -> _PackedState:
            return _PackedState(step, metric, packed_summary, model, tree)

        whole, second = packed(trainer_tree), self._second_folder(create=True)
        failures: list[str] = []

        def written(place: Path, state: _PackedState) -> Path | None:
            try:
                if failures:
                    self._make_room(step, metric)
                path = state.write(place)
            except OSError as error:
                failures.append(f"{place}: {error}")
                return None
            self._retain(place, step, metric)
            self._hold_reserve_again()
            return path

        self.degraded = False
        for pause in (0.0, 0.0, *BACK_OFF):
            time.sleep(pause)
            if (path := written(self.folder, whole)) is not None:
                return path
        if second is not None and (path := written(second, whole)) is not None:
            _warn(f"checkpoint of step {step} went to the second location {path}: {failures[-1]}")
            return path
        for state in (whole, *([packed(essential(trainer_tree))] if essential is not None else [])):
            if not (last or self._fits_in_the_end(step, metric, state.bytes)):
                continue
            self.reserve.release()
            if (path := written(self.folder, state)) is None:
                continue
            self.degraded = state is not whole
            kept = (
                "only the essential state could be kept"
                if self.degraded
                else "the state took the space held for the last"
            )
            so = "; a run resumed from it goes on, but not to the same bits" if self.degraded else ""
            _warn(f"of step {step} {kept} ({path}): {failures[-1]}{so}")
            return path
        self._hold_reserve_again()
        causes = "; ".join(dict.fromkeys(failures))
        raise CheckpointError(
            f"checkpoint of step {step} ({human_bytes(whole.bytes)}) could not be written: {causes}. Older "
            "ones are untouched. Free space, or set checkpoint.second_location to a folder on another disk"
        )

    def latest(self) -> Loaded | None:
        """The newest checkpoint that verifies, in the run's folder or the second location; None if none is there. Damaged ones
        are passed over with a warning.

        Raises: CheckpointError where there are checkpoints but not one verifies, or a newer version wrote one.
        """
        places = [self.folder, self._second_folder(create=False)]
        return newest(candidates(p for p in places if p is not None), load_checkpoint)

    def check_space(self, each: int, steps: int, others: int = 0) -> None:
        """CheckpointError, before training, for what cannot fit on the disk or under a quota: `each` bytes a checkpoint of
        `steps` steps, and `others` for logs, samples and reserve. It names bytes needed, bytes free, settings that would fit.
        """
        if self._second is not None:
            self._check_second_location(self._second)
        present = sum(_size(path) for _, path in candidates([self.folder])) + self.reserve.held
        free = free_bytes(self.folder)
        wanted = checkpoint_bytes(self.section, each, steps) + others - present
        if 0 < wanted <= free and (room := room_for(self.run_dir, wanted)) < wanted:
            free = room
        refuse_what_cannot_fit(self.folder, self.section, each, steps, others, free + present)

    @property
    def _second(self) -> Path | None:
        second = self.section.second_location
        return None if second is None else local_path(second, "checkpoint.second_location")

    def _check_second_location(self, place: Path) -> None:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint.second_location: cannot be made: {error}") from error
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(f"checkpoint.second_location: {place} is not writable")
        # The file with the run's id is made while there is room for it.
        self._second_folder(create=True)

    def _second_folder(self, create: bool) -> Path | None:
        """The run's own folder in the second location, named by an id that is deleted with the run folder: another run of this
        name must never resume from it."""
        if self._second is None:
            return None
        id_file = self.run_dir / ".run_id"
        written = None
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = id_file.read_text(encoding="utf-8").strip()
            written = text if text.isalnum() else None
        # Known from here on: a disk that stops to answer must not give the run a new name at each save.
        self._run_id = self._run_id or written
        if self._run_id is None:
            if not create:
                return None
            self._run_id = secrets.token_hex(8)
        if create and written is None:
            with contextlib.suppress(OSError):
                replace_atomically(id_file, self._run_id)
        return self._second / f"{self.run_dir.resolve().name}-{self._run_id}"

    def _hold_reserve_again(self) -> None:
        # Where there is no room for it, the next save tries again.
        with contextlib.suppress(OSError):
            self.reserve.make()

    def _fits_in_the_end(self, step: int, metric: float | None, size: int) -> bool:
        """Whether a checkpoint of `size` bytes and the reserve both fit once the retention has done its work."""
        try:
            freed = sum(_size(folder) for folder in _superfluous(self.section, self.folder, step, metric))
            return free_bytes(self.folder) + freed >= size
        except OSError:
            # A disk that does not even answer takes no checkpoint.
            return False

    def _make_room(self, step: int, metric: float | None) -> None:
        """Delete now what the retention would delete after this save; never the newest that verifies."""
        # A folder that cannot be listed (a network disk that is gone) must not keep the second location from being tried.
        with contextlib.suppress(OSError):
            good = next((folder for _, folder in candidates([self.folder]) if _verifies(folder)), None)
            superfluous = _superfluous(self.section, self.folder, step, metric)
            _delete(folder for folder in superfluous if folder != good)

    def _retain(self, place: Path, step: int, metric: float | None) -> None:
        section = self.section if place == self.folder else CheckpointSection(keep_last=1, keep_best=False)
        try:
            _delete(_superfluous(section, place, step, metric))
        except OSError as error:
            _warn(f"{place}: old checkpoints could not be looked for: {error}")


def load_checkpoint(path: Path | str) -> Loaded:
    """Read and verify one checkpoint folder. Errors as `verify_checkpoint`."""
    path = Path(path)
    state = read_state(path)
    tensors = {name: read_tensors(path / name, expected) for name, expected in state["files"].items()}
    try:
        return Loaded(
            step=state["step"],
            model=tensors[MODEL_FILE],
            trainer_tree=unpack_state(tensors[TRAINER_FILE], state["trainer"]),
            summary=unpack_state({}, state["summary"]),
            metric=state["metric"],
            path=path,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {STATE_FILE} does not hold a run's state: {error!r}") from error


class _PackedState:
    """One state as tensors and JSON, to be written to any place; `bytes` is what it takes there at most."""

    def __init__(self, step: int, metric: float | None, summary: Any, model: dict[str, Tensor], tree: Any) -> None:
        tensors, skeleton = pack_state(tree)
        self._name, self._files = _name(step), {MODEL_FILE: model, TRAINER_FILE: tensors}
        state = {"step": step, "metric": metric, "summary": summary, "trainer": skeleton, "torch": torch.__version__}
        self._json = {"format": FORMAT, "version": VERSION, **state}
        self.bytes = sum(map(tensor_bytes, self._files.values())) + len(json.dumps(self._json)) + CHECKPOINT_SLACK

    def write(self, place: Path) -> Path:
        """Raises: OSError; nothing is left in `place`."""
        place.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        if (free := free_bytes(place)) < self.bytes:
            # The same error as a failed write, without filling the disk to the brim first.
            raise OSError(errno.ENOSPC, f"needs {human_bytes(self.bytes)}, free are {human_bytes(free)}")
        # While one of the same step is replaced, `candidates` finds that by its `.replaced_` name.
        with replacing_folder(place / self._name) as folder:
            written = {}
            for name, tensors in self._files.items():
                with open(folder / name, "wb") as file:
                    written[name] = write_tensors(file, tensors)._asdict()
            body = {**self._json, "files": written}
            with open(folder / STATE_FILE, "wb") as file:
                file.write(json.dumps({**body, "sha256": content_digest(body)}, indent=1).encode())
        return place / self._name


def _superfluous(section: CheckpointSection, place: Path, step: int, metric: float | None) -> list[Path]:
    """What the retention lets go in `place` once the checkpoint of `step` is there, which is always kept.

    A later one is of a run that went back behind it because it is damaged: it does not count, unless it verifies after all.
    """
    saved, found = place / _name(step), candidates([place])
    counted = {saved: (step, metric)}
    for at, folder in found:
        if folder != saved and (at <= step or _verifies(folder)):
            counted[folder] = (at, _metric(folder))
    newest_first = sorted(counted, key=lambda folder: -counted[folder][0])
    keep = {saved, *newest_first[: section.keep_last]}
    scored = [(value, -at, folder) for folder, (at, value) in counted.items() if value is not None]
    if section.keep_best and scored:
        keep.add(min(scored)[2])
    if section.keep_every is not None:
        keep.update(folder for folder, (at, _) in counted.items() if at % section.keep_every == 0)
    return [folder for _, folder in found if folder not in keep]


def _verifies(folder: Path) -> bool:
    with contextlib.suppress(ValueError, OSError, CheckpointError):
        verify_checkpoint(folder)
        return True
    return False


def _metric(folder: Path) -> float | None:
    with contextlib.suppress(ValueError, OSError, CheckpointError, TypeError):
        return float(read_state(folder)["metric"])
    return None


def _delete(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            remove_folder(folder)
        except OSError as error:
            _warn(f"old checkpoint {folder} could not be deleted: {error}")


def _remove_leftovers(place: Path) -> None:
    """What a killed process left: half-written, half-deleted, and replaced ones whose successor is there."""
    for folder in place.iterdir():
        successor = folder.name.removeprefix(REPLACED)
        replaced = successor != folder.name and (place / successor).exists()
        if replaced or folder.name.startswith((WRITING, DELETING)):
            shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
