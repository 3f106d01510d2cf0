"""Every encode kernel in every shipped configuration, compiled for five chips without one: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from transcoder.kernels.encode import config

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may take."""
REGISTER_FILE = 1 << 16
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "mfma",
}


class Compiled(NamedTuple):
    registers: int
    """A lane."""
    spilled: int
    """Bytes of stack a lane, and on AMD spilled vector registers."""
    shared: int
    code: str


def compiled(kernel, types: dict[str, str], constants: dict, target: str, folder: Path, **options: int) -> Compiled:  # type: ignore[no-untyped-def]
    """Pointers, and integers typed "i32:16", are promised to be multiples of 16, as allocations and real sizes are."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: n for n, name in enumerate(kernel.arg_names)}
    own = {places[name]: value for name, value in constants.items() if name in places}
    signature = {name: "constexpr" if n in own else types[name].split(":")[0] for name, n in places.items()}
    aligned = [n for name, n in places.items() if n not in own and re.search(r"^\*|:16$", types[name])]
    source = ASTSource(
        kernel, signature, {(n,): v for n, v in own.items()}, {(n,): [["tt.divisibility", 16]] for n in aligned}
    )
    chip = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    made = triton.compile(source, target=chip, options=options)
    if chip.backend == "hip":
        text = made.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers: that costs no memory traffic and is not counted.
        found = {
            k: int(v)
            for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
        }
        return Compiled(
            found["vgpr_count"],
            found["vgpr_spill_count"] + found["private_segment_fixed_size"],
            made.metadata.shared,
            text,
        )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    words = [str(tool), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared, made.asm["ptx"])


POINTERS = {
    "*fp32": ("b", "values", "threshold"),
    "*i32": [
        "kept_key",
        "picked_count",
        "cuts",
        "failed",
        "failed_count",
        "fresh",
        "open_count",
        "histogram",
        "found_key",
    ],
    "*u8": ("kept_place",),
    "*i64": [
        "picked",
        "totals",
        "indices",
        "bounds",
        "open_cell",
        "state",
        "state_again",
        "found_position",
        "found_count",
    ],
}
SIZES = ("d_in", "d_sae", "x_row", "W_row")
COUNTS = ["rows_total", "tiles", "kept", "k", "stride", "entries", "cells", "wanted", "threshold_step"]


def types(inputs: str) -> dict[str, str]:
    return {
        "x": f"*{inputs}",
        "W": f"*{inputs}",
        **{name: kind for kind, names in POINTERS.items() for name in names},
        **dict.fromkeys(SIZES, "i32:16"),
        **dict.fromkeys(COUNTS, "i32"),
    }


def product_options(launch: config.ProductLaunch, precision: str) -> tuple[dict, dict[str, int]]:
    constants = {
        "BM": launch.rows,
        "BN": launch.latents,
        "BK": launch.depth,
        "GROUP": launch.group,
        "EVEN": True,
        "PRECISION": precision,
        "x_col": 1,
        "W_col": 1,
        "CHUNK": config.RESCAN_CHUNK,
    }
    return constants, {"num_warps": launch.warps, "num_stages": launch.stages}


INPUTS = {
    "bf16": ("half", "ieee"),
    "fp16": ("half", "ieee"),
    "fp32": ("float", "ieee"),
    "fp32 as tf32": ("tf32", "tf32"),
}
KERNELS = ["keep_tile_best", "rescan_rows", "rescan_cells", "above_threshold count", "above_threshold write"]
CASES = [("keep_tile_best", inputs) for inputs in INPUTS] + [(name, "bf16") for name in KERNELS[1:]]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_products(name: str, inputs: str, target: str, tmp_path: Path) -> None:
    from transcoder.kernels.encode import batch_kernel, kernel

    kind, precision = INPUTS[inputs]
    launch = config.product_launch(target, kind)
    name, _, mode = name.partition(" ")
    if mode:
        launch = config.threshold_launch(launch)
    constants, options = product_options(launch, precision)
    constants["WRITE"] = mode == "write"
    function = getattr(kernel, name, None) or getattr(batch_kernel, name)
    made = compiled(function, types(inputs.split()[0]), constants, target, tmp_path, **options)
    assert made.spilled == 0
    assert made.shared <= SHARED_LIMIT[target]
    if kind != "float":
        assert MATRIX_INSTRUCTION[target] in made.code
    if name == "keep_tile_best" and kind == "half" and target == "sm_90":
        # Two programs a multiprocessor: the epilogue of one behind the product of the other.
        assert 2 * made.registers * launch.warps * 32 <= REGISTER_FILE
        assert 2 * made.shared <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", TARGETS)
def test_selection_by_rows(target: str, tmp_path: Path) -> None:
    from transcoder.kernels.encode import kernel

    for chunk in (32, config.SELECT_CHUNK):
        made = compiled(
            kernel.select_rows,
            types("bf16"),
            {"CHUNK": chunk},
            target,
            tmp_path,
            num_warps=config.selection_warps(chunk),
        )
        assert made.spilled == 0
    made = compiled(
        kernel.order_rows, types("bf16"), {"CHUNK": config.ORDER_CHUNK}, target, tmp_path, num_warps=config.ORDER_WARPS
    )
    assert made.spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_selection_by_batch(target: str, tmp_path: Path) -> None:
    from transcoder.kernels.encode import batch_kernel, triton_backend

    levels = triton_backend.radix_levels(4096 * 18432)
    last = {"LAST": len(levels) - 1, "SHIFT": 0, "BY_POSITION": True, "BLOCK": config.COLLECT_BLOCK}
    common = {"BLOCK": config.RADIX_BLOCK, "BN": 128}
    cases: list[tuple[Callable, dict]] = [
        (batch_kernel.radix_level, {**levels[0], "AGAIN": False}),
        (batch_kernel.radix_level, {**levels[2], "AGAIN": True}),
        (batch_kernel.radix_level, {**levels[-1], "AGAIN": True}),
        (batch_kernel.list_open_cells, last),
        (batch_kernel.collect, last),
    ]
    for function, constants in cases:
        made = compiled(
            function, types("bf16"), {**common, **constants}, target, tmp_path, num_warps=config.RADIX_WARPS
        )
        assert made.spilled == 0
        assert made.shared <= SHARED_LIMIT[target]
