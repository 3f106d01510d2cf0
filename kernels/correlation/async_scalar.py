"""A size computed on a GPU, read by the host some steps later without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredSize:
    """Starts the copy of a 0-dim int64 GPU tensor into pinned memory; only `read` waits for it."""

    def __init__(self, size: Tensor) -> None:
        self._host = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
        self._host.copy_(size, non_blocking=True)
        # The copy runs on the current stream of the tensor's own device, which need not be the current device.
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(size.device))

    def arrived(self) -> bool:
        return self._event.query()

    def read(self) -> int:
        """The number; waits only if the copy has not ended yet."""
        self._event.synchronize()
        return int(self._host)
