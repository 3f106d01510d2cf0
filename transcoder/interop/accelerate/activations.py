"""Activations that look like the dense [..., d_sae] tensor a library expects, and are SparseCodes inside.

What a training step does with them runs on the codes: products with a matrix, scaling by a row, column ranges, counts, sums,
comparisons with a number at or above 0. Anything else is done on the dense tensor, which is made once, in the same graph, and
announced once a module. From then on the dense tensor is what counts, so a change in place is never lost.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from transcoder.kernels import SparseCodes, sparse_decode


class DenseView(UserWarning):
    """Something an accelerated module could not do on compressed codes: done densely, as fast as the library itself is."""


def announce(module: nn.Module, what: str) -> None:
    """Warn once a module and reason."""
    told: set[str] = module.__dict__.setdefault("_transcoder_announced", set())
    if what not in told:
        told.add(what)
        warnings.warn(f"transcoder.accelerate: {type(module).__name__}: {what}", DenseView, stacklevel=3)


class LazyTensor(torch.Tensor):
    """A tensor whose contents are computed when something asks for them: `dense()`, in the graph of what it depends on.

    `columns(ids)` is the part `dense()[..., ids]`, for whoever needs no more.
    """

    _make: Callable[[], Tensor]
    _dense: Tensor | None
    _columns: Callable[[Tensor], Tensor] | None
    _owner: weakref.ref[nn.Module]
    _in_graph: bool

    @staticmethod
    def of(
        owner: nn.Module,
        shape: Sequence[int],
        like: Tensor,
        make: Callable[[], Tensor],
        columns: Callable[[Tensor], Tensor] | None = None,
    ) -> LazyTensor:
        return fresh(LazyTensor, owner, shape, like.dtype, like.device, make, torch.is_grad_enabled(), columns)

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    def columns(self, ids: Tensor) -> Tensor:
        if self._dense is not None or self._columns is None:
            return self.dense()[..., ids]
        return self._columns(ids)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mine = args[0] if args and isinstance(args[0], LazyTensor) else None
        if mine is not None and func is _REQUIRES_GRAD:
            return mine._in_graph if mine._dense is None else mine._dense.requires_grad
        if isinstance(mine, SparseActivations) and mine._dense is None and func in _ON_CODES:
            found = _ON_CODES[func](mine, *args[1:], **kwargs)
            if found is not NotImplemented:
                mine._used = True
                return found
        if isinstance(mine, SparseActivations) and mine._used and func in _WATCHES:
            raise RuntimeError(
                f"transcoder.accelerate: {func.__name__} on activations that were decoded already: their gradient exists for "
                "the selected entries only. Call it before they are used, or take `activations.dense()` first"
            )
        args, kwargs = tree_map(lambda a: _made_dense(a, func), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only by what goes around __torch_function__; autograd has passed by then, without a graph.
        def plain(value: Any) -> Any:
            if not isinstance(value, LazyTensor):
                return value
            made = value.dense()
            if made.requires_grad and torch.is_grad_enabled():
                raise TypeError(
                    f"transcoder.accelerate: {func} reads these activations where gradients would be lost; give it "
                    "`activations.dense()`"
                )
            return made.detach()

        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class SparseActivations(LazyTensor):
    """`LazyTensor` over the pattern of codes of shape (product of the leading sizes, d_sae).

    `kept` [nnz] are floats, or yes and no (a comparison).
    """

    codes: SparseCodes
    kept: Tensor
    _used: bool

    @staticmethod
    def over(
        owner: nn.Module, codes: SparseCodes, leading: Sequence[int], dtype: torch.dtype, values: Tensor | None = None
    ) -> SparseActivations:
        shape, kept = (*leading, codes.shape[1]), codes.values if values is None else values

        def make() -> Tensor:
            flat = codes.rows() * codes.shape[1] + codes.indices
            dense = kept.new_zeros(codes.shape[0] * codes.shape[1]).index_put((flat,), kept)
            return dense.to(dtype).view(shape)

        new: SparseActivations = fresh(
            SparseActivations, owner, shape, dtype, codes.device, make, kept.requires_grad, None
        )
        new.codes, new.kept, new._used = codes, kept, False
        return new

    def _with(
        self, values: Tensor, dtype: torch.dtype | None = None, codes: SparseCodes | None = None
    ) -> SparseActivations:
        owner = self._owner()
        assert owner is not None
        return SparseActivations.over(owner, codes or self.codes, self.shape[:-1], dtype or self.dtype, values)


def fresh(
    kind: Any,
    owner: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[], Tensor],
    grad: bool,
    columns: Callable[[Tensor], Tensor] | None,
) -> Any:
    new = torch.Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)
    new._make, new._columns, new._dense = make, columns, None
    new._owner, new._in_graph = weakref.ref(owner), grad
    return new


def _made_dense(value: Any, func: Any) -> Any:
    if not isinstance(value, LazyTensor):
        return value
    if value._dense is None:
        owner = value._owner()
        if owner is not None:
            announce(
                owner, f"{getattr(func, '__name__', func)} needs the dense [..., d_sae] tensor, which is made for it"
            )
    return value.dense()


def _scaled(z: SparseActivations, factor: Any, divide: bool = False) -> Any:
    values = z.kept
    if isinstance(factor, Tensor):
        width = z.shape[-1]
        if factor.numel() == width and factor.shape[-1] == width and factor.dim() <= z.dim():
            factor = factor.reshape(-1)[z.codes.indices]
        elif factor.dim() > 0:
            return NotImplemented
        dtype = torch.result_type(torch.empty((), dtype=z.dtype).expand(1), factor)
    elif isinstance(factor, (int, float)) and z.dtype != torch.bool:
        dtype = z.dtype
    else:
        return NotImplemented
    if dtype == torch.bool or not dtype.is_floating_point:
        return NotImplemented
    return z._with(values / factor if divide else values * factor, dtype)


def _times_matrix(z: SparseActivations, W: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(W, Tensor) or isinstance(W, LazyTensor) or W.dim() != 2 or W.shape[0] != z.shape[-1]:
        return NotImplemented
    if not W.is_floating_point() or not z.kept.is_floating_point():
        return NotImplemented
    start = W.new_zeros(W.shape[1]) if bias is None else bias
    out = sparse_decode(z.codes.with_values(z.kept), W, start).to(torch.promote_types(z.dtype, W.dtype))
    return out.view(*z.shape[:-1], W.shape[1])


def _linear(z: SparseActivations, weight: Any, bias: Tensor | None = None) -> Any:
    return _times_matrix(z, weight.T, bias) if isinstance(weight, Tensor) and weight.dim() == 2 else NotImplemented


def column_range(z: SparseActivations, start: int, stop: int) -> SparseActivations:
    """z[..., start:stop]."""
    codes = z.codes
    if start == 0 and stop == codes.shape[1]:
        return z
    inside = (codes.indices >= start) & (codes.indices < stop)
    entries = inside.nonzero().squeeze(1)
    before = torch.cat([codes.row_ptr.new_zeros(1), inside.cumsum(0)])
    row_ptr = before[codes.row_ptr]
    unread = codes.values.detach()[entries]
    part = SparseCodes.trusted(unread, codes.indices[entries] - start, row_ptr, (codes.shape[0], stop - start))
    return z._with(z.kept[entries], codes=part)


def _item(z: SparseActivations, index: Any) -> Any:
    if isinstance(index, SparseActivations):
        # A comparison of these very activations: row-major, as boolean indexing gives it.
        same = index.codes.indices is z.codes.indices and index._dense is None and index.dtype == torch.bool
        return z.kept[index.kept].to(z.dtype) if same else NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, Tensor) for p in parts):
        return NotImplemented
    if len(parts) == 2 and parts[0] is Ellipsis:
        parts = (*[slice(None)] * (z.dim() - 1), parts[1])
    if len(parts) != z.dim() or any(p != slice(None) for p in parts[:-1]) or not isinstance(parts[-1], slice):
        return NotImplemented
    start, stop, step = parts[-1].indices(z.shape[-1])
    return column_range(z, start, max(start, stop)) if step == 1 else NotImplemented


def _split(z: SparseActivations, sizes: Any, dim: int = 0) -> Any:
    if dim % z.dim() != z.dim() - 1:
        return NotImplemented
    width = z.shape[-1]
    if isinstance(sizes, int):
        sizes = [min(sizes, width - at) for at in range(0, width, sizes)]
    if sum(sizes) != width:
        return NotImplemented
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return tuple(column_range(z, end - size, end) for size, end in zip(sizes, ends, strict=True))


def _above(z: SparseActivations, limit: Any) -> Any:
    if isinstance(limit, (int, float)) and limit >= 0 and z.dtype != torch.bool:
        return z._with(z.kept > limit, torch.bool)
    return NotImplemented


def _differs(z: SparseActivations, other: Any) -> Any:
    fits = isinstance(other, (int, float)) and other == 0
    return z._with(z.kept != 0, torch.bool) if fits else NotImplemented


def _as_bool(z: SparseActivations, *_: Any, **__: Any) -> Any:
    return z._with(z.kept != 0, torch.bool)


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(z: SparseActivations) -> Any:
        values = z.kept
        # Values are kept as wide as the accumulators; a narrower type is what the dense tensor will have.
        wide = values if values.is_floating_point() and values.dtype != torch.float64 else values.to(dtype)
        return z._with(wide, dtype)

    return cast


def _to(z: SparseActivations, *args: Any, **kwargs: Any) -> Any:
    wanted = (
        args[0] if len(args) == 1 and not kwargs else kwargs.get("dtype") if not args and len(kwargs) == 1 else None
    )
    if isinstance(wanted, torch.dtype) and wanted.is_floating_point:
        return _cast(wanted)(z)
    if isinstance(wanted, Tensor) and wanted.device == z.device and wanted.is_floating_point():
        return _cast(wanted.dtype)(z)
    return NotImplemented


def _sum(z: SparseActivations, dim: Any = None, **kwargs: Any) -> Any:
    codes = z.codes
    if kwargs or not (dim is None or isinstance(dim, int)):
        return NotImplemented
    values = z.kept.to(torch.int64) if z.dtype == torch.bool else z.kept
    out = torch.int64 if z.dtype == torch.bool else z.dtype
    if dim is None:
        return values.sum().to(out)
    if dim % z.dim() == z.dim() - 1:
        return values.new_zeros(codes.shape[0]).index_add(0, codes.rows(), values).to(out).view(z.shape[:-1])
    if z.dim() != 2:
        return NotImplemented
    return values.new_zeros(codes.shape[1]).index_add(0, codes.indices, values).to(out)


def _any(z: SparseActivations, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else (z.kept != 0).any()


def _detach(z: SparseActivations) -> Any:
    return z._with(z.kept.detach())


def _itself(z: SparseActivations) -> Any:
    return z


_ON_CODES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), _scaled),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__), lambda z, other: _scaled(z, other, divide=True)),
    **dict.fromkeys((Tensor.matmul, torch.matmul, Tensor.__matmul__, Tensor.mm, torch.mm), _times_matrix),
    nn.functional.linear: _linear,
    Tensor.__getitem__: _item,
    **dict.fromkeys((Tensor.split, torch.split, Tensor.split_with_sizes), _split),
    **dict.fromkeys((Tensor.gt, torch.gt, Tensor.__gt__), _above),
    **dict.fromkeys((Tensor.ne, torch.ne, Tensor.__ne__), _differs),
    Tensor.bool: _as_bool,
    Tensor.float: _cast(torch.float32),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.sum, torch.sum), _sum),
    **dict.fromkeys((Tensor.any, torch.any), _any),
    Tensor.detach: _detach,
    Tensor.contiguous: _itself,
    Tensor.to_dense: lambda z: z.dense(),
}


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


_REQUIRES_GRAD = _getters("requires_grad")[0]
_WATCHES = {Tensor.retain_grad, Tensor.register_hook, *_getters("grad")}
_DESCRIBES = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "is_sparse", "is_cuda", "is_quantized", "is_mkldnn"),
    *_getters("is_nested", "is_meta", "is_cpu", "is_mps"),
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.nelement,
        Tensor.__len__,
        Tensor.is_floating_point,
        Tensor.is_complex,
    ),
    *(
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        Tensor.ndimension,
        Tensor.get_device,
        Tensor.element_size,
    ),
}
