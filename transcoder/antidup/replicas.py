"""Data-parallel replicas: what each has counted is added up when somebody asks, and not in a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Replicas:
    """The processes of a group that train one transcoder on disjoint tokens (torchrun, DistributedDataParallel).

    Whoever is given one counts locally, and reports over all: its report is then a collective call, made by every process at
    the same step. Sequence ids must be distinct over the replicas; sketch signs and reservoir keys are kept apart by rank.

    Args:
        group: None is the default group, which must be initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Replicas: expected an initialised torch.distributed, got none: call torch.distributed.init_process_group "
                "first (torchrun sets its variables), or leave `replicas` out in a single process"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def states(self, state: Any, device: torch.device) -> Iterator[Any]:
        """Every replica's `state` (nested dicts, lists and tuples of tensors and plain values), in the order of their ranks,
        one at a time: tensors come to `device`, which the group's backend must handle. A collective call."""
        for rank in range(self.size):
            tensors: list[Tensor] = []
            box = [_skeleton(state, tensors) if rank == self.rank else None]
            source = rank if self._group is None else dist.get_global_rank(self._group, rank)
            dist.broadcast_object_list(box, src=source, group=self._group, device=device)
            if rank != self.rank:
                tensors = []
                _collect(box[0], tensors, device)
            sent = [part.to(device).contiguous() for part in tensors]
            for part in sent:
                if part.numel():
                    # Backends know no booleans; bytes are bytes.
                    plain = part.view(torch.uint8) if part.dtype == torch.bool else part
                    dist.broadcast(plain, src=source, group=self._group)
            yield _filled(box[0], sent)


class _Place(NamedTuple):
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _skeleton(tree: Any, tensors: list[Tensor]) -> Any:
    """`tree` with a place in the stead of each tensor, which goes to the list."""
    if isinstance(tree, Tensor):
        tensors.append(tree.detach())
        return _Place(len(tensors) - 1, tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {name: _skeleton(part, tensors) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_skeleton(part, tensors) for part in tree)
    return tree


def _collect(tree: Any, tensors: list[Tensor], device: torch.device) -> None:
    """An empty tensor for each place, in order."""
    if isinstance(tree, _Place):
        tensors.append(torch.empty(tree.shape, dtype=tree.dtype, device=device))
    elif isinstance(tree, dict):
        for part in tree.values():
            _collect(part, tensors, device)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            _collect(part, tensors, device)


def _filled(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, _Place):
        return tensors[tree.number]
    if isinstance(tree, dict):
        return {name: _filled(part, tensors) for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_filled(part, tensors) for part in tree)
    return tree
