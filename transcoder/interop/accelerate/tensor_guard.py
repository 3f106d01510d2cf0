"""Whether tensors that will be read later are still what they were."""

from __future__ import annotations

from torch import Tensor


class Unchanged:
    """Remembers tensors by name: where their contents lie, autograd's count of changes in place, and a first row and column.

    Changes by optimizers and by assignment are counted by PyTorch. What goes through `.data` is not: of it, whatever touches
    a whole row or column (a latent, a dimension, all of them) is found by the copies.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._before = {name: (tensor, *_state(tensor), _edges(tensor)) for name, tensor in tensors.items()}

    def holds(self) -> bool:
        return self.changed() is None

    def changed(self) -> str | None:
        """The name of the first tensor that is another now."""
        for name, (tensor, place, count, edges) in self._before.items():
            if _state(tensor) != (place, count):
                return name
            if not all(now.equal(then) for now, then in zip(_edges(tensor), edges, strict=True)):
                return name
        return None

    def check(self, what: str) -> None:
        """RuntimeError where something changed."""
        name = self.changed()
        if name is not None:
            raise RuntimeError(
                f"transcoder.accelerate: {what} is computed where it is first read, and {name} has changed since the encoder "
                f"ran (an optimizer step, a load, an assignment): call `.dense()` on {what} before that and keep the result"
            )


def _state(tensor: Tensor) -> tuple[int, int]:
    # Inference tensors count nothing.
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _edges(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach()
    if 0 in tensor.shape:
        return []
    return [tensor[0].clone(), tensor[:, 0].clone()] if tensor.dim() == 2 else [tensor.clone()]
