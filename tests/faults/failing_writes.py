"""`python failing_writes.py FOLDER`, for test_every_write.py: one run after another, in each of which one more file operation
fails. Audit hooks cannot be taken off again, so that this is a process of its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from planted_run import Planted, config

from transcoder.training import train_transcoder
from transcoder.training.checkpoint import CheckpointStore

STEPS = 6
CONFIG = config(
    training__steps=STEPS,
    checkpoint__every=2,
    checkpoint__keep_last=2,
    antidup__samples__save_frequency=3,
    antidup__monitor__correlation_save_frequency=3,
    antidup__verify_at_step=6,
    logging__every=2,
)
CAUSES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


class Fault:
    """Below Python's files and os: counts what would change the folder from the first step on, and fails number `at`."""

    def __init__(self) -> None:
        self.folder, self.at, self.seen, self.armed, self.lasts = "", -1, 0, False, False
        self.what: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in ("open", "os.rename", "os.mkdir", "os.truncate"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if not (writes and path.startswith(self.folder)):
            return
        self.what.append(f"{event} {path[len(self.folder) :]}")
        self.seen += 1
        if self.seen == self.at or (self.lasts and self.seen > self.at > 0):
            cause = CAUSES[self.at % len(CAUSES)]
            raise OSError(cause, os.strerror(cause), path)


class Arming(Planted):  # type: ignore[misc]
    """Failures begin with the first batch that is trained on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault, self.rewound = fault, 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rewound += 1

    def __next__(self) -> Any:
        # Looked at once for the widths and once for the normalisation: the next batch is the first one of training.
        self.fault.armed = self.fault.armed or self.rewound == 2
        return super().__next__()


def run(folder: Path, fault: Fault, at: int, second: Path | None = None) -> dict[str, Any]:
    """One run whose operation number `at` fails; with a second location, every one from there on."""
    changed = {
        "checkpoint.second_location": None if second is None else str(second),
        "checkpoint.asynchronous": at % 2 == 1,
    }
    settings = CONFIG.replace(changed)
    fault.lasts = second is not None
    fault.folder, fault.at, fault.seen, fault.armed, fault.what = str(folder), at, 0, False, []
    try:
        result = train_transcoder(settings, folder, batches=Arming(fault))
        ended = "finished" if result.finished else "stopped"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    fault.armed = False
    newest = CheckpointStore(folder, settings.checkpoint).latest()
    weights = b"" if newest is None else b"".join(t.numpy().tobytes() for t in newest.model.values())
    return {
        "ended": ended,
        "what": fault.what[at - 1] if 0 < at <= len(fault.what) else "",
        "operations": fault.seen,
        "step": -1 if newest is None else newest.step,
        "weights": hash(weights),
        "leftovers": [p.name for p in folder.glob("checkpoints/.*") if p.name.startswith(".")],
    }


def main(folder: Path) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    fault = Fault()
    sys.addaudithook(fault)
    once = [run(folder / "whole", fault, 0)]
    lasting = []
    for at in range(1, once[0]["operations"] + 1):
        once.append(run(folder / "run", fault, at))
        shutil.rmtree(folder / "run")
        if at % 6 == 1:
            lasting.append(run(folder / "run", fault, at, folder / "second"))
            shutil.rmtree(folder / "run")
    return {"once": once, "lasting": lasting}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
