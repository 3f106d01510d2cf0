"""Backend `triton` of the correlation statistics: static launches, nothing read by the host during an update.

An update without a half-life is the moments of every latent that fired (feature-major, one owner each) and then either
every pair of every row (atomic additions of multiples of a fixed unit: exact, hence in any order the same bits) or the rows of
the sketch (one owner each). With a half-life, counts are fractions that decay with every token and are no multiples of a unit:
those statistics are added by a stable sort, as in backend `torch` on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels.correlation import config
from transcoder.kernels.correlation.counter_rng import FIRST, GOLDEN, SECOND, key_state
from transcoder.kernels.correlation.exact import PackedTriangle
from transcoder.kernels.correlation.sketch import Sketch, best_candidates, candidates, directions
from transcoder.kernels.correlation.statistics import Moments
from transcoder.kernels.sparse_codes import LatentOrder, SparseCodes
from transcoder.kernels.triton_support import cdiv, check_device, on_device, on_its_device, usable

if usable():
    from transcoder.kernels.correlation import kernel

__all__ = ["add_moments", "add_pairs", "add_to_sketch", "similar", "usable"]

NAME = "FeatureCorrelation"


@on_its_device
def add_moments(codes: SparseCodes, weight: Tensor | None, moments: Moments, triangle: PackedTriangle | None) -> None:
    """Add n, sum w z, sum w z^2 and firing counts; settle the units of a triangle's latents that fire for the first time."""
    check_device(f"{NAME}.update", codes.device)
    if weight is None:
        moments.weight += codes.shape[0]
        moments.weight_squared += codes.shape[0]
    else:
        moments.weight += weight.sum()
        moments.weight_squared += weight.square().sum()
    if triangle is not None and triangle.unit is None:
        triangle.unit = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
    if codes.nnz == 0:
        return
    order, by_entry, owners = _owners(codes)
    unit = moments.total if triangle is None else triangle.unit
    kernel.moment_sums[(owners,)](
        _values(codes), codes.indices.contiguous(), order.permutation, order.rows, order.latent_ptr,
        _or_unused(weight, moments.total), moments.total, moments.square, moments.count, unit, codes.nnz,
        WEIGHTED=weight is not None, UNIT=triangle is not None, BY_ENTRY=by_entry, ENTRIES=config.LATENT_ENTRIES,
        num_warps=1,
    )  # fmt: skip


@on_its_device
def add_pairs(codes: SparseCodes, weight: Tensor | None, triangle: PackedTriangle) -> None:
    """Add every pair of latents that fire on one token. After `add_moments` of the same codes, which settles the units."""
    if codes.nnz == 0:
        return
    kernel.pair_sums[(codes.shape[0], config.PAIR_SLICES)](
        _values(codes), codes.indices.contiguous(), codes.row_ptr.contiguous(), _or_unused(weight, triangle.product),
        triangle.unit, triangle.product, triangle.joint,
        WEIGHTED=weight is not None, BITS=config.UNIT_BITS, BLOCK=config.PAIR_BLOCK, num_warps=config.PAIR_WARPS,
    )  # fmt: skip


@on_its_device
def add_to_sketch(codes: SparseCodes, weight: Tensor | None, sketch: Sketch, *keys: int) -> None:
    """Add the tokens' signs, weighted, to the sketch of every latent that fires on them and to that of the constant."""
    rows, words_a_token = codes.shape[0], cdiv(sketch.dim, 32)
    words = torch.empty(rows, words_a_token, dtype=torch.int32, device=codes.device)
    kernel.sign_words[(cdiv(words.numel(), config.WORDS),)](
        words, key_state(*keys), words.numel(), GOLDEN=GOLDEN, FIRST=FIRST, SECOND=SECOND, WORDS=config.WORDS
    )
    unused = _or_unused(weight, sketch.ones)
    kernel.constant_sketch[(words_a_token,)](
        unused, words, sketch.ones, rows, sketch.dim, words_a_token,
        WEIGHTED=weight is not None, TOKENS=config.ONES_TOKENS, num_warps=config.ONES_WARPS,
    )  # fmt: skip
    if codes.nnz == 0:
        return
    order, by_entry, owners = _owners(codes)
    kernel.sketch_sums[(owners, cdiv(sketch.dim, config.SKETCH_COLUMNS))](
        _values(codes), codes.indices.contiguous(), order.permutation, order.rows, order.latent_ptr,
        unused, words, sketch.rows, codes.nnz, sketch.dim, words_a_token,
        WEIGHTED=weight is not None, BY_ENTRY=by_entry, ROWS=config.SKETCH_ROWS, TILE=config.SKETCH_COLUMNS,
        num_warps=config.SKETCH_WARPS,
    )  # fmt: skip


def similar(sketches: list[Sketch], moments: Moments, above: float) -> tuple[Tensor, Tensor]:
    """(i, j), i < j, of the pairs of live latents whose estimated correlation exceeds `above`, sorted by (i, j).

    One pass over tiles of S @ S.T; no tile leaves the chip. Tiles append in any order, the sort restores one.
    """
    check_device(f"{NAME}.pairs", moments.total.device)
    live = (moments.count > 0).nonzero().flatten()
    unit = directions(sketches, moments, live).contiguous()
    latents, depth = unit.shape
    if latents < 2:
        return live[:0], live[:0]
    tiles = cdiv(latents, config.TILE)
    if tiles * tiles > config.MAX_PROGRAMS:
        return candidates(sketches, moments, above)
    capacity = min(config.CAPACITY, latents * (latents - 1) // 2)
    i, j = (torch.empty(capacity, dtype=torch.int32, device=live.device) for _ in range(2))
    estimate = torch.empty(capacity, dtype=torch.float32, device=live.device)
    found = torch.zeros((), dtype=torch.int64, device=live.device)
    with on_device(live.device):
        kernel.similar_pairs[(tiles * tiles,)](
            unit, i, j, estimate, found, latents, depth, above - config.SLACK, tiles, capacity,
            TILE=config.TILE, DEPTH=config.DEPTH, GROUP=config.TILE_GROUP, num_warps=config.TILE_WARPS,
        )  # fmt: skip
    count = int(found)
    if count > capacity:
        return candidates(sketches, moments, above)
    by_pair = (i[:count].long() * latents + j[:count]).argsort()
    kept = best_candidates(live[i[:count].long()][by_pair], live[j[:count].long()][by_pair], estimate[:count][by_pair])
    return kept[0], kept[1]


def _owners(codes: SparseCodes) -> tuple[LatentOrder, bool, int]:
    """(feature-major order, whether programs are counted by entries, how many)."""
    by_entry = codes.shape[1] > config.ENTRY_OWNERS_ABOVE * codes.nnz
    return codes.by_latent(), by_entry, codes.nnz if by_entry else codes.shape[1]


def _values(codes: SparseCodes) -> Tensor:
    return codes.values.detach().contiguous()


def _or_unused(weight: Tensor | None, unused: Tensor) -> Tensor:
    """A launch needs a pointer even for an argument that the kernel does not read."""
    return unused if weight is None else weight.contiguous()
