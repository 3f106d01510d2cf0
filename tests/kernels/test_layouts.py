"""Every op gives the same bits however its arguments lie in memory: strided, transposed, at an offset, expanded.

Numbers are whole, so sums are exact in any order; memory between the elements is poisoned.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transcoder.kernels import (
    FeatureCorrelation,
    SparseCodes,
    batch_topk_encode,
    counts_cpp,
    extension,
    nearest_cpp,
    nested_loss,
    sparse_decode,
    threshold_encode,
    topk_encode,
    use_backend,
)
from transcoder.kernels.adam.op import AdamUpdate, adam_step, one_op_for
from transcoder.kernels.encode import config

ROWS, D, LATENTS = 5, 3, 40
Op = Callable[..., list[Tensor]]


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


def poisoned(shape: list[int], like: Tensor) -> Tensor:
    poison = float("nan") if like.is_floating_point() else like.dtype == torch.bool or 1 << 40
    return torch.full(shape, poison, dtype=like.dtype, device=like.device)


def strided(t: Tensor) -> Tensor:
    view = poisoned([(n + 1) * (n_th + 2) for n_th, n in enumerate(t.shape)], t)
    for axis, n in enumerate(t.shape):
        view = view.narrow(axis, 1, n * (axis + 2)).unfold(axis, 1, axis + 2).squeeze(-1)
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """A matrix whose rows are contiguous columns; of a vector a column of a matrix."""
    if t.dim() == 1:
        matrix = poisoned([t.numel(), 3], t)
        matrix[:, 1] = t
        return matrix[:, 1]
    return t.T.contiguous().T


def at_an_offset(t: Tensor) -> Tensor:
    flat = poisoned([t.numel() + 2], t)
    flat[1:-1] = t.reshape(-1)
    return flat[1:-1].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """The first row, or number, everywhere. Indices stay what they are."""
    return t[:1].expand(t.shape) if t.dim() and (t.is_floating_point() or t.dtype == torch.bool) else strided(t)


LAYOUTS = (strided, transposed, at_an_offset, expanded)


def numbers(*shape: int, seed: int = 0, low: int = -3, high: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randint(low, high, shape, generator=g).float()


def with_gradients(loss: Callable[[], Tensor], results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return [*(t.detach() for t in results), *torch.autograd.grad(loss(), leaves)]


def encode(op: Callable[..., SparseCodes]) -> Op:
    def run(x: Tensor, W: Tensor, b: Tensor, weight: Tensor, *more: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, W, b)]
        codes = op(*leaves, *(more or (3,)))
        # `sum` hands an expanded gradient back.
        loss = codes.values.sum() + (codes.values * weight[codes.indices]).sum()
        return with_gradients(lambda: loss, [codes.values, codes.indices, codes.row_ptr], leaves)

    return run


def decode(values: Tensor, ids: Tensor, ptr: Tensor, W: Tensor, b: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (values, W, b)]
    out = sparse_decode(SparseCodes(leaves[0], ids, ptr, (ROWS, LATENTS)), *leaves[1:])
    return with_gradients(lambda: out.sum() + (out * weight).sum(), [out], leaves)


def nested(
    values: Tensor, ids: Tensor, ptr: Tensor, W: Tensor, b: Tensor, y: Tensor, tokens: Tensor, weights: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (values, W, b, y)]
    codes = SparseCodes(leaves[0], ids, ptr, (ROWS, LATENTS))
    loss = nested_loss(codes, *leaves[1:], [9, 20, 36], weights, token_weights=tokens.abs())
    return with_gradients(lambda: loss.value, [loss.per_prefix, loss.residual], leaves)


def order(values: Tensor, ids: Tensor, ptr: Tensor) -> list[Tensor]:
    codes = SparseCodes(values, ids, ptr, (ROWS, LATENTS))
    return [*codes.by_latent(), codes.rows(), codes.to_dense()]


def correlation(sketch: int | None) -> Op:
    def run(
        values: Tensor, ids: Tensor, ptr: Tensor, mask: Tensor, i: Tensor, j: Tensor, edges: Tensor
    ) -> list[Tensor]:
        monitor = FeatureCorrelation(LATENTS, sketch, device=values.device)
        codes = SparseCodes(values, ids, ptr, (ROWS, LATENTS))
        monitor.update(codes, mask.abs().double())
        monitor.watch(i, j)
        monitor.update(codes, mask > 0)
        monitor.load_state_dict(monitor.state_dict())
        found = monitor.survey(0.3, 1, edges)
        statistics = monitor.statistics(i, j)
        histogram = [] if found.histogram is None else [found.histogram]
        return [monitor.correlation(i, j), statistics.cosine, found.pairs.i, found.pairs.correlation, *histogram]

    return run


def adam(p: Tensor, m: Tensor, v: Tensor, unit: Tensor, unit_m: Tensor, unit_v: Tensor) -> list[Tensor]:
    # Parameters and gradients are contiguous (`takes`); the moments come from a loaded state.
    parameters = [p.clone().contiguous(), torch.nn.functional.normalize(unit.contiguous())]
    for n, parameter in enumerate(parameters):
        parameter.grad = parameter.flip(0) + n
    # Copies by a view of a copy of the storage: in place, and with the strides of the original.
    moments = [copy_of(t) for t in (m, unit_m, v, unit_v)]
    for t in moments[2:]:
        t.abs_()
    module = one_op_for(parameters)
    if module is None:  # backend `torch` has none
        return []
    steps = [torch.zeros((), device=p.device) for _ in parameters]
    update = AdamUpdate(
        parameters, moments[:2], moments[2:], steps, unit_rows=1, lr=0.5, betas=(0.5, 0.5), eps=1.0, max_norm=9.0
    )
    return [adam_step(module, update), *parameters, *moments, *steps]


def copy_of(t: Tensor) -> Tensor:
    if 0 in t.stride():  # several elements in one place cannot be written
        return t.contiguous()
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage().clone())
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def codes() -> list[Tensor]:
    with use_backend("torch"):
        z = SparseCodes.from_dense(numbers(ROWS, LATENTS, seed=1, low=-20))
    return [z.values, z.indices, z.row_ptr]


def cases() -> dict[str, tuple[Op, list[Tensor]]]:
    encoder = [
        numbers(ROWS, D, seed=2),
        numbers(LATENTS, D, seed=3),
        numbers(LATENTS, seed=4),
        numbers(LATENTS, seed=5),
    ]
    decoder = [*codes(), numbers(LATENTS, D, seed=6), numbers(D, seed=7)]
    pairs = [torch.tensor([3, 9, 0, 17]), torch.tensor([8, 2, 39, 30])]
    counted = [*codes(), numbers(ROWS, seed=9), *pairs, torch.linspace(-1, 1, 5, dtype=torch.float64)]
    return {
        "topk": (encode(topk_encode), encoder),
        "batch_topk": (encode(batch_topk_encode), encoder),
        "threshold": (encode(threshold_encode), [*encoder, numbers(LATENTS, seed=8).abs()]),
        "decode": (decode, [*decoder, numbers(ROWS, D, seed=10)]),
        "nested": (nested, [*decoder, numbers(ROWS, D, seed=11), numbers(ROWS, seed=12), numbers(3, seed=13).abs()]),
        "order": (order, codes()),
        "correlation": (correlation(None), counted),
        "sketch": (correlation(32), counted),
        "adam": (adam, [numbers(t, D, seed=n) for n, t in enumerate((4, 4, 4, 6, 6, 6))]),
    }


def check(
    op: Op, arguments: list[Tensor], device: torch.device | str = "cpu", turns: tuple[int, ...] = (0, 1, 2, 3)
) -> None:
    """Each argument in another layout each turn, all of them at a time."""
    for turn in turns:
        laid = [LAYOUTS[(n + turn) % len(LAYOUTS)](t.to(device)) for n, t in enumerate(arguments)]
        want = op(*(t.contiguous().clone() for t in laid))
        for n, (a, b) in enumerate(zip(op(*laid), want, strict=True)):
            assert torch.equal(a.nan_to_num(7777), b.nan_to_num(7777)), f"turn {turn}: result {n}"


@pytest.mark.parametrize("name", cases())
def test_layouts_never_show(name: str, cpu_backend: str) -> None:
    check(*cases()[name])


@pytest.mark.interpreted
@pytest.mark.parametrize("name", cases())
def test_layouts_never_show_to_triton(name: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: 1)  # every kernel runs: tiles are computed again
    with use_backend("triton"):
        # Two turns: neighbours swap a strided layout with an expanded or a transposed one.
        check(*cases()[name], triton_device, (0, 3))


def test_layouts_never_show_to_the_helpers_in_cpp() -> None:
    if not extension.usable():
        pytest.skip("no C++ compiler")

    def helpers(
        values: Tensor, ids: Tensor, ptr: Tensor, place: Tensor, weights: Tensor, i: Tensor, j: Tensor
    ) -> list[Tensor]:
        z = SparseCodes(values, ids, ptr, (ROWS, LATENTS))
        marks, sums = torch.zeros(4 * LATENTS, dtype=torch.uint8), torch.zeros(6, i.numel(), 4, dtype=torch.float64)
        counts_cpp.mark_sequences(z, place, weights.abs(), 4, marks)
        counts_cpp.add_by_group(z, i, j, place, weights.abs(), sums)
        return [marks, sums, nearest_cpp.rows_in_zeros(z.to_dense()[:4], i, LATENTS)]

    place = torch.tensor([2, 0, 1, 3, 3])
    pairs = [torch.tensor([3, 9, 0, 17]), torch.tensor([8, 2, 39, 30])]
    check(helpers, [*codes(), place, numbers(ROWS, seed=3), *pairs])

    def samples(group: Tensor, score: Tensor, activation: Tensor, rows: Tensor, tokens: Tensor) -> list[Tensor]:
        whole = {"dtype": torch.int64}
        store = [torch.zeros(6, 2) - 1, *(torch.zeros(6, 2, **kind) for kind in ({}, whole, whole, whole, whole))]
        store.append(torch.zeros(6, 2, 3, dtype=torch.int32))
        batch = (tokens, tokens + 1, None, torch.ones(ROWS, 3, dtype=torch.int32))
        counts_cpp.offer_samples(group, score.abs(), activation, rows, batch, 1, 2, store)
        return store

    entries = [torch.tensor([0, 5, 5, 1, 2, 5, 3]), numbers(7), numbers(7, seed=1), torch.tensor([0, 1, 2, 3, 4, 0, 2])]
    check(samples, [*entries, torch.arange(ROWS)])
