"""DiversityRegularizer: the losses that push duplicates apart, on compressed codes, bounded and measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup.ledger import UsageLedger
from transcoder.antidup.penalties import (
    Penalty,
    all_pairs_penalty,
    decoder_penalty,
    pair_penalty,
    position_penalty,
)
from transcoder.config import RegularizerSection
from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.counter import hash_bits

_NAME = "diversity_regularizer"
_LIVE_CALLS = 100
"""A latent counts as live for the dual control if it fired within this many calls."""


class HasDecoder(Protocol):
    """What the regularizer needs of a transcoder: `W_dec` [d_sae, d_out]."""

    @property
    def W_dec(self) -> Tensor: ...


class _Attached(torch.autograd.Function):
    """A value whose gradient with respect to `tensor` is already known."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


class DiversityRegularizer:
    """Adds diversity penalties to a loss. Terms of weight 0 are not computed; all weights 0 return the loss
    itself.

    Terms (formulas and their "Equivalent to" in transcoder.antidup.penalties):
        correlation: mean relu(c_ij - margin)^2 over the monitor's pairs, on the batch's own codes. With
            `adaptive` its weight follows lambda <- clip(lambda exp(step (rate - target)), 0, max) after each
            call, where rate is the share of
            recently firing latents that are in some pair: bounded dual control.
        orthogonality: mean relu(max cos - threshold)^2 over a random chunk of decoder rows, each row once
            before any twice, every `orthogonality_every` steps.
        all_pairs: mean r_ij^2 over all pairs of the batch.
        position_entropy: mean relu(floor - H_i).

    Args:
        section: weights and thresholds.
        d_sae, device: of the codes.
        seed: keys the chunks (with the step): no state, no global generator.
        ledger: told of calls, penalty values, gradient norms and files.
        out_dir: folder of `regularizer.jsonl` (`save`).
    """

    def __init__(
        self,
        section: RegularizerSection,
        d_sae: int,
        device: torch.device | str,
        seed: int,
        ledger: UsageLedger,
        out_dir: Path | None = None,
    ) -> None:
        self.section, self.d_sae, self.seed = section, d_sae, seed
        self.device = torch.empty(0, device=device).device
        self._ledger, self._out_dir = ledger, out_dir
        self._weight = torch.tensor(section.correlation_weight, dtype=torch.float64, device=self.device)
        self._last_fired = torch.full((d_sae,), -_LIVE_CALLS, dtype=torch.int64, device=self.device)
        self._calls = 0
        self._metrics: dict[str, Tensor] = {}

    def apply_penalty(
        self,
        loss: Tensor,
        transcoder: HasDecoder,
        codes: SparseCodes | None = None,
        batch: ActivationBatch | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
        step: int = 0,
    ) -> Tensor:
        """`loss` plus the weighted penalties; exactly `loss`, the same object, when no term acts. Never waits
        for a device.

        Args:
            loss: 0-dim.
            transcoder: has `W_dec` [d_sae, d_out], which takes the orthogonality gradient.
            codes: carry the graph in `values`; needed by every term but orthogonality.
            batch: its `positions` are needed by position_entropy; its `weights`, where given, weigh the
                correlation term.
            pairs: (i, j), each [P] int64, from `CorrelationMonitor.target_pairs`; None or empty leaves the
                correlation term out.
            step: keys the decoder chunk.

        Raises:
            ValueError: a term is switched on but what it acts on is not given.
        """
        section = self.section
        total = loss
        effects: list[tuple[Tensor, Tensor]] = []

        def add(name: str, penalty: Penalty, target: Tensor, weight: float | Tensor) -> None:
            nonlocal total
            attached = _Attached.apply(target, penalty.value, penalty.gradient.to(target.dtype))
            total = total + (weight * attached).to(loss.dtype)
            norm = penalty.gradient.norm()
            self._metrics[f"regularizer/{name}_penalty"] = penalty.value
            self._metrics[f"regularizer/{name}_gradient_norm"] = norm
            effects.append((weight * penalty.value, weight * norm))

        if section.correlation_weight > 0 and pairs is not None:
            given = self._codes(codes, "correlation_weight")
            if pairs[0].numel():
                weights = None if batch is None else batch.weights
                with torch.no_grad():
                    found = pair_penalty(given, pairs[0], pairs[1], section.correlation_margin, weights)
                add("correlation", found, given.values, self._weight)
            if section.adaptive:
                self._control(given, pairs)
            self._metrics["regularizer/correlation_weight"] = self._weight
        if section.orthogonality_weight > 0 and step % section.orthogonality_every == 0:
            with torch.no_grad():
                found = decoder_penalty(transcoder.W_dec, self._chunk(step), section.orthogonality_threshold)
            add("orthogonality", found, transcoder.W_dec, section.orthogonality_weight)
        if section.all_pairs_weight > 0:
            given = self._codes(codes, "all_pairs_weight")
            with torch.no_grad():
                found = all_pairs_penalty(given)
            add("all_pairs", found, given.values, section.all_pairs_weight)
        if section.position_entropy_weight > 0:
            given = self._codes(codes, "position_entropy_weight")
            if batch is None:
                raise ValueError(
                    "DiversityRegularizer.apply_penalty: position_entropy_weight is above 0, so expected batch (for its "
                    "positions), got None"
                )
            with torch.no_grad():
                found = position_penalty(given, batch.positions, section.position_entropy_floor)
            add("position_entropy", found, given.values, section.position_entropy_weight)

        self._ledger.record_call(_NAME)
        for value, norm in effects:
            self._ledger.record_effect(_NAME, penalty=value, gradient_norm=norm)
        self._calls += 1
        return total

    def metrics(self) -> dict[str, Tensor]:
        """0-dim device tensors: each term's last penalty (before its weight), its gradient's norm, and the
        dual weight."""
        return dict(self._metrics)

    def save(self, step: int) -> Path:
        """Append the metrics to `regularizer.jsonl`, dropping lines of this step and later (a resumed run
        writes those again). Reads the device."""
        if self._out_dir is None:
            raise ValueError("DiversityRegularizer.save: expected an out_dir at construction, got None")
        self._out_dir.mkdir(parents=True, exist_ok=True)
        path = self._out_dir / "regularizer.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.strip() and json.loads(line)["step"] < step:
                    kept.append(line)
        kept.append(json.dumps({"step": step, **{name: float(value) for name, value in self._metrics.items()}}))
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        self._ledger.record_file(_NAME, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight.clone(), "last_fired": self._last_fired.clone(), "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["last_fired"].shape != (self.d_sae,):
            raise ValueError(
                f"DiversityRegularizer.load_state_dict: expected d_sae = {self.d_sae}, got {state['last_fired'].numel()}"
            )
        self._weight.copy_(state["weight"])
        self._last_fired.copy_(state["last_fired"])
        self._calls = int(state["calls"])

    def _codes(self, codes: SparseCodes | None, term: str) -> SparseCodes:
        if codes is None:
            raise ValueError(
                f"DiversityRegularizer.apply_penalty: {term} is above 0, so expected codes, got None; pass the step's codes or "
                f"set {term} to 0"
            )
        if codes.shape[1] != self.d_sae:
            raise ValueError(
                f"DiversityRegularizer.apply_penalty: codes: expected d_sae = {self.d_sae}, got shape {codes.shape}"
            )
        return codes

    def _chunk(self, step: int) -> Tensor:
        """The decoder rows of this step: a slice of a random order that lasts until every row was seen."""
        size = min(self.section.orthogonality_chunk, self.d_sae)
        chunks = -(-self.d_sae // size)
        turn = step // self.section.orthogonality_every
        order = hash_bits(torch.arange(self.d_sae, device=self.device), self.seed, turn // chunks).argsort()
        start = turn % chunks * size
        return order[start : start + size]

    @torch.no_grad()
    def _control(self, codes: SparseCodes, pairs: tuple[Tensor, Tensor]) -> None:
        section = self.section
        now = torch.where(codes.values > 0, self._calls, -_LIVE_CALLS)
        self._last_fired.scatter_reduce_(0, codes.indices, now, "amax")
        live = (self._last_fired > self._calls - _LIVE_CALLS).sum().clamp(min=1)
        paired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
        for side in pairs:
            paired.index_fill_(0, side, True)
        rate = paired.sum() / live
        # Not in place: the metric of this step and the graph of its loss hold the old tensor.
        grown = self._weight * torch.exp(section.adaptive_step * (rate.double() - section.target_rate))
        self._weight = grown.clamp(0, section.correlation_weight_max)
