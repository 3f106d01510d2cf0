"""Registration of the ops with torch.library: for torch.compile, torch.export, fake tensors and dispatch modes.

An op is three functions over the same tensors: the computation, the sizes, dtypes and strides of its result (for tracers), and
the gradient. Every tensor that a result depends on is an argument, and so is the name of the backend: a gradient runs on the
backend of its forward pass, and a compiled graph keeps the backend that it was traced with.

An untraced call skips the dispatcher: the computation runs in an autograd function with the same gradient. The dispatcher, and
building the codes again behind it, cost 115 microseconds of the 505 of a small step (B 64, d 64, 256 latents, on one CPU core),
and lose what backends keep with the codes between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library

from transcoder.kernels.backend import use_backend
from transcoder.kernels.sparse_codes import LatentOrder, SparseCodes
from transcoder.kernels.sparse_codes import traced as traced  # where the ops look for it

LIBRARY = Library("transcoder", "DEF")


def define(
    schema: str, run: Callable[..., Any], sizes: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> torch._ops.OpOverload:
    """Register `transcoder::<schema>`: `run` computes it, `sizes` returns empty tensors like its results.

    By hand, because torch.library.custom_op costs 25 microseconds a call and this 5 (around an op that does nothing).
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"transcoder::{name}", sizes, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(torch.ops.transcoder, name).default
    return op


def differentiate(op: torch._ops.OpOverload, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its gradient under a tracer."""
    torch.library.register_autograd(op._name, backward, setup_context=setup, lib=LIBRARY)


def differentiable_once(op: torch._ops.OpOverload) -> None:
    """Make the gradient of `op`, itself the gradient of another op, raise instead of returning a wrong result."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{op._name}: the ops are differentiable once; the gradient of a gradient is not implemented"
        )

    differentiate(op, setup, backward)


def run_directly(
    run: Callable[..., Any], remember: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Run an untraced op and its gradient. Data derived from the codes (the last argument) is shared with all holders of the
    codes. `remember` and `backward` are those given to `differentiate`."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            out = run(*inputs)
            remember(ctx, inputs[:-1], out)
            ctx.derived = inputs[-1]
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with use_backend(ctx.backend):
                return *backward(ctx, *grads), None

    call: Callable[..., Any] = Direct.apply
    return call


def codes_of(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    d_sae: int,
    order: Sequence[Tensor] = (),
    derived: dict[str, object] | None = None,
) -> SparseCodes:
    """SparseCodes from an op's tensor arguments, with their feature-major order or other `derived` data where known."""
    shape = (row_ptr.numel() - 1, d_sae)
    if derived is not None:
        # The caller's `derived` data records whether the pattern was validated.
        return SparseCodes(values, indices, row_ptr, shape, derived)
    return SparseCodes.trusted(values, indices, row_ptr, shape, {"by_latent": LatentOrder(*order)} if order else None)


def _by_latent(indices: Tensor, row_ptr: Tensor, d_sae: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    unread = torch.empty_like(indices, dtype=torch.float32)
    with use_backend(backend):
        return tuple(codes_of(unread, indices, row_ptr, d_sae).by_latent())  # type: ignore[return-value]


def _by_latent_sizes(indices: Tensor, row_ptr: Tensor, d_sae: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return indices.new_empty(indices.shape), indices.new_empty(indices.shape), indices.new_empty(d_sae + 1)


by_latent = define(
    "by_latent(Tensor indices, Tensor row_ptr, SymInt d_sae, str backend) -> (Tensor, Tensor, Tensor)",
    _by_latent,
    _by_latent_sizes,
)
"""The feature-major order: permutation [nnz], rows [nnz], latent_ptr [d_sae + 1], all int64 (LatentOrder)."""
