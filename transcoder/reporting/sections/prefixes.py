"""What each Matryoshka width adds."""

from __future__ import annotations

from transcoder.reporting import figures
from transcoder.reporting.charts import Line, line_chart
from transcoder.reporting.html import table
from transcoder.reporting.numbers import MISSING, number, percent
from transcoder.reporting.runfolder import RunFolder


def section(run: RunFolder) -> str:
    heldout = run.prefix_figures("evaluation/fvu_prefix")
    training = run.prefix_figures("metrics/fvu_prefix")
    found = heldout or training
    where = "held-out tokens" if heldout else "the last training batches (no evaluation was recorded)"
    if not found:
        return '<p class="empty">No FVU per prefix was logged.</p>'
    if len(found) == 1:
        ((width, value),) = found.items()
        only = f"One width only ({number(width)} latents, FVU {number(value)}): this run has no nested prefixes."
        return f'<p class="empty">{only}</p>'
    linear = figures.LINEAR_BASELINE.of(run)
    lines = [Line("held-out" if heldout else "training", list(found), list(found.values()), "c0", markers=True)]
    chart = line_chart(
        "FVU by prefix width",
        lines,
        x_label="latents in the prefix",
        y_label="FVU",
        references=[] if linear is None else [(linear, f"linear map {number(linear)}")],
        from_zero=True,
        note=f"Measured on {where}.",
    )
    rows, before = [], None
    for width, value in found.items():
        added = width if before is None else width - before[0]
        if before is None:
            gain = each = MISSING
        else:
            gain = number(before[1] - value)
            each = number(1000 * (before[1] - value) / added)
        rows.append([number(width), number(added), number(value), percent(1 - value), gain, each])
        before = (width, value)
    head = ["Width", "Latents added", "FVU", "Explained", "FVU gained", "per 1,000 latents"]
    return f'<div class="beside"><div class="charts one">{chart}</div><div>{table(head, rows, numeric=range(6))}</div></div>'
