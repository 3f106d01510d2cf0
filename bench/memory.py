"""Memory of a variant: its peak during a run, and the bytes held between runs."""

from __future__ import annotations

import ctypes
import gc
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that `call` holds at once beyond what the process held before: CUDA's own count, or the resident set. None
    where the system cannot say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    try:
        # Memory that the allocator keeps after a free would be reused without being counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def held_bytes(roots: Iterable[Any], apart_from: Iterable[Any] = ()) -> int:
    """Bytes of all tensors that can be reached from `roots` (functions through what they close over, objects through their
    fields), each storage once, without those that can be reached from `apart_from`."""
    theirs = _storages(apart_from)
    return sum(size for place, size in _storages(roots).items() if place not in theirs)


_OUTSIDE = (type, types.ModuleType, types.FrameType, types.CodeType, str, bytes, int, float, type(None))


def _storages(roots: Iterable[Any]) -> dict[int, int]:
    found: dict[int, int] = {}
    waiting = list(roots)
    seen: dict[int, Any] = {}
    """{id: storage} of all reachable tensors. Storages are kept alive so that ids stay unique."""
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _OUTSIDE):
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            if one.is_sparse:
                waiting += [one._indices(), one._values()]
            elif type(one) in (Tensor, torch.nn.Parameter):
                # The others, fake ones of a compiler, stand for no memory.
                storage = one.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
                waiting.append(one.grad if one.is_leaf else None)
        elif isinstance(one, types.FunctionType):
            # The globals belong to the program, not to the variant.
            waiting += [cell.cell_contents for cell in one.__closure__ or () if cell != types.CellType()]
            waiting += [one.__defaults__, one.__kwdefaults__, vars(one)]
        else:
            waiting += gc.get_referents(one)
    return found
