"""Run: what a run left in its folder, or has left so far. Page, comparisons, watch and notebooks read it through this class."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from transcoder.checkpoint_folder import CheckpointError, candidates, find_checkpoint
from transcoder.files import local_path
from transcoder.layer_list import layer_folders
from transcoder.reporting import plots, run_tables
from transcoder.reporting.checkpoint import Checkpoint, newest_readable, read_checkpoint
from transcoder.reporting.duplicates import Duplicates
from transcoder.reporting.format import as_float, number, whole
from transcoder.reporting.latent_table import FILE_NAME as LATENTS_FILE
from transcoder.reporting.latent_table import LatentTable, read_latents
from transcoder.reporting.latents import LatentColumns, Latents
from transcoder.reporting.metrics_table import FILE_NAME, Metrics
from transcoder.reporting.parts import Missing, Part, RunPartMissingError
from transcoder.reporting.samples import SampleTable, read_samples
from transcoder.reporting.summary_metrics import SUMMARY_METRICS
from transcoder.reporting.tables import html_table, safe, text_table
from transcoder.usage import SECTIONS

if TYPE_CHECKING:
    import torch

    from transcoder.model import Transcoder

_REPORTED = {
    "duplicates/pairs": "pairs_total",
    "duplicates/flagged": "pairs_flagged",
    "duplicates/mergeable": "pairs_mergeable",
    "duplicates/share_of_live": "share_of_live_with_neighbour",
    "duplicates/effective_dictionary_size": "effective_dictionary_size",
}
"""Metrics that the correlation report has too, under these names."""
OF_LAYERS = {"usage.json", "correlation report", "activation samples"}


class Run:
    """What a run left in its folder, or has left so far: `Run("runs/demo").latents[17]`.

    Nothing is read before it is asked for; what was read stays as it was until `refresh`. Finished, interrupted and running
    runs alike. A file that is missing or damaged reads as empty, is named with the reason in `missing`, and a lookup in it
    (`run.summary["evaluation/fvu"]`, `run.latents[17].contexts`) is a RunPartMissingError, a LookupError, that says the same.

    Files: config.yaml, metrics.jsonl, usage.json, summary.json, anti_duplication_logs/correlation_step_*.json and
    positions.json, activation_samples/{samples.parquet, summary.json}, latents.parquet, checkpoints/.

    Args:
        path: the run's folder.
        empty_ok: take a folder that holds neither config.yaml nor metrics.jsonl (yet) too.
        metrics: the folder's metrics.jsonl where it is followed already.

    Raises:
        FileNotFoundError: no such folder, or it holds no run.
    """

    def __init__(self, path: str | Path, *, empty_ok: bool = False, metrics: Metrics | None = None) -> None:
        self.path = local_path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"run folder {str(self.path)!r}: no such folder; expected one that `transcoder train` wrote"
            )
        if not empty_ok and not any((self.path / name).exists() for name in ("config.yaml", FILE_NAME)):
            inside = sorted(p.parent.name for p in self.path.glob("*/config.yaml"))
            hint = f"; there are runs inside: {', '.join(inside[:5])}" if inside else ""
            raise FileNotFoundError(
                f"{self.path}: expected a run folder, found neither config.yaml nor {FILE_NAME} in it{hint}"
            )
        self._why: dict[str, str] = {}
        """What is missing of a whole run: reason."""
        self._why_lacking: dict[str, str] = {}
        """What makes the latents' cards richer and is missing: reason."""
        if metrics is not None:
            self.metrics = metrics

    def refresh(self) -> Run:
        """Forget what was read, so that a running run is read again. Returns itself."""
        self.__dict__ = {"path": self.path, "_why": {}, "_why_lacking": {}}
        return self

    # -- the files

    @cached_property
    def config(self) -> Part:
        """config.yaml as nested dicts: `run.config["transcoder"]["k"]`; a run of another version is read as it is."""
        return self._part("settings", "config.yaml", "not in the folder: the settings are unknown", yaml.safe_load)

    @cached_property
    def metrics(self) -> Metrics:
        """metrics.jsonl: `steps, values = run.metrics["metrics/fvu"]` as NumPy arrays, `run.metrics.frame()`."""
        metrics = Metrics(self.path / FILE_NAME)
        try:
            metrics.poll(torn_end=True)
        except (OSError, RecursionError) as error:
            self._why[FILE_NAME] = f"cannot be read: {_first_line(error)}"
        return metrics

    @cached_property
    def summary(self) -> Part:
        """summary.json: {"finished", "interrupted_by", "step", "tokens", ..., metric: value}, as `RunResult.summary` has it.

        Empty while the run has not ended; `metric` knows the latest values then.
        """
        absent = "not in the folder: the run was interrupted or is still going"
        return self._part("summary", "summary.json", absent)

    @cached_property
    def usage(self) -> Mapping[str, Any]:
        """The ledger's components by name, see `antidup.UsageLedger`."""
        absent = "not in the folder: nothing proves that the anti-duplication parts ran"
        usage = self._part("ledger", "usage.json", absent)
        components = usage.get("components")
        if usage and not isinstance(components, dict):
            self._why["usage.json"] = "holds no components"
        return components if isinstance(components, dict) else {}

    @cached_property
    def correlation_files(self) -> list[tuple[int, Path]]:
        """Every correlation report as (step, path), in order of steps."""
        found = []
        for file in (self.path / "anti_duplication_logs").glob("correlation_step_*.json"):
            step = re.fullmatch(r"correlation_step_(\d+)\.json", file.name)
            if step:
                found.append((int(step[1]), file))
        return sorted(found)

    @cached_property
    def correlation(self) -> Part:
        """The newest correlation report that can be read."""
        what = "correlation report"
        for _, file in reversed(self.correlation_files):
            if report := self._part(what, str(file.relative_to(self.path)), "went away"):
                return report
        if self.setting("antidup.monitor.enabled") is False:
            self._why[what] = "the correlation monitor was switched off"
        elif not self.correlation_files:
            every = self.setting("antidup.monitor.correlation_save_frequency")
            when = "its first report" if every is None else f"step {every}, when the first is due"
            self._why[what] = f"anti_duplication_logs/ holds none: the run ended before {when}, or did not write it"
        else:
            self._why[what] = "none of those in anti_duplication_logs/ can be read"
        return Part({}, self._error_text(what, self._why[what]))

    @cached_property
    def heldout_duplicates(self) -> Part:
        """heldout_duplicates.json: pairs and verdicts of the final weights; empty where they were not looked at, or the run has
        gone on since."""
        found = self._part("duplicates of the final weights", "heldout_duplicates.json", None)
        last = self.last_step
        return found if not found or last is None or (whole(found.get("step")) or 0) >= last else Part({})

    @cached_property
    def sampler_positions(self) -> Part:
        """positions.json: what the position sampler saw and drew; empty where there was no sampler."""
        return self._part("sampler positions", "anti_duplication_logs/positions.json", None)

    @cached_property
    def sample_summary(self) -> Part:
        absent = None if self.samples is None else "not in the folder"
        return self._part("summary of samples", "activation_samples/summary.json", absent)

    @cached_property
    def samples(self) -> SampleTable | None:
        """activation_samples/samples.parquet, or None."""
        file = self.path / "activation_samples" / "samples.parquet"
        if not file.exists():
            when = self._every("antidup.samples.save_frequency", "they are saved")
            why = f"samples.parquet is not in the folder{when}: no contexts can be shown"
            off = self.setting("antidup.samples.enabled") is False
            self._why["activation samples"] = "the sample collector was switched off" if off else why
            return None
        found = self._parquet(self._why, "activation samples", file, read_samples)
        if found is not None and not len(found):
            self._why["activation samples"] = (
                "samples.parquet is empty: no latent passed the collector's minimum activation"
            )
            return None
        return found

    @cached_property
    def heldout_latents(self) -> LatentTable | None:
        """latents.parquet, what the final weights say of each latent, or None."""
        what, file = "facts of each latent", self.path / LATENTS_FILE
        if file.exists():
            return self._parquet(self._why_lacking, what, file, read_latents)
        if self.finished:
            why = "the run finished, but could not write it (its log says why), or is of an earlier version"
        else:
            why = "it is written when a run finishes"
        self._why_lacking[what] = (
            f"{LATENTS_FILE} (activation histograms, promoted and suppressed tokens) is not in the folder: {why}"
        )
        return None

    @cached_property
    def unverified_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None. Its checksums are not verified, which would read all of it."""
        found = newest_readable(self.path)
        if found is None:
            when = self._every("checkpoint.every", "the run writes one")
            self._why_lacking["checkpoint"] = f"checkpoints/ holds none that can be read{when}: no decoder neighbours"
        return found

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The newest checkpoint whose checksums hold: its `path`, `step`, `decoder` [d_sae, d_out] and `firings`.

        Raises:
            RunPartMissingError: there is none, or none that is whole.
        """
        try:
            return read_checkpoint(find_checkpoint(self.path))
        except FileNotFoundError as error:
            second = self.setting("checkpoint.second_location")
            elsewhere = "" if second is None else f"; look into checkpoint.second_location, {second}"
            why = f"checkpoints/ holds none{self._every('checkpoint.every', 'the run writes one')}{elsewhere}"
            raise RunPartMissingError(self._error_text("checkpoint", why)) from error
        except (OSError, ValueError, CheckpointError) as error:
            raise RunPartMissingError(self._error_text("checkpoint", str(error))) from error

    def transcoder(self, device: torch.device | str = "cpu") -> Transcoder:
        """The transcoder as the newest good checkpoint has it, ready to encode and decode."""
        from transcoder.model import Transcoder

        return Transcoder.from_pretrained(self.checkpoint.path, device=device)

    # -- what is missing

    @property
    def missing(self) -> list[Missing]:
        """What a whole run has and this one lacks, each with `what` and `why`; of a layer set, what the set itself lacks. Reads
        everything but checkpoints and latents."""
        for part in ("config", "metrics", "summary", "usage", "correlation", "samples", "sample_summary"):
            getattr(self, part)
        why = {}
        if FILE_NAME not in self._why:
            if not self.metrics.series:
                why[FILE_NAME] = self.metrics.why_empty
            if bad := self.metrics.unreadable:
                lines = "line is" if bad == 1 else "lines are"
                why[f"part of {FILE_NAME}"] = f"{bad} {lines} unreadable (a run that was killed?)"
        if self.earlier_session is not None:
            why["summary.json"] = (
                f"is of an earlier session, which ended at step {self.earlier_session}: "
                f"the values shown are the last in {FILE_NAME}"
            )
        # Weights that were only measured were not trained here; the parts of a layer set lie in its layers' folders.
        training = {FILE_NAME, "usage.json", "correlation report"} if "evaluated" in self.summary else set()
        elsewhere = OF_LAYERS if layer_folders(self.path) else training
        return [Missing(what, reason) for what, reason in {**self._why, **why}.items() if what not in elsewhere]

    @property
    def lacking(self) -> list[Missing]:
        """What the cards of the latents go without, and why. Reads the files that `missing` does not."""
        _ = self.heldout_latents, self.unverified_checkpoint
        other = {"checkpoint"} if "evaluated" in self.summary else set()
        return [Missing(what, why) for what, why in self._why_lacking.items() if what not in other]

    def missing_error(self, what: str, *listed: str) -> RunPartMissingError:
        """The error for `what`; the reason is that of the first of `listed` which `missing` has."""
        reasons = {m.what: m.why for m in self.missing}
        why = next((reasons[name] for name in listed if name in reasons), "it is not in the folder")
        return RunPartMissingError(self._error_text(what, why))

    # -- facts

    @property
    def name(self) -> str:
        name = self.config.get("name")
        return name if isinstance(name, str) and name else self.path.resolve().name

    @property
    def last_step(self) -> int | None:
        """Optimizer steps done, as far as any file knows."""
        known = [s for s in (whole(self.final.get("step")), self.metrics.last_step) if s is not None]
        return max(known, default=None)

    @cached_property
    def earlier_session(self) -> int | None:
        """The step that summary.json is of where the run has gone on since, so that its values are not this session's; else
        None."""
        stated, last = whole(self.summary.get("step")), self.metrics.last_step
        if stated is None or last is None:
            return None
        begun = [whole(e["payload"].get("from_step")) for e in self.metrics.events if _is_resume(e)]
        every = whole(self.setting("logging.every")) or 1
        # A run that went back to an older checkpoint has yet to come to the step of its summary.
        back = bool(begun) and begun[-1] is not None and begun[-1] < stated and last + every <= stated
        return stated if last > stated or back else None

    @property
    def final(self) -> Mapping[str, Any]:
        """`summary`, unless it is of an earlier session: then nothing."""
        return self.summary if self.earlier_session is None else {}

    @property
    def tokens(self) -> float | None:
        """Tokens trained on, as far as any file knows."""
        stated = self.final.get("tokens")
        known = isinstance(stated, (int, float)) and not isinstance(stated, bool)
        return stated if known else self.metrics.get("details/n_training_samples").last()

    @property
    def finished(self) -> bool:
        """Whether the run came to its last step."""
        return bool(self.final.get("finished"))

    @property
    def status(self) -> str:
        """ "finished", "stopped by SIGTERM", or what can be said of a run that left no summary."""
        if self.finished:
            return "finished"
        by = self.final.get("interrupted_by")
        return f"stopped by {by}" if isinstance(by, str) else "interrupted or still running"

    @property
    def data_source(self) -> str | None:
        """What the run trained on: "model", "cached" or "own batches"; the logged event counts, then config.yaml."""
        for event in reversed(self.metrics.events):
            payload = event.get("payload")
            if event.get("event") == "data" and isinstance(payload, dict) and isinstance(payload.get("source"), str):
                return str(payload["source"])
        kind = self.setting("activations.kind")
        return kind if isinstance(kind, str) else None

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A setting such as "transcoder.k"; `default` where the config does not say."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def widths(self) -> list[int]:
        """Cumulative prefix widths as the settings list them; empty where they do not."""
        listed = self.setting("transcoder.widths")
        return [w for w in listed if isinstance(w, int)] if isinstance(listed, list) else []

    def metric(self, name: str, how: str = "last") -> float | None:
        """The final value of a metric such as "evaluation/fvu": summary.json's unless it is of an earlier session, else from
        metrics.jsonl, else (duplicates) from the newest correlation report; None where none has it.

        Args:
            how: From metrics.jsonl take the "last" value, the "tail_mean" of the last ten, or the "rate" over the run: the
                harmonic mean, tokens over time where the value is tokens per second.
        """
        if name in self._summary_numbers:
            return self._summary_numbers[name]
        series = self.metrics.get(name)
        value = {"last": series.last, "tail_mean": series.tail_mean, "rate": series.rate}[how]()
        if value is None and name in _REPORTED:
            reported = self.correlation.get(_REPORTED[name])
            value = float(reported) if isinstance(reported, (int, float)) else None
        return value

    def metric_names(self) -> list[str]:
        return sorted({*self._summary_numbers, *self.metrics.series})

    def prefix_metrics(self, family: str) -> dict[int, float]:
        """Width -> value of a family such as "evaluation/fvu_prefix", widths ascending."""
        found = {}
        for name in self.metric_names():
            width = name.removeprefix(family + "_")
            value = self.metric(name, "tail_mean") if width != name and width.isdecimal() else None
            if value is not None:
                found[int(width)] = value
        return dict(sorted(found.items()))

    def part_enabled(self, component: str) -> bool | None:
        """Whether an anti-duplication part was switched on, by the ledger, else the config; None: unknown."""
        record = self.usage.get(component)
        if isinstance(record, dict) and isinstance(record.get("enabled"), bool):
            return record["enabled"]
        enabled = self.setting(f"antidup.{SECTIONS[component]}.enabled")
        return enabled if isinstance(enabled, bool) else None

    # -- latents, duplicates and tables

    @cached_property
    def latents(self) -> Latents:
        """All latents: `run.latents[17]`, `.search("text")`, `.filter(prefix=0)`, `.density`, `.frame()`."""
        columns = LatentColumns(self)
        return Latents(columns, np.arange(columns.d_sae))

    @cached_property
    def duplicates(self) -> Duplicates:
        """Pairs of latents that rise and fall together, strongest first, each with a verdict; `.mergeable`, `.groups`,
        `.histogram`, `.frame()`.

        Raises:
            RunPartMissingError: there is no report of them that can be read.
        """
        if not self.heldout_duplicates and not self.correlation:
            raise self.missing_error("duplicates", "correlation report")
        return Duplicates(self)

    prefixes = property(run_tables.prefixes)
    positions = property(run_tables.positions)
    ledger = property(run_tables.ledger)
    plot_loss, plot_fvu, plot_duplicates = plots.plot_loss, plots.plot_fvu, plots.plot_duplicates
    plot_density, plot_positions = plots.plot_density, plots.plot_positions

    # -- how it shows itself

    def __repr__(self) -> str:
        rows = text_table(("metric", "value"), self._shown_metrics())
        return f"run {self.name!r}: {self._headline()}\n{rows}\nparts: {', '.join(self._parts())}"

    def _repr_html_(self) -> str:
        rows, parts = html_table(("metric", "value"), self._shown_metrics()), safe(", ".join(self._parts()))
        return f"<p><b>{safe(self.name)}</b> {safe(self._headline())}</p>{rows}<p>parts: {parts}</p>"

    def _headline(self) -> str:
        steps = self.setting("training.steps")
        of = f" of {number(steps)}" if isinstance(steps, int) else ""
        return f"{self.status}, {number(self.last_step)}{of} steps"

    def _shown_metrics(self) -> Sequence[tuple[str, str]]:
        found = ((m, m.of(self)) for m in SUMMARY_METRICS)
        return [(m.label, m.text(value)) for m, value in found if value is not None]

    def _parts(self) -> list[str]:
        """What is there, by the names of files: a representation must not read a gigabyte."""
        saved = candidates([self.path / "checkpoints"])
        there = {
            "metrics": (self.path / FILE_NAME).exists(),
            "summary": (self.path / "summary.json").exists(),
            "duplicates": bool(self.correlation_files),
            "contexts": (self.path / "activation_samples" / "samples.parquet").exists(),
            f"checkpoint of step {saved[0][0]}" if saved else "checkpoint": bool(saved),
        }
        return [name if here else f"no {name}" for name, here in there.items()]

    # -- reading

    @cached_property
    def _summary_numbers(self) -> dict[str, float]:
        # Plain names ("step", "tokens") are the run's, not metrics.
        metrics = {n: v for n, v in self.final.items() if "/" in n and isinstance(v, (int, float))}
        return {name: as_float(value) for name, value in metrics.items() if math.isfinite(as_float(value))}

    def _every(self, setting: str, what: str) -> str:
        """ " (`what` every 500 steps)"; nothing where the settings do not say."""
        every = self.setting(setting)
        return "" if every is None else f" ({what} every {every} steps)"

    def _error_text(self, what: str, why: str) -> str:
        return f"run {str(self.path)!r} has no {what}: {why}"

    def _part(self, what: str, name: str, absent: str | None, parse: Callable[[str], Any] = json.loads) -> Part:
        """The mapping in a file; empty, with the reason kept, where there is none.

        Args:
            absent: the reason where the file is not there; None: that it is not there is no loss.
        """
        try:
            value = parse((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            why = absent
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            why = f"cannot be read: {_first_line(error)}"
        else:
            if isinstance(value, dict):
                return Part(value)
            why = "holds no sections" if parse is yaml.safe_load else "is not a JSON object"
        if why is not None:
            self._why[name] = why
        return Part({}, self._error_text(what, f"{name} {why or 'is not in the folder'}"))

    @staticmethod
    def _parquet(reasons: dict[str, str], what: str, file: Path, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the file, or None with the reason kept."""
        try:
            return read(file)
        except ImportError:
            reasons[what] = f"pyarrow is not installed (pip install pyarrow): {file.name} cannot be read"
        except (OSError, ValueError) as error:
            reasons[what] = f"{file.name} cannot be read: {_first_line(error)}"
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_resume(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "resume" and isinstance(event.get("payload"), dict)
