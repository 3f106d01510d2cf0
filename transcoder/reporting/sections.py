"""What each section of report.html shows: values only. How they look and read is templates/sections/NAME.html."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from transcoder.reporting import summary_metrics
from transcoder.reporting.charts import Chart, Line, bar_chart, line_chart, ordered_colors
from transcoder.reporting.duplicates import Duplicates
from transcoder.reporting.format import MISSING, number, percent, real, whole
from transcoder.reporting.latent_cards import LISTED_PAIRS
from transcoder.reporting.parts import RunPartMissingError
from transcoder.reporting.run import Run
from transcoder.reporting.samples import SampleTable
from transcoder.reporting.summary_metrics import SummaryMetric
from transcoder.reporting.verdict import MERGEABLE_SHARE, REFUSED_SHARE, verdicts

if TYPE_CHECKING:
    import pandas as pd

Section = dict[str, Any]
"""What a template is given, by name."""

POSITION_BINS = 10
LEAST_SAMPLES = 4
"""Strongest samples a latent needs before its concentration says anything."""
LISTED_EVENTS = 50
SAMPLES_NOTE = "Samples are collected from the drawn tokens. Training keeps every token."
TRAINING_NOTE = (
    "Only the drawn tokens train: the language model ran on the others for nothing (antidup.positions.train)."
)


class Curve(NamedTuple):
    """A chart over the steps; `lines` by label."""

    title: str
    unit: str
    lines: dict[str, str]
    from_zero: bool = False
    allow_log: bool = False
    scale: float = 1.0


FVU_CURVES, PREFIX_CURVES = "Fraction of variance unexplained", "FVU per prefix"
PAIRS = {"candidates, in training": "duplicates/pairs", "flagged": "duplicates/flagged"}
TIME = {
    "waiting for the language model": "time/language_model_share",
    "transcoder": "time/transcoder_share",
    "against duplicates": "time/antidup_share",
    "files": "time/files_share",
}
CURVES = (
    Curve("Loss", "loss", summary_metrics.LOSSES, allow_log=True),
    Curve(FVU_CURVES, "FVU", {"training": "metrics/fvu", "held-out": "evaluation/fvu"}, from_zero=True),
    Curve(PREFIX_CURVES, "FVU", {}, from_zero=True),
    Curve("L0", "latents a token", {"L0": "metrics/l0"}),
    Curve("Dead latents", "% of latents", {"dead": "sparsity/dead_share"}, from_zero=True, scale=100),
    Curve("Candidate pairs", "pairs", PAIRS, from_zero=True),
    Curve("Effective dictionary size", "latents", {"effective size": "duplicates/effective_dictionary_size"}),
    Curve("Throughput", "tokens/s", {"tokens/s": "metrics/tokens_per_second"}, from_zero=True),
    Curve("Time of the run", "% of the time", TIME, from_zero=True, scale=100),
    Curve("Learning rate", "rate", {"learning rate": "details/learning_rate"}),
    Curve("Gradient norm before clipping", "norm", {"gradient norm": "details/gradient_norm"}, allow_log=True),
    Curve("Selection threshold", "activation", {"threshold": "metrics/topk_threshold"}),
)
SPARSE_FAMILIES = ("evaluation/", "duplicates/")
"""Metrics that are not logged at every logging step: their points are marked."""


TILES = (
    summary_metrics.TRAINING_FVU,
    summary_metrics.L0,
    summary_metrics.DEAD,
    summary_metrics.DUPLICATES,
    summary_metrics.DISTINCT,
    summary_metrics.DICTIONARY_SIZE,
    summary_metrics.TOKENS_PER_SECOND,
)
FOUND = (
    summary_metrics.DUPLICATES,
    summary_metrics.TWINS,
    summary_metrics.SPLITS,
    summary_metrics.CORRELATED,
    summary_metrics.UNDECIDED,
    summary_metrics.DUPLICATE_SHARE,
    summary_metrics.JUDGED,
    summary_metrics.DISTINCT,
)


def overview(run: Run) -> Section:
    recovered = summary_metrics.CE_RECOVERED
    # Only where a language model was at hand.
    metrics = [recovered, *TILES] if recovered.of(run) is not None else list(TILES)
    baselines = (summary_metrics.HELDOUT_FVU, summary_metrics.LINEAR_BASELINE, summary_metrics.MEAN_BASELINE)
    found = Duplicates(run)
    return {
        "answers": verdicts(run),
        "baselines": [(metric, metric.of(run)) for metric in baselines],
        "tiles": tiles(run, metrics),
        "curve": _curve(run, CURVES[1]),
        "worst": next(iter(found.mergeable), next(iter(found), None)),
        "missing": [*run.missing, *run.lacking],
        "verdicts": run.ledger,
    }


def tiles(run: Run, metrics: Iterable[SummaryMetric]) -> list[tuple[str, str, str]]:
    return [(metric.label.strip(), metric.text(metric.of(run)), metric.meaning) for metric in metrics]


def curves(run: Run) -> Section:
    # The overview shows the FVU.
    drawn = [_curve(run, curve) for curve in CURVES if curve.title != FVU_CURVES]
    return {"charts": drawn, "empty": "" if any(drawn) else "No metrics were logged, so there are no curves."}


def _curve(run: Run, curve: Curve) -> Chart | None:
    return line_chart(
        curve.title,
        _prefix_lines(run) if curve.title == PREFIX_CURVES else _lines(run, curve),
        y_label=curve.unit,
        references=_baselines(run) if curve.title == FVU_CURVES else (),
        from_zero=curve.from_zero,
        allow_log=curve.allow_log,
    )


def _lines(run: Run, curve: Curve) -> list[Line]:
    lines = []
    for n, (label, name) in enumerate(curve.lines.items()):
        steps, values = run.metrics.get(name)
        # A loss that is always 0 is a part that is off; drawn, it would only flatten the others.
        if len(values) and (values.any() or len(curve.lines) == 1 or curve.lines == PAIRS):
            lines.append(Line(label, steps, curve.scale * values, f"c{n}", name.startswith(SPARSE_FAMILIES)))
    return lines


def _prefix_lines(run: Run) -> list[Line]:
    series = {
        width: run.metrics.get(f"metrics/fvu_prefix_{width}") for width in run.prefix_metrics("metrics/fvu_prefix")
    }
    logged = {width: found for width, found in series.items() if len(found)}
    colors = ordered_colors(len(logged))
    return [Line(number(w), s.steps, s.values, c) for (w, s), c in zip(logged.items(), colors, strict=True)]


def _baselines(run: Run, *, mean: bool = True) -> list[tuple[float, str]]:
    """Horizontal lines of a chart of the FVU."""
    named = [(summary_metrics.LINEAR_BASELINE, "linear map"), (summary_metrics.MEAN_BASELINE, "mean")]
    found = [(real(metric.of(run)), label) for metric, label in named[: 1 + mean]]
    return [(value, f"{label} {number(value)}") for value, label in found if value is not None]


def prefixes(run: Run) -> Section:
    try:
        found = run.prefixes
    except RunPartMissingError:
        return {}
    heldout = found.attrs["heldout"]
    where = "held-out tokens" if heldout else "the last training batches (no evaluation was recorded)"
    chart = line_chart(
        "FVU by prefix width",
        [Line("held-out" if heldout else "training", found.index, found.fvu, markers=True)],
        x_label="latents in the prefix",
        y_label="FVU",
        references=_baselines(run, mean=False),
        from_zero=True,
        note=f"Measured on {where}.",
    )
    found["each"] = 1000 * found.gain / found.added
    return {"chart": chart, "rows": [_prefix_row(row) for row in found.reset_index().to_dict("records")]}


def _prefix_row(row: dict[str, Any]) -> list[str]:
    gain, each = real(row["gain"]), real(row["each"])
    return [
        number(row["width"]),
        number(row["added"]),
        number(row["fvu"]),
        percent(row["explained"]),
        number(gain),
        number(each),
    ]


def duplicates(run: Run) -> Section:
    found = Duplicates(run)
    pairs = found[:LISTED_PAIRS]
    return {
        "found": found,
        "why": _why_missing(run, "correlation report"),
        "tiles": tiles(run, FOUND),
        "pairs": pairs,
        "charts": [_histogram(found), _merge_costs(pairs)],
        "trained": run.correlation,
    }


def _histogram(found: Duplicates) -> Chart | None:
    threshold = found.thresholds.get("correlation")
    return bar_chart(
        "Correlation of latent pairs",
        found.histogram.edges.tolist(),
        [("pairs", found.histogram.counts.tolist(), "c0")],
        x_label="correlation",
        y_label="pairs",
        log=True,
        marks=[] if threshold is None else [(threshold, f"threshold {number(threshold)}")],
        note="All pairs that fired together; the table has those that fire often enough, too.",
    )


def _merge_costs(pairs: Duplicates) -> Chart | None:
    """How many of the listed pairs merge at which cost; a cost outside 0 to 1 counts in the outermost bin."""
    shares = [p.merge_share for p in pairs if p.merge_share is not None]
    counts, edges = np.histogram(np.clip(shares, 0, 1), 10, (0, 1))
    return bar_chart(
        "What merging the listed pairs would cost",
        edges.tolist(),
        [("pairs", counts.tolist(), "c2")],
        x_label="share of the dropped latent's worth (1: all of it, or more)",
        y_label="pairs",
        marks=[(MERGEABLE_SHARE, ""), (REFUSED_SHARE, "")],
        note="Duplicates are left of the first line, correlated pairs right of the second, unless the test's error is large.",
    )


def positions(run: Run) -> Section:
    samples = run.samples
    if samples is None:
        return {}
    shares = concentration(samples)
    counts, edges = np.histogram(shares, POSITION_BINS, (0, 1))
    concentrated = bar_chart(
        "Do latents keep to one position?",
        edges.tolist(),
        [("latents", counts.tolist(), "c0")],
        x_label="share of a latent's strongest samples at its commonest position",
        y_label="latents",
        note=f"{number(len(shares))} latents with at least {LEAST_SAMPLES} strongest samples.",
    )
    charts = [_sample_positions(run), concentrated, _drawn_positions(run)]
    return {"charts": charts, "locked": shares.index[shares == 1.0].tolist()}


def _sample_positions(run: Run) -> Chart | None:
    found = run.positions
    named = (("strongest", "strongest", "c0"), ("stratified", "across positions", "c1"))
    return bar_chart(
        "Where kept samples stand",
        found.attrs["edges"].tolist(),
        [(label, _percents(found[name]), color) for name, label, color in named if found[name].any()],
        x_label="position in the sequence",
        y_label="% of samples",
        note="The second kind is drawn to cover all positions, so only the first shows a preference.",
    )


def _drawn_positions(run: Run) -> Chart | None:
    """How the position sampler shifted what training sees or, as `chooses` says, what samples are collected from."""
    seen, drawn = run.sampler_positions.get("seen"), run.sampler_positions.get("drawn")
    if not (isinstance(seen, list) and isinstance(drawn, list) and len(seen) == len(drawn) and seen):
        return None
    counts = [np.asarray([real(v) or 0.0 for v in values]) for values in (seen, drawn)]
    if not all(values.sum() for values in counts):
        return None
    samples = run.sampler_positions.get("chooses") == "samples"
    before = "in the batches looked at" if samples else "in the text"
    named = ((before, "c4"), (f"drawn for {'samples' if samples else 'training'}", "c2"))
    return bar_chart(
        "What the position sampler chose",
        np.linspace(0, 1, len(seen) + 1).tolist(),
        [(label, _percents(v), color) for v, (label, color) in zip(counts, named, strict=True)],
        x_label="position, as a share of the sequence",
        y_label="% of tokens",
        note=SAMPLES_NOTE if samples else TRAINING_NOTE,
    )


def _percents(counts: Any) -> list[float]:
    return (100 * counts / counts.sum()).tolist()


def concentration(samples: SampleTable) -> pd.Series[float]:
    """By latent with enough strongest samples: the share of them at its commonest position."""
    import pandas as pd

    top = pd.DataFrame({"latent": samples.latent, "position": samples.position})[samples.top]
    counts = top.value_counts().groupby("latent").agg(["sum", "max"])
    counts = counts[counts["sum"] >= LEAST_SAMPLES]
    return counts["max"] / counts["sum"]


def data_facts(run: Run) -> list[tuple[str, str]]:
    facts = [("Kept samples at sink tokens", percent(real(run.sample_summary.get("sink_fraction"))))]
    special, seen = real(run.sampler_positions.get("special_seen")), run.sampler_positions.get("seen")
    total = sum(real(v) or 0.0 for v in seen) if isinstance(seen, list) else 0.0
    if special is not None and total:
        facts.append(("Special tokens before sampling", percent(special / (total + special))))
        drawn = run.sampler_positions.get("drawn")
        kept = sum(real(v) or 0.0 for v in drawn) if isinstance(drawn, list) else 0.0
        kept += real(run.sampler_positions.get("special_drawn")) or 0.0
        if kept and run.sampler_positions.get("chooses") != "samples":
            facts.append(("Language-model tokens for each one drawn", number((total + special) / kept)))
    facts.append(("FVU on masked sink tokens", number(summary_metrics.SINK_FVU.of(run))))
    facts.append(("FVU of all tokens, sinks included", number(summary_metrics.FVU_WITH_SINKS.of(run))))
    facts.append(("FVU without any sinks", number(summary_metrics.FVU_WITHOUT_SINKS.of(run))))
    for name in run.metric_names():
        if name.startswith("data/"):
            facts.append((name.removeprefix("data/").replace("_", " ").capitalize(), number(run.metric(name))))
    return [(name, value) for name, value in facts if value != MISSING]


def latents(run: Run) -> Section:
    why = {m.what: m.why for m in run.lacking} | ({} if run.heldout_latents is None else run.heldout_latents.why)
    return {"why": _why_missing(run, "activation samples"), "lacking": why}


def settings(run: Run) -> Section:
    return {
        "data": data_facts(run),
        "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
        "logged": [[name, number(run.metric(name))] for name in run.metric_names()],
        "events": [
            [
                number(whole(e.get("step"))),
                str(e.get("event")),
                ", ".join(f"{k}: {v}" for k, v in p.items()) if isinstance(p := e.get("payload"), dict) else "",
            ]
            for e in run.metrics.events[-LISTED_EVENTS:]
        ],
    }


def _why_missing(run: Run, what: str) -> str:
    return next((missing.why for missing in run.missing if missing.what == what), "")
