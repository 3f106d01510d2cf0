"""This package: the backend that runs by default, and PyTorch's sparse operations for comparison."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import CHECK_RATE, ENCODE, LEARNING_RATE, SKETCH, WEIGHTS, Case, Probe, answers
from bench.interleaved_timing import Variant
from transcoder.config import TrainingSection
from transcoder.kernels import FeatureCorrelation, SparseCodes, sparse_decode, use_backend
from transcoder.kernels import nested_loss as nested_loss_op
from transcoder.kernels.backend import active_backend, has_backend
from transcoder.kernels.correlation.cpp_backend import WaitingPairs
from transcoder.kernels.correlation.op import EXACT_LIMIT
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step

UPDATES = 32
"""Correlation updates in one measurement, at least: pairs of many batches are added together."""


def variants(operation: str, case: Case) -> list[Variant]:
    """The default backend first; then the others that this machine can run."""
    default = active_backend(case.device)
    others = [name for name in ("triton", "cpp", "torch") if name != default and has_backend(name, "encode")]
    if case.device.type == "cuda":
        others = [name for name in others if name != "cpp"]
    make: Callable[[Case], Variant] = globals()[operation]
    found = [_on(backend, make, case) for backend in (default, *others)]
    if operation == "encode" and case.activation == "topk" and default == "cpp":
        found.append(_on("cpp", make, case, screen="bf16"))
    if operation in ("encode", "step") and case.device.type == "cuda":
        found.append(_in_bf16(_on(default, make, case)))
    return found


def _in_bf16(variant: Variant) -> Variant:
    """Products in bf16 under autocast, as training on a GPU does. Its selection differs, so its results are not compared."""
    forward = variant.forward

    def run(i: int) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return forward(i)

    why = "bf16 products select other latents"
    return replace(variant, name=f"{variant.name} bf16", forward=run, answer=None, unchecked=why)


def _on(backend: str, make: Callable[[Case], Variant], case: Case, screen: str | None = None) -> Variant:
    def chosen(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any) -> Any:
            with use_backend(backend), mock.patch.dict(os.environ, {"TRANSCODER_SCREEN": str(screen)}):
                return call(*words)

        def plainly(*words: Any) -> Any:
            with use_backend(backend):
                return call(*words)

        return plainly if screen is None else run

    variant = make(case)
    variant.name, variant.ours = f"ours ({backend}{'' if screen is None else f', {screen} screen'})", True
    variant.forward = chosen(variant.forward)
    variant.backward = variant.backward and chosen(variant.backward)
    variant.answer = variant.answer and chosen(variant.answer)
    return variant


def encode(case: Case) -> Variant:
    W, b = case.leaf("W_enc"), case.leaf("b_enc")
    op, k = ENCODE[case.activation], case.size.k

    def tidy() -> None:
        W.grad = b.grad = None

    def answer(probe: Probe) -> dict[str, Tensor]:
        codes = op(probe.x, W, b, k)
        codes.values.sum().backward()
        return {"codes": codes.to_dense(), **answers(("W_enc", "b_enc"), W, b)}

    return Variant("ours", lambda i: op(case.x(i), W, b, k).values.sum(), lambda loss: loss.backward(), tidy, answer)


def _fresh(codes: SparseCodes, values: Tensor) -> SparseCodes:
    """Codes without derived data, as from the encoder: each step sorts its codes by latent."""
    return SparseCodes.trusted(values, codes.indices, codes.row_ptr, codes.shape)


def decode(case: Case) -> Variant:
    return _decoding(case, nested=False)


def nested_loss(case: Case) -> Variant:
    return _decoding(case, nested=True)


def _decoding(case: Case, nested: bool) -> Variant:
    W, b = case.leaf("W_dec"), case.leaf("b_dec")
    # Leaves that share the case's memory.
    values = [codes.values.detach().requires_grad_() for codes, _ in case.coded]

    def result(codes: SparseCodes, v: Tensor, y: Tensor) -> Tensor:
        codes = _fresh(codes, v)
        return nested_loss_op(codes, W, b, y, case.widths).per_prefix if nested else sparse_decode(codes, W, b)

    def tidy() -> None:
        for leaf in (W, b, *values):
            leaf.grad = None

    def scalar(out: Tensor) -> Tensor:
        return out.sum() if nested else out.square().sum()

    def forward(i: int) -> Tensor:
        n = i % len(case.coded)
        codes, y = case.coded[n]
        return scalar(result(codes, values[n], y))

    def answer(probe: Probe) -> dict[str, Tensor]:
        v = probe.codes.values.clone().requires_grad_()
        out = result(probe.codes, v, probe.x)
        scalar(out).backward()
        assert v.grad is not None
        name = "losses" if nested else "reconstruction"
        return {name: out, "codes.grad": v.grad[v.detach() > 0], **answers(("W_dec", "b_dec"), W, b)}

    return Variant("ours", forward, lambda loss: loss.backward(), tidy, answer)


def updates_timed(case: Case) -> int:
    """Correlation updates in one measurement: at least UPDATES. On the CPU pairs wait for those of later batches; there it is
    a multiple of the updates after which they are added: each round does so. Every entry of these codes fires."""
    size = case.size
    if case.device.type != "cpu" or size.d_sae > EXACT_LIMIT:
        return UPDATES
    period = max(1, -(-WaitingPairs(size.d_sae).limit // (size.rows * size.k)))
    return period * -(-UPDATES // period)


def correlation(case: Case) -> Variant:
    size, updates = case.size, updates_timed(case)

    def statistics() -> FeatureCorrelation:
        return FeatureCorrelation(size.d_sae, None if size.d_sae <= EXACT_LIMIT else SKETCH, device=case.device)

    monitor = statistics()

    def forward(i: int) -> None:
        for n in range(updates):
            monitor.update(case.codes[(i * updates + n) % len(case.codes)])
        # Reading adds all buffered updates to the sums, so no work of this round is left for the next.
        monitor.correlation(0, 1)

    def answer(probe: Probe) -> dict[str, Tensor]:
        fresh = statistics()
        fresh.update(probe.codes)
        return {"correlation": fresh.correlation(*probe.busiest)}

    note = f"mean of {updates} updates, the adding of what waits included"
    if size.d_sae > EXACT_LIMIT:
        note = f"mean of {updates} updates; a sketch of {SKETCH} signs a token"
    return Variant("ours", forward, answer=answer, note=note, per=updates)


def _model(case: Case) -> Transcoder:
    size = case.size
    config = TranscoderConfig(
        size.d, size.d, size.d_sae, size.k, activation=case.activation, widths=case.widths, loss="saelens"
    )
    model = Transcoder(config, device=case.device).train()
    for name in ("W_enc", "W_dec"):
        getattr(model, name).data.copy_(getattr(case, name))
    return model


def optimizer(case: Case) -> Variant:
    model = _model(case)
    adam = make_optimizer(model, TrainingSection(), LEARNING_RATE)

    def forward(i: int) -> None:
        for name, p in model.named_parameters():
            p.grad = case.given_gradients[name]
        optimizer_step(model, adam, LEARNING_RATE, 1.0)

    def answer(probe: Probe) -> dict[str, Tensor]:
        checked = _model(case)
        optimizer = make_optimizer(checked, TrainingSection(), CHECK_RATE)
        for grads in case.gradients():
            for name, grad in grads.items():
                getattr(checked, name).grad = grad
            optimizer_step(checked, optimizer, CHECK_RATE, 1.0)
        return case.steps_of(dict(checked.named_parameters()))

    return Variant("ours", forward, answer=answer, note="projection, norm, clipping, Adam, unit rows")


def step(case: Case) -> Variant:
    model = _model(case)
    adam = make_optimizer(model, TrainingSection(), LEARNING_RATE)

    def forward(i: int) -> None:
        x = case.x(i)
        model.training_step(x, x).loss.backward()
        optimizer_step(model, adam, LEARNING_RATE, 1.0)

    def answer(probe: Probe) -> dict[str, Tensor]:
        loss = model.training_step(probe.x, probe.x).loss
        loss.backward()
        return {"loss": loss, **answers(WEIGHTS, *(getattr(model, n) for n in WEIGHTS))}

    return Variant("ours", forward, tidy=lambda: model.zero_grad(set_to_none=True), answer=answer)
