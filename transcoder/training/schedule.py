"""What follows from the length of a run: defaults, the learning rate, and what is due after which step. All of it is a function
of the step, so resuming needs no state."""

from __future__ import annotations

import math

from transcoder.antidup.window import BLOCK_TOKENS
from transcoder.config import RunConfig, TrainingSection
from transcoder.dictionary_config import TranscoderConfig

WARMUP_STEPS = 100
"""Default of `training.warmup_steps` in runs of a thousand steps and more."""


def peak_learning_rate(config: RunConfig) -> float:
    """`training.lr`, or the field's default 2e-4 / sqrt(d_sae / 2^14) (Gao et al. 2024)."""
    if config.training.lr is not None:
        return config.training.lr
    return 2e-4 / math.sqrt(config.transcoder.d_sae / 2**14)


def length_defaults(config: RunConfig) -> dict[str, int]:
    """{setting: its default for a run of this length}, of the settings for which null means such a default. Each acts within
    the run: the warm-up ends, a latent can be counted dead, a pair can be flagged by the middle of the run."""
    training, flag_blocks = config.training, config.antidup.monitor.blocks_to_flag
    tokens = training.steps * training.batch_size * training.accumulation
    return {
        "training.warmup_steps": min(WARMUP_STEPS, training.steps // 10),
        "transcoder.dead_after_tokens": max(1, min(TranscoderConfig.dead_after_tokens, tokens // 4)),
        "antidup.monitor.block_tokens": max(1, min(BLOCK_TOKENS, tokens // (2 * flag_blocks))),
    }


def learning_rate(step: int, section: TrainingSection, peak: float) -> float:
    """Rate of the step with index `step` (0 is the first): linear warm-up that never starts at 0, then the cosine from
    `peak` to `peak * min_lr_ratio`, which the last step runs at exactly; `constant` stays at `peak`."""
    warmup = WARMUP_STEPS if section.warmup_steps is None else section.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if section.schedule == "constant":
        return peak
    span = section.steps - 1 - warmup
    progress = min(1.0, (step - warmup) / span) if span > 0 else 1.0
    floor = peak * section.min_lr_ratio
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


FIRST_TARGETS = 10
"""Step of the first search for pairs to penalise: by then batches of 1024 tokens have given 10k tokens of evidence."""


class Calendar:
    """Which work is due between two steps, by the number of steps done."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._steps = config, config.training.steps
        self.verify_step = min(config.antidup.verify_at_step, self._steps)
        """Step at which the ledger is verified; moves on where files could not be written."""

    def last(self, step: int) -> bool:
        return step >= self._steps

    def every(self, period: int, step: int) -> bool:
        """Each `period` steps (0: never), and at the last one."""
        return (period > 0 and step % period == 0) or self.last(step)

    def recycling(self, step: int) -> bool:
        section = self._config.antidup.recycle
        acts = section.enabled and self._config.antidup.monitor.enabled
        return acts and step % section.every == 0 and 0 < step <= int(section.until * self._steps)

    def reporting(self, step: int) -> bool:
        """Reports of the anti-duplication parts: at their interval, before pairs are recycled, and to be verified."""
        regular = self.every(self._config.antidup.monitor.correlation_save_frequency, step)
        return regular or self.recycling(step) or self.verifying(step)

    def searching(self, step: int) -> bool:
        """Pairs to penalise are needed well before the first report: steps 10, 20, 40, 80, ... until then."""
        doublings, rest = divmod(step, FIRST_TARGETS)
        early = step < self._config.antidup.monitor.correlation_save_frequency
        return early and self._config.antidup.regularizer.enabled and rest == 0 and doublings & (doublings - 1) == 0

    def sampling(self, step: int) -> bool:
        """Sample files are written."""
        return self.every(self._config.antidup.samples.save_frequency, step) or self.verifying(step)

    def verifying(self, step: int) -> bool:
        return step == self.verify_step
