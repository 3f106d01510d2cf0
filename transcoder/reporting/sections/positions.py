"""Where in the sequence latents fire, and what the sinks do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting import summary_metrics
from transcoder.reporting.elements import Block, bar_chart, charts, real, text, tiles
from transcoder.reporting.format import number, percent, whole
from transcoder.reporting.run import Run
from transcoder.reporting.samples import SampleTable

BINS = 10
ENOUGH = 4
"""Strongest samples a latent needs before its concentration says anything."""
LISTED = 24


def section(run: Run) -> list[Block]:
    sinks = _sinks(run)
    parts = [sinks] if sinks["rows"] else []
    samples = run.samples
    if samples is None:
        return [*parts, text("No activation samples, so it is not known where latents fire.", "empty")]
    length = max(whole(run.setting("activations.sequence_length")) or 0, int(samples.position.max()) + 1)
    edges = np.linspace(0, length, BINS + 1)
    groups = []
    for label, chosen, color in (("strongest", samples.top, "c0"), ("across positions", ~samples.top, "c1")):
        if chosen.any():
            counts = np.histogram(samples.position[chosen], edges)[0]
            groups.append((label, [float(c) for c in 100 * counts / counts.sum()], color))
    drawn = [
        bar_chart(
            "Where kept samples stand",
            list(edges),
            groups,
            x_label="position in the sequence",
            y_label="% of samples",
            note="The second kind is drawn to cover all positions, so only the first shows a preference.",
        )
    ]
    latents, shares = concentration(samples)
    if len(latents):
        counts = np.histogram(shares, np.linspace(0, 1, BINS + 1))[0]
        drawn.append(
            bar_chart(
                "Do latents keep to one position?",
                list(np.linspace(0, 1, BINS + 1)),
                [("latents", [float(c) for c in counts], "c0")],
                x_label="share of a latent's strongest samples at its commonest position",
                y_label="latents",
                note=f"{number(len(latents))} latents with at least {ENOUGH} strongest samples.",
            )
        )
    drawn.append(_sampled(run))
    parts.append(charts(drawn))
    locked = latents[shares == 1.0]
    if len(locked):
        rest = f" and {number(len(locked) - LISTED)} more" if len(locked) > LISTED else ""
        words = (
            f"{number(len(locked))} of them fire strongest at one position only, as latents do that follow a sink or a "
            "position rather than content:"
        )
        parts.append({"is": "chips", "text": words, "latents": [int(i) for i in locked[:LISTED]], "rest": rest})
    return parts


def _sampled(run: Run) -> Block | None:
    """How the position sampler shifted what training sees."""
    book = run.sampler_positions
    seen, drawn = book.get("seen"), book.get("drawn")
    if not (isinstance(seen, list) and isinstance(drawn, list) and len(seen) == len(drawn) and seen):
        return None
    numbers = [[real(v) or 0.0 for v in values] for values in (seen, drawn)]
    if not all(map(sum, numbers)):
        return None
    bins = len(seen)
    groups = [
        (label, [100 * v / sum(values) for v in values], color)
        for label, values, color in zip(("in the text", "drawn for training"), numbers, ("c4", "c2"), strict=True)
    ]
    return bar_chart(
        "What the position sampler chose",
        [n / bins for n in range(bins + 1)],
        groups,
        x_label="position, as a share of the sequence",
        y_label="% of tokens",
    )


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


def _sinks(run: Run) -> Block:
    fraction = real(run.sample_summary.get("sink_fraction"))
    facts: list[tuple[str, str]] = []
    if fraction is not None:
        facts.append(("Kept samples at sink tokens", percent(fraction)))
    book = run.sampler_positions
    special, seen = real(book.get("special_seen")), book.get("seen")
    total = sum(real(v) or 0.0 for v in seen) if isinstance(seen, list) else 0.0
    if special is not None and total:
        facts.append(("Special tokens in the text", percent(special / (total + special))))
    sink = summary_metrics.SINK_FVU.of(run)
    if sink is not None:
        facts.append(("FVU on masked sink tokens", number(sink)))
    for name in run.metric_names():
        if name.startswith("data/"):
            words = name.removeprefix("data/").replace("_", " ").capitalize()
            facts.append((words, number(run.metric(name))))
    return tiles(facts)
