"""A nested state (leaves are tensors or JSON values) as flat tensors plus JSON, and back, bit for bit; and copies of states
that training no longer touches, in host memory that is used again for the next one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, strided

_TENSOR, _ITEMS, _TUPLE, _FLOAT = "$tensor", "$items", "$tuple", "$float"
"""A marked node is a JSON object of one key that begins with "$"; dicts that would look like one are marked too."""


def pack_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into tensors (by unique name) and a JSON-ready skeleton that names them.

    Args:
        tree: dicts (keys str or int), lists, tuples; leaves are dense tensors, None, bool, int, str, and float (NaN and Inf
            too).

    Returns:
        (tensors, skeleton). Tensors are detached, not copied: write them before the state moves on.

    Raises:
        TypeError: a leaf or key of another kind; the message gives its place in the tree.

    Equivalent to: `unpack_state(*pack_state(tree)) == tree`, tensors bitwise, devices aside.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "", tensors)


def unpack_state(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    """The tree that `pack_state` took apart.

    Raises:
        ValueError: the skeleton names a tensor that is not there, or is not a skeleton.
    """
    if isinstance(skeleton, list):
        return [unpack_state(tensors, value) for value in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    mark: Any
    value: Any
    mark, value = next(iter(skeleton.items())) if len(skeleton) == 1 else (None, None)
    if mark == _TENSOR:
        if value not in tensors:
            raise ValueError(f"state: expected a tensor named {value!r}, it is missing from the file")
        return tensors[value]
    if mark == _TUPLE:
        return tuple(unpack_state(tensors, item) for item in value)
    if mark == _ITEMS:
        return {key: unpack_state(tensors, item) for key, item in value}
    if mark == _FLOAT:
        return float(value)
    return {key: unpack_state(tensors, value) for key, value in skeleton.items()}


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


def _pack(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    where = f"state {place or 'root'}"
    if isinstance(node, Tensor):
        if node.layout != strided or node.is_quantized or node.device.type == "meta":
            raise TypeError(f"{where}: expected a dense tensor, got {node.layout} on {node.device}")
        name = place or "tensor"
        while name in tensors:
            name += "'"
        tensors[name] = node.detach()
        return {_TENSOR: name}
    if isinstance(node, dict):
        for key in node:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: expected keys of type str or int, got {key!r} of type {type(key).__name__}")
        packed = {key: _pack(value, f"{place}/{key}" if place else str(key), tensors) for key, value in node.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in packed):
            return packed
        return {_ITEMS: [[key, value] for key, value in packed.items()]}
    if isinstance(node, (list, tuple)):
        values = [_pack(value, f"{place}/{i}" if place else str(i), tensors) for i, value in enumerate(node)]
        return {_TUPLE: values} if isinstance(node, tuple) else values
    if isinstance(node, float) and not math.isfinite(node):
        return {_FLOAT: repr(float(node))}
    # Exact types, so that NumPy scalars do not pass and come back changed.
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise TypeError(
        f"{where}: expected a tensor, None, bool, int, float or str, got {type(node).__name__}; "
        "convert it (for a NumPy scalar: .item())"
    )
