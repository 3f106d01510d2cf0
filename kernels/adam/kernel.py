"""Triton kernels of the optimizer step. Every sum has one owner and a fixed order: equal inputs give equal bits."""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_squares(gradient, partial, count, BLOCK: tl.constexpr):
    """partial[i] = sum of squares of the i-th block of a gradient."""
    block = tl.program_id(0).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + place, mask=place < count, other=0)
    tl.store(partial + block, tl.sum(g * g, axis=0))


@triton.jit
def tangent_squares(gradient, parameter, along, partial, columns, TILE: tl.constexpr):
    """along[m] = g_m . w_m and partial[m] = |g_m - along[m] w_m|^2, for unit rows w_m. The second pass over the row is from
    the cache; the difference is squared, not its expansion, which cancels."""
    row = tl.program_id(0).to(tl.int64)
    gradient += row * columns
    parameter += row * columns
    products = tl.zeros((TILE,), tl.float32)
    for first in range(0, columns, TILE):
        place = first + tl.arange(0, TILE)
        inside = place < columns
        g = tl.load(gradient + place, mask=inside, other=0)
        products += g * tl.load(parameter + place, mask=inside, other=0)
    dot = tl.sum(products, axis=0)
    squares = tl.zeros((TILE,), tl.float32)
    for first in range(0, columns, TILE):
        place = first + tl.arange(0, TILE)
        inside = place < columns
        g = tl.load(gradient + place, mask=inside, other=0)
        left = g - dot * tl.load(parameter + place, mask=inside, other=0)
        squares += left * left
    tl.store(along + row, dot)
    tl.store(partial + row, tl.sum(squares, axis=0))


@triton.jit
def step_scalars(
    norm, bad, step, rate, scalars, max_norm,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, CLIP: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """One program: counts the step, and scalars = (clip factor, rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t)).

    float64, once a parameter: in float32 1 - 0.999^t of the first steps keeps four digits.
    """
    taken = True
    if GUARDED:
        taken = tl.load(bad) == 0
    if taken:
        t = tl.load(step) + 1
        tl.store(step, t)
        t = t.to(tl.float64)
        first = 1 - tl.exp(t * tl.full((), LOG_BETA1, tl.float64))
        second = 1 - tl.exp(t * tl.full((), LOG_BETA2, tl.float64))
        if CLIP:
            # As torch.nn.utils.clip_grad_norm_.
            factor = max_norm / (tl.load(norm) + 1e-6)
            tl.store(scalars, tl.where(factor < 1, factor, 1.0).to(tl.float32))
        else:
            tl.store(scalars, tl.full((), 1.0, tl.float32))
        tl.store(scalars + 1, (tl.load(rate) / first).to(tl.float32))
        tl.store(scalars + 2, (1 / tl.sqrt(second)).to(tl.float32))


@triton.jit
def adam_element(g, p, m, v, rate, scale, keep1, new1, keep2, new2, eps):
    """(parameter, first moment, second moment) after one step, with IEEE divisions and roots: memory bounds the kernel."""
    m = keep1 * m + new1 * g
    v = keep2 * v + new2 * g * g
    return p - tl.div_rn(rate * m, tl.sqrt_rn(v) * scale + eps), m, v


@triton.jit
def adam_blocks(
    parameter, gradient, first, second, scalars, bad, count, keep1, new1, keep2, new2, eps,
    GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam on blocks of elements. Nothing is touched where `bad` holds."""
    taken = True
    if GUARDED:
        taken = tl.load(bad) == 0
    if taken:
        clip, rate, scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        g = clip * tl.load(gradient + place, mask=inside, other=0)
        p = tl.load(parameter + place, mask=inside, other=0)
        m = tl.load(first + place, mask=inside, other=0)
        v = tl.load(second + place, mask=inside, other=0)
        p, m, v = adam_element(g, p, m, v, rate, scale, keep1, new1, keep2, new2, eps)
        tl.store(parameter + place, p, mask=inside)
        tl.store(first + place, m, mask=inside)
        tl.store(second + place, v, mask=inside)


@triton.jit
def adam_rows(
    parameter, gradient, first, second, along, scalars, bad, columns, keep1, new1, keep2, new2, eps, least,
    GUARDED: tl.constexpr, ONE_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adam on one row of a matrix of unit rows: the gradient loses its part along the row, the new row is scaled to length 1
    (a zero row stays zero)."""
    taken = True
    if GUARDED:
        taken = tl.load(bad) == 0
    if taken:
        clip, rate, scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
        row = tl.program_id(0).to(tl.int64)
        parallel = tl.load(along + row)
        parameter += row * columns
        gradient += row * columns
        first += row * columns
        second += row * columns
        squares = tl.zeros((TILE,), tl.float32)
        p = tl.zeros((TILE,), tl.float32)
        for start in range(0, TILE if ONE_TILE else columns, TILE):
            place = start + tl.arange(0, TILE)
            inside = place < columns
            p = tl.load(parameter + place, mask=inside, other=0)
            g = clip * (tl.load(gradient + place, mask=inside, other=0) - parallel * p)
            m = tl.load(first + place, mask=inside, other=0)
            v = tl.load(second + place, mask=inside, other=0)
            p, m, v = adam_element(g, p, m, v, rate, scale, keep1, new1, keep2, new2, eps)
            tl.store(first + place, m, mask=inside)
            tl.store(second + place, v, mask=inside)
            squares += tl.where(inside, p * p, 0)
            if not ONE_TILE:
                tl.store(parameter + place, p, mask=inside)
        length = tl.sqrt_rn(tl.sum(squares, axis=0))
        length = tl.where(length < least, least, length)
        if ONE_TILE:
            place = tl.arange(0, TILE)
            tl.store(parameter + place, tl.div_rn(p, length + tl.zeros((TILE,), tl.float32)), mask=place < columns)
        else:
            tl.debug_barrier()  # all lanes see what the others wrote
            for start in range(0, columns, TILE):
                place = start + tl.arange(0, TILE)
                inside = place < columns
                p = tl.load(parameter + place, mask=inside, other=0)
                tl.store(parameter + place, tl.div_rn(p, length + tl.zeros((TILE,), tl.float32)), mask=inside)
