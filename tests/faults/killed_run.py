"""A run that is killed again and again: `python killed_run.py FOLDER KILLS SEED`, for test_sigkill.py.

This process imports torch once and forks; each child is a process of its own that trains in FOLDER/killed until SIGKILL meets
it. It has one thread and has never run a backward pass when it forks, so that a child starts from a clean state.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from planted_run import Planted, config

from transcoder.training import train_transcoder
from transcoder.training.checkpoint import CheckpointStore

STEPS = 270
BATCHES = 18
"""A child is killed within this many batches of its start; the first few are looked at before the first step."""
MOMENT = 0.012
"""And up to so many seconds after a batch was taken: a step and the writing of its files take about as long."""

CONFIG = config(
    training__steps=STEPS,
    training__evaluation_every=45,
    checkpoint__every=3,
    checkpoint__keep_last=2,
    antidup__samples__save_frequency=100,
    antidup__monitor__correlation_save_frequency=30,
    antidup__monitor__block_tokens=20_000,
    antidup__verify_at_step=100,
    logging__every=2,
)


class Told(Planted):  # type: ignore[misc]
    """Says at each batch that it was taken, and goes no further than it may."""

    def __init__(self, pipe: int, batches: int | None) -> None:
        super().__init__()
        self.pipe, self.left = pipe, batches

    def __next__(self) -> Any:
        if self.left is not None:
            if self.left == 0:
                # On a busy machine the kill may come late: not at a later step, or the run would end before fifty of them.
                time.sleep(3600)
            self.left -= 1
        os.write(self.pipe, b".")
        return super().__next__()


def start(run_dir: Path, batches: int | None = None) -> tuple[int, int]:
    """Fork a child that trains to the end, or for so many batches, resuming what is there. Returns its process id and what
    tells of its batches."""
    heard, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return child, heard
    code = 1
    try:
        logging.disable()
        warnings.simplefilter("ignore")
        train_transcoder(CONFIG, run_dir, resume=True, batches=Told(told, batches))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def newest(run_dir: Path) -> tuple[int, bool]:
    """(step of the newest checkpoint that verifies, whether the newest folder was unusable); -1 where there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = CheckpointStore(run_dir, CONFIG.checkpoint).latest()
    return -1 if loaded is None else loaded.step, bool(caught)


def ending(run_dir: Path) -> int:
    """The status of a child that nobody kills."""
    child, heard = start(run_dir)
    while os.read(heard, 4096):
        pass
    os.close(heard)
    return os.waitpid(child, 0)[1]


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    assert ending(folder / "whole") == 0
    killed, steps, in_a_write, ended = folder / "killed", [], 0, False
    while len(steps) < kills and not ended:
        taken = draw.randrange(BATCHES)
        child, heard = start(killed, taken + 1)
        for _ in range(taken):
            os.read(heard, 1)
        time.sleep(draw.uniform(0, MOMENT))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(heard)
        ended = not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
        if (killed / "checkpoints").is_dir():
            in_a_write += any(p.name.startswith(".") for p in (killed / "checkpoints").iterdir())
        step, unusable = newest(killed)
        assert not unusable, "a kill never leaves a checkpoint that does not verify under its final name"
        steps.append(step)
    last = ending(killed)
    return {"steps": steps, "in_a_write": in_a_write, "ended_early": ended, "last_status": last}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
