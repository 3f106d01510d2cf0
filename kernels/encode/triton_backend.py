"""Backend `triton` of the encode ops: launches of kernel.py and batch_kernel.py; gradients are sums over segments.

Nothing here waits for the device but threshold_encode, whose size depends on the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.encode import config
from transcoder.kernels.encode.torch_backend import Selection
from transcoder.kernels.sparse_codes import SparseCodes
from transcoder.kernels.triton_support import cdiv, check_device, interpreted, on_device, usable

if usable():
    from transcoder.kernels.encode import batch_kernel, kernel
    from transcoder.kernels.segments_triton import segment_sum, weighted_row_sum

__all__ = ["counters", "gradients", "select_batch_topk", "select_threshold", "select_topk", "usable"]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x and W; `auto` gives others to the next backend."""
Adapt = Callable[[config.ProductLaunch], config.ProductLaunch]


class Counters(NamedTuple):
    """Counts of certified and of recomputed rows or cells on one device since the last reset."""

    certified: int
    rescanned: int


_totals: dict[torch.device, Tensor] = {}


def counters(device: torch.device | str, reset: bool = False) -> Counters:
    """Tokens (topk_encode) and cells of token and tile (batch_topk_encode) that were certified or computed again.

    Reads the device: for diagnosis, not for a training step.
    """
    totals = _totals_on(torch.empty(0, device=device).device)
    found = Counters(*totals.tolist())
    if reset:
        totals.zero_()
    return found


def select_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    product = Product(x, W, b, "topk_encode")
    rows, d_sae = x.shape[0], W.shape[0]
    values = torch.empty(rows * k, dtype=torch.float32, device=x.device)
    indices = torch.empty(rows * k, dtype=torch.int64, device=x.device)
    row_ptr = torch.arange(0, rows * k + 1, k, device=x.device)
    kept = config.kept_entries(k, d_sae, product.launch.latents)
    step = max(1, config.SCRATCH_BYTES // (product.tiles * kept * config.KEPT_BYTES))
    step = max(product.launch.rows, step // product.launch.rows * product.launch.rows)
    stride = k + product.launch.latents
    chunk = min(config.SELECT_CHUNK, max(32, _power_of_two(product.tiles * kept)))
    with product.on_device():
        for start in range(0, rows, step):
            part = product.narrow(start, min(step, rows - start))
            number = part.rows
            kept_key, kept_place = part.keep_tile_best(kept)
            picked = torch.empty(number, stride, dtype=torch.int64, device=x.device)
            state = torch.zeros(number * 4 + 1, dtype=torch.int32, device=x.device)
            failed_count, picked_count, failed, cuts = state.split([1, number, number, 2 * number])
            kernel.select_rows[(number,)](
                kept_key, kept_place, picked, picked_count, cuts, failed, failed_count, part.tiles, kept, d_sae, k, stride,
                CHUNK=chunk, num_warps=config.selection_warps(chunk),
            )  # fmt: skip
            kernel.rescan_rows[(min(number, part.programs),)](
                *part.operands, kept_key, kept_place, picked, picked_count, cuts, failed, failed_count, _totals_on(x.device),
                number, part.d_in, d_sae, part.tiles, kept, k, stride, *part.strides, **part.tile_options,
                DESCRIBED=part.described, CHUNK=config.RESCAN_CHUNK,
            )  # fmt: skip
            kernel.order_rows[(number,)](
                picked, picked_count, values[start * k :], indices[start * k :], k, stride,
                CHUNK=config.ORDER_CHUNK, num_warps=config.ORDER_WARPS,
            )  # fmt: skip
    return Selection(values, indices, row_ptr)


def select_batch_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    product = Product(x, W, b, "batch_topk_encode")
    rows, d_sae, tiles, device = product.rows, product.d_sae, product.tiles, x.device
    wanted = rows * k
    if rows == 0:
        return Selection(b.new_empty(0), _numbers(0, device), torch.zeros(1, dtype=torch.int64, device=device))
    latents = product.launch.latents
    kept = config.kept_entries(k, d_sae, latents, spread=config.BATCH_SPREAD)
    entries, cells = rows * tiles * kept, rows * tiles
    # An open cell has `kept` of the chosen entries, so there are no more of them than this.
    most_open = min(cells, wanted // kept)
    levels = radix_levels(rows * d_sae)
    blocks = min(4 * product.programs, cdiv(entries, config.RADIX_BLOCK))
    last = {"LAST": len(levels) - 1, "SHIFT": levels[-1]["SHIFT"], "BY_POSITION": levels[-1]["BY_POSITION"]}
    last |= {"BLOCK": config.COLLECT_BLOCK, "num_warps": config.RADIX_WARPS}
    with product.on_device():
        kept_key, kept_place = product.keep_tile_best(kept)
        fresh = torch.empty(most_open, latents, dtype=torch.int32, device=device)
        open_cell = _numbers(most_open, device)
        histograms = torch.zeros(2, len(levels), config.RADIX_BINS, dtype=torch.int32, device=device)
        states = torch.zeros(2, len(levels) + 1, 4, dtype=torch.int64, device=device)
        states[:, 0, 2] = wanted
        open_count = torch.zeros(1, dtype=torch.int32, device=device)
        found_count = torch.zeros(1, dtype=torch.int64, device=device)
        found = (kept_key, kept_place, fresh, open_cell, open_count)
        sizes = (entries, tiles, kept, d_sae)
        options = {"BLOCK": config.RADIX_BLOCK, "num_warps": config.RADIX_WARPS}
        for again in (False, True):
            histogram, state = histograms[int(again)], states[int(again)]
            for level in levels:
                batch_kernel.radix_level[(blocks,)](
                    *found, histogram, state, *sizes, **level, **options, AGAIN=again, BN=latents
                )
            if not again:
                batch_kernel.list_open_cells[(cdiv(cells, config.COLLECT_BLOCK),)](
                    kept_key, kept_place, histogram, state, open_cell, open_count, _totals_on(device), cells,
                    tiles, kept, d_sae, **last,
                )  # fmt: skip
                batch_kernel.rescan_cells[(max(1, min(most_open, product.programs)),)](
                    *product.operands, kept_key, fresh, open_cell, open_count, product.d_in, d_sae, tiles, kept,
                    *product.strides, DESCRIBED=product.described, **product.tile_options,
                )  # fmt: skip
        position = torch.full((wanted,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        key = torch.zeros(wanted, dtype=torch.int32, device=device)
        batch_kernel.collect[(blocks,)](
            *found, histograms[1], states[0], states[1], position, key, found_count, *sizes, wanted,
            **last, BN=latents,
        )  # fmt: skip
    values, flat = _in_order(position, key, found_count)
    row_of = torch.div(flat, d_sae, rounding_mode="floor")
    row_ptr = torch.searchsorted(row_of, torch.arange(rows + 1, device=device))
    return Selection(values, flat - row_of * d_sae, row_ptr)


def select_threshold(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Selection:
    product = Product(x, W, b, "threshold_encode", config.threshold_launch)
    cells = product.rows * product.tiles
    bounds = torch.zeros(cells + 1, dtype=torch.int64, device=x.device)
    if cells:
        _above_threshold(product, threshold, bounds[1:])
        bounds = bounds.cumsum(0)
    number = int(bounds[-1])
    values = torch.empty(number, dtype=torch.float32, device=x.device)
    indices = _numbers(number, x.device)
    if number:
        _above_threshold(product, threshold, bounds, values, indices)
    return Selection(values, indices, bounds[:: product.tiles].contiguous())


def _above_threshold(
    product: Product, threshold: Tensor, bounds: Tensor, values: Tensor | None = None, indices: Tensor | None = None
) -> None:
    """Counts the passing entries of each cell into `bounds`; given values and indices, writes the entries at the places in
    `bounds`."""
    step = threshold.stride(0) if threshold.dim() else 0
    with product.on_device():
        kernel.above_threshold[product.grid()](
            product.x, product.W, product.b, threshold, bounds, bounds if values is None else values,
            bounds if indices is None else indices, product.rows, product.d_in, product.d_sae, product.tiles, step,
            *product.strides, GROUP=product.launch.group, WRITE=values is not None, **product.tile_options,
        )  # fmt: skip


def gradients(
    grad: Tensor, x: Tensor, W: Tensor | None, codes: SparseCodes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, W_enc, b_enc) from per-entry gradients [nnz], inactive entries already 0; None where not needed.

    `W` may be None where x needs none. Sums over segments, each with one owner and one order; long ones (hot latents) are
    split, their parts added in order.
    """
    check_device("encode", grad.device)
    grad_x = grad_W = grad_b = None
    with on_device(grad.device):
        if needs[0] and W is not None:
            grad_x = weighted_row_sum(W, codes.indices, codes.row_ptr, grad)
        if needs[1] or needs[2]:
            order = codes.by_latent()
            by_latent = grad[order.permutation]
            if needs[1]:
                grad_W = weighted_row_sum(x, order.rows, order.latent_ptr, by_latent)
            if needs[2]:
                grad_b = segment_sum(by_latent, order.latent_ptr)
    return grad_x, grad_W, grad_b


def radix_levels(positions: int) -> list[dict[str, Any]]:
    """The digits of the selection: three of the 31 bits of a key, then those of a position below `positions`."""
    levels: list[dict[str, Any]] = []
    parents = {False: 31, True: cdiv(max(1, (positions - 1).bit_length()), config.RADIX_BITS) * config.RADIX_BITS}
    for by_position, shifts in (
        (False, (20, 10, 0)),
        (True, range(parents[True] - config.RADIX_BITS, -1, -config.RADIX_BITS)),
    ):
        parent = parents[by_position]
        for shift in shifts:
            before = levels[-1] if levels else {"SHIFT": 0, "BY_POSITION": False}
            levels.append(
                {
                    "LEVEL": len(levels),
                    "SHIFT": shift,
                    "PARENT": parent,
                    "BY_POSITION": by_position,
                    "SHIFT_BEFORE": before["SHIFT"],
                    "BY_POSITION_BEFORE": before["BY_POSITION"],
                }
            )
            parent = shift
    return levels


def _in_order(position: Tensor, key: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """(values, positions) in ascending order; with too few entries, zeros at the lowest free positions make up the rest.

    Then the result is 0 .. c - 1 and the entries from c on, c the first number that makes them enough. `number` [1] is the
    count of entries; places beyond hold the largest int64.
    """
    wanted = position.numel()
    position, order = position.sort()
    place = torch.arange(wanted, device=position.device)
    missing = wanted - number
    # Entry i has position[i] - i free positions below it, so the last of the missing ones has this many entries before it.
    before = torch.searchsorted(position - place, missing - 1, right=True)
    first = torch.where(missing > 0, missing + before, 0)
    real = place < number
    target = torch.where(position < first, position, missing + place)
    target = torch.where(real, target, wanted)
    values = torch.zeros(wanted + 1, dtype=torch.float32, device=position.device)
    flat = torch.arange(wanted + 1, device=position.device)
    values.scatter_(0, target, key[order].view(torch.float32))
    flat.scatter_(0, target, position)
    return values[:wanted], flat[:wanted]


class Product:
    """x @ W.T + b of one call: its launch, its tiles and the arguments that every kernel of it shares."""

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, op: str, adapt: Adapt | None = None) -> None:
        check_device(op, x.device)
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{op}: backend triton: expected float32, bfloat16 or float16, got {x.dtype}: use backend torch"
            )
        if interpreted() and x.dtype == torch.bfloat16:
            # The interpreter multiplies the bits of bfloat16 as integers. Widened, products and sums are what they should be.
            x, W = x.float(), W.float()
        self.x, self.W, self.b = x, W, b.contiguous()
        self.rows, self.d_in, self.d_sae = x.shape[0], x.shape[1], W.shape[0]
        self.precision = "ieee"
        # Follows the former switch `allow_tf32` too, which raises when it is read after this one is set.
        if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
            self.precision = "tf32"
        launch = _launch(x.device, x.dtype, self.precision)
        self.launch = adapt(launch) if adapt else launch
        self.tiles = cdiv(self.d_sae, self.launch.latents)
        self.described = self.launch.described and self._fits_descriptors()

    def _fits_descriptors(self) -> bool:
        """Whole blocks only, so that no descriptor reaches beyond W; 16-byte addresses and strides, as the hardware asks."""
        launch, x, W = self.launch, self.x, self.W
        whole = self.d_sae % launch.latents == 0 and self.d_in % launch.depth == 0
        # Columns of the matrix of tiles are counted in 32 bits.
        small = self.tiles * self.d_in < 1 << 31
        aligned = x.data_ptr() % 16 == W.data_ptr() % 16 == x.stride(0) * x.element_size() % 16 == 0
        return whole and small and aligned and x.stride(1) == 1 and x.stride(0) >= self.d_in and W.is_contiguous()

    @property
    def operands(self) -> tuple[Any, Any, Tensor]:
        """x, W and b of keep_tile_best and what computes its tiles again; b's numbers are next to each other: kernels know
        strides of matrices only."""
        if not (self.described and self.rows):
            return self.x, self.W, self.b
        from triton.tools.tensor_descriptor import TensorDescriptor

        launch, columns = self.launch, self.tiles * self.d_in
        x = TensorDescriptor(self.x, [self.rows, self.d_in], [self.x.stride(0), 1], [launch.rows, launch.depth])
        W = TensorDescriptor(self.W, [launch.latents, columns], [columns, 1], [launch.latents, launch.depth])
        return x, W, self.b

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.x.stride(), *self.W.stride())

    @property
    def tile_options(self) -> dict[str, Any]:
        launch = self.launch
        return {
            "BM": launch.rows,
            "BN": launch.latents,
            "BK": launch.depth,
            "EVEN": self.d_in % launch.depth == 0,
            "PRECISION": self.precision,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    @property
    def programs(self) -> int:
        """Programs of a persistent kernel: what the device can hold at a time."""
        return 2 * _multiprocessors(self.x.device)

    def on_device(self) -> AbstractContextManager[Any]:
        return on_device(self.x.device)

    def narrow(self, start: int, length: int) -> Product:
        part = Product.__new__(Product)
        part.__dict__.update(self.__dict__)
        part.x, part.rows = self.x.narrow(0, start, length), length
        return part

    def grid(self) -> tuple[int]:
        return (cdiv(self.rows, self.launch.rows) * self.tiles,)

    def keep_tile_best(self, kept: int) -> tuple[Tensor, Tensor]:
        """[B, T, kept] keys (int32) and places (uint8)."""
        shape = (self.rows, self.tiles, kept)
        kept_key = torch.empty(shape, dtype=torch.int32, device=self.x.device)
        kept_place = torch.empty(shape, dtype=torch.uint8, device=self.x.device)
        if self.rows:
            kernel.keep_tile_best[self.grid()](
                *self.operands, kept_key, kept_place, self.rows, self.d_in, self.d_sae, self.tiles, kept,
                *self.strides, GROUP=self.launch.group, DESCRIBED=self.described, **self.tile_options,
            )  # fmt: skip
        return kept_key, kept_place


def _numbers(length: int, device: torch.device) -> Tensor:
    return torch.empty(length, dtype=torch.int64, device=device)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _totals_on(device: torch.device) -> Tensor:
    if device not in _totals:
        _totals[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return _totals[device]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _launch(device: torch.device, dtype: torch.dtype, precision: str) -> config.ProductLaunch:
    kind = precision if precision == "tf32" else "float" if dtype == torch.float32 else "half"
    return config.product_launch(_architecture(device), kind)
