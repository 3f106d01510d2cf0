"""Held-out metrics of a transcoder, and of the baselines it must beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, ActivationStream
from transcoder.activations.masking import find_sinks
from transcoder.activations.rows import Substitute
from transcoder.antidup.merge_cost import MergeResult, MergeTest
from transcoder.antidup.running_mass import PositionMass
from transcoder.antidup.workload import ENCODED, TESTED
from transcoder.kernels import SparseCodes, nested_loss, sparse_decode
from transcoder.model import Transcoder
from transcoder.training.baselines import LinearBaseline


@contextmanager
def at_inference(transcoder: Transcoder) -> Iterator[None]:
    """Inside the `with` block the transcoder is in eval mode (BatchTopK runs with its threshold); its mode is restored."""
    was_training = transcoder.training
    transcoder.eval()
    try:
        yield
    finally:
        transcoder.train(was_training)


@torch.no_grad()
def evaluate(
    transcoder: Transcoder,
    heldout: Sequence[ActivationBatch],
    sinks: ActivationBatch | None = None,
    baseline: LinearBaseline | None = None,
) -> dict[str, float]:
    """FVU (fraction of variance unexplained) on held-out non-sink tokens, per prefix, with L0 and the baselines.

    FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2 over all tokens, the mean being the held-out one; BatchTopK runs with its
    threshold, as at inference. Targets that do not vary have their mean square in the place of their variance, as in
    `losses.spread`. `evaluation/sink_fvu` is the same ratio over the masked-out sink tokens, around the mean of
    the others; `evaluation/sink_l0` and `evaluation/sink_only_latents` (that fire on sinks and on no other held-out token) say
    what the dictionary would do with them. `evaluation/fvu_with_sinks` is over all held-out tokens, masked ones too, around the
    mean of all. `evaluation/fvu_without_sinks` leaves out what was masked and any further tokens whose norms stand apart
    (`masking.find_sinks`): it is `evaluation/fvu` where the mask takes every sink. Reads the device: call it between steps.

    Returns: {"evaluation/fvu", "evaluation/fvu_with_sinks", "evaluation/fvu_without_sinks",
    "evaluation/fvu_prefix_<w>", "evaluation/explained_variance", "evaluation/l0",
    "evaluation/tokens", "evaluation/live_share", and with a baseline "evaluation/baseline_mean_fvu",
    "evaluation/baseline_linear_fvu"}; over the latents that fired at least 30 times, the entropy of where in the sequence they
    are active, divided by what each tenth of it offered, 1 being everywhere alike: "evaluation/position_entropy_median",
    "evaluation/position_entropy_p01", "evaluation/position_judged" (how many); with sinks, the share of a latent's activation
    that falls on them: "evaluation/sink_mass_median", "evaluation/sink_mass_p99".
    """
    if not heldout:
        raise ValueError("evaluate: expected at least one held-out batch, got none")
    with at_inference(transcoder):
        return _evaluate(transcoder, heldout, sinks, baseline)


@torch.no_grad()
def cross_entropy(transcoder: Transcoder, model: ActivationStream, tokens: int) -> dict[str, float]:
    """What the transcoder costs the language model when it stands in for the layer, on about `tokens` held-out tokens.

    Sinks keep their own activations. `evaluation/ce_recovered` is (CE_zero - CE_transcoder) / (CE_zero - CE_model), where zero
    puts nothing in the layer's place: 1 costs nothing, 0 is no better than leaving the layer out. Empty where there is no
    language model to run (own batches, cached activations).
    """
    substitutes: dict[str, Substitute | None] = {
        "model": None,
        "transcoder": lambda source, _: transcoder(source),
        "zero": lambda _, target: torch.zeros_like(target),
    }
    with at_inference(transcoder):
        found = model.heldout_losses(substitutes, tokens)
    return cross_entropy_metrics(found, "evaluation")


def cross_entropy_metrics(found: dict[str, float] | None, room: str) -> dict[str, float]:
    """Losses by what stands in for the layers as metrics, and the share that is recovered of what leaving them out costs."""
    if found is None:
        return {}
    metrics = {f"{room}/ce_{name}": value for name, value in found.items()}
    span = found["zero"] - found["model"]
    if span > 0:
        metrics[f"{room}/ce_recovered"] = (found["zero"] - found["transcoder"]) / span
    return metrics


@torch.no_grad()
def merge_test(
    transcoder: Transcoder, heldout: Sequence[ActivationBatch], i: Tensor, j: Tensor, tokens: int | None = None
) -> MergeResult:
    """What folding latent j into i (or i into j) costs on the first `tokens` held-out tokens (None: all), for pairs (i, j),
    each [P] int64. The transcoder runs as at inference; the FVU is that of the full width, and no latent is folded into one of
    a wider prefix.

    Raises: ValueError without held-out tokens.
    """
    if not heldout:
        raise ValueError(
            "merge_test: expected held-out tokens, got none; set activations.heldout_fraction above 0, or give `heldout`"
        )
    if i.numel() == 0:
        # The held-out tokens are encoded for the pairs' sake alone.
        return MergeResult.untested(i, j)
    with at_inference(transcoder):
        # In normalised units throughout: costs are ratios.
        test, seen = MergeTest(i, j, transcoder.W_dec, transcoder.widths), 0
        for batch in heldout:
            if tokens is not None and seen >= tokens:
                break
            seen += len(batch)
            codes = transcoder.encode(batch.source)
            target = transcoder.residual_target(batch.source, batch.target)
            error = sparse_decode(codes, transcoder.W_dec, transcoder.b_dec) - target
            test.update(codes, error, transcoder.normalize_target(batch.target))
        return test.result()


def merge_test_work(
    transcoder: Transcoder, heldout: Sequence[ActivationBatch], i: Tensor, j: Tensor, tokens: int | None = None
) -> float:
    """Work of `merge_test` with these arguments, see `antidup.workload`."""
    config, held = transcoder.config, sum(map(len, heldout))
    seen = held if tokens is None else min(tokens, held)
    encoder = seen * config.d_sae * config.d_in
    rows = seen * torch.cat([i, j]).unique().numel() * config.d_out
    return ENCODED * encoder + rows + TESTED * 2 * i.numel() * seen * config.k / config.d_sae


def _evaluate(
    transcoder: Transcoder,
    heldout: Sequence[ActivationBatch],
    sinks: ActivationBatch | None,
    baseline: LinearBaseline | None,
) -> dict[str, float]:
    tokens = sum(len(batch) for batch in heldout)
    widths = transcoder.widths
    mean = torch.stack([batch.target.double().sum(0) for batch in heldout]).sum(0) / tokens
    solution = None if baseline is None or baseline.tokens == 0 else baseline.solve()

    device = mean.device
    total, size = torch.zeros(2, dtype=torch.float64, device=device).unbind()
    errors = torch.zeros(len(widths), dtype=torch.float64, device=device)
    rivals = torch.zeros(2, dtype=torch.float64, device=device)
    active = torch.zeros((), dtype=torch.int64, device=device)
    fired = torch.zeros(transcoder.config.d_sae, dtype=torch.bool, device=device)
    longest = max((int(batch.positions.max()) + 1 for batch in heldout if len(batch)), default=0)
    where = PositionMass(transcoder.config.d_sae, device, torch.float64, decay=1.0, length=longest)
    parts = _Parts(heldout, mean.numel(), device)
    for batch in heldout:
        sums, codes, row_errors = _prefix_sums(transcoder, batch)
        parts.add(batch, row_errors)
        where.add(codes, batch.positions)
        errors += sums
        total += (batch.target.double() - mean).square().sum()
        size += batch.target.double().square().sum()
        live = codes.values > 0
        active += live.sum()
        fired.index_fill_(0, codes.indices[live], True)
        if baseline is not None and solution is not None:
            rivals[0] += (batch.target - baseline.mean()).double().square().sum()
            rivals[1] += (batch.target - baseline.predict(solution, batch.source)).double().square().sum()
    total = _denominator(total, size, tokens * mean.numel())
    fvu = (errors / total).tolist()
    metrics = {
        "evaluation/fvu": fvu[-1],
        **{f"evaluation/fvu_prefix_{w}": value for w, value in zip(widths, fvu, strict=True)},
        "evaluation/explained_variance": 1 - fvu[-1],
        "evaluation/l0": float(active) / tokens,
        "evaluation/tokens": float(tokens),
        "evaluation/live_share": float(fired.float().mean()),
    }
    entropy, judged, _, _ = where.shares()
    metrics["evaluation/position_judged"] = float(judged.sum())
    metrics |= _quantiles("evaluation/position_entropy", entropy[judged], {"median": 0.5, "p01": 0.01})
    if solution is not None:
        metrics["evaluation/baseline_mean_fvu"], metrics["evaluation/baseline_linear_fvu"] = (rivals / total).tolist()
    if sinks is not None and len(sinks) > 0:
        sums, codes, row_errors = _prefix_sums(transcoder, sinks)
        parts.add_masked(sinks, row_errors)
        on_sinks = codes.indices[codes.values > 0]
        only = torch.zeros_like(fired).index_fill_(0, on_sinks, True) & ~fired
        metrics["evaluation/sink_l0"] = on_sinks.numel() / len(sinks)
        metrics["evaluation/sink_only_latents"] = float(only.sum())
        on_sink = torch.zeros_like(entropy).index_add_(0, codes.indices, codes.values.double())
        share = on_sink / (on_sink + where.mass.sum(1))
        metrics |= _quantiles("evaluation/sink_mass", share[share.isfinite()], {"median": 0.5, "p99": 0.99})
        around, size = (part.square().sum() for part in (sinks.target.double() - mean, sinks.target.double()))
        metrics["evaluation/sink_fvu"] = float(sums[-1] / _denominator(around, size, sinks.target.numel()))
        metrics["evaluation/sink_tokens"] = float(len(sinks))
    return metrics | parts.metrics()


class _Parts:
    """FVU of the held-out tokens with and without those whose norms stand apart, around each part's own mean."""

    def __init__(self, heldout: Sequence[ActivationBatch], d_out: int, device: torch.device) -> None:
        norms = torch.cat([torch.linalg.vector_norm(batch.source.float(), dim=1) for batch in heldout])
        sinks = find_sinks(norms)
        self._above = float("inf") if sinks is None else sinks.multiple * float(norms.median())
        self._errors = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, d_out, dtype=torch.float64, device=device)
        self._squares, self._tokens = torch.zeros_like(self._errors), torch.zeros_like(self._errors)

    def add(self, batch: ActivationBatch, errors: Tensor) -> None:
        """Rows that training does not mask, and the squared error [B] of each."""
        self._add(0, batch.target, errors)
        ordinary = torch.linalg.vector_norm(batch.source.float(), dim=1) <= self._above
        self._add(1, batch.target[ordinary], errors[ordinary])

    def add_masked(self, batch: ActivationBatch, errors: Tensor) -> None:
        self._add(0, batch.target, errors)

    def _add(self, part: int, target: Tensor, errors: Tensor) -> None:
        self._errors[part] += errors.sum()
        self._sums[part] += target.double().sum(0)
        self._squares[part] += target.double().square().sum()
        self._tokens[part] += len(target)

    def metrics(self) -> dict[str, float]:
        around = self._squares - self._sums.square().sum(1) / self._tokens.clamp(min=1)
        numbers = self._tokens.max() * self._sums.shape[1]
        fvu = [
            float(e / _denominator(a, s, int(numbers)))
            for e, a, s in zip(self._errors, around, self._squares, strict=True)
        ]
        return {"evaluation/fvu_with_sinks": fvu[0], "evaluation/fvu_without_sinks": fvu[1]}


def _quantiles(name: str, values: Tensor, wanted: Mapping[str, float]) -> dict[str, float]:
    """Of no values, none. The nearest rank: torch.quantile refuses more than 16M values."""
    ordered = values.sort().values
    last = ordered.numel() - 1
    return {f"{name}_{told}": float(ordered[round(q * last)]) for told, q in wanted.items()} if last >= 0 else {}


def _denominator(around: Tensor, size: Tensor, numbers: int) -> Tensor:
    """Sum of squares around the mean; where that is rounding, the sum of squares, and where that is 0, 1 a number."""
    rounding = (8 * torch.finfo(torch.float32).eps) ** 2 * size
    return torch.where(around > rounding, around, torch.where(size > 0, size, torch.full_like(size, float(numbers))))


def _prefix_sums(transcoder: Transcoder, batch: ActivationBatch) -> tuple[Tensor, SparseCodes, Tensor]:
    """(squared errors [P] in raw units, summed over the batch; codes; squared error of each row [B], of the full width)."""
    codes = transcoder.encode(batch.source)
    target = transcoder.residual_target(batch.source, batch.target)
    nested = nested_loss(codes, transcoder.W_dec, transcoder.b_dec, target, transcoder.widths)
    unit = transcoder.target_scale.double().square()
    raw = nested.per_prefix.double() * target.numel() / unit
    return raw, codes, nested.residual.double().square().sum(1) / unit
