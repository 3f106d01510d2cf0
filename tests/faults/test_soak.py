"""Twenty thousand steps: memory and open files stay where they were once the run is warm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_trainer import Planted, config
from transcoder.activations import ActivationBatch
from transcoder.training import train_transcoder

STEPS, WARM, LOOK_EVERY = 20_000, 5_000, 1_000
ROOM = 8 << 20
"""Bytes that resident memory may move by: an allocator keeps pages. A leak of 600 bytes a step would show."""


class Watched(Planted):
    """The same few batches over and over, and a look at this process now and then."""

    def __init__(self) -> None:
        super().__init__(rows=8)
        self.ready = [super(Watched, self).__next__() for _ in range(32)]
        self.index = 0
        self.looks: list[tuple[int, int]] = []
        """(resident bytes, open files)"""

    def __next__(self) -> ActivationBatch:
        if self.index % LOOK_EVERY == 0 and self.index >= WARM:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.looks.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        self.index += 1
        return self.ready[self.index % len(self.ready)]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_twenty_thousand_steps_take_no_more_memory_nor_files(tmp_path: Path) -> None:
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_transcoder(settings, tmp_path / "run", batches=batches).finished
    finally:
        torch.set_num_threads(threads)
    memory, files = zip(*batches.looks, strict=True)
    print(memory, files)
    assert len(memory) >= 15
    assert len(set(files)) == 1, files
    assert max(memory) - memory[0] < ROOM, memory
