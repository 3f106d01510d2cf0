"""Random bits from a counter: the same (seed, keys, index) gives the same bits on every device, in any order,
with no state.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014): additions, xors and multiplications modulo
2^64, which int64 tensors do exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


GOLDEN, FIRST, SECOND = _signed(_GOLDEN), _signed(_FIRST), _signed(_SECOND)
"""The constants as signed 64-bit numbers, for code that repeats `hash_bits` elsewhere."""


def _mix_host(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def key_state(*keys: int) -> int:
    """The keys' share of `hash_bits`, a signed 64-bit number: x = index * GOLDEN + key_state(*keys) begins the mixing."""
    state = 0
    for key in keys:
        state = _mix_host((state + _GOLDEN + (key & _MASK)) & _MASK)
    return _signed(state)


def _shift(x: Tensor, by: int) -> Tensor:
    # int64 shifts drag the sign bit in; the mask makes the shift logical.
    return (x >> by) & ((1 << (64 - by)) - 1)


def hash_bits(index: Tensor, *keys: int) -> Tensor:
    """64 random bits for each element of `index` (int64), as int64; independent between different `keys`.

    Args:
        index: int64 tensor of any shape, the counter.
        keys: whole numbers such as (seed, rank, step); their order matters.
    """
    x = index * GOLDEN + key_state(*keys)
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def uniform(index: Tensor, *keys: int) -> Tensor:
    """float64 in [0, 1) with 53 random bits, one for each element of `index`."""
    return _shift(hash_bits(index, *keys), 11).double() * 2.0**-53


def signs(rows: int, columns: int, device: torch.device, *keys: int) -> Tensor:
    """[rows, columns] fp32 of +1 and -1; row t depends on (keys, t) alone."""
    words = -(-columns // 32)
    counter = torch.arange(rows * words, device=device).view(rows, words, 1)
    bits = hash_bits(counter, *keys) >> torch.arange(32, device=device)
    return (bits & 1).view(rows, words * 32)[:, :columns].float().mul_(2).sub_(1)
