"""Eager PyTorch as anyone would write it: dense codes [B, N], dense products, torch.optim.Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.cases import BETAS, CHECK_RATE, LEARNING_RATE, WEIGHTS, Case, Probe, answers, selected
from bench.interleaved_timing import Variant

Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
PRODUCTS = "Z^T Z of dense codes [B, N], whose making is not timed; sums in fp32, ours in fp64; no joint counts"
GIVEN_DENSE = "is given dense codes [B, N], whose making is not timed; their gradient is dense"


def missing() -> str | None:
    return None


def encoded(x: Tensor, W: Tensor, b: Tensor, k: int, batch: bool) -> Tensor:
    acts = torch.relu(x @ W.T + b)
    if batch:
        flat = acts.flatten()
        top = flat.topk(k * x.shape[0], sorted=False)
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(acts)
    top = acts.topk(k, dim=1, sorted=False)
    return torch.zeros_like(acts).scatter(1, top.indices, top.values)


def prefix_losses(z: Tensor, W: Tensor, b: Tensor, y: Tensor, widths: Sequence[int]) -> Tensor:
    """Each prefix adds its own latents to the reconstruction of the one before."""
    out, start, losses = b.expand(y.shape), 0, []
    for width in widths:
        out = out + z[:, start:width] @ W[start:width]
        losses.append((out - y).square().mean())
        start = width
    return torch.stack(losses)


def encode(case: Case, name: str = "eager PyTorch", wrap: Wrap = lambda f: f) -> list[Variant]:
    W, b = case.leaf("W_enc"), case.leaf("b_enc")
    k, batch = case.size.k, case.activation == "batch_topk"
    function = wrap(lambda x, W, b: encoded(x, W, b, k, batch))

    def tidy() -> None:
        W.grad = b.grad = None

    def answer(probe: Probe) -> dict[str, Tensor]:
        z = function(probe.x, W, b)
        z.sum().backward()
        return {"codes": z, **answers(("W_enc", "b_enc"), W, b)}

    def forward(i: int) -> Tensor:
        return function(case.x(i), W, b).sum()

    return [Variant(name, forward, lambda s: s.backward(), tidy, answer, note="its codes are dense [B, N]")]


def decode(case: Case) -> list[Variant]:
    return [decoding(case, "eager PyTorch", lambda z, y, W, b: z @ W + b, "reconstruction", GIVEN_DENSE)]


def nested_loss(case: Case, name: str = "eager PyTorch", wrap: Wrap = lambda f: f) -> list[Variant]:
    function = wrap(lambda z, y, W, b: prefix_losses(z, W, b, y, case.widths))
    return [decoding(case, name, function, "losses", GIVEN_DENSE)]


def decoding(
    case: Case,
    name: str,
    function: Callable[..., Tensor],
    result: str,
    note: str = "",
    weights: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Variant:
    """`function(z, y, W, b)` from dense codes, which cost nothing here: they were timed where they were made.

    `weights` are the leaves that collect the gradients where `function` holds its own; `transposed` says that W is [d, N].
    """
    W, b = (case.leaf("W_dec"), case.leaf("b_dec")) if weights is None else weights
    # Leaves that share the case's memory.
    dense = [z.detach().requires_grad_() for z in case.dense]

    def scalar(out: Tensor) -> Tensor:
        return out.sum() if result == "losses" else out.square().sum()

    def tidy() -> None:
        for leaf in (W, b, *dense):
            leaf.grad = None

    def forward(i: int) -> Tensor:
        return scalar(function(dense[i % len(dense)], case.x(i), W, b))

    def answer(probe: Probe) -> dict[str, Tensor]:
        z = probe.dense.clone().requires_grad_()
        out = function(z, probe.x, W, b)
        scalar(out).backward()
        found = {result: out, "codes.grad": selected(z), **answers(("W_dec", "b_dec"), W, b)}
        found["W_dec.grad"] = found["W_dec.grad"].T if transposed else found["W_dec.grad"]
        return found

    return Variant(name, forward, lambda s: s.backward(), tidy, answer, note=note)


def correlation(case: Case) -> list[Variant]:
    n = case.size.d_sae
    if 4 * n * n > 1 << 30:
        return []
    products, sums = torch.zeros(n, n, device=case.device), torch.zeros(2, n, device=case.device)

    def forward(i: int) -> None:
        z = case.dense[i % len(case.dense)]
        products.addmm_(z.T, z)
        sums[0] += z.sum(0)
        sums[1] += z.square().sum(0)

    def answer(probe: Probe) -> dict[str, Tensor]:
        z, (i, j) = probe.dense, probe.busiest
        mean = z.mean(0)
        covariance = z.T @ z / len(z) - mean[:, None] * mean
        deviation = covariance.diagonal().sqrt()
        return {"correlation": covariance[i, j] / (deviation[i] * deviation[j])}

    return [Variant("eager PyTorch", forward, answer=answer, note=PRODUCTS)]


def project(W: Tensor) -> None:
    assert W.grad is not None
    W.grad -= (W.grad * W).sum(1, keepdim=True) * W


def normalise(W: Tensor) -> None:
    W.copy_(W / W.norm(dim=1, keepdim=True))


def optimizer(case: Case) -> list[Variant]:
    weights = {name: case.leaf(name) for name in WEIGHTS}
    adam = torch.optim.Adam(weights.values(), lr=LEARNING_RATE, betas=BETAS, fused=True)

    def forward(i: int) -> None:
        for name, w in weights.items():
            # Projection and clipping write into the gradient, whose copy is no part of what is timed.
            w.grad = case.given_gradients[name]
        finish(weights, adam)

    def answer(probe: Probe) -> dict[str, Tensor]:
        checked = {name: case.leaf(name) for name in WEIGHTS}
        optimizer = torch.optim.Adam(checked.values(), lr=CHECK_RATE, betas=BETAS, fused=True)
        for grads in case.gradients():
            for name, grad in grads.items():
                checked[name].grad = grad
            finish(checked, optimizer)
        return case.steps_of(checked)

    note = "projection, norm, clipping, Adam (fused) and unit rows one after another"
    return [Variant("eager PyTorch", forward, answer=answer, note=note)]


def finish(weights: dict[str, Tensor], adam: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        project(weights["W_dec"])
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam.step()
        normalise(weights["W_dec"])
    adam.zero_grad(set_to_none=True)


def step(case: Case, name: str = "eager PyTorch", wrap: Wrap = lambda f: f) -> list[Variant]:
    weights = {n: case.leaf(n) for n in WEIGHTS}
    adam = torch.optim.Adam(weights.values(), lr=LEARNING_RATE, betas=BETAS, fused=True)
    k, batch, widths, d = case.size.k, case.activation == "batch_topk", case.widths, case.size.d

    def loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        return prefix_losses(encoded(x, W_enc, b_enc, k, batch), W_dec, b_dec, x, widths).sum() * d

    function = wrap(loss)

    def forward(i: int) -> None:
        function(case.x(i), *weights.values()).backward()
        finish(weights, adam)

    def tidy() -> None:
        adam.zero_grad(set_to_none=True)

    def answer(probe: Probe) -> dict[str, Tensor]:
        value = function(probe.x, *weights.values())
        value.backward()
        return {"loss": value, **answers(WEIGHTS, *weights.values())}

    return [Variant(name, forward, None, tidy, answer, note="dense codes; no dead counts, no threshold")]
