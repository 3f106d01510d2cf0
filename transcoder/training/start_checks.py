"""Settings and data that contradict each other are refused before any work is done."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transcoder.activations import ActivationBatch
from transcoder.antidup.window import BLOCK_TOKENS
from transcoder.config import ActivationsSection, ConfigError, RunConfig, flags, load_yaml
from transcoder.kernels.backend import why_slower
from transcoder.settings import brief
from transcoder.training.schedule import learning_rate, length_defaults, peak_learning_rate

if TYPE_CHECKING:
    from transcoder.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    *("model.device", "activations.prefetch", "activations.allow_changed_data"),
    *("training.steps", "training.max_bad_steps"),
)
"""Settings that a resumed run may be given other values of: they do not change its results, or say so in their help."""
FORMER_DEFAULTS = {"antidup.regularizer.orthogonality_weight": 0.01}
"""Defaults that changed with the version that added `antidup.positions.train`, as they were before it."""
FORMER_WAYS = ("antidup.positions.train", "activations.eos_as_bos")
"""Settings that are on in a resumed run of a version before them: the sampler drew the training tokens, and TransformerLens'
stand-in for a missing BOS was taken."""
STREAMS = 8
"""`parallel.streams` under torchrun where it is null."""
FOUND = ("activations.mask_norm_multiple",)
"""Settings whose `auto` a run replaces by what it finds: its config.yaml has the value, which a resumed run goes on with."""


def under_torchrun() -> bool:
    """Whether this is one of several processes that torchrun has started."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_one_process() -> None:
    """ConfigError under torchrun, for what only `train` and `demo` do in several processes."""
    if under_torchrun():
        raise ConfigError(
            f"expected one process, got {os.environ['WORLD_SIZE']} (WORLD_SIZE, which torchrun sets): of the commands only "
            "`train` and `demo` run in several; start this one without torchrun"
        )


def check_for_ranks(config: RunConfig, processes: int, own_batches: bool) -> None:
    """ConfigError for what a run in several processes cannot do (the list in docs/scale.md), before the model is loaded."""
    wrong = [
        (own_batches, "batches: expected none"),
        (":" in config.model.device, f"model.device: expected auto, cuda or cpu, got {config.model.device}"),
        (config.activations.layers is not None, "activations.layers: expected null"),
        (
            config.transcoder.activation == "jumprelu",
            "transcoder.activation: expected topk or batch_topk, got jumprelu",
        ),
    ]
    for found, said in wrong:
        if found:
            raise ConfigError(f"{said} in a run of {processes} processes; start it without torchrun")


def in_ranks(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The config of one of a run's processes: `parallel.streams` is set, and only the first one writes to the terminal and to
    services, and draws the report.

    Raises: ConfigError where the processes cannot share the streams evenly.
    """
    streams = config.parallel.streams or STREAMS
    if streams % ranks.count:
        raise ConfigError(
            f"parallel.streams: expected a multiple of the number of processes, {ranks.count}, got {streams}; it is fixed for "
            "a run"
        )
    quiet: dict[str, Any] = {
        "logging.progress": False,
        "logging.wandb": "off",
        "logging.tensorboard": False,
        "logging.report": False,
        "logging.report_tokens": 0,
    }
    return config.replace({"parallel.streams": streams, **(quiet if ranks.rank else {})})


def check_streams(config: RunConfig, own_batches: bool) -> None:
    """ConfigError where the data cannot be read as `parallel.streams` streams."""
    streams, batch = config.parallel.streams or 1, config.training.batch_size
    if streams == 1:
        return
    wrong = [
        (own_batches, "with `batches`: they are one stream"),
        (config.activations.layers is not None, "with activations.layers"),
        (config.activations.kind == "cached", "with cached activations, whose shards are one stream"),
        (config.antidup.positions.enabled and config.antidup.positions.train, "with antidup.positions.train"),
        (batch % streams != 0, f"or a divisor of training.batch_size = {batch}"),
    ]
    for found, said in wrong:
        if found:
            raise ConfigError(f"parallel.streams: expected 1 {said}, got {streams}")


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


def say_backend(device: torch.device) -> None:
    """Warn where the ops run on a slower backend than this device usually has. Compiles one that was never used."""
    slower = why_slower(device)
    if slower is not None:
        logger.warning("slow: %s; see `transcoder doctor`", slower)


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
    _name_what_cannot_act(config)
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


def _name_what_cannot_act(config: RunConfig) -> None:
    """Warn of each setting that waits for more tokens or steps than the run has, with a value that would act."""
    dictionary, training, anti = config.transcoder, config.training, config.antidup
    steps, monitor = training.steps, anti.monitor
    a_step = training.batch_size * training.accumulation
    tokens = steps * a_step

    def warn(name: str, value: int | None, why: str, would: int) -> None:
        logger.warning(
            "%s is %s and the run has %d steps of %d tokens: %s; %d would act",
            *(name, value, steps, a_step, why, would),
        )

    refresh = training.dead_refresh_steps
    acts_from = min(refresh, steps // 4) if steps > 3 else 1
    if refresh >= steps > 1 and dictionary.aux_k != 0 and dictionary.aux_coefficient != 0:
        warn("training.dead_refresh_steps", refresh, "AuxK never reads which latents are dead", acts_from)
    dead_after = dictionary.dead_after_tokens
    if dead_after is not None and dead_after > (steps - 1) // acts_from * acts_from * a_step and steps > 1:
        why = "no latent will be counted dead, and AuxK has nothing to train"
        warn("transcoder.dead_after_tokens", dead_after, why, max(1, tokens // 4))
    if monitor.enabled:
        last = int(anti.recycle.until * steps) if anti.recycle.enabled else steps
        outcome = "flagged" if last == steps else f"flagged by step {last}, after which nothing is recycled"
        if last < monitor.blocks_to_flag:
            share = anti.recycle.until if anti.recycle.enabled else 1.0
            would = next(n for n in itertools.count(steps) if int(share * n) >= monitor.blocks_to_flag)
            why = f"a flag needs {monitor.blocks_to_flag} blocks of a step at least, so no pair will be {outcome}"
            warn("training.steps", steps, why, would)
        for name, would in _changes_for_a_flag(config, last).items():
            why = f"a flag needs {monitor.blocks_to_flag} blocks, each closed by a report, so no pair will be {outcome}"
            warn(f"antidup.monitor.{name}", getattr(monitor, name), why, would)
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep is not None and math.lcm(every, keep) > steps and steps % keep:
        warn("checkpoint.keep_every", keep, "no checkpoint is of a step that is a multiple of it", min(every, steps))
    waits: dict[str, tuple[bool, int | None, int, str]] = {
        "training.warmup_steps": (True, training.warmup_steps, steps, "the learning rate never reaches lr"),
        "training.evaluation_every": (True, training.evaluation_every, steps, "there is one evaluation, at the end"),
        "transcoder.jumprelu.warmup_steps": (
            dictionary.activation == "jumprelu",
            dictionary.jumprelu.warmup_steps,
            steps,
            "the penalty never reaches its weight",
        ),
        "antidup.samples.collect_every": (
            anti.samples.enabled,
            anti.samples.collect_every,
            steps - 1,
            "samples are collected from the untrained weights of step 0 alone",
        ),
        "antidup.regularizer.orthogonality_every": (
            anti.regularizer.enabled and anti.regularizer.orthogonality_weight > 0,
            anti.regularizer.orthogonality_every,
            steps - 1,
            "the decoder penalty acts in step 0 alone",
        ),
        "antidup.recycle.every": (
            anti.recycle.enabled,
            anti.recycle.every,
            int(anti.recycle.until * steps),
            f"nothing is recycled, since the last round is due at step {int(anti.recycle.until * steps)}",
        ),
    }
    for name, (used, value, most, why) in waits.items():
        if used and value is not None and value > most > 0:
            warn(name, value, why, max(1, most // 10))


def _changes_for_a_flag(config: RunConfig, last: int) -> dict[str, int]:
    """The fewest settings of the monitor, with values, that let a pair be flagged by step `last`; none if it can be already, or
    if there are fewer steps than blocks."""
    monitor, training = config.antidup.monitor, config.training
    a_step, needed = training.batch_size * training.accumulation, monitor.blocks_to_flag
    if last < needed:
        return {}
    now = {
        "block_tokens": monitor.block_tokens or BLOCK_TOKENS,
        "correlation_save_frequency": monitor.correlation_save_frequency,
        "update_every": monitor.update_every,
    }
    most = {
        "block_tokens": max(1, last * a_step // (2 * needed)),
        "correlation_save_frequency": max(1, last // (2 * needed)),
        "update_every": 1,
    }

    def flags_come(values: dict[str, int]) -> bool:
        frequency, since, closed = values["correlation_save_frequency"], 0, 0
        for step in [*range(frequency, last, frequency), last]:
            counted = -(-step // values["update_every"]) * a_step
            if counted - since >= values["block_tokens"]:
                since, closed = counted, closed + 1
        return closed >= needed

    for size in range(len(now) + 1):
        for names in itertools.combinations(now, size):
            changes = {name: min(now[name], most[name]) for name in names}
            if flags_come({**now, **changes}):
                return changes
    return {}


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


def say_nothing_held_out(config: RunConfig) -> None:
    """Name what waits for held-out text in a run that has none."""
    waits = ["evaluation (training.evaluation_every, checkpoint.keep_best)"]
    if config.antidup.monitor.enabled:
        waits.append("the merge test (antidup.monitor.merge_test_tokens), without which duplicates have no verdict")
    logger.warning(
        "activations.heldout_fraction is %g and nothing is held out: there is no %s; %g would act",
        config.activations.heldout_fraction,
        " and no ".join(waits),
        ActivationsSection.heldout_fraction,
    )


def check_length(config: RunConfig, run_dir: Path, step: int) -> None:
    """Before a resumed run of `step` steps goes on: say what another number of steps than it was started with makes of its
    schedule. Its summary of an earlier end is removed.

    Raises: ConfigError: fewer steps than are done.
    """
    section, peak = config.training, peak_learning_rate(config)
    if section.steps < step:
        raise ConfigError(
            f"training.steps: this run has done {step} steps: expected at least as many, got {section.steps}"
        )
    if section.steps == step:
        logger.warning("all %d steps are done; a larger training.steps trains on", step)
        return
    saved = run_dir / "config.yaml"
    before = RunConfig.load(saved).training if saved.exists() else section
    if before.steps != section.steps:
        logger.warning(
            "training.steps is %d, it was %d: schedule %s goes on as in a run of %d steps. Learning rate %.3g in the last "
            "step, %.3g from step %d on, %.3g at the end",
            section.steps,
            before.steps,
            section.schedule,
            section.steps,
            learning_rate(max(0, step - 1), before, peak),
            learning_rate(step, section, peak),
            step + 1,
            learning_rate(section.steps - 1, section, peak),
        )
    (run_dir / "summary.json").unlink(missing_ok=True)


def as_started(config: RunConfig, run_dir: Path, resume: bool) -> RunConfig:
    """`config` with every default that depends on the run filled in: what a resumed run was started with, or found where
    `config` says `auto`, else what its length gives. A run of an earlier version keeps the defaults of then where `config`
    has today's, and its position sampler goes on drawing the training tokens, for which there was no setting."""
    saved = run_dir / "config.yaml"
    kept: dict[str, Any] = {}
    if resume and saved.exists():
        before, now, defaults = (c.to_dict() for c in (RunConfig.load(saved), config, RunConfig()))
        older = _lacks(saved, "antidup.positions.train")
        former = {name: _setting(before, name) for name in length_defaults(config)} | (FORMER_DEFAULTS if older else {})
        kept = {
            name: value
            for name, value in former.items()
            if _setting(before, name) == value and _setting(now, name) == _setting(defaults, name)
        }
        kept |= {name: _setting(before, name) for name in FOUND if _setting(now, name) == "auto"}
        if config.parallel.streams is None:
            kept["parallel.streams"] = _setting(before, "parallel.streams")
        kept |= {name: True for name in FORMER_WAYS if _lacks(saved, name)}
    config = config.replace(kept) if kept else config
    values = config.to_dict()
    unset = {name: value for name, value in length_defaults(config).items() if _setting(values, name) is None}
    return config.replace(unset) if unset else config


def _lacks(saved: Path, dotted: str) -> bool:
    """Whether a config.yaml is of a version without this setting."""
    values: Any = load_yaml(saved)
    *sections, name = dotted.split(".")
    for section in sections:
        values = values.get(section) if isinstance(values, dict) else None
    return not isinstance(values, dict) or name not in values


def changed_settings(saved: Path, config: RunConfig) -> list[str]:
    """Names of the settings that change a run's results and differ between `config` and a saved config.yaml."""
    before, now = (as_started(c, saved.parent, resume=True).to_dict() for c in (RunConfig.load(saved), config))
    sections = ("model.", "activations.", "transcoder.", "training.", "antidup.", "per_layer.", "parallel.")
    names = [name for name, _ in flags() if name.startswith(sections)]
    return [name for name in names if _setting(before, name) != _setting(now, name)]


def _setting(values: dict[str, Any], dotted: str) -> Any:
    return functools.reduce(operator.getitem, dotted.split("."), values)
