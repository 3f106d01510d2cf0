"""dictionary_learning: its trainers' `update`, as `trainSAE` calls it. Autoencoders only."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from bench.cases import LEARNING_RATE, Case, Probe
from bench.interleaved_timing import Variant

NAME = "dictionary_learning"


@functools.cache
def missing() -> str | None:
    if importlib.util.find_spec("dictionary_learning") is None:
        return "dictionary-learning is not installed here: python -m bench.peers dictionary-learning"
    try:
        _hide_broken_torchvision()
        import dictionary_learning  # noqa: F401
    except Exception as error:
        return f"dictionary-learning cannot be imported here: {type(error).__name__}: {error}"
    return None


def _hide_broken_torchvision() -> None:
    """The library installs torchvision, which may be built for another torch; transformers then fails although nothing needs
    it."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def _trainer(case: Case) -> tuple[str, Any]:
    """(name, trainer) with our weights; TopK and BatchTopK keep W_dec as a Linear [d, N]."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    size = case.size
    shared: dict[str, Any] = {
        "steps": 10**9,
        "activation_dim": size.d,
        "dict_size": size.d_sae,
        "k": size.k,
        "layer": 0,
        "lm_name": "none",
        "lr": LEARNING_RATE,
        "warmup_steps": 0,
        "device": str(case.device),
    }
    if len(case.widths) > 1:
        sizes = [b - a for a, b in zip([0, *case.widths], case.widths, strict=False)]
        fractions = [s / size.d_sae for s in sizes]
        trainer: Any = MatryoshkaBatchTopKTrainer(**shared, group_fractions=fractions)
        name = "Matryoshka"
    elif case.activation == "batch_topk":
        trainer, name = BatchTopKTrainer(**shared), "BatchTopK"
    else:
        trainer, name = TopKTrainer(**shared), "TopK"
    ae = trainer.ae
    with torch.no_grad():
        if len(case.widths) > 1:
            ae.W_enc.copy_(case.W_enc.T)
            ae.W_dec.copy_(case.W_dec)
        else:
            ae.encoder.weight.copy_(case.W_enc)
            ae.decoder.weight.copy_(case.W_dec.T)
    return f"{NAME} {name}", trainer


OTHER_BIAS = {"b_dec.grad": "it is subtracted from x too, so its gradient is another one"}


def _grads(ae: Any) -> dict[str, Tensor]:
    if hasattr(ae, "W_enc"):
        found = {"W_enc": ae.W_enc.grad, "b_enc": ae.b_enc.grad, "W_dec": ae.W_dec.grad}
        flipped: tuple[str, ...] = ("W_enc",)
    else:
        found = {"W_enc": ae.encoder.weight.grad, "b_enc": ae.encoder.bias.grad, "W_dec": ae.decoder.weight.grad}
        flipped = ("W_dec",)
    return {f"{n}.grad": g.T if n in flipped else g for n, g in found.items() if g is not None}


def encode(case: Case) -> list[Variant]:
    name, trainer = _trainer(case)
    ae = trainer.ae

    def acts(x: Tensor) -> Tensor:
        found: Tensor = ae.encode(x, use_threshold=False)
        return found

    def answer(probe: Probe) -> dict[str, Tensor]:
        z = acts(probe.x)
        z.sum().backward()
        return {"codes": z, **_grads(ae)}

    return [
        Variant(
            name,
            lambda i: acts(case.x(i)).sum(),
            lambda s: s.backward(),
            lambda: ae.zero_grad(set_to_none=True),
            answer,
            note="dense codes [B, N]; subtracts b_dec from x and trains it through the encoder",
        )
    ]


def step(case: Case) -> list[Variant]:
    if len(case.widths) > 1 and case.activation == "topk":
        return []
    name, trainer = _trainer(case)
    # It weighs prefixes by 1/P and then takes their mean.
    scale = len(case.widths) ** 2

    def answer(probe: Probe) -> dict[str, Tensor]:
        # Dead counts and threshold change; neither is read before 10 million tokens or 1000 steps.
        loss = trainer.loss(probe.x, step=1) * scale
        loss.backward()
        return {"loss": loss, **_grads(trainer.ae)}

    return [
        Variant(
            name,
            lambda i: trainer.update(2, case.x(i)),
            None,
            lambda: trainer.ae.zero_grad(set_to_none=True),
            answer,
            lacks=OTHER_BIAS,
            note="an autoencoder: it cannot train a transcoder; dense codes; subtracts b_dec from x; reads the loss back each "
            f"step{'; prefixes weigh 1/P and are averaged: scaled for the check' if len(case.widths) > 1 else ''}",
        )
    ]
