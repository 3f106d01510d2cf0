"""Settings and data that contradict each other are refused before any work is done."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from transcoder.activations import ActivationBatch
from transcoder.config import ConfigError, RunConfig, flags, load_yaml
from transcoder.settings import brief

logger = logging.getLogger(__name__)

MAY_CHANGE = ("model.device", "activations.prefetch", "activations.allow_changed_data", "training.max_bad_steps")
"""Settings that a resumed run may be given other values of: they do not change its results, or say so in their help."""
FORMER_DEFAULTS = {"antidup.regularizer.orthogonality_weight": 0.01}
"""Defaults that changed with the version that added `antidup.positions.train`, as they were before it."""
FOUND = ("activations.mask_norm_multiple",)
"""Settings whose `auto` a run replaces by what it finds: its config.yaml has the value, which a resumed run goes on with."""


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        # Of what torch says, the first sentence: others name its own functions, over pages.
        reason = brief(error).partition(". ")[0]
        have = ", ".join(map(repr, ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]))
        raise ConfigError(
            f"model.device: expected a device of this machine ({have}), got {name!r}: {reason}"
        ) from error
    return device


def check_switches(
    config: RunConfig, batches: Iterable[ActivationBatch] | None, heldout: Sequence[ActivationBatch] | None
) -> None:
    """Refuse settings that contradict each other: the ledger would only notice after the first steps."""
    if heldout is not None and batches is None:
        raise ValueError(
            "train_transcoder: heldout: expected it only with `batches`: config.activations has held-out data"
        )
    positions = config.antidup.positions
    if batches is not None and positions.enabled and positions.train:
        raise ConfigError(
            "antidup.positions.train: the position sampler chooses among a sequence's tokens before they become batches, "
            "which it cannot do for your own `batches`; set it to false"
        )
    anti = config.antidup
    trained = config.training.steps * config.training.batch_size * config.training.accumulation
    if positions.enabled and positions.train:
        logger.warning(
            "antidup.positions.train: %d training tokens are drawn from about %d tokens of the language model, masked tokens "
            "not counted; without it each of those trains",
            trained,
            round(trained / positions.keep_fraction),
        )
    elif positions.enabled and not anti.samples.enabled:
        logger.warning(
            "antidup.positions: the position sampler is off too, since it chooses what antidup.samples looks at and that is off"
        )
    if anti.recycle.enabled and not (anti.monitor.enabled and anti.monitor.merge_test_tokens):
        raise ConfigError(
            "antidup.recycle.enabled: it folds what the monitor flags and the merge test passes; set antidup.monitor.enabled "
            "to true and antidup.monitor.merge_test_tokens above 0"
        )
    if anti.recycle.enabled and (config.transcoder.aux_k == 0 or config.transcoder.aux_coefficient == 0):
        raise ConfigError(
            "antidup.recycle.enabled: AuxK trains the latents that it frees; set transcoder.aux_k and "
            "transcoder.aux_coefficient above 0"
        )
    evidence = anti.monitor.blocks_to_flag * anti.monitor.block_tokens
    if anti.recycle.enabled and evidence > anti.recycle.until * trained:
        logger.warning(
            "antidup.recycle: a flag needs %d blocks of %d tokens, and the run's last round comes after %d tokens: nothing "
            "will be recycled; lower antidup.monitor.block_tokens",
            anti.monitor.blocks_to_flag,
            anti.monitor.block_tokens,
            int(anti.recycle.until * trained),
        )
    _name_what_cannot_act(config, trained)
    section = anti.regularizer
    weights = [field.name for field in dataclasses.fields(section) if field.name.endswith("_weight")]
    if section.enabled and all(getattr(section, name) == 0 for name in weights):
        raise ConfigError(
            f"antidup.regularizer: enabled with every weight 0 ({', '.join(weights)}): it would have no effect; set one, or "
            "set antidup.regularizer.enabled to false"
        )
    if section.enabled and not anti.regularizer_acts:
        logger.warning(
            "antidup.regularizer: the pair penalty is off too, since antidup.monitor finds its pairs and that is off"
        )


def _name_what_cannot_act(config: RunConfig, trained: int) -> None:
    """Warn of settings that wait for more tokens or steps than the run has. `trained`: its tokens."""
    dictionary, monitor, steps = config.transcoder, config.antidup.monitor, config.training.steps
    if dictionary.dead_after_tokens >= trained:
        logger.warning(
            "transcoder.dead_after_tokens is %d and the run has %d tokens: no latent will be counted dead, and AuxK has "
            "nothing to train; %d would act",
            dictionary.dead_after_tokens,
            trained,
            max(1, trained // 4),
        )
    if monitor.enabled and monitor.blocks_to_flag * monitor.block_tokens > trained:
        logger.warning(
            "antidup.monitor.block_tokens is %d, a flag needs %d blocks, and the run has %d tokens: no pair will be flagged; "
            "%d would act",
            monitor.block_tokens,
            monitor.blocks_to_flag,
            trained,
            max(1, trained // (monitor.blocks_to_flag + 1)),
        )
    for name, value in (
        ("training.warmup_steps", config.training.warmup_steps),
        ("training.evaluation_every", config.training.evaluation_every),
    ):
        if value > steps:
            logger.warning("%s is %d and the run has %d steps: %d would act", name, value, steps, max(1, steps // 10))


def check_folder(run_dir: Path, config: RunConfig, resume: bool) -> None:
    """A folder that holds a run is resumed, with the settings it was started with, or left alone."""
    present = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (run_dir / name).exists()]
    if present and not resume:
        raise FileExistsError(
            f"{run_dir} holds a run already ({', '.join(present)}): add --resume to go on with it, or choose another --out"
        )
    if resume and (run_dir / "config.yaml").exists():
        changed = [name for name in changed_settings(run_dir / "config.yaml", config) if name not in MAY_CHANGE]
        if changed:
            raise ConfigError(
                f"resume: {', '.join(changed)} differ from {run_dir / 'config.yaml'}: a resumed run goes on exactly as it was "
                "started; leave them out, or give the values of that file where a default has changed since, or start a new "
                "run with another --out"
            )


def as_started(config: RunConfig, run_dir: Path, resume: bool) -> RunConfig:
    """`config` as a resumed run was started: with what it found where `config` says `auto`. A run of an earlier version, whose
    position sampler always drew the training tokens without a setting for it, goes on so, and with what was the default then
    where `config` has today's."""
    saved = run_dir / "config.yaml"
    if not resume or not saved.exists():
        return config
    before, now, defaults = (c.to_dict() for c in (RunConfig.load(saved), config, RunConfig()))
    kept = {name: _setting(before, name) for name in FOUND if _setting(now, name) == "auto"}
    if _drew_training_tokens(saved):
        kept["antidup.positions.train"] = True
        kept |= {
            name: value
            for name, value in FORMER_DEFAULTS.items()
            if _setting(before, name) == value and _setting(now, name) == _setting(defaults, name)
        }
    return config.replace(kept)


def _drew_training_tokens(saved: Path) -> bool:
    """Whether a config.yaml is of a version whose position sampler drew the training tokens without a setting for it."""
    values: Any = load_yaml(saved)
    for section in ("antidup", "positions"):
        values = values.get(section) if isinstance(values, dict) else None
    return not isinstance(values, dict) or "train" not in values


def changed_settings(saved: Path, config: RunConfig) -> list[str]:
    """Names of the settings that change a run's results and differ between `config` and a saved config.yaml."""
    before, now = as_started(RunConfig.load(saved), saved.parent, resume=True).to_dict(), config.to_dict()
    sections = ("model.", "activations.", "transcoder.", "training.", "antidup.")
    names = [name for name, _ in flags() if name.startswith(sections)]
    return [name for name in names if _setting(before, name) != _setting(now, name)]


def _setting(values: dict[str, Any], dotted: str) -> Any:
    return functools.reduce(operator.getitem, dotted.split("."), values)
