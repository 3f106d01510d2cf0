"""sparsify (EleutherAI): its SparseCoder as a transcoder, stepped as its trainer does with Adam.

Its decoder is eager on the CPU and Triton on CUDA (SPARSIFY_DISABLE_TRITON=1 keeps it eager there); both are timed on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import LEARNING_RATE, Case, Probe
from bench.interleaved_timing import Variant

NAME = "sparsify"
NO_MASK = "TopK only; backward without the ReLU mask; no projection, clipping or unit rows; Adam as PyTorch does it by default"


@functools.cache
def missing() -> str | None:
    if importlib.util.find_spec("sparsify") is None:
        return "eai-sparsify is not installed here: python -m bench.peers sparsify"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import sparsify

        if not hasattr(sparsify, "SparseCoder"):
            return "the package `sparsify` here is another one: eai-sparsify is meant"
    except Exception as error:
        return f"eai-sparsify cannot be imported here: {type(error).__name__}: {error}"
    return None


def _coder(case: Case) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    size = case.size
    config = SparseCoderConfig(num_latents=size.d_sae, k=size.k, transcode=True, normalize_decoder=False)
    coder = SparseCoder(size.d, config, device=case.device, dtype=torch.float32)
    with torch.no_grad():
        coder.encoder.weight.copy_(case.W_enc)
        coder.encoder.bias.zero_()
        coder.W_dec.copy_(case.W_dec)
    return coder


def _decoders(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The decoders that can run here, by name."""
    from sparsify import utils

    found: dict[str, Callable[..., Tensor]] = {f"{NAME} eager": utils.eager_decode}
    if case.device.type == "cuda" and hasattr(utils, "xformers_embedding_bag"):
        found[f"{NAME} Triton"] = utils.triton_decode
    return found


def _with(decoder: Callable[..., Tensor], call: Callable[..., Any]) -> Callable[..., Any]:
    from sparsify import sparse_coder

    def run(*words: Any) -> Any:
        before, sparse_coder.decoder_impl = sparse_coder.decoder_impl, decoder
        try:
            return call(*words)
        finally:
            sparse_coder.decoder_impl = before

    return run


def _grads(coder: Any) -> dict[str, Tensor]:
    leaves = {
        "W_enc": coder.encoder.weight,
        "b_enc": coder.encoder.bias,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    return {f"{n}.grad": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}


def encode(case: Case) -> list[Variant]:
    if case.activation != "topk":
        return []
    coder = _coder(case)

    def answer(probe: Probe) -> dict[str, Tensor]:
        acts, ids, pre = coder.encode(probe.x)
        acts.sum().backward()
        return {"codes": torch.zeros_like(pre).scatter(1, ids, acts), **_grads(coder)}

    return [
        Variant(
            NAME,
            lambda i: coder.encode(case.x(i)).top_acts.sum(),
            lambda s: s.backward(),
            lambda: coder.zero_grad(set_to_none=True),
            answer,
            note="codes [B, k]; its fused encoder returns the pre-activations [B, N] too; backward without the ReLU mask",
        )
    ]


def decode(case: Case) -> list[Variant]:
    if case.activation != "topk":
        return []
    found = []
    k = case.size.k
    for name, decoder in _decoders(case).items():
        coder = _coder(case)
        # Leaves that share the case's memory.
        acts = [codes.values.detach().view(-1, k).requires_grad_() for codes, _ in case.coded]
        ids = [codes.indices.view(-1, k) for codes, _ in case.coded]

        def tidy(coder: Any = coder, acts: list[Tensor] = acts) -> None:
            coder.zero_grad(set_to_none=True)
            for leaf in acts:
                leaf.grad = None

        def forward(i: int, coder: Any = coder, acts: list[Tensor] = acts, ids: list[Tensor] = ids) -> Tensor:
            n = i % len(acts)
            total: Tensor = coder.decode(acts[n], ids[n]).square().sum()
            return total

        def answer(probe: Probe, coder: Any = coder) -> dict[str, Tensor]:
            v = probe.codes.values.view(-1, k).clone().requires_grad_()
            out = coder.decode(v, probe.codes.indices.view(-1, k))
            out.square().sum().backward()
            assert v.grad is not None
            return {"reconstruction": out, "codes.grad": v.grad[v.detach() > 0], **_grads(coder)}

        found.append(
            Variant(
                name,
                _with(decoder, forward),
                lambda s: s.backward(),
                tidy,
                _with(decoder, answer),
                note="codes [B, k]; PyTorch's embedding_bag" if "eager" in name else "codes [B, k]; atomic sums",
            )
        )
    return found


def step(case: Case) -> list[Variant]:
    if case.activation != "topk" or len(case.widths) > 1:
        return []
    found = []
    for name, decoder in _decoders(case).items():
        coder = _coder(case)
        adam = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
        since = torch.zeros(case.size.d_sae, dtype=torch.long, device=case.device)
        fired = torch.zeros(case.size.d_sae, dtype=torch.bool, device=case.device)

        def forward(i: int, coder: Any = coder, adam: Any = adam, since: Tensor = since, fired: Tensor = fired) -> None:
            x = case.x(i)
            out = coder(x=x, y=x, total_variance=(x - x.mean(0)).pow(2).sum())
            fired[out.latent_indices.flatten()] = True
            out.fvu.backward()
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                since.add_(len(x))
                since[fired] = 0
                fired.zero_()

        def answer(probe: Probe, coder: Any = coder) -> dict[str, Tensor]:
            x = probe.x
            # FVU in place of the mean of squared errors: the same up to this factor.
            scale = (x - x.mean(0)).pow(2).sum() / len(x)
            # Without the bf16 autocast that it uses on CUDA, so that results can be compared.
            forward = type(coder).forward
            loss = getattr(forward, "__wrapped__", forward)(coder, x=x, y=x).fvu * scale
            loss.backward()
            return {"loss": loss, **_grads(coder)}

        found.append(
            Variant(
                name,
                _with(decoder, forward),
                None,
                lambda coder=coder: coder.zero_grad(set_to_none=True),
                _with(decoder, answer),
                note=f"FVU loss; {NO_MASK}{'; bf16 products' if case.device.type == 'cuda' else ''}",
            )
        )
    return found
