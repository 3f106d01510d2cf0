"""Races between the warps of one program over global memory: what `tl.debug_barrier` is for, and what no other tool here sees.

ttsem replays the final TTGIR of a launch with its layouts, to find races over shared memory. Here the same replay notes which
warp loads and stores which words of global memory between two barriers (`tl.debug_barrier`, and every operation that goes
through shared memory). Two warps, one word, a store among them: a race. Written for ttsem 0.1.0, whose inner parts it uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ttsem import harness, mlir, races, validate
from ttsem.interp import grid_order
from ttsem.memory import Memory
from ttsem.values import to_numpy

KINDS = {"tt.load": "load", "tt.store": "store", "tt.atomic_rmw": "atomic"}
WORD = 4


class WarpRaces(races.RaceInterp):  # type: ignore[misc]
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step_budget = 10**9
        self.found: dict[tuple[str, str], int] = {}
        """(places of the two operations) -> words."""
        self.begin()

    def begin(self) -> None:
        """A new program."""
        self.epoch, self.by_epoch, self.seen = {0: 0}, {}, set()
        self.accesses, self.pending = [], []
        self.since, self.open = -1, []

    def eval_op(self, op: Any) -> None:
        kind = KINDS.get(op.name)
        args = [self.value(name) for name in op.operands] if kind else []
        super().eval_op(op)
        if kind is None:
            return
        self.instance += 1
        pointers, layout = np.asarray(args[0], np.int64), op.operand_types[0]
        mask_at = 1 if kind == "load" else 2
        mask = np.broadcast_to(np.asarray(args[mask_at], bool), pointers.shape) if len(args) > mask_at else None
        value = op.result_types[0] if kind != "store" else op.operand_types[1]
        for warp in range(self.group_warps[self.group]):
            if kind != "load" and not self.writes(layout if pointers.ndim else None, warp):
                continue
            mine: Any = ()
            if pointers.ndim:
                mine = tuple(self.warp_coords(layout, warp))
            taken = pointers[mine].reshape(-1)
            if mask is not None:
                taken = taken[mask[mine].reshape(-1)]
            self.note(warp, kind, taken, np.dtype(to_numpy(value)).itemsize, op)

    def writes(self, layout: Any, warp: int) -> bool:
        """Whether this warp is the one that writes: of copies of an element Triton lets the first do it."""
        layout = None if layout is None else self.layout_of(layout)
        if layout is None or not layout.has_in_dim("warp"):
            return warp == 0
        bases = layout.bases.get("warp", [])
        copies = any(not any(basis) and (warp >> bit) & 1 for bit, basis in enumerate(bases))
        return warp < layout.get_in_dim_size("warp") and not copies

    def note(self, warp: int, kind: str, at: Any, size: int, op: Any) -> None:
        if self.epoch[self.group] != self.since:
            self.since, self.open = self.epoch[self.group], []
        if not at.size:
            return
        words = np.unique((at[:, None] + np.arange(0, size, WORD)[None, :]).reshape(-1) // WORD)
        where = place(op)
        for other, before, theirs, instance, there in self.open:
            if other == warp or "store" not in (kind, before) or instance == self.instance:
                continue
            both = np.intersect1d(words, theirs, assume_unique=True)
            # A warp that took part in the other operation with its own copy of the words does not wait.
            own = [w for n, _, w, i, _ in self.open if i == instance and n == warp]
            if both.size and not (own and np.isin(both, np.concatenate(own)).all()):
                self.found[there, where] = self.found.get((there, where), 0) + int(both.size)
        self.open.append((warp, kind, words, self.instance, where))


def place(op: Any) -> str:
    """The source line of an operation."""
    found = re.search(r'"([^"]+\.py)":(\d+):\d+', op.text or "")
    if found is None:
        return str(op.name)
    return Path(found[1]).read_text(encoding="utf-8").splitlines()[int(found[2]) - 1].strip()


def replay(record: Any, target: Any) -> dict[tuple[str, str], int]:
    """The races of one launch."""
    stages = validate.split_dump(harness.dump_for_launch(record, target))
    llvm = next((n for n, (_, text) in enumerate(stages) if "llvm.func" in text), len(stages))
    ir = mlir.to_generic(stages[llvm - 1][1], None)
    module = mlir.parse(ir)
    name = record.fn_name if record.fn_name in module.funcs else harness._entry_candidates(module, record.fn_name)[0]
    block = module.funcs[name].regions[0].blocks[0]
    names = harness._runtime_param_names(record)
    memory = Memory()
    for base in {record.bases.get(n, record.ptrs[n]): n for n in names if n in record.ptrs}.items():
        memory.register(base[0], np.array(record.pre[base[1]], copy=True))
    values = list(harness._arg_values(record, names, block, emulated=False))
    values += [np.array(0, np.int64)] * (len(block.args) - len(values))  # scratch of the launcher
    interpreter = WarpRaces(module, memory, harness._grid3(record.grid), *races.launch_config(ir))
    for program in grid_order(interpreter.num_programs):
        interpreter.begin()
        interpreter.run(name, values, program)
    return interpreter.found


@contextmanager
def watching(names: set[str]) -> Iterator[dict[str, dict[tuple[str, str], int]]]:
    """Inside a session: kernel -> its races, of every launch of the kernels named."""
    from triton.runtime.jit import JITFunction

    found: dict[str, dict[tuple[str, str], int]] = {}
    launch, target = JITFunction.run, harness.target_for("cpu", 90)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = self.fn.__name__
        if not warmup and name in names:
            record = harness.record_launch(self, args, options, grid, lambda *_, **__: None, "", 0).record
            found.setdefault(name, {}).update(replay(record, target))
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = launch
