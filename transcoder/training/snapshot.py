"""A copy of a state that training no longer touches, taken into memory that is used again for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Snapshots:
    """Copies nested states (dicts, lists, tuples; tensors at the leaves) to the host.

    Room for each tensor is kept from one copy to the next and grows with it: one copy of a run's state in host memory, pinned
    where the tensors lie on a GPU. A copy stands until the next `take`.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Host memory held."""
        return sum(room.numel() for room in self._room.values())

    def take(self, tree: Any) -> tuple[Any, Callable[[], None]]:
        """(copy, wait): the copy's tensors may be read once `wait()` has returned.

        Copies from a GPU are queued behind what it was told to do before and ahead of what it is told next, so that the copy
        is of this moment, and the caller waits for nothing. `wait` may be called in another thread.

        Equivalent to: `copy.deepcopy(tree)`, tensors contiguous and on the CPU.
        """
        devices: set[torch.device] = set()
        copy = self._copied(tree, "", devices)
        events = []
        for device in devices:
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))

        def wait() -> None:
            for event in events:
                event.synchronize()

        return copy, wait

    def _copied(self, node: Any, place: str, devices: set[torch.device]) -> Any:
        if isinstance(node, Tensor):
            if node.is_cuda:
                devices.add(node.device)
            return self._tensor(node.detach(), place)
        if isinstance(node, dict):
            return {key: self._copied(value, f"{place}/{key!r}", devices) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            values = [self._copied(value, f"{place}/{i}", devices) for i, value in enumerate(node)]
            return tuple(values) if isinstance(node, tuple) else values
        return node

    def _tensor(self, tensor: Tensor, place: str) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size == 0 or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
            # What cannot be stored is refused by name where it is packed.
            return tensor.cpu().clone()
        room = self._room.get(place)
        if room is None or room.numel() < size or room.is_pinned() != tensor.is_cuda:
            room = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=tensor.is_cuda)
            self._room[place] = room
        copy = room[:size].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor, non_blocking=True)
