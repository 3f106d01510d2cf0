"""Tensors whose contents are made where something reads them, and that are PyTorch's own in every other respect.

A `LazyTensor` is a node of autograd's graph like any tensor: `requires_grad`, `grad_fn`, hooks, views, counts of changes in
place are PyTorch's. Whatever asks for its contents gets a view of it (`dense`): a plain tensor that shares the contents, the
graph and the count of changes, so a change in place, through whatever view, changes it, and is followed by autograd.

A subclass may answer single functions without the contents (`_shortcut`) as long as no other reader can tell (`untouched`).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from transcoder.interop.accelerate.tensor_guard import Unchanged


class DenseView(UserWarning):
    """Something an accelerated module could not do on compressed codes: done densely, as fast as the library itself is."""


def announce(module: nn.Module, what: str) -> None:
    """Warn once a module and reason."""
    told: set[str] = module.__dict__.setdefault("_transcoder_announced", set())
    if what not in told:
        told.add(what)
        warnings.warn(f"transcoder.accelerate: {type(module).__name__}: {what}", DenseView, stacklevel=3)


class Source:
    """Where a lazy tensor's contents come from."""

    def contents(self) -> Tensor:
        """A tensor of its own memory, without a graph."""
        raise NotImplementedError

    def pull(self, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Gradients of the inputs it was born from."""
        raise NotImplementedError


class Computed(Source):
    """`make(*inputs)`, its ReLU with `relu`: by the modes (gradients, autocast, inference) of now, whenever it is computed.

    Args:
        reads: refuses to compute from inputs that have changed.
    """

    def __init__(
        self, what: str, make: Callable[..., Tensor], inputs: Sequence[Tensor], reads: Unchanged, *, relu: bool
    ) -> None:
        self.what, self.make, self.inputs, self.reads, self.relu = what, make, inputs, reads, relu
        device = inputs[0].device.type
        self.inference = torch.is_inference_mode_enabled()
        self.grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._graph: tuple[Tensor, list[Tensor]] | None = None
        self._positive: Tensor | None = None

    @contextlib.contextmanager
    def modes(self, grad: bool) -> Iterator[None]:
        device, dtype, enabled = self.autocast
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            yield

    def _run(self) -> Tensor:
        self.reads.check(self.what)
        with self.modes(self.grad):
            leaves = [t.detach().requires_grad_(self.grad and t.requires_grad) for t in self.inputs]
            out = self.make(*leaves)
        if self.grad:
            self._graph = out, leaves
        return out

    def contents(self) -> Tensor:
        out = self._run()
        with self.modes(False):
            made = out.detach()
            if self.relu:
                # The product's gradient does not need its result.
                made = made.relu_()
                self._positive = made > 0 if self.grad else None
        return made

    def pull(self, grad: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            if self._graph is None or not self._graph[0].requires_grad:
                # Read where autograd was already passed: the graph is made now.
                self._positive = self._run().detach() > 0 if self.relu else None
        assert self._graph is not None
        out, leaves = self._graph
        grad = grad.to(out.dtype)
        if self._positive is not None:
            grad = grad * self._positive
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, retain_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]


class _View(Source):
    """A view of another lazy tensor (`part`: one of those that `func` gives): its contents are a view of that one's."""

    def __init__(
        self, parent: LazyTensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any], part: int | None
    ) -> None:
        self.parent, self.func, self.args, self.kwargs, self.part = parent, func, args, kwargs, part
        self.grad = torch.is_grad_enabled()
        self.version = 0 if parent.is_inference() else parent._version

    def again(self) -> Tensor:
        """The view of what the other is by now, in the graph if this one was taken in it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.grad):
            return self._of(self.parent.dense())

    def contents(self) -> Tensor:
        return self._of(self.parent.contents())

    def _of(self, parent: Tensor) -> Tensor:
        found: Any = self.func(parent, *self.args, **self.kwargs)
        return found if self.part is None else found[self.part]


class _Born(torch.autograd.Function):
    """A lazy tensor in the graph of what it is made from."""

    @staticmethod
    def forward(ctx: Any, cls: Any, source: Source, meta: Tensor, device: torch.device, *inputs: Tensor) -> Any:
        ctx.source = source
        ctx.set_materialize_grads(False)
        return _shell(cls, source, meta, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:]
        found = [None] * len(needs) if grad is None else ctx.source.pull(grad, needs)
        return (None, None, None, None, *found)


def _shell(cls: Any, source: Source, meta: Tensor, device: torch.device) -> Any:
    """Of the shape, strides and type of `meta`."""
    place: dict[str, Any] = {"strides": meta.stride(), "storage_offset": meta.storage_offset()}
    new: Any = torch.Tensor._make_wrapper_subclass(cls, meta.shape, **place, dtype=meta.dtype, device=device)
    new._source, new._raw, new._parent, new._owner = source, None, None, None
    new._node, new._needs, new._used, new._watched = None, False, False, False
    return new


class LazyTensor(torch.Tensor):
    """A tensor whose contents are made when something asks for them: `dense()`."""

    _source: Source
    _raw: Tensor | None
    _parent: LazyTensor | None
    _owner: weakref.ref[nn.Module] | None
    _node: Any
    _needs: bool
    _used: bool
    _watched: bool

    @classmethod
    def born(
        cls,
        owner: weakref.ref[nn.Module] | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: Source,
        inputs: Sequence[Tensor],
    ) -> Any:
        """A new one, in the graph of `inputs`: those that `source.pull` gives gradients of."""
        meta, device = torch.empty(tuple(shape), dtype=dtype, device="meta"), inputs[0].device
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            new = _Born.apply(cls, source, meta, device, *inputs)
        else:
            new = _shell(cls, source, meta, device)
        new._owner = owner
        new.settle()
        return new

    def settle(self) -> None:
        """What it is in the graph now is what it was born as."""
        with torch._C.DisableTorchFunctionSubclass():
            self._node, self._needs = self.grad_fn, self.requires_grad

    def untouched(self) -> bool:
        """Whether what it was born from says all about it: contents not made, graph its own, gradient not watched."""
        chain = [self]
        while chain[-1]._parent is not None:
            chain.append(chain[-1]._parent)
        if any(at._raw is not None or at._watched for at in chain):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return all(at.requires_grad == at._needs and at.grad_fn is at._node for at in chain)

    def contents(self) -> Tensor:
        if self._raw is None:
            self._raw = self._source.contents().to(self.dtype)
        return self._raw

    def dense(self) -> Tensor:
        """The same as a plain tensor: a view, in its graph. Changing either changes both."""
        self.contents()
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(self._source, _View):
                if not self._watched and self.requires_grad == self._needs:
                    again = self._source.again()
                    # Past this one's own place in the graph, not past the other's.
                    self._used = self._used or again.requires_grad
                    return again
                if not self.is_inference() and self._version != self._source.version:
                    raise RuntimeError(
                        "transcoder.accelerate: a part of activations whose gradient is asked for was changed in place: take "
                        "the part of `activations.dense()`"
                    )
            view: Tensor = torch.ops.aten.alias.default(self)
        return view

    def use(self) -> None:
        """Note that its values went into a graph by another way than through it."""
        at: LazyTensor | None = self
        while at is not None:
            at._used = True
            at = at._parent

    def _watch(self, func: Any) -> None:
        if self._used:
            raise RuntimeError(
                f"transcoder.accelerate: {_name(func)} on activations that were used already (decoded, multiplied): their "
                "gradient exists for the selected entries only. Call it before they are used, or go on with "
                "`activations.dense()` in their place"
            )
        self._watched = True

    def _shortcut(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """func(*args, **kwargs) of this untouched tensor, args[0], without its contents, or NotImplemented."""
        return NotImplemented

    def _view_kind(self) -> Any:
        return LazyTensor

    def _announce(self, func: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if self._raw is None and owner is not None:
            announce(owner, f"{_name(func)} needs the dense [..., d_sae] tensor, which is made for it")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mine = args[0] if args and isinstance(args[0], LazyTensor) else None
        if func in _WATCHES and mine is not None:
            mine._watch(func)
        elif func in _ENGINE:
            tree_map_only(LazyTensor, lambda t: t._watch(func), _inputs(func, args, kwargs))
        elif func == _GRAD and mine is not None:
            # Reading `.grad` watches nothing, but there is none of what was used past it.
            mine._watch(func) if mine._used else None
        elif func not in _AS_IT_IS:
            return _read(func, args, kwargs, mine)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Below autograd, which has recorded its part: of plain contents.
        kwargs = kwargs or {}
        if func in _VIEWS and isinstance(args[0], LazyTensor):
            return _views(args[0], func, args[1:], kwargs)
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.contents(), (args, kwargs))
        return func(*args, **kwargs)


def _read(func: Any, args: Sequence[Any], kwargs: dict[str, Any], mine: LazyTensor | None) -> Any:
    if func == _SET_DATA and mine is not None:
        raise RuntimeError(
            "transcoder.accelerate: `.data =` on activations is not supported; use `copy_` under no_grad"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError("transcoder.accelerate: compiled code got activations that hold codes; give it `.dense()`")
    if mine is not None and mine.untouched():
        found = mine._shortcut(func, args, kwargs)
        if found is not NotImplemented:
            return found
    given: list[tuple[LazyTensor, Tensor]] = []

    def densified(lazy: LazyTensor) -> Tensor:
        lazy._announce(func)
        given.append((lazy, lazy.dense()))
        return given[-1][1]

    dense_args, dense_kwargs = tree_map_only(LazyTensor, densified, (tuple(args), kwargs))
    found = func(*dense_args, **dense_kwargs)
    for lazy, view in given:
        if view.shape != lazy.shape or view.stride() != lazy.stride():
            raise RuntimeError(f"transcoder.accelerate: {_name(func)} changes the shape in place: give it `.dense()`")
        if found is view:
            # A change in place, or what gives back its argument: the argument itself, with all of its graph.
            return lazy
    return found


def _views(parent: LazyTensor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Views that are lazy themselves."""
    like = torch.empty(0, dtype=parent.dtype, device="meta").as_strided(
        parent.shape, parent.stride(), parent.storage_offset()
    )
    found = func(like, *args, **kwargs)
    many = isinstance(found, (list, tuple))
    new = []
    for part, meta in enumerate(found if many else [found]):
        # A view of an inference tensor is one.
        with torch.inference_mode(parent.is_inference()):
            source = _View(parent, func, args, kwargs, part if many else None)
            view = _shell(parent._view_kind(), source, meta, parent.device)
        view._parent, view._owner = parent, parent._owner
        new.append(view)
    return new if many else new[0]


def _inputs(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an engine call takes gradients with respect to."""
    place = 1 if func is torch.autograd.grad else 4
    return kwargs.get("inputs", args[place] if len(args) > place else None)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


def _functions(owner: Any, *names: str) -> list[Any]:
    return [getattr(owner, name) for name in names]


_GRAD = _getters("grad")[0]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_WATCHES = {
    Tensor.retain_grad,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
    *_getters("grad_fn"),
}
_ENGINE = {torch.autograd.backward, torch.autograd.grad, Tensor.backward}
_VIEWS = {
    torch.ops.aten.detach.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
}
"""Views that stay lazy. `alias` is not one of them: it is what `dense` asks by."""

_AS_IT_IS = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "is_sparse", "is_cuda", "is_quantized", "is_mkldnn"),
    *_getters("is_nested", "is_meta", "is_cpu", "is_mps", "requires_grad", "is_leaf", "retains_grad", "output_nr"),
    *_getters("_version", "_backward_hooks"),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    Tensor.grad.__set__,  # type: ignore[union-attr]
    Tensor.grad.__delete__,  # type: ignore[union-attr]
    *_functions(Tensor, "requires_grad_", "size", "stride", "storage_offset", "is_contiguous", "dim", "ndimension"),
    *_functions(Tensor, "numel", "nelement", "__len__", "is_floating_point", "is_complex", "is_inference"),
    *_functions(Tensor, "get_device", "element_size"),
    *_functions(torch, "is_floating_point", "is_complex", "is_inference", "numel"),
}
"""What PyTorch itself answers, as of any tensor."""
