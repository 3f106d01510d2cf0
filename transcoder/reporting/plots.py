"""Plots of a run for a notebook; methods of `Run`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from transcoder.reporting import summary_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transcoder.reporting.run import Run


def plot_loss(run: Run) -> Figure:
    """The losses over the steps. Needs matplotlib."""
    figure, (axes,) = _figure(1)
    drawn = [_line(axes, run, name, label) for label, name in summary_metrics.LOSSES.items()]
    if not any(drawn):
        raise run.missing_error("losses", "metrics.jsonl")
    axes.set(title="Loss", xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    return figure


def plot_fvu(run: Run) -> Figure:
    """FVU over the steps, by prefix and held-out, against the linear map. Needs matplotlib."""
    figure, (axes,) = _figure(1)
    widths = list(run.prefix_metrics("metrics/fvu_prefix"))
    drawn = [_line(axes, run, f"metrics/fvu_prefix_{width}", f"width {width:,}", alpha=0.6) for width in widths[:-1]]
    drawn.append(_line(axes, run, "metrics/fvu", "training"))
    drawn.append(_line(axes, run, "evaluation/fvu", "held-out", marker="o"))
    if not any(drawn):
        raise run.missing_error("FVU", "metrics.jsonl")
    linear = summary_metrics.LINEAR_BASELINE.of(run)
    if linear is not None:
        axes.axhline(linear, linestyle=":", color="gray", label="linear map")
    axes.set(title="Fraction of variance unexplained", xlabel="step", ylabel="FVU")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_duplicates(run: Run) -> Figure:
    """Duplicate pairs over the steps, and all pairs by correlation. Needs matplotlib."""
    found = run.duplicates
    figure, (over_steps, by_correlation) = _figure(2)
    _line(over_steps, run, "duplicates/pairs", "above the threshold", drawstyle="steps-post")
    _line(over_steps, run, "duplicates/flagged", "flagged", drawstyle="steps-post")
    over_steps.set(title="Duplicate pairs", xlabel="step", ylabel="pairs")
    over_steps.set_ylim(bottom=0)
    if over_steps.lines:
        over_steps.legend()
    by_correlation.stairs(found.histogram.counts, found.histogram.edges, fill=True)
    least = found.thresholds.get("correlation")
    if least is not None:
        by_correlation.axvline(least, linestyle=":", color="gray", label="threshold")
        by_correlation.legend()
    title = f"All pairs, step {found.step:,}"
    by_correlation.set(title=title, xlabel="correlation", ylabel="pairs", yscale="symlog")
    by_correlation.set_ylim(0, 2 * max(1, found.histogram.counts.max()))
    return figure


def plot_density(run: Run) -> Figure:
    """Latents by how often they fire. Needs matplotlib."""
    share = run.latents.density
    figure, (axes,) = _figure(1)
    live = share[share > 0]
    if len(live):
        axes.hist(np.log10(live), bins=40)
    title = f"Firing density: {len(live):,} latents fired, {len(share) - len(live):,} did not"
    axes.set(title=title, xlabel="log10 of the share of tokens", ylabel="latents")
    return figure


def plot_positions(run: Run) -> Figure:
    """Where in the sequence kept samples stand. Needs matplotlib."""
    found = run.positions
    figure, (axes,) = _figure(1)
    for name, label in (("strongest", "strongest"), ("stratified", "across positions")):
        if found[name].sum():
            axes.stairs(100 * found[name] / found[name].sum(), found.attrs["edges"], label=label, linewidth=2)
    axes.set(title="Where kept samples stand", xlabel="position in the sequence", ylabel="% of samples")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes side by side that shows itself in a notebook.

    Without pyplot: it would keep every figure in memory, and a notebook would show each twice.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install matplotlib") from error

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=100)
            return png.getvalue()

    figure = ShownFigure(figsize=(6 * count, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line(axes: Axes, run: Run, name: str, label: str, **style: Any) -> bool:
    """Draw a logged metric; False where it was not logged."""
    series = run.metrics.get(name)
    if series:
        axes.plot(*series, label=label, **style)
    return bool(series)
