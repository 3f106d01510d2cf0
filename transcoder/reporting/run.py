"""Run: a run's folder in a notebook."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transcoder.checkpoint_folder import candidates
from transcoder.reporting import summary_metrics
from transcoder.reporting.format import number
from transcoder.reporting.run_checkpoint import RunCheckpoint
from transcoder.reporting.run_duplicates import Duplicates
from transcoder.reporting.run_errors import missing_part
from transcoder.reporting.run_latent_columns import LatentColumns
from transcoder.reporting.run_latents import Latents
from transcoder.reporting.run_metrics import Metrics
from transcoder.reporting.run_parts import Ledger, Positions, Prefixes
from transcoder.reporting.run_tables import html_table, safe, text_table
from transcoder.reporting.runfolder import Missing, RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transcoder.model import Transcoder

_SHOWN = (
    summary_metrics.HELDOUT_FVU,
    summary_metrics.LINEAR_BASELINE,
    summary_metrics.CE_RECOVERED,
    summary_metrics.L0,
    summary_metrics.DEAD,
    summary_metrics.PAIRS,
    summary_metrics.FLAGGED,
    summary_metrics.MERGEABLE,
    summary_metrics.TOKENS_PER_SECOND,
)


class Run:
    """What a run left in its folder, or has left so far: `Run("runs/demo").latents[17]`.

    Nothing is read before it is asked for; what was read stays as it was until `refresh`. Finished, interrupted and running
    runs alike. A part that is not there is a `RunPartMissingError` (a LookupError) that names it and says why; `missing`
    lists them.

    Args:
        path: the run's folder.

    Raises:
        FileNotFoundError: no such folder, or it holds no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)
        """The files themselves, tolerant of what is not there."""
        self.path = self.folder.path
        if not any((self.path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
            inside = sorted(p.parent.name for p in self.path.glob("*/config.yaml"))
            hint = f"; there are runs inside: {', '.join(inside[:5])}" if inside else ""
            raise FileNotFoundError(
                f"{self.path}: expected a run folder, found neither config.yaml nor metrics.jsonl in it{hint}"
            )

    def refresh(self) -> Run:
        """Forget what was read, so that a running run is read again. Returns itself."""
        self.__dict__ = {"folder": RunFolder(self.path), "path": self.path}
        return self

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        """ "finished", "stopped by SIGTERM", or what can be said of a run that left no summary."""
        return self.folder.status

    @property
    def missing(self) -> list[Missing]:
        """What a whole run has and this one lacks, each with `what` and `why`. Reads every file but the checkpoints."""
        return self.folder.missing

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml as nested dicts: `run.config["transcoder"]["k"]`."""
        if not self.folder.config:
            raise missing_part(self.folder, "settings", "config.yaml")
        return self.folder.config

    @property
    def summary(self) -> dict[str, Any]:
        """The final figures. RunPartMissingError while the run has not ended; `figure` knows the latest then."""
        if not self.folder.summary:
            raise missing_part(self.folder, "summary", "summary.json")
        return self.folder.summary

    def figure(self, name: str) -> float | None:
        """A figure as it was last measured, such as "evaluation/fvu"; None where it never was."""
        return self.folder.figure(name)

    @cached_property
    def metrics(self) -> Metrics:
        """Every logged figure: `steps, values = run.metrics["metrics/fvu"]`, NumPy arrays."""
        if not self.folder.metrics.series:
            raise missing_part(self.folder, "metrics", "metrics.jsonl")
        return Metrics(self.folder.metrics)

    @cached_property
    def checkpoint(self) -> RunCheckpoint:
        """The newest checkpoint whose checksums hold: its `path`, `step`, `decoder` [d_sae, d_out] and `firings`."""
        return RunCheckpoint(self.folder)

    def transcoder(self, device: torch.device | str = "cpu") -> Transcoder:
        """The transcoder as the newest good checkpoint has it, ready to encode and decode."""
        from transcoder.model import Transcoder

        return Transcoder.from_pretrained(self.checkpoint.path, device=device)

    @cached_property
    def latents(self) -> Latents:
        """All latents: `run.latents[17]`, `.search("text")`, `.filter(prefix=0)`, `.density`."""
        columns = LatentColumns(self)
        return Latents(columns, np.arange(columns.d_sae))

    @cached_property
    def duplicates(self) -> Duplicates:
        """Pairs of latents that rise and fall together, strongest first; `.groups`, `.histogram`, `.flagged`."""
        return Duplicates.read(self.folder, self.latents)

    @cached_property
    def positions(self) -> Positions:
        """Where in the sequence samples stand, and the share of sinks."""
        return Positions(self.folder)

    @cached_property
    def prefixes(self) -> Prefixes:
        """What each Matryoshka width adds."""
        return Prefixes.read(self.folder)

    @cached_property
    def ledger(self) -> Ledger:
        """Whether each anti-duplication part was really used."""
        return Ledger.read(self.folder)

    def plot_loss(self) -> Figure:
        """The losses over the steps. Needs matplotlib."""
        from transcoder.reporting.run_plots import plot_loss

        return plot_loss(self)

    def plot_fvu(self) -> Figure:
        """FVU over the steps, by prefix and held-out, against the linear map. Needs matplotlib."""
        from transcoder.reporting.run_plots import plot_fvu

        return plot_fvu(self)

    def plot_duplicates(self) -> Figure:
        """Duplicate pairs over the steps, and all pairs by correlation. Needs matplotlib."""
        from transcoder.reporting.run_plots import plot_duplicates

        return plot_duplicates(self)

    def plot_density(self) -> Figure:
        """Latents by how often they fire. Needs matplotlib."""
        from transcoder.reporting.run_plots import plot_density

        return plot_density(self)

    def plot_positions(self) -> Figure:
        """Where in the sequence kept samples stand. Needs matplotlib."""
        from transcoder.reporting.run_plots import plot_positions

        return plot_positions(self)

    def __repr__(self) -> str:
        rows = text_table(("figure", "value"), self._figures())
        return f"run {self.name!r}: {self._headline()}\n{rows}\nparts: {', '.join(self._parts())}"

    def _repr_html_(self) -> str:
        rows = html_table(("figure", "value"), self._figures())
        parts = safe(", ".join(self._parts()))
        return f"<p><b>{safe(self.name)}</b> {safe(self._headline())}</p>{rows}<p>parts: {parts}</p>"

    def _headline(self) -> str:
        steps = self.folder.setting("training.steps")
        of = f" of {number(steps)}" if isinstance(steps, int) else ""
        return f"{self.status}, {number(self.folder.last_step)}{of} steps"

    def _figures(self) -> list[tuple[str, str]]:
        found = ((f, f.of(self.folder)) for f in _SHOWN)
        return [(f.label, f.text(value)) for f, value in found if value is not None]

    def _parts(self) -> list[str]:
        """What is there, by the names of files: a representation must not read a gigabyte."""
        checkpoints = candidates([self.path / "checkpoints"])
        there = {
            "metrics": (self.path / "metrics.jsonl").exists(),
            "summary": (self.path / "summary.json").exists(),
            "duplicates": bool(self.folder.correlation_files),
            "contexts": (self.path / "activation_samples" / "samples.parquet").exists(),
            f"checkpoint of step {checkpoints[0][0]}" if checkpoints else "checkpoint": bool(checkpoints),
        }
        return [name if here else f"no {name}" for name, here in there.items()]
