"""Where in the sequence latents fire, and what the sinks do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting import figures
from transcoder.reporting.charts import bar_chart
from transcoder.reporting.html import tiles
from transcoder.reporting.numbers import number, percent
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.sample_table import SampleTable

BINS = 10
ENOUGH = 4
"""Strongest samples a latent needs before its concentration says anything."""
LISTED = 24


def section(run: RunFolder) -> str:
    parts = [_sinks(run)]
    samples = run.samples
    if samples is None:
        parts.append('<p class="empty">No activation samples, so positions cannot be shown.</p>')
        return "".join(parts)
    length = run.setting("activations.sequence_length")
    longest = int(samples.position.max()) + 1
    length = max(int(length), longest) if isinstance(length, int) else longest
    edges = np.linspace(0, length, BINS + 1)
    groups = []
    for label, chosen, color in (("strongest", samples.top, "c0"), ("across positions", ~samples.top, "c1")):
        if chosen.any():
            counts = np.histogram(samples.position[chosen], edges)[0]
            groups.append((label, list(100 * counts / counts.sum()), color))
    charts = bar_chart(
        "Where kept samples stand",
        list(edges),
        groups,
        x_label="position in the sequence",
        y_label="% of samples",
        note="The second kind is drawn to cover all positions, so only the first shows a preference.",
    )
    latents, shares = concentration(samples)
    if len(latents):
        counts = np.histogram(shares, np.linspace(0, 1, BINS + 1))[0]
        charts += bar_chart(
            "Do latents keep to one position?",
            list(np.linspace(0, 1, BINS + 1)),
            [("latents", [float(c) for c in counts], "c0")],
            x_label="share of a latent's strongest samples at its commonest position",
            y_label="latents",
            note=f"{number(len(latents))} latents with at least {ENOUGH} strongest samples.",
        )
    parts.append(f'<div class="charts">{charts}</div>')
    locked = latents[shares == 1.0]
    if len(locked):
        links = " ".join(f'<a class="chip" href="#latent-{i}" data-latent="{i}">{i}</a>' for i in locked[:LISTED])
        rest = f" and {number(len(locked) - LISTED)} more" if len(locked) > LISTED else ""
        parts.append(
            f"<p>{number(len(locked))} of them fire strongest at one position only, as latents do that follow a sink or a "
            f"position rather than content: {links}{rest}</p>"
        )
    return "".join(parts)


def concentration(samples: SampleTable) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Per latent with enough strongest samples: its id, and the share of them at its commonest position."""
    keys = np.stack([samples.latent[samples.top], samples.position[samples.top]], 1)
    cells, counts = np.unique(keys, axis=0, return_counts=True)
    latents, first = np.unique(cells[:, 0], return_index=True)
    if not len(latents):
        return latents, np.zeros(0)
    totals, most = np.add.reduceat(counts, first), np.maximum.reduceat(counts, first)
    enough = totals >= ENOUGH
    return latents[enough], most[enough] / totals[enough]


def _sinks(run: RunFolder) -> str:
    fraction = run.sample_summary.get("sink_fraction")
    facts = []
    if isinstance(fraction, (int, float)):
        facts.append(("Kept samples at sink tokens", percent(float(fraction))))
    sink = figures.SINK_FVU.of(run)
    if sink is not None:
        facts.append(("FVU on masked sink tokens", number(sink)))
    for name in run.figure_names():
        if name.startswith("data/"):
            words = name.removeprefix("data/").replace("_", " ").capitalize()
            facts.append((words, number(run.figure(name))))
    return tiles(facts) if facts else ""
