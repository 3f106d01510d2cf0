"""Records the launches of a part of the program, without a GPU and without memory.

The program runs on fake tensors (sizes and dtypes, no data) with backend `triton`. Kernels are noted instead of launched, with
the grid and the arguments that their launcher chose; every PyTorch operation in between is noted too. So the counts are those
of the real launchers; and since fake tensors hold no values, a launcher that reads one fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its arguments by name, tensors as fake tensors."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.arguments[name]
        except KeyError as error:
            raise AttributeError(name) from error


@dataclass(frozen=True)
class Call:
    """One PyTorch operation and the bytes of memory that it reads and writes."""

    operation: str
    bytes: int


@dataclass
class Recorder(TorchDispatchMode):
    """Collects the events of one section at a time."""

    events: list[Launch | Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def section(self) -> list[Launch | Call]:
        """The events since the last call."""
        done, self.events = self.events, []
        return done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = moved_bytes(func, args, kwargs, result)
        if moved:
            self.events.append(Call(str(func), moved))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _bytes(tensor: Tensor) -> int:
    """Bytes of the memory of a tensor; repetitions of an expanded one are not counted."""
    stored = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= size if stride else 1
    return stored * tensor.element_size()


UNTOUCHED = ("empty", "new_empty", "lift_fresh", "detach")
WRITES_ALL = ("zero_", "fill_", "copy_", "zeros_like", "ones_like", "full_like", "new_zeros")
"""Arguments that are overwritten, or of which only the shape is used, are not read."""
PICKS = ("index", "index_select", "gather")
SCATTERS = ("index_add_", "scatter_", "scatter_add_")
RADIX_BITS = 8


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Inputs read once and results written once, no credit for a cache; sorts by the passes of a radix sort."""
    name = func._schema.name.split("::")[1]
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if not func._schema.name.startswith("aten::") or is_view or name.startswith(UNTOUCHED):
        return 0
    made = sum(
        _bytes(t) for r, t in zip(returns, _as_tuple(result), strict=False) if not r.alias_info for t in _tensors(t)
    )
    if name == "sort":
        keys = args[0]
        return 2 * (keys.element_size() * 8 // RADIX_BITS) * keys.numel() * (keys.element_size() + 8)
    if name in PICKS:
        ids = args[1] if name == "index" else args[2]
        return 2 * made + sum(_bytes(t) for t in _tensors(ids))
    if name in SCATTERS:
        ids, source = args[2], _tensors(args[3:])
        return sum(map(_bytes, [ids, *source])) + 2 * ids.numel() * args[0].element_size()
    read: dict[int, int] = {}
    written = 0
    for argument, value in zip(func._schema.arguments, args, strict=False):
        for tensor in _tensors(value):
            overwritten = argument.alias_info is not None and argument.alias_info.is_write
            # Adam's schema lets it unscale gradients in place, which it does for a gradient scaler only.
            if overwritten and not (name == "_fused_adam_" and argument.name == "grads"):
                written += _bytes(tensor)
            if not (name in WRITES_ALL and argument is func._schema.arguments[0]):
                key = tensor.untyped_storage()._cdata
                read[key] = max(read.get(key, 0), _bytes(tensor))
    return sum(read.values()) + written + made


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@contextmanager
def recording(architecture: str, multiprocessors: int) -> Iterator[Recorder]:
    """Fake tensors, backend `triton` as on a chip of `architecture`, and a recorder that sees every launch.

    Use it in a separate process: afterwards the backends stay imported as if Triton could run here.
    """
    import triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.tools.tensor_descriptor import TensorDescriptor

    from transcoder.kernels import registration, triton_support, use_backend

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # A descriptor stands for its tensor.
        tensors = [arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args]
        named = dict(zip(self.arg_names, tensors))  # noqa: B905
        recorder.events.append(Launch(self.fn.__name__, tuple(grid), named | kwargs))

    recorder = Recorder()
    with ExitStack() as stack:
        # Before the backends are imported: they look whether Triton can run and bind these names.
        stack.enter_context(mock.patch.object(triton_support, "usable", return_value=True))
        stack.enter_context(mock.patch.object(triton_support, "check_device", return_value=None))
        from transcoder.kernels.decode import triton_backend as decode
        from transcoder.kernels.encode import triton_backend as encode

        stack.enter_context(mock.patch.object(encode, "_architecture", return_value=architecture))
        stack.enter_context(mock.patch.object(encode, "_multiprocessors", return_value=multiprocessors))
        stack.enter_context(mock.patch.object(encode, "_totals", {}))
        # A traced op would hide its launches from the recorder.
        stack.enter_context(mock.patch.object(registration, "traced", return_value=False))
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", note))
        # It keeps tensors, which must not outlive their mode.
        decode._on_device.cache_clear()
        stack.callback(decode._on_device.cache_clear)
        for context in (use_backend("triton"), FakeTensorMode(), recorder):
            stack.enter_context(context)
        yield recorder
