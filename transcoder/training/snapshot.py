"""A copy of a state that training no longer touches, in host memory that is used again for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transcoder.training.state_tree import pack_state, unpack_state


class Snapshots:
    """Copies nested states (see `pack_state`) to the host.

    The memory of each tensor is kept from one copy to the next and grows with it: one copy of a run's state, pinned where the
    tensors lie on a GPU. A copy stands until the next `take`.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Host memory held."""
        return sum(memory.numel() for memory in self._memory.values())

    def take(self, tree: Any) -> tuple[Any, Callable[[], None]]:
        """(copy, wait): the copy's tensors may be read once `wait()` has returned, which another thread may call.

        Copies from a GPU are queued in its current stream, so that the copy is of this moment, and the caller waits for
        nothing.

        Raises:
            TypeError: a leaf that cannot be stored.

        Equivalent to: `copy.deepcopy(tree)`, tensors contiguous and on the CPU.
        """
        tensors, skeleton = pack_state(tree)
        copies = {name: self._copied(name, tensor) for name, tensor in tensors.items()}
        events = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))

        def wait() -> None:
            for event in events:
                event.synchronize()

        return unpack_state(copies, skeleton), wait

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.numel() < tensor.nbytes or memory.is_pinned() != tensor.is_cuda:
            memory = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu", pin_memory=tensor.is_cuda)
            self._memory[name] = memory
        copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor, non_blocking=tensor.is_cuda)
