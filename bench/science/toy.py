"""Synthetic activations with known features, and a transcoder trained on them by the real trainer.

x = sum_g a_g u_g + noise, y = sum_g a_g v_g with unit directions u_g, v_g drawn at random in D = 64 dimensions: more features
than dimensions, so no linear map separates them. Each stage defines which features are active together.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder import ActivationBatch, RunConfig, Transcoder, train_transcoder
from transcoder.activations.masking import SinkMasker
from transcoder.antidup.merge_cost import MergeTest
from transcoder.config import ActivationsSection
from transcoder.kernels import FeatureCorrelation

D = 64
D_SAE = 256
SEQUENCE = 64
NOISE = 0.02
BATCH = 512
BOS = 0
VOCABULARY = 100
HELDOUT_TOKENS = 1 << 15

Active = Callable[[int, torch.Generator], Tensor]
"""(tokens, generator) -> [tokens, features] bool: which features are on."""


def independent(features: int, l0: float) -> Active:
    return lambda tokens, g: torch.rand(tokens, features, generator=g) < l0 / features


@dataclass(frozen=True)
class Sinks:
    """Tokens whose activation carries no information about the text."""

    bos_every: float = 0.0
    """Share of tokens that are BOS, anywhere in a packed sequence: a constant vector."""
    norm_share: float = 0.0
    """Share of ordinary tokens, anywhere in a sequence, whose activation is one direction of a larger norm."""
    norm_times: float = 0.0
    """That norm over the usual one; 0 adds a vector of about 100 times to the token's own activation."""


@dataclass(frozen=True)
class Toy:
    active: Active
    features: int
    seed: int
    sinks: Sinks = field(default_factory=Sinks)
    masked: bool = True
    """Drop what `SinkMasker` finds by id and by norm, which it fits to the stream's tokens, as the activation stream does."""

    def directions(self) -> tuple[Tensor, Tensor]:
        """(u, v), each [features, D], unit rows."""
        g = torch.Generator().manual_seed(10_000 + self.seed)
        u, v = (torch.randn(self.features, D, generator=g) for _ in range(2))
        return torch.nn.functional.normalize(u, dim=1), torch.nn.functional.normalize(v, dim=1)

    def tokens(self, count: int, key: int) -> tuple[ActivationBatch, Tensor, Tensor]:
        """(batch, amplitudes [count, features], sink [count] bool) of a deterministic piece of the stream, unmasked."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + key)
        u, v = self.directions()
        amplitude = self.active(count, g) * (0.5 + torch.rand(count, self.features, generator=g))
        x = amplitude @ u + NOISE * torch.randn(count, D, generator=g)
        y = amplitude @ v + NOISE * torch.randn(count, D, generator=g)
        ids = torch.randint(1, VOCABULARY, (count,), generator=g)
        fixed = torch.Generator().manual_seed(20_000 + self.seed)
        bos_x, bos_y, loud_x, loud_y = torch.randn(4, D, generator=fixed).mul(5 / D**0.5)
        bos = torch.rand(count, generator=g) < self.sinks.bos_every
        loud = (torch.rand(count, generator=g) < self.sinks.norm_share) & ~bos
        ids[bos] = BOS
        x[bos], y[bos] = bos_x, bos_y
        if self.sinks.norm_times:
            # A few per cent of the direction's length come from the token.
            for values, direction in ((x, loud_x), (y, loud_y)):
                size = self.sinks.norm_times * float(values.norm(dim=1).median())
                values[loud] = size * (direction / direction.norm() + 0.02 * values[loud] / values.norm(dim=1).median())
        else:
            x[loud] = x[loud] + 40 * loud_x
            y[loud] = y[loud] + 40 * loud_y
        place = key * count + torch.arange(count)
        batch = ActivationBatch(x, y, ids, place % SEQUENCE, place // SEQUENCE)
        return batch, amplitude, bos | loud

    def batches(self) -> Iterator[ActivationBatch]:
        """Endless training batches of BATCH rows."""
        held: list[ActivationBatch] = []
        rows, key = 0, 0
        while True:
            batch, _, _ = self.tokens(2 * BATCH, key)
            key += 1
            batch = select(batch, self.let_through(batch))
            held.append(batch)
            rows += len(batch)
            while rows >= BATCH:
                whole = join(held)
                yield select(whole, slice(0, BATCH))
                held, rows = [select(whole, slice(BATCH, None))], rows - BATCH

    def let_through(self, batch: ActivationBatch) -> Tensor:
        """[tokens] bool: tokens that reach the transcoder, in training and at inference: all that the mask keeps."""
        valid = torch.ones(len(batch), dtype=torch.bool)
        if not self.masked:
            return valid
        return ~_masker(self).find(batch.source, batch.tokens, batch.positions, valid).any

    def heldout(self) -> tuple[ActivationBatch, Tensor, Tensor]:
        return self.tokens(HELDOUT_TOKENS, 1 << 20)


@functools.cache
def _masker(toy: Toy) -> SinkMasker:
    masker = SinkMasker(ActivationsSection(), [BOS], VOCABULARY, None, torch.device("cpu"))
    batch, _, _ = toy.tokens(1 << 14, 1 << 21)
    valid = torch.ones(len(batch), dtype=torch.bool)
    masker.fit(**masker.candidates(batch.source, batch.tokens, batch.positions, valid))
    return masker


def select(batch: ActivationBatch, rows: Any) -> ActivationBatch:
    assert batch.sequences is not None
    return ActivationBatch(
        batch.source[rows], batch.target[rows], batch.tokens[rows], batch.positions[rows], batch.sequences[rows]
    )


def join(parts: list[ActivationBatch]) -> ActivationBatch:
    names = ("source", "target", "tokens", "positions", "sequences")
    return ActivationBatch(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


def train(toy: Toy, steps: int, **settings: Any) -> Transcoder:
    """The real trainer on a toy's stream; `settings` by dotted names with `__` for the dot."""
    config = RunConfig().replace({
        "name": "science",
        "model.device": "cpu",
        "transcoder.d_sae": D_SAE,
        "transcoder.dead_after_tokens": 200 * BATCH,
        "transcoder.normalize": "rms",
        "training.steps": steps,
        "training.batch_size": BATCH,
        "training.lr": 3e-3,
        "training.seed": toy.seed,
        "training.evaluation_tokens": 2 * BATCH,
        "antidup.positions.enabled": False,
        "antidup.samples.enabled": False,
        "antidup.monitor.block_tokens": 100 * BATCH,
        "antidup.monitor.correlation_save_frequency": 50,
        "antidup.regularizer.enabled": False,
        "checkpoint.every": steps,
        "logging.progress": False,
        **{name.replace("__", "."): value for name, value in settings.items()},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train_transcoder(config, Path(folder) / "run", batches=toy.batches()).transcoder.eval()


@dataclass(frozen=True)
class Found:
    """Measurements of a trained transcoder on held-out tokens."""

    fvu: float
    """Of the tokens that are no sinks."""
    l0: float
    dead: int
    mcc: float
    """Mean over features of the best |cosine| of a live decoder row with v_g."""
    uniqueness: float
    """Distinct best latents over features."""
    f1: float
    """Mean over features of F1 of the best latent's firing against the feature's."""
    pairs: int
    """r > 0.8 on at least 100 tokens."""
    mergeable: int
    i: Tensor
    j: Tensor
    mergeable_pairs: Tensor
    best: Tensor
    """[features] latent whose decoder row is nearest v_g."""
    sink_only: int
    """Latents of whose firings at least 99 % fall on sinks."""


@torch.no_grad()
def examine(model: Transcoder, toy: Toy, min_correlation: float = 0.8, min_support: int = 100) -> Found:
    """Measures on held-out tokens. Tokens that the mask removes do not reach the transcoder, as at inference; sinks that it
    misses count."""
    batch, amplitude, sink = toy.heldout()
    seen = toy.let_through(batch)
    codes = model.encode(batch.source[seen])
    error = model.decode(codes) - batch.target[seen]
    ordinary = ~sink[seen]
    target = batch.target[seen][ordinary]
    fvu = float(error[ordinary].square().sum() / (target - target.mean(0)).square().sum())
    statistics = FeatureCorrelation(model.config.d_sae)
    statistics.update(codes)
    found = statistics.pairs(min_correlation, min_support)
    decoder = model.W_dec / model.target_scale  # in the units of the error
    test = MergeTest(found.i, found.j, decoder)
    test.update(codes, error, batch.target[seen])
    mergeable = test.result().mergeable() if len(found) else torch.zeros(0, dtype=torch.bool)
    fires = codes.to_dense() > 0
    counts = fires.sum(0)
    on_sink = fires[~ordinary].sum(0)
    _, v = toy.directions()
    cosine = (torch.nn.functional.normalize(decoder, dim=1) @ v.T).masked_fill((counts == 0)[:, None], -1)
    value, best = cosine.max(0)
    feature = amplitude[seen][ordinary] > 0
    own = fires[ordinary][:, best]
    both = (own & feature).sum(0)
    f1 = 2 * both / (own.sum(0) + feature.sum(0)).clamp(min=1)
    return Found(
        fvu=fvu,
        l0=float(fires[ordinary].sum(1).float().mean()),
        dead=int((counts == 0).sum()),
        mcc=float(value.mean()),
        uniqueness=best.unique().numel() / toy.features,
        f1=float(f1.mean()),
        pairs=len(found),
        mergeable=int(mergeable.sum()),
        i=found.i,
        j=found.j,
        mergeable_pairs=mergeable,
        best=best,
        sink_only=int(((counts > 0) & (on_sink >= 0.99 * counts)).sum()),
    )


def unmasked(toy: Toy) -> Toy:
    return replace(toy, masked=False)
