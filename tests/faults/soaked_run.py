"""A long run of short steps, for test_soak.py: `python soaked_run.py FOLDER` says what it held on the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from planted_run import Planted, config

from transcoder.training import train_transcoder

STEPS, WARM, LOOK_EVERY = 20_000, 5_000, 1_000


class Watched(Planted):  # type: ignore[misc]
    """The same few batches over and over, and a look at this process now and then."""

    def __init__(self) -> None:
        super().__init__(rows=8)
        self.ready = [super(Watched, self).__next__() for _ in range(32)]
        self.index = 0
        self.looks: list[tuple[int, int]] = []
        """(resident bytes, open files)"""

    def __next__(self) -> Any:
        if self.index % LOOK_EVERY == 0 and self.index >= WARM:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.looks.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        self.index += 1
        return self.ready[self.index % len(self.ready)]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}


def main(folder: Path) -> list[tuple[int, int]]:
    settings = config(
        training__steps=STEPS,
        training__batch_size=8,
        training__evaluation_tokens=32,
        training__dead_refresh_steps=100,
        transcoder__d_sae=32,
        transcoder__k=2,
        transcoder__widths=[8, 32],
        transcoder__normalization_tokens=64,
        antidup__monitor__correlation_save_frequency=1000,
        antidup__monitor__update_every=4,
        antidup__monitor__block_tokens=20_000,
        antidup__samples__collect_every=100,
        antidup__samples__save_frequency=1000,
        antidup__verify_at_step=1000,
        checkpoint__every=500,
        logging__every=100,
    )
    batches = Watched()
    torch.set_num_threads(1)
    assert train_transcoder(settings, folder / "run", batches=batches).finished
    return batches.looks


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
