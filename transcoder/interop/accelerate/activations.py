"""Activations that look like the dense [..., d_sae] tensor a library expects, and are SparseCodes inside.

What a training step does with them runs on the codes: products with a matrix, scaling by a row, column ranges, counts, sums,
comparisons with a number at or above 0. Anything else is done on the dense tensor, which is made once and announced once a
module. From then on the dense tensor is what counts (`LazyTensor`).

One rule for all: a call that one of the functions below does not take as it stands (an argument it has no name for, a type it
does not know) is a dense one. NaN and infinity in a row of a matrix are seen by what selects that row's latent.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.lazy import DenseView, LazyTensor, Source, announce
from transcoder.kernels import SparseCodes, sparse_decode

__all__ = ["DenseView", "LazyTensor", "SparseActivations", "announce"]


class _Scattered(Source):
    """`kept` at the places of the codes, 0 elsewhere."""

    def __init__(self, codes: SparseCodes, kept: Tensor, shape: Sequence[int]) -> None:
        self.codes, self.kept, self.shape = codes, kept, shape
        self.inference = torch.is_inference_mode_enabled()

    def _places(self) -> Tensor:
        return self.codes.rows() * self.codes.shape[1] + self.codes.indices

    def contents(self) -> Tensor:
        with torch.inference_mode(self.inference), torch.no_grad():
            flat = self.kept.new_zeros(self.codes.shape[0] * self.codes.shape[1])
            return flat.index_put_((self._places(),), self.kept.detach()).view(*self.shape)

    def pull(self, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        return [grad.reshape(-1)[self._places()].to(self.kept.dtype)]


class SparseActivations(LazyTensor):
    """`LazyTensor` over the pattern of codes of shape (product of the leading sizes, d_sae).

    `kept` [nnz] are floats, or yes and no (a comparison): wider than `dtype` perhaps, as the kernels accumulate.
    """

    codes: SparseCodes
    kept: Tensor

    @staticmethod
    def over(
        owner: nn.Module | weakref.ref[nn.Module] | None,
        codes: SparseCodes,
        leading: Sequence[int],
        dtype: torch.dtype,
        values: Tensor | None = None,
    ) -> SparseActivations:
        kept = codes.values if values is None else values
        owner = weakref.ref(owner) if isinstance(owner, nn.Module) else owner
        shape = (*leading, codes.shape[1])
        new: SparseActivations = SparseActivations.born(owner, shape, dtype, _Scattered(codes, kept, shape), (kept,))
        new.codes, new.kept = codes, kept
        return new

    def typed(self) -> Tensor:
        """[nnz] in the tensor's own type."""
        return self.kept.to(self.dtype)

    def _with(
        self, values: Tensor, dtype: torch.dtype | None = None, codes: SparseCodes | None = None
    ) -> SparseActivations:
        return SparseActivations.over(self._owner, codes or self.codes, self.shape[:-1], dtype or self.dtype, values)

    def _as(self, view: Any, codes: SparseCodes, kept: Tensor) -> Any:
        """A lazy view of this tensor, which has these codes."""
        view.codes, view.kept = codes, kept
        view.settle()
        return view

    def _view_kind(self) -> Any:
        return SparseActivations

    def _shortcut(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        handler = _ON_CODES.get(func)
        if handler is None or self.__dict__.get("codes") is None:
            return NotImplemented
        try:
            _SIGNATURES[handler].bind(*args, **kwargs)
        except TypeError:
            return NotImplemented
        found = handler(*args, **kwargs)
        for result in found if isinstance(found, tuple) else (found,):
            through = isinstance(result, LazyTensor) and (result is self or result._parent is self)
            if isinstance(result, Tensor) and not through and result.requires_grad:
                self.use()
        return found


def _scaled(z: SparseActivations, factor: Any, divide: bool) -> Any:
    """Where 0 times (or over) the factor is 0."""
    if isinstance(factor, LazyTensor) or z.dtype == torch.bool:
        return NotImplemented
    each = factor
    if isinstance(factor, Tensor):
        width = z.shape[-1]
        row = factor.dim() > 0 and factor.shape[-1] == width == factor.numel() and factor.dim() <= z.dim()
        fits = factor.dtype in _FACTORS and factor.device == z.device and (row or factor.dim() == 0)
        if not fits or not bool((factor.isfinite() & (factor != 0 if divide else True)).all()):
            return NotImplemented
        each = factor.reshape(-1)[z.codes.indices] if row else factor
        dtype = torch.result_type(torch.empty(1, dtype=z.dtype), factor)
    elif type(factor) in (int, float) and math.isfinite(factor) and (factor != 0 or not divide):
        dtype = z.dtype
    else:
        return NotImplemented
    return z._with(z.kept / each if divide else z.kept * each, dtype)


def _linear(z: SparseActivations, weight: Any, bias: Any = None) -> Any:
    is_matrix = isinstance(weight, Tensor) and not isinstance(weight, LazyTensor) and weight.dim() == 2
    return _product(z, weight.T, bias) if is_matrix else NotImplemented


def _product(z: SparseActivations, W: Any, bias: Any = None) -> Any:
    """z @ W + bias, where a dense z could be multiplied so."""
    device = z.device.type
    wide = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    fit = [
        isinstance(t, Tensor)
        and not isinstance(t, LazyTensor)
        and t.device == z.device
        and t.is_floating_point()
        and (t.dtype == z.dtype or (wide is not None and torch.float64 not in (t.dtype, z.dtype)))
        for t in (W, *([] if bias is None else [bias]))
    ]
    if not all(fit) or W.dim() != 2 or W.shape[0] != z.shape[-1] or z.dtype == torch.bool:
        return NotImplemented
    if bias is not None and bias.shape != W.shape[1:]:
        return NotImplemented
    start = W.new_zeros(W.shape[1]) if bias is None else bias
    kept = z.kept if z.kept.dtype == torch.float64 else z.kept.float()
    out = sparse_decode(z.codes.with_values(kept), W, start).to(wide or z.dtype)
    return out.view(*z.shape[:-1], W.shape[1])


def _columns_of(z: SparseActivations, start: int, stop: int) -> tuple[SparseCodes, Tensor]:
    codes = z.codes
    inside = (codes.indices >= start) & (codes.indices < stop)
    entries = inside.nonzero().squeeze(1)
    before = torch.cat([codes.row_ptr.new_zeros(1), inside.cumsum(0)])
    row_ptr = before[codes.row_ptr]
    unread = codes.values.detach()[entries]
    part = SparseCodes.trusted(unread, codes.indices[entries] - start, row_ptr, (codes.shape[0], stop - start))
    return part, z.kept[entries]


def _item(z: SparseActivations, index: Any) -> Any:
    if isinstance(index, SparseActivations):
        # A comparison of these very activations: row-major, as boolean indexing gives it.
        same = index.untouched() and index.codes.indices is z.codes.indices and index.dtype == torch.bool
        return z.typed()[index.kept] if same else NotImplemented
    parts = index if type(index) is tuple else (index,)
    if len(parts) == 2 and parts[0] is Ellipsis:
        parts = (*[slice(None)] * (z.dim() - 1), parts[1])
    if len(parts) != z.dim() or any(type(p) is not slice for p in parts):
        return NotImplemented
    ends = [p.start for p in parts] + [p.stop for p in parts] + [p.step for p in parts]
    if any(end is not None and type(end) is not int for end in ends) or any(p != slice(None) for p in parts[:-1]):
        return NotImplemented
    start, stop, step = parts[-1].indices(z.shape[-1])
    if step != 1:
        return NotImplemented
    codes, kept = _columns_of(z, start, max(start, stop))
    with torch._C.DisableTorchFunctionSubclass():
        view = torch.ops.aten.slice.Tensor(z, z.dim() - 1, start, max(start, stop))
    return z._as(view, codes, kept)


def _split(z: SparseActivations, split_size: Any, dim: Any = 0) -> Any:
    width = z.shape[-1]
    if type(dim) is not int or dim not in (-1, z.dim() - 1):
        return NotImplemented
    if type(split_size) is int and split_size > 0:
        sizes = [min(split_size, width - at) for at in range(0, width, split_size)]
    elif type(split_size) in (list, tuple) and all(type(size) is int and size >= 0 for size in split_size):
        sizes = list(split_size)
    else:
        return NotImplemented
    if sum(sizes) != width:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        views = torch.ops.aten.split_with_sizes.default(z, sizes, z.dim() - 1)
    ends = list(itertools.accumulate(sizes))
    return tuple(
        z._as(view, *_columns_of(z, end - size, end)) for view, size, end in zip(views, sizes, ends, strict=True)
    )


def _above(z: SparseActivations, other: Any) -> Any:
    if type(other) in (int, float) and other >= 0 and z.dtype != torch.bool:
        return z._with(z.typed() > other, torch.bool)
    return NotImplemented


def _differs(z: SparseActivations, other: Any) -> Any:
    fits = type(other) in (int, float) and other == 0
    return z._with(z.typed() != 0, torch.bool) if fits else NotImplemented


def _as_bool(z: SparseActivations) -> Any:
    return z if z.dtype == torch.bool else z._with(z.typed() != 0, torch.bool)


def _to(z: SparseActivations, dtype: Any) -> Any:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return NotImplemented
    return z if dtype == z.dtype else z._with(z.typed().to(dtype), dtype)


def _sum(z: SparseActivations, dim: Any = None) -> Any:
    narrow = z.dtype not in (torch.bool, torch.float32, torch.float64)
    if not (dim is None or type(dim) is int) or (narrow and torch.is_autocast_enabled(z.device.type)):
        return NotImplemented
    codes, yes = z.codes, z.dtype == torch.bool
    kept, out = (z.kept.to(torch.int64), torch.int64) if yes else (z.kept, z.dtype)
    if dim is None:
        return kept.sum().to(out)
    if dim in (-1, z.dim() - 1):
        return kept.new_zeros(codes.shape[0]).index_add(0, codes.rows(), kept).to(out).view(z.shape[:-1])
    if z.dim() == 2 and dim in (0, -2):
        return kept.new_zeros(codes.shape[1]).index_add(0, codes.indices, kept).to(out)
    return NotImplemented


def _detach(z: SparseActivations) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        view = torch.ops.aten.detach.default(z)
    return z._as(view, z.codes, z.kept.detach())


_FACTORS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ON_CODES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), lambda z, other: _scaled(z, other, divide=False)
    ),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__), lambda z, other: _scaled(z, other, divide=True)),
    **dict.fromkeys((Tensor.matmul, torch.matmul, Tensor.__matmul__), lambda z, other: _product(z, other)),
    **dict.fromkeys((Tensor.mm, torch.mm), lambda z, mat2: _product(z, mat2)),
    nn.functional.linear: _linear,
    Tensor.__getitem__: _item,
    Tensor.split: _split,
    torch.split: lambda z, split_size_or_sections, dim=0: _split(z, split_size_or_sections, dim),
    **dict.fromkeys((Tensor.gt, torch.gt, Tensor.__gt__), _above),
    **dict.fromkeys((Tensor.ne, torch.ne, Tensor.__ne__), _differs),
    Tensor.bool: _as_bool,
    Tensor.float: lambda z: _to(z, torch.float32),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.sum, torch.sum), _sum),
    **dict.fromkeys((Tensor.any, torch.any), lambda z: (z.typed() != 0).any()),
    Tensor.detach: _detach,
    **dict.fromkeys((Tensor.contiguous, Tensor.to_dense), lambda z: z),
}
"""Parameters have PyTorch's names: what does not bind to them is dense."""

_SIGNATURES = {handler: inspect.signature(handler) for handler in _ON_CODES.values()}
