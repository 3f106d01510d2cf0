"""Bytes and operations of each launch of our kernels, from its arguments. One method a kernel, with the kernel's name.

Model, the same for all: an operand that is swept once comes from memory once. A gather of rows reads each distinct row from
memory once where the table's slab of columns fits the share CACHE of the second-level cache, and again by the share that does
not fit; all of it passes through that cache. Codes are spread evenly over latents (distinct latents by the birthday formula),
no values are tied, no latent is hot enough to be split, and RESCAN_SHARE of the tokens fail their certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bench.launch_trace import Call, Launch
from transcoder.kernels.encode import config as encode_config

CACHE = 0.6
"""Share of the second-level cache that is available to reused data."""
SECTOR = 32
"""Bytes transferred by an isolated access."""


@dataclass(frozen=True)
class Cost:
    """Bytes from and to memory, bytes through the second-level cache, and operations on each kind of unit."""

    memory: float = 0
    cached: float = 0
    matrix: float = 0
    vector: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.memory + other.memory,
            self.cached + other.cached,
            self.matrix + other.matrix,
            self.vector + other.vector,
        )


def distinct(drawn: float, of: float) -> float:
    """Expected number of distinct items in `drawn` uniform draws from `of` items."""
    return of * (1 - (1 - 1 / of) ** drawn) if of else 0.0


class Traffic:
    """Costs of launches on a chip whose second-level cache holds `cache` bytes; remembers its content."""

    def __init__(self, cache: float) -> None:
        self.room = CACHE * cache
        self.resident: set[int] = set()

    def of(self, event: Launch | Call) -> Cost:
        if isinstance(event, Call):
            return Cost(memory=event.bytes)
        model: Callable[[Launch], Cost] | None = getattr(self, event.kernel, None)
        if model is None:
            raise KeyError(f"kernel {event.kernel!r} has no traffic model: add one to bench/launch_cost.py")
        return model(event)

    def gather(self, draws: float, table: Tensor, columns: int, tile: int) -> Cost:
        """`draws` rows of a table, `columns` columns of each, in slabs of `tile` columns, one slab after the other."""
        row = columns * table.element_size()
        if table.untyped_storage()._cdata in self.resident:
            return Cost(cached=draws * row)
        rows = distinct(draws, table.shape[0])
        slab = rows * min(tile, columns) * table.element_size()
        missing = max(0.0, 1 - self.room / slab) if slab else 0.0
        return Cost(memory=(rows + (draws - rows) * missing) * row, cached=draws * row)

    def again(self, size: float, times: int) -> Cost:
        """Something swept `times` times with other things in between."""
        return Cost(memory=size * (1 if size <= self.room / 2 else times), cached=size * times)

    # encode

    def _product(self, a: Launch, row_blocks: int, tiles: int) -> Cost:
        operations = 2 * row_blocks * a.BM * tiles * a.BN * a.d_in
        return Cost(vector=operations) if a.PRECISION == "ieee" and a.x.element_size() == 4 else Cost(matrix=operations)

    def keep_tile_best(self, a: Launch) -> Cost:
        row_blocks = -(-a.rows_total // a.BM)
        groups = -(-row_blocks // a.GROUP)
        W = a.d_sae * a.d_in * a.W.element_size()
        kept = a.rows_total * a.tiles * a.kept * encode_config.KEPT_BYTES
        x = a.rows_total * a.d_in * a.x.element_size()
        tile_reads = row_blocks * a.tiles * (a.BM + a.BN) * a.d_in * a.x.element_size()
        swept = Cost(memory=x + kept + 4 * a.d_sae, cached=tile_reads)
        return swept + Cost(memory=self.again(W, groups).memory) + self._product(a, row_blocks, a.tiles)

    def select_rows(self, a: Launch) -> Cost:
        rows = a.grid[0]
        return Cost(memory=rows * (a.tiles * a.kept * encode_config.KEPT_BYTES + 8 * a.k + 12))

    def rescan_rows(self, a: Launch) -> Cost:
        return self._rescan(a, encode_config.RESCAN_SHARE * a.rows_total)

    def rescan_cells(self, a: Launch) -> Cost:
        return self._rescan(a, encode_config.RESCAN_SHARE * a.x.shape[0])

    def _rescan(self, a: Launch, cells: float) -> Cost:
        one = self._product(a, 1, 1)
        read = (a.BN + 1) * a.d_in * a.x.element_size()
        return Cost(memory=cells * read, matrix=cells * one.matrix, vector=cells * one.vector)

    def order_rows(self, a: Launch) -> Cost:
        return Cost(memory=a.grid[0] * a.k * (8 + 4 + 8))

    def radix_level(self, a: Launch) -> Cost:
        # Levels by position run only where the last value is tied; the second round only where cells were computed again.
        return Cost() if a.BY_POSITION else Cost(memory=4 * a.entries)

    def list_open_cells(self, a: Launch) -> Cost:
        return Cost(memory=a.cells * (min(SECTOR, 4 * a.kept) + min(SECTOR, a.kept)))

    def collect(self, a: Launch) -> Cost:
        return Cost(memory=encode_config.KEPT_BYTES * a.entries + 12 * a.wanted)

    # sums over lists of rows

    def weighted_rows(self, a: Launch) -> Cost:
        entries, tiles = a.entries, a.grid[1]
        lists = self.again(entries * (8 + a.weights.element_size()) + 8 * a.segments, tiles)
        written = a.segments * a.columns * a.out.element_size()
        return (
            lists
            + self.gather(entries, a.table, a.columns, a.TILE)
            + Cost(memory=written, vector=2 * entries * a.columns)
        )

    def split_totals(self, a: Launch) -> Cost:
        return Cost(memory=a.grid[0] * 3 * SECTOR)

    def row_products(self, a: Launch) -> Cost:
        tiles = a.grid[1]
        left = a.grid[0] * a.columns * a.left.element_size()
        partial = tiles * a.entries * a.partial.element_size()
        lists = self.again(8 * a.entries, tiles)
        gathered = self.gather(a.entries, a.table, a.columns, a.TILE)
        return gathered + lists + Cost(memory=left + partial, vector=2 * a.entries * a.columns)

    def segment_sums(self, a: Launch) -> Cost:
        return Cost(memory=a.values.numel() * a.values.element_size() + a.grid[0] * (8 + a.out.element_size()))

    # nested loss

    def prefix_cuts(self, a: Launch) -> Cost:
        return Cost(memory=8 * (a.ids.numel() + a.row_ptr.numel() + a.searches))

    def walk_up(self, a: Launch) -> Cost:
        entries, tiles, dense = a.ids.numel(), a.grid[1], a.rows * a.columns
        lists = self.again(entries * (8 + 4) + 8 * a.rows * (1 + a.prefixes), tiles)
        dense_bytes = dense * (a.y.element_size() + a.residual.element_size())
        errors = a.errors.numel() * a.errors.element_size()
        gathered = self.gather(entries, a.W, a.columns, a.TILE)
        work = 2 * entries * a.columns + 2 * a.prefixes * dense
        return gathered + lists + Cost(memory=dense_bytes + errors, vector=work)

    def prefix_totals(self, a: Launch) -> Cost:
        return Cost(memory=a.errors.numel() * a.errors.element_size())

    def walk_down(self, a: Launch) -> Cost:
        columns, entries, tiles = a.last_column - a.first_column, a.ids.numel(), a.grid[1]
        dense = a.rows * columns * a.residual.element_size()
        lists = self.again(entries * (8 + 4) + 8 * a.rows * (1 + a.prefixes), tiles)
        partial = tiles * entries * a.partial.element_size()
        slab = a.prefixes * a.rows * columns * a.slab.element_size() if a.SLAB else 0
        # The slab is used again for the next columns: it only reaches memory where it does not fit.
        fits = slab <= self.room
        if fits and a.SLAB:
            self.resident.add(a.slab.untyped_storage()._cdata)
        gathered = self.gather(entries, a.W, columns, a.TILE)
        moved = Cost(memory=2 * dense + partial + (0 if fits else slab), cached=slab, vector=4 * entries * columns)
        return gathered + lists + moved

    def feature_major(self, a: Launch) -> Cost:
        return Cost(memory=a.entries * (8 + 8 + 8 + 4 + 8 + 4))

    # correlation

    def _fired(self, a: Launch) -> float:
        return distinct(a.entries, a.latent_ptr.numel() - 1)

    def moment_sums(self, a: Launch) -> Cost:
        owners = 8 * a.grid[0]
        return Cost(memory=a.entries * (8 + 4 + 8) + owners + self._fired(a) * (2 * 3 * 8 + 16), vector=6 * a.entries)

    def pair_sums(self, a: Launch) -> Cost:
        rows, entries = a.grid[0], a.ids.numel()
        pairs = rows * (entries / rows) * (entries / rows - 1) / 2
        triangle = a.product.numel() * (a.product.element_size() + a.joint.element_size())
        # Two atomic additions a pair, each in its own sector, read and written where the triangle is not in the cache.
        outside = max(0.0, 1 - self.room / triangle)
        return Cost(
            memory=entries * (8 + 4 + 8) + pairs * 4 * SECTOR * outside, cached=pairs * 4 * SECTOR, vector=8 * pairs
        )

    def sign_words(self, a: Launch) -> Cost:
        return Cost(memory=4 * a.count, vector=12 * a.count)

    def constant_sketch(self, a: Launch) -> Cost:
        return Cost(memory=a.words.numel() * 4)

    def sketch_sums(self, a: Launch) -> Cost:
        rows = 2 * 4 * self._fired(a) * a.columns
        words = a.entries * 4 * a.words_a_token
        return Cost(
            memory=rows + a.entries * (8 + 4 + 8) + 8 * a.grid[0] + a.words.numel() * 4,
            cached=words,
            vector=2 * a.entries * a.columns,
        )

    # optimizer step

    def block_squares(self, a: Launch) -> Cost:
        return Cost(memory=4 * a.count, vector=2 * a.count)

    def tangent_squares(self, a: Launch) -> Cost:
        # Both rows again for the squares, from the cache of the multiprocessor.
        row = a.grid[0] * a.columns
        return Cost(memory=8 * row + 8 * a.grid[0], vector=6 * row)

    def step_scalars(self, a: Launch) -> Cost:
        return Cost(memory=3 * SECTOR)

    def adam_blocks(self, a: Launch) -> Cost:
        return Cost(memory=28 * a.count, vector=16 * a.count)

    def adam_rows(self, a: Launch) -> Cost:
        elements = a.grid[0] * a.columns
        # A long row's parameters are written, read back from the cache and written again.
        return Cost(memory=28 * elements, cached=0 if a.ONE_TILE else 8 * elements, vector=20 * elements)


def total(events: list[Launch | Call], cache: float) -> tuple[Cost, list[Cost]]:
    """(sum, one a launch)."""
    traffic = Traffic(cache)
    costs = [traffic.of(event) for event in events]
    return sum(costs, Cost()), costs
