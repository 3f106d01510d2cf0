"""How the run went: small multiples over the steps."""

from __future__ import annotations

import math

from transcoder.reporting import summary_metrics
from transcoder.reporting.elements import Block, Line, charts, line_chart, ordered_colors, text
from transcoder.reporting.format import number
from transcoder.reporting.run import Run


def section(run: Run) -> list[Block]:
    drawn = [
        line_chart(
            "Loss",
            _lines(
                run,
                [
                    ("losses/overall_loss", "overall", "c0"),
                    ("losses/mse_loss", "full width", "c1"),
                    ("losses/auxiliary_reconstruction_loss", "AuxK", "c2"),
                    ("losses/diversity_penalty", "diversity", "c3"),
                ],
            ),
            y_label="loss",
            allow_log=True,
        ),
        line_chart(
            "Fraction of variance unexplained",
            [
                *_lines(run, [("metrics/fvu", "training", "c0")]),
                *_lines(run, [("evaluation/fvu", "held-out", "c1")], markers=True),
            ],
            y_label="FVU",
            references=_baselines(run),
            from_zero=True,
        ),
        line_chart("FVU per prefix", _prefixes(run), y_label="FVU", from_zero=True),
        line_chart("L0", _lines(run, [("metrics/l0", "L0", "c0")]), y_label="latents a token"),
        line_chart(
            "Dead latents",
            _lines(run, [("sparsity/dead_share", "dead", "c1")], scale=100),
            y_label="% of latents",
            from_zero=True,
        ),
        line_chart(
            "Duplicate pairs",
            _lines(
                run, [("duplicates/pairs", "candidates", "c0"), ("duplicates/flagged", "flagged", "c1")], markers=True
            ),
            y_label="pairs",
            from_zero=True,
        ),
        line_chart(
            "Effective dictionary size",
            _lines(run, [("duplicates/effective_dictionary_size", "effective size", "c2")], markers=True),
            y_label="latents",
        ),
        line_chart(
            "Throughput",
            _lines(run, [("metrics/tokens_per_second", "tokens/s", "c0")]),
            y_label="tokens/s",
            from_zero=True,
        ),
        line_chart(
            "Learning rate",
            _lines(run, [("details/learning_rate", "learning rate", "c3")]),
            y_label="rate",
        ),
        line_chart(
            "Gradient norm before clipping",
            _lines(run, [("details/gradient_norm", "gradient norm", "c2")]),
            y_label="norm",
            allow_log=True,
        ),
        line_chart(
            "BatchTopK threshold",
            _lines(run, [("metrics/topk_threshold", "threshold", "c0")]),
            y_label="activation",
        ),
    ]
    shown = charts(drawn)
    return [shown] if shown["charts"] else [text("No figures were logged, so there are no curves.", "empty")]


def _lines(run: Run, wanted: list[tuple[str, str, str]], scale: float = 1.0, markers: bool = False) -> list[Line]:
    lines = []
    for name, label, color in wanted:
        series = run.metrics.get(name)
        # A loss that is always 0 is a part that is off; drawn, it would only flatten the others.
        if any(v != 0 for v in series.values) or (len(series) and len(wanted) == 1) or name.startswith("duplicates/"):
            lines.append(Line(label, series.steps, [scale * v for v in series.values], color, markers))
    return lines


def _prefixes(run: Run) -> list[Line]:
    widths = [w for w in run.prefix_metrics("metrics/fvu_prefix") if len(run.metrics.get(f"metrics/fvu_prefix_{w}"))]
    series = [(w, run.metrics.get(f"metrics/fvu_prefix_{w}")) for w in widths]
    colors = ordered_colors(len(series))
    return [Line(number(w), s.steps, s.values, c) for (w, s), c in zip(series, colors, strict=True)]


def _baselines(run: Run) -> list[tuple[float, str]]:
    found = []
    for figure, label in ((summary_metrics.LINEAR_BASELINE, "linear map"), (summary_metrics.MEAN_BASELINE, "mean")):
        value = figure.of(run)
        if value is not None and math.isfinite(value):
            found.append((value, f"{label} {number(value)}"))
    return found
