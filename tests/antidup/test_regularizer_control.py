"""What steers the penalties: the batch's weights, which latents count as live, how far one step may go."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup import DiversityRegularizer, UsageLedger
from transcoder.antidup.penalties import pair_penalty, position_penalty
from transcoder.antidup.running_mass import PositionMass
from transcoder.config import RegularizerSection
from transcoder.kernels import SparseCodes
from transcoder.usage import REQUIRED_EFFECTS

LATENTS, TOKENS, STEPS = 20, 40, 1000
SECTION = RegularizerSection(
    correlation_weight=0.01, correlation_weight_max=0.1, orthogonality_weight=0, target_rate=0.05
)
PAIR = (torch.tensor([0]), torch.tensor([1]))
MODEL = SimpleNamespace(W_dec=torch.ones(LATENTS, 2))


def regularizer(section: RegularizerSection, folder: Path) -> DiversityRegularizer:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return DiversityRegularizer(section, LATENTS, "cpu", 0, ledger, folder, steps=STEPS)


def step_of(part: DiversityRegularizer, z: Tensor, pairs: tuple[Tensor, Tensor], step: int) -> float:
    """The weight that the next step gets."""
    loss = torch.zeros((), requires_grad=True)
    part.apply_penalty(loss, MODEL, codes=SparseCodes.from_dense(z), pairs=pairs, step=step)
    return float(part.state_dict()["weight"])


def test_the_pair_penalty_weighs_tokens_as_the_batch_does(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.rand(TOKENS, LATENTS, generator=g)
    weights = torch.where(torch.arange(TOKENS) % 2 == 0, 2.0, 0.0)
    z[1::2, 1] = z[1::2, 0]  # twins on tokens that do not count
    batch = ActivationBatch(
        torch.zeros(TOKENS, 2), torch.zeros(TOKENS, 2), torch.ones(TOKENS, dtype=torch.int64), torch.arange(TOKENS),
        weights=weights,
    )  # fmt: skip
    codes = SparseCodes.from_dense(z)
    part = regularizer(replace(SECTION, adaptive=False), tmp_path)
    loss = torch.zeros((), requires_grad=True)
    got = part.apply_penalty(loss, MODEL, codes=codes, batch=batch, pairs=PAIR)
    u, v = z[::2, 0].double(), z[::2, 1].double()
    cosine = float(u @ v / (u.norm() * v.norm()))
    assert float(got.detach()) == pytest.approx(0.01 * (cosine - 0.3) ** 2, rel=1e-5)
    assert float(pair_penalty(codes, *PAIR, margin=0.3).value) > 1.02 * (cosine - 0.3) ** 2


def test_one_step_moves_the_weight_by_no_more_than_its_share_of_the_run(tmp_path: Path) -> None:
    z = torch.ones(TOKENS, LATENTS)
    all_pairs = (torch.arange(0, LATENTS, 2), torch.arange(1, LATENTS, 2))
    # A rate of 1 is twenty times the target: no more is made of it than of twice the target.
    after = step_of(regularizer(SECTION, tmp_path), z, all_pairs, 0)
    assert after == pytest.approx(0.01 * math.exp(math.log(10) * 10 / STEPS))


def test_a_latent_that_fired_some_steps_ago_is_live(tmp_path: Path) -> None:
    section = replace(SECTION, adaptive_step=1.0, target_rate=0.5)
    part = regularizer(section, tmp_path)
    z = torch.ones(TOKENS, LATENTS)
    # At the target: 10 of 20 latents are paired.
    half = (torch.arange(0, 10, 2), torch.arange(1, 10, 2))
    assert step_of(part, z, half, 0) == pytest.approx(0.01)
    z[:, 10:] = 0  # the others are silent from now on
    for step in range(1, 100):
        weight = step_of(part, z, half, step)
    assert weight == pytest.approx(0.01)
    # For a hundred steps: now all that live are paired.
    assert step_of(part, z, half, 100) == pytest.approx(0.01 * math.exp(0.5))


def test_entropy_is_in_units_of_the_bins_that_were_offered() -> None:
    # Sequences of four tokens have four of ten bins; a latent that fires on all of them is as flat as can be.
    running = PositionMass(1, "cpu")
    positions = torch.arange(400) % 4
    codes = SparseCodes.from_dense(torch.ones(400, 1))
    bin_of = running.add(codes, positions)
    assert bin_of.unique().numel() == 4
    assert float(position_penalty(codes, bin_of, running, floor=0.99).value) == 0
