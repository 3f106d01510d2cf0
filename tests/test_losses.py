from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transcoder.kernels import SparseCodes, topk_encode
from transcoder.kernels.encode.reference import topk_encode_reference
from transcoder.losses import CONVENTIONS, auxk_loss, reconstruction_loss


def problem(rows: int = 12, d_sae: int = 20, d: int = 6) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.rand(rows, d_sae, generator=g, dtype=torch.float64) * (torch.rand(rows, d_sae, generator=g) < 0.4)
    return (
        SparseCodes.from_dense(z),
        torch.randn(d_sae, d, generator=g, dtype=torch.float64),
        torch.randn(d, generator=g, dtype=torch.float64),
        torch.randn(rows, d, generator=g, dtype=torch.float64),
    )


def by_hand(
    convention: str, z: Tensor, W: Tensor, b: Tensor, y: Tensor, widths: list[int], weights: list[float]
) -> Tensor:
    """Each library's own way of writing it, dense."""
    errors = [z[:, :w] @ W[:w] + b - y for w in widths]
    per_token = [(e**2).sum(-1).mean() for e in errors]
    weighted = [w * e for w, e in zip(weights, per_token, strict=True)]
    if convention == "saelens":
        return sum(weighted)
    if convention == "dictionary_learning":
        return torch.stack(weighted).mean()
    if convention == "fvu":
        total = ((y - y.mean(0)) ** 2).sum()
        return sum(w * (e**2).sum() / total for w, e in zip(weights, errors, strict=True)) / sum(weights)
    return sum(w * (e**2).mean() for w, e in zip(weights, errors, strict=True)) / sum(weights)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_what_the_libraries_write(convention: str) -> None:
    codes, W, b, y = problem()
    widths, weights = [5, 12, 20], [1.0, 0.5, 2.0]
    W = W.requires_grad_()
    got = reconstruction_loss(codes, W, b, y, widths, weights, convention)
    want = by_hand(convention, codes.to_dense(), W, b, y, widths, weights)
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(torch.autograd.grad(got.loss, W), torch.autograd.grad(want, W))
    full = codes.to_dense() @ W.detach() + b - y
    torch.testing.assert_close(got.mse_per_prefix[-1], (full**2).mean())
    torch.testing.assert_close(got.fvu_per_prefix[-1], (full**2).sum() / ((y - y.mean(0)) ** 2).sum())
    torch.testing.assert_close(got.residual, full)


def test_unknown_convention() -> None:
    codes, W, b, y = problem()
    with pytest.raises(ValueError, match="convention: expected one of mse"):
        reconstruction_loss(codes, W, b, y, [20], [1.0], "l1")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("aux_k", [2, 50])
def test_auxk_value_and_every_gradient_match_a_dense_float64_version(convention: str, aux_k: int) -> None:
    """The encoder's gradient is the point: one peer's fused encoder drops it, and dead latents then never come back."""
    _, W_dec, _, y = problem()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 7, generator=g, dtype=torch.float64)
    W_enc = torch.randn(20, 7, generator=g, dtype=torch.float64).requires_grad_()
    b_enc = torch.randn(20, generator=g, dtype=torch.float64).requires_grad_()
    W_dec = W_dec.requires_grad_()
    residual, dead = torch.randn(12, 6, generator=g, dtype=torch.float64), torch.tensor([1, 4, 5, 11, 19])
    variance = (y - y.mean(0)).square().mean()

    got = auxk_loss(x, residual, W_enc, b_enc, W_dec, dead, aux_k, variance, convention)

    k = min(aux_k, 5)
    z = topk_encode_reference(x, W_enc[dead], b_enc[dead], k)
    squared = (z @ W_dec[dead] + residual) ** 2
    scale = min(5 / aux_k, 1.0)
    want = {
        "mse": scale * squared.mean(),
        "saelens": scale * squared.sum(-1).mean(),
        "fvu": scale * squared.mean() / variance,
        "dictionary_learning": squared.mean() / (residual - residual.mean(0)).square().mean(),
    }[convention]
    torch.testing.assert_close(got, want)
    leaves = (W_enc, b_enc, W_dec)
    for actual, expected in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(actual, expected)
        live = torch.ones(20, dtype=torch.bool).index_fill(0, dead, False)
        assert float(actual[dead].abs().sum()) > 0
        assert float(actual[live].abs().sum()) == 0


def test_token_weights_scale_each_tokens_error() -> None:
    codes, W, b, y = problem()
    weights = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = reconstruction_loss(codes, W, b, y, [20], [1.0], token_weights=weights).loss
    torch.testing.assert_close(got, (weights[:, None] * (codes.to_dense() @ W + b - y) ** 2).mean())
    once = reconstruction_loss(codes, W, b, y, [20], [1.0], token_weights=torch.ones(12)).loss
    torch.testing.assert_close(once, reconstruction_loss(codes, W, b, y, [20], [1.0]).loss)


def test_codes_from_the_encoder_pass_the_loss_back_to_it() -> None:
    _, W_dec, b, y = problem()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(12, 7, generator=g, dtype=torch.float64)
    W_enc = torch.randn(20, 7, generator=g, dtype=torch.float64).requires_grad_()
    b_enc = torch.zeros(20, dtype=torch.float64)
    got = reconstruction_loss(topk_encode(x, W_enc, b_enc, 3), W_dec, b, y, [8, 20], [1.0, 1.0]).loss
    z = topk_encode_reference(x, W_enc, b_enc, 3)
    want = by_hand("mse", z, W_dec, b, y, [8, 20], [1.0, 1.0])
    torch.testing.assert_close(torch.autograd.grad(got, W_enc), torch.autograd.grad(want, W_enc))


DEGENERATE = {
    "one row": torch.tensor([[3.0, -1.0, 2.0, 0.5, 1.0, -2.0]]),
    "constant": torch.full((12, 6), 0.1),
    "constant rows": torch.tensor([[0.1, 7.3, -2.7, 1e3, 1e-3, 0.7]]).expand(12, 6),
    "zero": torch.zeros(12, 6),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_targets_that_do_not_vary_have_a_finite_loss_and_gradient(convention: str, name: str) -> None:
    """FVU is then a share of the targets' mean square, and of 1 where they are 0."""
    y = DEGENERATE[name]
    codes, W, b, _ = problem(rows=len(y))
    codes = SparseCodes.from_dense(codes.to_dense().float())
    W, b = W.float().requires_grad_(), b.float()
    got = reconstruction_loss(codes, W, b, y, [20], [1.0], convention)
    errors = (codes.to_dense() @ W.detach() + b - y).square().mean()
    size = y.square().mean() if y.any() else torch.ones(())
    torch.testing.assert_close(got.fvu_per_prefix[0], errors / size)
    if convention == "fvu":
        torch.testing.assert_close(got.loss.detach(), errors / size)
    (gradient,) = torch.autograd.grad(got.loss, W)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_auxk_of_one_row_is_finite(convention: str) -> None:
    _, W_dec, _, y = problem(rows=1)
    g = torch.Generator().manual_seed(1)
    x, W_enc = (torch.randn(n, 7, generator=g, dtype=torch.float64) for n in (1, 20))
    W_enc.requires_grad_()
    variance = reconstruction_loss(
        SparseCodes.from_dense(torch.ones(1, 20, dtype=torch.float64)), W_dec, y[0] * 0, y, [20], [1.0]
    ).target_variance
    residual = torch.randn(1, 6, generator=g, dtype=torch.float64)
    loss = auxk_loss(x, residual, W_enc, W_enc.detach().sum(1), W_dec, torch.tensor([1, 2, 3]), 2, variance, convention)
    assert 0 < float(loss.detach()) < 1e6
    assert bool(torch.isfinite(torch.autograd.grad(loss, W_enc)[0]).all())
