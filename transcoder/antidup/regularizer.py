"""DiversityRegularizer: adds the penalties on duplicate latents to the loss, with bounded weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    sink_penalty,
)
from transcoder.antidup.running_mass import PositionMass, SinkMass
from transcoder.antidup.special_tokens import SpecialTokens
from transcoder.config import RegularizerSection
from transcoder.files import replace_lines
from transcoder.kernels import SparseCodes, nearest_cpp
from transcoder.kernels.correlation.counter_rng import hash_bits
from transcoder.usage import TERM_UNITS

_NAME = "diversity_regularizer"
_LIVE_STEPS = 100
"""A latent counts as live for the dual control if it fired within this many steps."""
CROSSINGS = 10
"""Number of times that the adaptive weight could go from its lower to its upper bound in a run."""
LEAST_RATE = 1e-4
"""Smallest divisor of the distance between rate and target, for a target of 0."""


class HasDecoder(Protocol):
    """What the regularizer needs of a transcoder: `W_dec` [d_sae, d_out]."""

    @property
    def W_dec(self) -> Tensor: ...


class _Attached(torch.autograd.Function):
    """A value whose gradient with respect to `tensor` is already known."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradient, rows)
        ctx.size = tensor.shape[0]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, rows = ctx.saved_tensors
        if rows is None:
            return grad * gradient, None, None, None
        if rows.numel() == 0:
            return None, None, None, None
        return nearest_cpp.rows_in_zeros(grad * gradient, rows, ctx.size), None, None, None


class DiversityRegularizer:
    """Adds diversity penalties to a loss. Terms of weight 0 are not computed; all weights 0 return the loss
    itself.

    Terms (formulas and their "Equivalent to" in transcoder.antidup.penalties):
        correlation: mean relu(c_ij - margin)^2 over the monitor's pairs, on the batch's own codes. With
            `adaptive` its weight follows lambda <- clip(lambda exp(g clip((rate - target) / target, -1, 1)), weight, max) once
            a step, from the step after on, where rate is the share of recently firing latents that are in some
            pair (mean over the step's micro-batches): bounded dual control. g is such that a tenth of the run takes it from
            one bound to the other, so that short runs are controlled too. With `adaptive_step` the exponent is
            adaptive_step (rate - target) and the lower bound 0. The weight does not change until the monitor has searched for
            pairs.
        orthogonality: mean relu(max cos - threshold)^2 over a random chunk of decoder rows, each row once
            before any twice, every `orthogonality_every` steps, in the step's first micro-batch.
        all_pairs: mean r_ij^2 over all pairs of the batch.
        position_entropy: mean relu(floor - H_i) over latents with enough firings in the last 100 or so batches.
        sink_mass: mean relu(b_i - allowed)^2 over the same, b_i the share of activation on special tokens.

    Args:
        section: weights and thresholds.
        d_sae, device: of the codes.
        seed: keys the chunks (with the step): no state, no global generator.
        ledger: records calls, penalty values, gradient norms, the number of evaluations of each term and what they were made
            on, and files.
        out_dir: folder of `regularizer.jsonl` (`save`).
        scale: multiplies every penalty. The section's weights are relative to a reconstruction loss of
            convention `mse`; a loss that is larger by some factor (a sum over d_out instead of a mean) passes
            that factor, and the balance stays.
        accumulation: micro-batches a step, when each one's loss is divided by their number: the orthogonality
            term, which only the first has, is multiplied by it.
        special_ids: token ids that count as sinks for sink_mass.
        steps: of the run; the adaptive weight's speed is relative to it.
    """

    def __init__(
        self,
        section: RegularizerSection,
        d_sae: int,
        device: torch.device | str,
        seed: int,
        ledger: UsageLedger,
        out_dir: Path | None = None,
        scale: float = 1.0,
        accumulation: int = 1,
        special_ids: Sequence[int] = (),
        steps: int = 1000,
    ) -> None:
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"DiversityRegularizer: scale: expected a positive number, got {scale!r}")
        if accumulation < 1:
            raise ValueError(f"DiversityRegularizer: accumulation: expected at least 1, got {accumulation!r}")
        if steps < 1:
            raise ValueError(f"DiversityRegularizer: steps: expected at least 1, got {steps!r}")
        self._scale, self._accumulation = float(scale), accumulation
        self._run_steps = steps
        self.section, self.d_sae, self.seed = section, d_sae, seed
        self.device = torch.empty(0, device=device).device
        self._ledger, self._out_dir = ledger, out_dir
        self._weight = torch.tensor(section.correlation_weight, dtype=torch.float64, device=self.device)
        """Weight of the correlation term in this step."""
        self._next_weight = self._weight
        """Weight of the correlation term from the next step on."""
        self._rates: list[Tensor] = []
        """The rate of each micro-batch of this step."""
        self._step: int | None = None
        self._steps = 0
        self._no_rate = torch.zeros((), dtype=torch.float64, device=self.device)
        self._last_fired = torch.full((d_sae,), -_LIVE_STEPS, dtype=torch.int64, device=self.device)
        self._positions = PositionMass(d_sae, self.device) if section.position_entropy_weight > 0 else None
        self._special = SpecialTokens(special_ids, self.device)
        self._sinks = SinkMass(d_sae, self.device) if section.sink_mass_weight > 0 else None
        self._metrics: dict[str, Tensor] = {}
        for term in TERM_UNITS:
            if getattr(section, f"{term}_weight") > 0:
                self._evaluated(term, 0, 0)

    def apply_penalty(
        self,
        loss: Tensor,
        transcoder: HasDecoder,
        codes: SparseCodes | None = None,
        batch: ActivationBatch | None = None,
        pairs: tuple[Tensor, Tensor] | None = None,
        step: int = 0,
        micro: int = 0,
    ) -> Tensor:
        """`loss` plus the weighted penalties; exactly `loss`, the same object, when no term acts. Never waits
        for a device.

        Args:
            loss: 0-dim.
            transcoder: has `W_dec` [d_sae, d_out], which takes the orthogonality gradient.
            codes: carry the graph in `values`; needed by every term but orthogonality.
            batch: its `positions` are needed by position_entropy, its `tokens` by sink_mass; its `weights`, where given,
                weigh the correlation term.
            pairs: (i, j), each [P] int64, from `CorrelationMonitor.target_pairs`. Empty leaves the correlation
                term without a penalty, None without an evaluation.
            step: the optimizer step; keys the decoder chunk. Calls of one step move the dual weight once.
            micro: which of the step's micro-batches.

        Raises:
            ValueError: the input of a term with a weight above 0 is missing.
        """
        section = self.section
        total = loss
        effects: list[tuple[Tensor, Tensor]] = []
        self._begin(step)

        def add(name: str, penalty: Penalty, target: Tensor, weight: float | Tensor) -> None:
            nonlocal total
            weight = weight * self._scale
            attached = _Attached.apply(target, penalty.value, penalty.gradient.to(target.dtype), penalty.rows)
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
            self._evaluated("correlation", 1, pairs[0].numel())
            if section.adaptive:
                self._control(given, pairs)
            self._metrics["regularizer/correlation_weight"] = self._weight
        if section.orthogonality_weight > 0 and step % section.orthogonality_every == 0 and micro == 0:
            rows = self._chunk(step)
            with torch.no_grad():
                found = decoder_penalty(transcoder.W_dec, rows, section.orthogonality_threshold)
            add("orthogonality", found, transcoder.W_dec, section.orthogonality_weight * self._accumulation)
            self._evaluated("orthogonality", 1, rows.numel())
        if section.all_pairs_weight > 0:
            given = self._codes(codes, "all_pairs_weight")
            with torch.no_grad():
                found = all_pairs_penalty(given)
            add("all_pairs", found, given.values, section.all_pairs_weight)
            self._evaluated("all_pairs", 1, (given.values.detach() > 0).sum())
        if self._positions is not None:
            given = self._codes(codes, "position_entropy_weight")
            with torch.no_grad():
                bin_of = self._positions.add(given, _needed(batch, "position_entropy_weight", "positions"))
                found = position_penalty(given, bin_of, self._positions, section.position_entropy_floor)
            add("position_entropy", found, given.values, section.position_entropy_weight)
            self._evaluated("position_entropy", 1, (given.values.detach() > 0).sum())
        if self._sinks is not None:
            given = self._codes(codes, "sink_mass_weight")
            with torch.no_grad():
                sink = self._special.marked(_needed(batch, "sink_mass_weight", "tokens"))
                self._sinks.add(given, sink)
                found = sink_penalty(given, sink, self._sinks, section.sink_mass_allowed)
            add("sink_mass", found, given.values, section.sink_mass_weight)
            self._evaluated("sink_mass", 1, (given.values.detach() > 0).sum())

        self._ledger.record_call(_NAME)
        # Also recorded if no term acted: the penalty is then 0, not missing.
        self._ledger.record_effect(_NAME, penalty=0.0, gradient_norm=0.0)
        for value, norm in effects:
            self._ledger.record_effect(_NAME, penalty=value, gradient_norm=norm)
        return total

    def metrics(self) -> dict[str, Tensor]:
        """0-dim device tensors: each term's last penalty (before its weight), its gradient's norm, and the
        dual weight."""
        return dict(self._metrics)

    def set_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Set what `metrics` returns until terms are evaluated again, so that a resumed run logs the last values."""
        self._metrics = {name: value.to(self.device) for name, value in metrics.items()}

    def save(self, step: int) -> Path:
        """Append the metrics to `regularizer.jsonl`, dropping lines of this step and later (a resumed run
        writes those again). Reads the device.

        Raises:
            OSError: the file could not be written; the previous file is unchanged.
        """
        if self._out_dir is None:
            raise ValueError("DiversityRegularizer.save: expected an out_dir at construction, got None")
        path = self._out_dir / "regularizer.jsonl"
        values = {name: float(value) for name, value in self._metrics.items()}
        replace_lines(path, step, [{"step": step, **values}])
        self._ledger.record_file(_NAME, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Call it between steps: the micro-batches of an unfinished step are not included."""
        state: dict[str, Any] = {
            "weight": self._next_weight.clone(),
            "last_fired": self._last_fired.clone(),
            "steps": self._steps,
            "step": self._step,
        }
        if self._positions is not None:
            state["positions"] = self._positions.state_dict()
        if self._sinks is not None:
            state["sinks"] = self._sinks.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        if state["last_fired"].shape != (self.d_sae,):
            raise ValueError(
                f"DiversityRegularizer.load_state_dict: expected d_sae = {self.d_sae}, got {state['last_fired'].numel()}"
            )
        weight = state["weight"].to(self.device, torch.float64, copy=True)
        steps, step = int(state["steps"]), None if state["step"] is None else int(state["step"])
        if weight.dim() or (self._positions is not None and "positions" not in state):
            raise ValueError(
                "DiversityRegularizer.load_state_dict: expected a 0-dim weight, and positions where "
                f"position_entropy_weight is above 0, got {sorted(state)} and a weight of shape {list(weight.shape)}"
            )
        if self._sinks is not None and "sinks" not in state:
            raise ValueError("DiversityRegularizer.load_state_dict: expected sinks: sink_mass_weight is above 0")
        if self._sinks is not None:
            SinkMass(self.d_sae, self.device).load_state_dict(state["sinks"])
        if self._positions is not None:
            self._positions.load_state_dict(state["positions"])
        if self._sinks is not None:
            self._sinks.load_state_dict(state["sinks"])
        self._weight = self._next_weight = weight
        self._rates = []
        self._last_fired.copy_(state["last_fired"])
        self._steps, self._step = steps, step

    def _begin(self, step: int) -> None:
        """At a step's first call, apply the weight that the previous step has set."""
        if step != self._step:
            self._weight, self._step = self._next_weight, step
            self._rates = []
            self._steps += 1

    def _evaluated(self, term: str, times: int, number: int | Tensor) -> None:
        effect: dict[str, float | Tensor] = {f"{term}_evaluations": times, f"{term}_{TERM_UNITS[term]}": number}
        self._ledger.record_effect(_NAME, **effect)

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
        """Set the next step's weight from this step's weight and the mean rate of its micro-batches so far."""
        section = self.section
        self._note_firing(codes)
        if pairs[0].numel() == 0 and self._ledger.surveys == 0:
            return
        if pairs[0].numel() == 0:
            self._rates.append(self._no_rate)
        else:
            live = (self._last_fired > self._steps - _LIVE_STEPS).sum().clamp(min=1)
            paired = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device)
            for side in pairs:
                paired.index_fill_(0, side, True)
            self._rates.append(paired.sum().double() / live)
        rate = self._rates[0] if len(self._rates) == 1 else torch.stack(self._rates).mean()
        low, high = section.correlation_weight, section.correlation_weight_max
        off = rate - section.target_rate
        if section.adaptive_step is None:
            speed = math.log(high / low) * CROSSINGS / self._run_steps
            exponent = speed * (off / max(section.target_rate, LEAST_RATE)).clamp(-1, 1)
        else:
            low, exponent = 0.0, section.adaptive_step * off
        # Not in place: the metric of this step and the graph of its loss hold the old tensor.
        self._next_weight = (self._weight * torch.exp(exponent)).clamp(low, high)

    def _note_firing(self, codes: SparseCodes) -> None:
        fires = codes.values > 0
        if self.device.type == "cpu" and bool(fires.all()):
            self._last_fired.index_fill_(0, codes.indices, self._steps)
            return
        now = torch.where(fires, self._steps, -_LIVE_STEPS)
        self._last_fired.scatter_reduce_(0, codes.indices, now, "amax")


def _needed(batch: ActivationBatch | None, setting: str, column: str) -> Tensor:
    """A column of the batch that the penalty of this setting reads."""
    if batch is None:
        raise ValueError(
            f"DiversityRegularizer.apply_penalty: {setting} is above 0, so expected batch (for its {column}), got None"
        )
    found: Tensor = getattr(batch, column)
    return found
