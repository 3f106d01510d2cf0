"""The learning rate as a pure function of the step: resuming needs no state."""

from __future__ import annotations

import math

from transcoder.config import RunConfig, TrainingSection


def peak_learning_rate(config: RunConfig) -> float:
    """`training.lr`, or the field's default 2e-4 / sqrt(d_sae / 2^14) (Gao et al. 2024)."""
    if config.training.lr is not None:
        return config.training.lr
    return 2e-4 / math.sqrt(config.transcoder.d_sae / 2**14)


def learning_rate(step: int, section: TrainingSection, peak: float) -> float:
    """Rate of the step with index `step` (0 is the first): linear warm-up that never starts at 0, then the cosine from
    `peak` to `peak * min_lr_ratio`, which the last step runs at exactly; `constant` stays at `peak`."""
    if step < section.warmup_steps:
        return peak * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return peak
    span = section.steps - 1 - section.warmup_steps
    progress = min(1.0, (step - section.warmup_steps) / span) if span > 0 else 1.0
    floor = peak * section.min_lr_ratio
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
