"""SAELens: its training SAEs and the step of its trainer, called as `SAETrainer.fit` calls it."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import LEARNING_RATE, Case, Probe
from bench.interleaved_timing import Variant
from bench.peers.eager import GIVEN_DENSE, decoding

NAME = "SAELens"
AUTOENCODES = "an autoencoder: it cannot train a transcoder"
PREFIXES = "decodes each prefix from its first latent on"
PLAIN = (
    "rescale_acts_by_decoder_norm off (its default is on, which costs more); no projection, no unit rows; Adam as PyTorch does "
    "it by default"
)


@functools.cache
def missing() -> str | None:
    if importlib.util.find_spec("sae_lens") is None:
        return "sae-lens is not installed here: python -m bench.peers saelens"
    try:
        import sae_lens  # noqa: F401
    except Exception as error:
        return f"sae-lens cannot be imported here: {type(error).__name__}: {error}"
    return None


def _sae(case: Case, sparse: bool = False) -> Any:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    size = case.size
    shared: dict[str, Any] = {
        "d_in": size.d,
        "d_sae": size.d_sae,
        "k": size.k,
        "device": str(case.device),
        "apply_b_dec_to_input": False,
        "rescale_acts_by_decoder_norm": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(case.widths) > 1:
            sae: Any = MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(**shared, matryoshka_widths=list(case.widths))
            )
        elif case.activation == "batch_topk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared))
        else:
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, use_sparse_activations=sparse))
    with torch.no_grad():
        sae.W_enc.copy_(case.W_enc.T)
        sae.W_dec.copy_(case.W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def _layouts(case: Case) -> Iterator[tuple[str, Any]]:
    nested = len(case.widths) > 1
    if nested and case.activation == "topk":
        return
    yield (
        f"{NAME} {'Matryoshka' if nested else {'topk': 'TopK', 'batch_topk': 'BatchTopK'}[case.activation]}",
        _sae(case),
    )
    if case.activation == "topk" and not nested:
        yield f"{NAME} TopK COO", _sae(case, sparse=True)


def _grads(sae: Any, names: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec")) -> dict[str, Tensor]:
    found = {f"{n}.grad": getattr(sae, n).grad for n in names}
    return {n: (g.T if n == "W_enc.grad" else g) for n, g in found.items() if g is not None}


def _dense(acts: Tensor) -> Tensor:
    return acts.to_dense() if acts.is_sparse else acts


def _total(acts: Tensor) -> Tensor:
    return torch.sparse.sum(acts) if acts.is_sparse else acts.sum()


def encode(case: Case) -> list[Variant]:
    found = []
    for name, sae in _layouts(case):

        def answer(probe: Probe, sae: Any = sae) -> dict[str, Tensor]:
            acts, _ = sae.encode_with_hidden_pre(probe.x)
            _total(acts).backward()
            return {"codes": _dense(acts), **_grads(sae, ("W_enc", "b_enc"))}

        found.append(
            Variant(
                name,
                lambda i, sae=sae: _total(sae.encode_with_hidden_pre(case.x(i))[0]),
                lambda s: s.backward(),
                lambda sae=sae: sae.zero_grad(set_to_none=True),
                answer,
                note=f"{'COO codes' if 'COO' in name else 'dense codes [B, N]'}; returns the pre-activations [B, N] too",
            )
        )
    return found


def decode(case: Case) -> list[Variant]:
    _, sae = next(_layouts(case))
    weights = sae.W_dec, sae.b_dec
    return [decoding(case, NAME, lambda z, y, W, b: sae.decode(z), "reconstruction", GIVEN_DENSE, weights)]


def nested_loss(case: Case) -> list[Variant]:
    layouts = list(_layouts(case))
    if not layouts:
        return []
    _, sae = layouts[0]

    def losses(z: Tensor, y: Tensor, W: Tensor, b: Tensor) -> Tensor:
        # The outer width by `decode`, the inner ones one after another, as training_forward_pass does.
        outer = sae.decode(z)
        made = [*(out for _, out in sae._iterable_decode(z, include_outer_loss=False)), outer]
        return torch.stack([sae.mse_loss_fn(out, y).sum(dim=-1).mean() for out in made]) / case.size.d

    return [
        decoding(case, f"{NAME} Matryoshka", losses, "losses", f"{GIVEN_DENSE}; {PREFIXES}", (sae.W_dec, sae.b_dec))
    ]


def step(case: Case) -> list[Variant]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    found = []
    for name, sae in _layouts(case):
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=case.size.rows,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
            device=str(case.device),
        )
        trainer = SAETrainer(config, sae, iter(()))

        def answer(probe: Probe, sae: Any = sae) -> dict[str, Tensor]:
            given = TrainStepInput(
                sae_in=probe.x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
            )
            out = sae.training_forward_pass(given)
            out.loss.backward()
            return {"loss": out.loss, **_grads(sae)}

        found.append(
            Variant(
                name,
                lambda i, trainer=trainer: trainer.step(case.x(i)),
                None,
                lambda sae=sae: sae.zero_grad(set_to_none=True),
                answer,
                note=f"{AUTOENCODES}; {PLAIN}{f'; {PREFIXES}' if len(case.widths) > 1 else ''}",
            )
        )
    return found
