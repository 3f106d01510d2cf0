"""What each Matryoshka width adds."""

from __future__ import annotations

from transcoder.reporting import summary_metrics
from transcoder.reporting.elements import Block, Line, charts, columns, line_chart, table, text
from transcoder.reporting.format import MISSING, number, percent
from transcoder.reporting.run import Run


def section(run: Run) -> list[Block]:
    heldout = run.prefix_metrics("evaluation/fvu_prefix")
    training = run.prefix_metrics("metrics/fvu_prefix")
    found = heldout or training
    where = "held-out tokens" if heldout else "the last training batches (no evaluation was recorded)"
    if not found:
        return [text("No FVU per prefix was logged.", "empty")]
    if len(found) == 1:
        ((width, value),) = found.items()
        only = f"One width only ({number(width)} latents, FVU {number(value)}): this run has no nested prefixes."
        return [text(only, "empty")]
    linear = summary_metrics.LINEAR_BASELINE.of(run)
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
    head = ["Width", "Added", "FVU", "Explained", "FVU gained", "per 1,000 latents"]
    lead = "Each prefix is a transcoder of its own; what a width adds is the FVU that its further latents take away."
    return [
        text(lead, "lead"),
        columns([charts([chart])], [table(head, rows, numeric=range(6), caption="FVU by prefix")]),
    ]
