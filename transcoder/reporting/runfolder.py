"""RunFolder: everything a run left behind, tolerant of what is not there and plain about it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from transcoder.reporting.checkpoint_facts import CheckpointFacts, read_checkpoint_facts
from transcoder.reporting.format import as_float, whole
from transcoder.reporting.jsonl import read_records
from transcoder.reporting.latent_table import FILE_NAME as LATENTS_FILE
from transcoder.reporting.latent_table import LatentTable, read_latents
from transcoder.reporting.sample_table import SampleTable, read_samples
from transcoder.reporting.series import FILE_NAME, MetricsTable, collect
from transcoder.usage import SECTIONS

logger = logging.getLogger(__name__)

PARTS = ("config", "metrics", "summary", "usage", "correlation", "samples", "sample_summary")
"""What a whole run has; attributes of RunFolder."""
OF_LATENTS = ("latents", "checkpoint")
"""What makes its latents' cards richer."""
_REPORTED = {
    "duplicates/pairs": "pairs_total",
    "duplicates/flagged": "pairs_flagged",
    "duplicates/mergeable": "pairs_mergeable",
    "duplicates/share_of_live": "share_of_live_with_neighbour",
    "duplicates/effective_dictionary_size": "effective_dictionary_size",
}


@dataclass(frozen=True)
class Missing:
    """Something a whole run has and this one lacks."""

    what: str
    why: str


class RunFolder:
    """Reads a run's folder. Nothing is required but the folder itself.

    Files: config.yaml, metrics.jsonl, usage.json, summary.json,
    anti_duplication_logs/correlation_step_*.json and positions.json,
    activation_samples/{samples.parquet, summary.json}, latents.parquet, checkpoints/. What is absent or unreadable is empty
    here and named in `missing`, with the reason.

    summary.json is what `train_transcoder` returns as `RunResult.summary`: {"finished", "interrupted_by",
    "step", "tokens",
    name of a figure: number, ...}; the names are those of metrics.jsonl and of the last evaluation.

    Raises:
        FileNotFoundError: `path` is no folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"run folder {str(self.path)!r}: no such folder; expected one that `transcoder train` wrote"
            )
        self._missing: dict[str, str] = {}
        self._lacking: dict[str, str] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml as plain dicts; a run of another version is read as it is."""
        file = self.path / "config.yaml"
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._missing["config.yaml"] = "not in the folder: the settings are unknown"
            return {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self._missing["config.yaml"] = f"cannot be read: {_first_line(error)}"
            return {}
        if not isinstance(values, dict):
            self._missing["config.yaml"] = "holds no sections"
            return {}
        return values

    @cached_property
    def metrics(self) -> MetricsTable:
        file = self.path / FILE_NAME
        try:
            table = collect(read_records(file))
        except FileNotFoundError:
            self._missing[FILE_NAME] = "not in the folder: there are no curves"
            return collect(())
        except (OSError, RecursionError) as error:
            self._missing[FILE_NAME] = f"cannot be read: {_first_line(error)}"
            return collect(())
        if table.unreadable:
            lines = "line is" if table.unreadable == 1 else "lines are"
            self._missing[f"part of {FILE_NAME}"] = f"{table.unreadable} {lines} unreadable (a run that was killed?)"
        if not table.series:
            self._missing[FILE_NAME] = "holds no figures: the run ended before its first logging step"
        return table

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self._json("summary.json", "not in the folder: the run was interrupted or is still going")

    @cached_property
    def usage(self) -> dict[str, Any]:
        """The ledger's components by name."""
        usage = self._json("usage.json", "not in the folder: nothing proves that the anti-duplication parts ran")
        components = usage.get("components")
        if usage and not isinstance(components, dict):
            self._missing["usage.json"] = "holds no components"
        return components if isinstance(components, dict) else {}

    @cached_property
    def positions(self) -> dict[str, Any]:
        """What the position sampler saw and drew; empty where there was none."""
        return self._json("anti_duplication_logs/positions.json", "", quiet=True)

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
    def correlation(self) -> dict[str, Any]:
        """The newest correlation report that can be read."""
        name = "correlation report"
        for _, file in reversed(self.correlation_files):
            report = self._json(str(file.relative_to(self.path)), "went away")
            if report:
                return report
        if self.setting("antidup.monitor.enabled") is False:
            self._missing[name] = "the correlation monitor was switched off"
        elif not self.correlation_files:
            every = self.setting("antidup.monitor.correlation_save_frequency")
            when = "its first report" if every is None else f"step {every}, when the first is due"
            self._missing[name] = f"anti_duplication_logs/ holds none: the run ended before {when}, or did not write it"
        else:
            self._missing[name] = "none of those in anti_duplication_logs/ can be read"
        return {}

    @cached_property
    def sample_summary(self) -> dict[str, Any]:
        return self._json("activation_samples/summary.json", "not in the folder", quiet=self.samples is None)

    @cached_property
    def samples(self) -> SampleTable | None:
        """activation_samples/samples.parquet, or None."""
        file = self.path / "activation_samples" / "samples.parquet"
        name = "activation samples"
        if not file.exists():
            if self.setting("antidup.samples.enabled") is False:
                self._missing[name] = "the sample collector was switched off"
            else:
                every = self.setting("antidup.samples.save_frequency")
                when = "" if every is None else f" (they are saved every {every} steps)"
                self._missing[name] = f"samples.parquet is not in the folder{when}: no contexts can be shown"
            return None
        try:
            table = read_samples(file)
        except ImportError:
            self._missing[name] = "pyarrow is not installed (pip install pyarrow): samples.parquet cannot be read"
        except (OSError, ValueError) as error:
            self._missing[name] = f"samples.parquet cannot be read: {_first_line(error)}"
        else:
            if len(table):
                return table
            self._missing[name] = "samples.parquet is empty: no latent passed the collector's minimum activation"
        return None

    @cached_property
    def latents(self) -> LatentTable | None:
        """latents.parquet, or None."""
        file, name = self.path / LATENTS_FILE, "held-out facts of each latent"
        try:
            return read_latents(file)
        except FileNotFoundError:
            if self.setting("logging.report") is False:
                why = "logging.report is off, and it is made for the report"
            elif self.finished:
                why = "the run finished, but could not write it (its log says why), or is of an earlier version"
            else:
                why = "it is written when a run finishes"
            self._lacking[name] = (
                f"{LATENTS_FILE} (activation histograms, promoted and suppressed tokens) is not in the folder: {why}"
            )
        except ImportError:
            self._lacking[name] = f"pyarrow is not installed (pip install pyarrow): {LATENTS_FILE} cannot be read"
        except (OSError, ValueError) as error:
            self._lacking[name] = f"{LATENTS_FILE} cannot be read: {_first_line(error)}"
        return None

    @cached_property
    def checkpoint(self) -> CheckpointFacts | None:
        """What the newest checkpoint tells of the latents, or None."""
        try:
            return read_checkpoint_facts(self.path)
        except (OSError, ValueError) as error:
            every = self.setting("checkpoint.every")
            when = "" if every is None else f" (the run writes one every {every} steps)"
            self._lacking["checkpoint"] = f"{_first_line(error)}{when}: no decoder neighbours"
        return None

    @property
    def missing(self) -> list[Missing]:
        """What is not there, and why. Reads everything."""
        for part in (
            "config",
            "metrics",
            "summary",
            "usage",
            "correlation",
            "samples",
            "sample_summary",
            "latents",
            "checkpoint",
        ):
            getattr(self, part)
        if self.earlier_session is not None:
            self._missing["summary.json"] = (
                f"is of an earlier session, which ended at step {self.earlier_session}: "
                f"the figures shown are the last in {FILE_NAME}"
            )
        return [Missing(what, why) for what, why in self._missing.items()]

    @property
    def lacking(self) -> list[Missing]:
        """What the cards of the latents go without, and why. Reads the files that `missing` does not."""
        for part in OF_LATENTS:
            getattr(self, part)
        return [Missing(what, why) for what, why in self._lacking.items()]

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
        """The step that summary.json is of where the run has gone on since, so that its figures are not this session's; else
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
    def final(self) -> dict[str, Any]:
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
    def data_source(self) -> str | None:
        """What the run trained on: "model", "cached" or "own batches" (whatever config.yaml says of models and texts)."""
        for event in reversed(self.metrics.events):
            payload = event.get("payload")
            if event.get("event") == "data" and isinstance(payload, dict) and isinstance(payload.get("source"), str):
                return str(payload["source"])
        kind = self.setting("activations.kind")
        return kind if isinstance(kind, str) else None

    @property
    def status(self) -> str:
        """ "finished", "stopped by SIGTERM", or what can be said of a run that left no summary."""
        if self.finished:
            return "finished"
        by = self.final.get("interrupted_by")
        if isinstance(by, str):
            return f"stopped by {by}"
        return "interrupted or still running"

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A setting such as "transcoder.k"; `default` where the config does not say."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def figure(self, name: str, how: str = "last") -> float | None:
        """A final figure by metric name: summary.json's unless it is of an earlier session, else from metrics.jsonl, else
        (duplicates) from the newest correlation report; None where none has it.

        Args:
            how: From metrics.jsonl take the "last" value, the "tail_mean" of the last ten, or the "median"
                of the run.
        """
        stated = self._summary_numbers.get(name)
        if stated is not None:
            return stated
        series = self.metrics.get(name)
        value = {"last": series.last, "tail_mean": series.tail_mean, "median": series.median}[how]()
        if value is None and name in _REPORTED:
            reported = self.correlation.get(_REPORTED[name])
            value = float(reported) if isinstance(reported, (int, float)) else None
        return value

    def figure_names(self) -> list[str]:
        return sorted({*self._summary_numbers, *self.metrics.series})

    def prefix_figures(self, family: str) -> dict[int, float]:
        """Width -> value of a family such as "evaluation/fvu_prefix", widths ascending."""
        found = {}
        for name in self.figure_names():
            width = name.removeprefix(family + "_")
            value = self.figure(name, "tail_mean") if width != name and width.isdecimal() else None
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

    @cached_property
    def _summary_numbers(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in self.final.items():
            # Plain names ("step", "tokens") are the run's, not figures.
            if "/" in name and isinstance(value, (int, float)) and math.isfinite(as_float(value)):
                found[name] = as_float(value)
        return found

    def _json(self, name: str, absent: str, quiet: bool = False) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not quiet:
                self._missing[name] = absent
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._missing[name] = f"cannot be read: {_first_line(error)}"
            return {}
        if not isinstance(value, dict):
            self._missing[name] = "is not a JSON object"
            return {}
        return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_resume(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "resume" and isinstance(event.get("payload"), dict)
