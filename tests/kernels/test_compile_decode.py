"""Every kernel of the segment sums, of decode and of correlation, in every shipped configuration, compiled for five chips."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

INDEX = ("ids", "ptr", "row_ptr", "cuts", "widths", "permutation", "order_rows", "out_rows")
SIZES = ("columns", "table_row", "W_row", "y_row", "out_row", "left_row", "slab_row", "first_column", "last_column")
COUNTS = ("segments", "entries", "piece_programs", "searches", "prefixes", "rows", "tiles")
NAMES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


def types(table: str, values: str) -> dict[str, str]:
    """Of every argument of every kernel here; gathered matrices are `table`, all else is `values`."""
    return {
        **dict.fromkeys(INDEX, "*i64"),
        **dict.fromkeys(SIZES, "i32:16"),
        **dict.fromkeys(COUNTS, "i32"),
        **dict.fromkeys(("table", "W", "bias"), f"*{table}"),
        **dict.fromkeys(("weights", "values", "left", "out", "y", "residual", "scales", "token_weights"), f"*{values}"),
        **dict.fromkeys(("running", "slab", "out_values", "errors", "partial", "pieces"), f"*{values}"),
    }


def kernels() -> dict[str, Callable]:
    from transcoder.kernels import segments_triton as s
    from transcoder.kernels.decode import kernel as d

    return {
        k.__name__: k
        for k in (
            *(s.weighted_rows, s.split_totals, s.row_products, s.segment_sums),
            *(d.prefix_cuts, d.walk_up, d.prefix_totals, d.walk_down, d.feature_major),
        )
    }


def configuration(name: str, table: torch.dtype, values: torch.dtype) -> tuple[dict, int]:
    """(constants, warps) as the launchers choose them for a [*, 2304] matrix."""
    from transcoder.kernels import gather_config
    from transcoder.kernels.decode import config
    from transcoder.kernels.segments_triton import ACCUMULATOR, SUM_ENTRIES

    choice = gather_config.gather(torch.empty(0, 2304, dtype=table))
    constants = {f"{m}_column": 1 for m in ("table", "W", "y", "left", "out")}
    constants |= {"BIAS": True, "WEIGHTED": True, "SLAB": True, "SPLIT": gather_config.SPLIT}
    constants |= {"ACC": ACCUMULATOR[values], "ROWS": choice.rows, "TILE": choice.columns}
    constants |= {"ENTRIES": SUM_ENTRIES, "TOKENS": config.TOTAL_TOKENS}
    constants |= {"SEARCHES": config.SEARCHES, "COPIES": config.COPIES}
    warps = {"prefix_totals": config.TOTAL_WARPS, "prefix_cuts": 4, "feature_major": 4}.get(name, choice.warps)
    return constants, warps


GATHERING = ["weighted_rows", "row_products", "walk_up", "walk_down"]
OTHERS = ["split_totals", "segment_sums", "prefix_cuts", "prefix_totals", "feature_major"]
CASES = [(name, "float32") for name in GATHERING + OTHERS] + [(name, "bfloat16") for name in GATHERING]


@pytest.mark.parametrize(("name", "table"), CASES)
def test_compiles_without_spills(name: str, table: str, target: str, compile_kernel: Callable) -> None:
    constants, warps = configuration(name, getattr(torch, table), torch.float32)
    kernel = kernels()[name]
    own = {k: v for k, v in constants.items() if k in kernel.arg_names}
    made = compile_kernel(kernel, types(NAMES[table], "fp32"), own, target, num_warps=warps)
    # Seen: 8 bytes on sm_100 and sm_120, where ptxas trades one register for more programs a multiprocessor.
    assert made.spilled <= (8 if target in ("sm_100", "sm_120") else 0)
    assert made.shared <= made.shared_limit
    # 12 programs a multiprocessor with 8 KiB in flight each cover the memory's latency several times.
    assert made.registers <= 168
    if target == "sm_90":
        print(f"{name} {table}: {made.registers} registers, {made.shared} bytes of shared memory")
        if name in GATHERING:
            # Rows of the matrix come 16 bytes a lane.
            assert len(re.findall(r"LDG\.E\.128", made.machine())) >= 8
    if name in (*GATHERING, "split_totals", "segment_sums"):
        assert not re.search(r"\b(atom|red)\.|atomic", made.code), "sums have one owner"


@pytest.mark.parametrize("name", GATHERING)
def test_float64_compiles(name: str, compile_kernel: Callable) -> None:
    constants, warps = configuration(name, torch.float64, torch.float64)
    kernel = kernels()[name]
    own = {k: v for k, v in constants.items() if k in kernel.arg_names}
    assert compile_kernel(kernel, types("fp64", "fp64"), own, "sm_90", num_warps=warps).spilled == 0


CORRELATION = {
    "moment_sums": {"WEIGHTED": True, "UNIT": True, "BY_ENTRY": False},
    "pair_sums": {"WEIGHTED": True},
    "sign_words": {},
    "sketch_sums": {"WEIGHTED": True, "BY_ENTRY": True},
    "constant_sketch": {"WEIGHTED": True},
    "similar_pairs": {},
}


@pytest.mark.parametrize("name", CORRELATION)
def test_correlation_compiles_without_spills(name: str, target: str, compile_kernel: Callable) -> None:
    from transcoder.kernels.correlation import config, counter_rng, kernel

    own_types = {
        **dict.fromkeys(("ids", "permutation", "order_rows", "latent_ptr", "row_ptr", "count", "found"), "*i64"),
        **dict.fromkeys(("token_weights", "total", "square", "unit", "product"), "*fp64"),
        **dict.fromkeys(("values", "sketch", "ones", "found_estimate"), "*fp32"),
        **dict.fromkeys(("joint", "words", "found_i", "found_j"), "*i32"),
        **dict.fromkeys(("entries", "rows", "latents", "tiles", "capacity", "words_a_token"), "i32"),
        **dict.fromkeys(("columns", "depth"), "i32:16"),
        "above": "fp32",
        "state": "i64",
    }
    constants = {
        "moment_sums": {"ENTRIES": config.LATENT_ENTRIES},
        "pair_sums": {"BITS": config.UNIT_BITS, "BLOCK": config.PAIR_BLOCK},
        "sign_words": {
            "GOLDEN": counter_rng.GOLDEN,
            "FIRST": counter_rng.FIRST,
            "SECOND": counter_rng.SECOND,
            "WORDS": config.WORDS,
        },
        "sketch_sums": {"ROWS": config.SKETCH_ROWS, "TILE": config.SKETCH_COLUMNS},
        "constant_sketch": {"TOKENS": config.ONES_TOKENS},
        "similar_pairs": {"TILE": config.TILE, "DEPTH": config.DEPTH, "GROUP": config.TILE_GROUP},
    }
    if name == "sign_words":
        own_types["count"] = "i32"
    if name == "similar_pairs":
        own_types["unit"] = "*fp32"
    warps = {
        "pair_sums": config.PAIR_WARPS,
        "sign_words": 4,
        "constant_sketch": config.ONES_WARPS,
        "sketch_sums": config.SKETCH_WARPS,
        "similar_pairs": config.TILE_WARPS,
    }
    made = compile_kernel(
        getattr(kernel, name),
        own_types,
        CORRELATION[name] | constants[name],
        target,
        num_warps=warps.get(name, 1),
    )
    assert made.spilled == 0
    assert made.shared <= made.shared_limit
    if target == "sm_90":
        print(f"{name}: {made.registers} registers, {made.shared} bytes of shared memory")
        machine = made.machine()
        if name == "pair_sums":
            # The additions return nothing and order nothing: reductions, no fences.
            assert len(re.findall(r"\bRED[A-Z]*\.E\.ADD\.F64", machine)) >= 1
            assert len(re.findall(r"\bRED[A-Z]*\.E\.ADD\b", machine)) >= 2
            assert not re.search(r"\b(MEMBAR|ATOMG)", machine)
        if name == "similar_pairs":
            assert re.search(r"\b(HGMMA|HMMA)\S*TF32", machine)
