"""A layer set: a run for each layer, all of them on the same passes of the language model, and one summary on top."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transcoder.activations.activation_source import ActivationSource, row_bytes
from transcoder.activations.rows import Substitute
from transcoder.config import BUFFER_TOKENS, RunConfig
from transcoder.files import replace_atomically
from transcoder.layer_list import LAYERS_FOLDER, layer_name
from transcoder.phases import TimeShares
from transcoder.reporting import MetricsWriter, ProgressBar
from transcoder.reporting.layer_sets import mean_over_layers
from transcoder.reporting.report import write_report
from transcoder.training.disk_space import human_bytes
from transcoder.training.evaluation import at_inference, cross_entropy_metrics
from transcoder.training.nonfinite import TrainingDivergedError
from transcoder.training.run_end import RunResult, write_run_report

if TYPE_CHECKING:
    from transcoder.training.signals import StopRequest
    from transcoder.training.trainer import Trainer

logger = logging.getLogger(__name__)

DIVERGENCE = "divergence"
"""What stopped a layer that ended alone, in its summary."""
MEMORY_SHARE = 0.25
"""Share of the free memory for the shuffle buffers and the rows that the next refill takes."""


def buffer_tokens(source: ActivationSource, config: RunConfig, device: torch.device) -> int:
    """Tokens of the shuffle buffer of every layer where the config leaves it open: `BUFFER_TOKENS`, or as many whole batches as
    a quarter of the free memory holds, at least two. Logged."""
    samples, batch = config.antidup.samples, config.training.batch_size
    context, weighted = (samples.context_tokens if samples.enabled else 0), config.antidup.positions.train
    a_token = sum(row_bytes(size, context, weighted) for size in source.activation_bytes)
    free = free_memory(device)
    fits = int(MEMORY_SHARE * free / (a_token * (1 + config.activations.refill_fraction)))
    chosen = max(2 * batch, min(BUFFER_TOKENS, fits // batch * batch))
    logger.warning(
        "activations.buffer_tokens is %d for each of %d layers: %s, of %s free on %s",
        *(chosen, len(source.widths), human_bytes(chosen * a_token), human_bytes(free), device),
    )
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; of the host, without what the system could get back by writing memory to a disk."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 8 << 30


class LayerSet:
    """The runs of a layer set: their common loop, metrics, summary and page.

    A step is taken by every layer before the next one. After a resume from checkpoints of different steps, those that are
    behind catch up first. A layer whose loss diverges ends alone.

    Args:
        config: of the set.
        runs: by layer, prepared.
        source: what all of them read.
        stack: closes the log and the bar.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, runs: Mapping[int, Trainer], source: ActivationSource, stack: ExitStack
    ) -> None:
        self.config, self.run_dir, self.runs, self._source = config, run_dir, dict(runs), source
        self.ended: dict[int, str] = {}
        """Layers that ended before the others, and why."""
        resumed = any(run.step for run in runs.values())
        replace_atomically(run_dir / "config.yaml", config.to_yaml())
        self.writer = stack.enter_context(MetricsWriter(run_dir, config, self.step if resumed else None))
        buffer_tokens = next(iter(runs.values())).config.activations.buffer_tokens
        self.writer.write_event("layers", {"layers": list(runs), "buffer_tokens": buffer_tokens})
        self._shares = TimeShares()
        """Of the time that all layers take together."""
        self._bar = ProgressBar(config.training.steps, self.step, config.logging.progress)
        stack.callback(self._bar.close)

    @property
    def _going(self) -> dict[int, Trainer]:
        steps = self.config.training.steps
        return {layer: run for layer, run in self.runs.items() if layer not in self.ended and run.step < steps}

    @property
    def step(self) -> int:
        """Steps that every layer has done which has not ended; all of them where none is left."""
        left = [run.step for layer, run in self.runs.items() if layer not in self.ended]
        return min(left, default=max(run.step for run in self.runs.values()))

    def train(self, stop: StopRequest) -> RunResult:
        """Steps until the last one or a signal; then each layer's summary and page, and the set's."""
        for run in self.runs.values():
            run.parts.metrics_log.begin(run.tokens)
        try:
            with self._shares.running():
                while stop.signal is None and (going := self._going):
                    behind = min(run.step for run in going.values())
                    for layer, run in going.items():
                        if run.step == behind:
                            self._advance(layer, run)
                    self._log()
        except Exception:
            for run in self._going.values():
                run.rescue()
            raise
        stopped_by = stop.signal if self._going else None
        results = {}
        for layer, run in self.runs.items():
            results[layer] = run.end(DIVERGENCE if layer in self.ended else stopped_by, report=False)
        results = self._with_reports(results)
        if len(self.ended) == len(self.runs):
            raise TrainingDivergedError(f"every layer diverged: {'; '.join(self.ended.values())}")
        summary = self._write_summary(results, stopped_by)
        self.writer.flush()
        report = self._write_report() if self.config.logging.report else None
        first = next(iter(results.values()))
        finished = all(one.finished for layer, one in results.items() if layer not in self.ended)
        return RunResult(
            self.run_dir, self.step, finished, stopped_by, summary, report, first.transcoder, first.heldout, results
        )

    def _advance(self, layer: int, run: Trainer) -> None:
        try:
            run.advance()
        except TrainingDivergedError as error:
            self.ended[layer] = f"layer {layer}: {error}"
            logger.error("layer %d ends at step %d, the others go on: %s", layer, run.step, error)
            event = {"layer": layer, "error": str(error)}
            run.writer.write_event("layer_ended", event)
            self.writer.write_event("layer_ended", event, step=run.step)
            run.rescue()
            run.leave()

    def _log(self) -> None:
        """The newest metrics of every layer, and their means, where all have come to a step that is logged."""
        step, steps = self.step, self.config.training.steps
        if step % self.config.logging.every and step < steps:
            return
        found = {
            layer: {**run.bar.latest, **run.parts.evaluation.latest}
            for layer, run in self.runs.items()
            if layer not in self.ended
        }
        if any(run.step != step for run in self._going.values()) or not found:
            return
        means = mean_over_layers(found)
        if "metrics/tokens_per_second" in means:
            # Of the language model's tokens, which every layer trains on.
            means["metrics/tokens_per_second"] = min(one["metrics/tokens_per_second"] for one in found.values())
        shown = {
            f"layers/{layer_name(layer)}/{name}": value
            for layer, metrics in found.items()
            for name, value in metrics.items()
            if name in SHOWN
        }
        means |= self._shares.taken()
        self.writer.write(step, {**means, **shown})
        self._bar.update(step, means)

    def _write_summary(self, results: Mapping[int, RunResult], stopped_by: str | None) -> dict[str, Any]:
        good = {layer: one.summary for layer, one in results.items() if layer not in self.ended}
        finished = stopped_by is None
        summary: dict[str, Any] = {
            "name": self.config.name,
            "step": self.step,
            "finished": finished,
            "interrupted_by": stopped_by,
            "d_in": next(iter(results.values())).summary["d_in"],
            "d_out": next(iter(results.values())).summary["d_out"],
            "tokens": max(one.summary["tokens"] for one in results.values()),
            **mean_over_layers(good),
            **(self._cross_entropy() if finished else {}),
            "layers": {layer_name(layer): one.summary for layer, one in results.items()},
            "ended": {layer_name(layer): why for layer, why in self.ended.items()},
        }
        if finished:
            self.writer.write(self.step, {name: value for name, value in summary.items() if name.startswith("set/")})
        text = json.dumps(summary, indent=2).encode()
        try:
            replace_atomically(self.run_dir / "summary.json", text)
        except OSError as error:
            logger.warning("summary.json of the set could not be written: %s", error)
        return summary

    def _with_reports(self, results: Mapping[int, RunResult]) -> dict[int, RunResult]:
        """The layers' pages: each is a process of its own, as many at a time as there are cores."""
        with ThreadPoolExecutor(max_workers=max(1, min(len(results), os.cpu_count() or 1))) as pool:
            pages = pool.map(lambda layer: write_run_report(self.runs[layer], results[layer].finished), results)
            return {
                layer: dataclasses.replace(result, report=page)
                for (layer, result), page in zip(results.items(), pages, strict=True)
            }

    def _write_report(self) -> Path | None:
        try:
            return write_report(self.run_dir)
        except Exception as error:
            logger.warning(
                "report.html of the set could not be written: %s; try `transcoder report %s`", error, self.run_dir
            )
            return None

    def _cross_entropy(self) -> dict[str, float]:
        """The language model's cross-entropy with every layer's transcoder in its place at once. Whatever goes wrong in the
        language model, the run is not lost to it."""
        tokens = self.config.training.evaluation_ce_tokens
        if not (tokens and self._source.holds_out):
            return {}
        places = {
            place: run.layers[0].transcoder
            for place, (layer, run) in enumerate(self.runs.items())
            if layer not in self.ended
        }
        try:
            return set_cross_entropy(places, self._source, tokens)
        except Exception as error:
            logger.warning("cross-entropy of the set could not be taken: %s: %s", type(error).__name__, error)
            return {}


SHOWN = frozenset(
    ("metrics/fvu", "metrics/l0", "losses/overall_loss", "sparsity/dead_share", "duplicates/pairs", "evaluation/fvu")
)
"""Metrics of a layer that the set's log has too."""


@torch.no_grad()
def set_cross_entropy(transcoders: Mapping[int, Any], source: ActivationSource, tokens: int) -> dict[str, float]:
    """What all transcoders together cost the language model, on about `tokens` held-out tokens, a pass at a time.

    Every layer but the first then reads what the transcoders before it made of the stream. Sinks keep their own activations.

    Args:
        transcoders: by the layer's place in the source.

    Returns: {"set/ce_model", "set/ce_transcoder": all in place, "set/ce_zero": nothing in any layer's place,
    "set/ce_recovered": (zero - transcoder) / (zero - model)}, in nats a token. Empty without a language model.
    """

    def nothing(_: Tensor, target: Tensor) -> Tensor:
        return torch.zeros_like(target)

    def in_place(transcoder: Any) -> Substitute:
        return lambda source, _: transcoder(source)

    with ExitStack() as stack:
        for transcoder in transcoders.values():
            stack.enter_context(at_inference(transcoder))
        found = source.heldout_losses(
            {
                "model": {},
                "transcoder": {place: in_place(transcoder) for place, transcoder in transcoders.items()},
                "zero": dict.fromkeys(transcoders, nothing),
            },
            tokens,
        )
    return cross_entropy_metrics(found, "set")


def layers_folder(run_dir: Path, layer: int) -> Path:
    """The run folder of a layer of a set."""
    return run_dir / LAYERS_FOLDER / layer_name(layer)
