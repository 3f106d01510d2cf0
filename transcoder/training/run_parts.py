"""The parts of a run, made from its config: data, ledger, layer trainers, observers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from transcoder.activations import ActivationBatch, ActivationStream, build_stream
from transcoder.antidup import ActivationSampleCollector, CorrelationMonitor, PositionSampler, UsageLedger
from transcoder.config import RunConfig
from transcoder.reporting.progress import stage
from transcoder.training import observers as observe
from transcoder.training.layer_trainer import LayerTrainer
from transcoder.training.nonfinite import StepLedger
from transcoder.training.recycling import Recycler
from transcoder.training.schedule import Calendar
from transcoder.training.sources import BatchSource, own_data
from transcoder.usage import POSITIONS, REGULARIZER, SECTIONS

if TYPE_CHECKING:
    from transcoder.parallel.ranks import Ranks


@dataclass
class TrainingData:
    """What a run reads."""

    kind: str
    source: BatchSource
    heldout: list[ActivationBatch]
    heldout_sinks: ActivationBatch | None = None
    """Held-out tokens that masking leaves out of training."""
    special_ids: Sequence[int] = ()
    sequence_length: int = 0
    positions: PositionSampler | None = None


class RunParts:
    """Everything that a run is made of, before any state is restored.

    Args: as `train_transcoder`; `stack` closes the activation stream, which `build` makes of the config.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        device: torch.device,
        batches: Iterable[ActivationBatch] | None,
        heldout: Sequence[ActivationBatch] | None,
        stack: ExitStack,
        build: Callable[..., ActivationStream] = build_stream,
        ranks: Ranks | None = None,
    ) -> None:
        anti, shape, seed = config.antidup, config.transcoder, config.training.seed
        logs = run_dir / "anti_duplication_logs"
        enabled = {name: getattr(anti, section).enabled for name, section in SECTIONS.items()}
        enabled[POSITIONS], enabled[REGULARIZER] = anti.positions_act, anti.regularizer_acts
        ledger = self.ledger = StepLedger(enabled, run_dir / "usage.json")
        if batches is None:
            data = self.data = _open_stream(config, device, ledger, logs, stack, build)
            if isinstance(data.source, ActivationStream):
                config = config.replace({"activations.mask_norm_multiple": data.source.mask_norm_multiple})
        else:
            source, held = own_data(batches, heldout, config.training.evaluation_tokens, device)
            sequence_length = config.activations.sequence_length
            data = self.data = TrainingData("own batches", source, held, sequence_length=sequence_length)
        if anti.positions_act and data.positions is None:
            length, special = data.sequence_length, data.special_ids
            data.positions = PositionSampler(anti.positions, seed, special, ledger, logs, length)
        monitor = CorrelationMonitor(anti.monitor, shape.d_sae, device, logs, ledger) if anti.monitor.enabled else None
        samples = None
        if anti.samples.enabled:
            folder, special = run_dir / "activation_samples", data.special_ids
            chosen = None if anti.positions.train else data.positions
            keep = max(anti.samples.collect_every, round(anti.samples.forget_after * config.training.steps))
            samples = ActivationSampleCollector(
                anti.samples, shape.d_sae, device, seed, folder, special, data.sequence_length, ledger, chosen, keep
            )
        self.ranks = ranks
        self.config = config
        """With the values that `auto` stood for."""
        self.monitor, self.samples = monitor, samples
        d_in, d_out = data.source.d_in, data.source.d_out
        layer = LayerTrainer(config, d_in, d_out, device, ledger, monitor, data.special_ids, logs, ranks=ranks)
        if monitor is not None and layer.transcoder.selection.most_a_token == 1:
            ledger.record_no_pairs_possible()
        self.layers = [layer]

        calendar = Calendar(config)
        self.metrics_log = observe.MetricsLog(layer, calendar)
        self.evaluation = observe.Evaluation(layer, calendar, heldout=bool(data.heldout))
        recycling = None
        if monitor is not None and anti.recycle.enabled:
            recycling = observe.Recycling(layer, calendar, Recycler(anti.recycle, seed, logs), monitor, samples)
        penalties, positions = layer.regularizer, data.positions
        part_log = functools.partial(observe.PartLog, layer, calendar)
        every: list[observe.Observer | None] = [
            None if monitor is None else observe.CorrelationReports(layer, calendar, monitor),
            recycling,
            None if penalties is None else part_log("regularizer.jsonl", penalties.save),
            None if positions is None else part_log("positions.json", positions.save, positions=positions),
            None if samples is None else observe.Samples(layer, calendar, samples),
            observe.Proof(layer, calendar),
            self.metrics_log,
            self.evaluation,
            observe.Checkpoints(layer, calendar, self.evaluation),
        ]
        self.observers = [observer for observer in every if observer is not None]
        """In the order in which they act."""


def _open_stream(
    config: RunConfig,
    device: torch.device,
    ledger: UsageLedger,
    logs: Path,
    stack: ExitStack,
    build: Callable[..., ActivationStream],
) -> TrainingData:
    """The stream of `config.activations`, which `stack` closes, with the sampler of its training tokens if it has one."""
    samples, section, made = config.antidup.samples, config.antidup.positions, list[PositionSampler]()

    def sampler(special_ids: Sequence[int]) -> PositionSampler:
        made.append(PositionSampler(section, config.training.seed, special_ids, ledger, out_dir=logs))
        return made[-1]

    context = samples.context_tokens if samples.enabled else 0
    thins = sampler if section.enabled and section.train else None
    stage("loading the language model and the text")
    stream = build(config, device, position_sampler=thins, context_tokens=context)
    stack.callback(stream.close)
    stage("reading held-out text")
    held, sinks = stream.heldout(config.training.evaluation_tokens), stream.heldout_sinks()
    kind, ids, positions = config.activations.kind, stream.special_ids, made[0] if made else None
    return TrainingData(kind, stream, held, sinks, ids, stream.sequence_length, positions)
