"""What ran, how it ended, its figures against the baselines, and whether every part was really used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transcoder.reporting import summary_metrics
from transcoder.reporting.elements import Block, Cell, columns, heading, panel, real, short, table, text, tiles
from transcoder.reporting.format import MISSING, clock, number
from transcoder.reporting.ledger_verdict import verdicts
from transcoder.reporting.run import Run
from transcoder.reporting.summary_metrics import SummaryMetric

_TILES = (
    summary_metrics.TRAINING_FVU,
    summary_metrics.L0,
    summary_metrics.DEAD,
    summary_metrics.PAIRS,
    summary_metrics.FLAGGED,
    summary_metrics.MERGEABLE,
    summary_metrics.DICTIONARY_SIZE,
    summary_metrics.TOKENS_PER_SECOND,
)


def header(run: Run) -> dict[str, Any]:
    """The page's head: {"eyebrow", "title", "pill": [words, look], "facts", "progress": 0..1 | null}."""
    steps = run.setting("training.steps")
    last = number(run.last_step)
    total = real(steps) or 0.0
    facts = [f"{last} of {number(total)} steps" if total > 0 else f"{last} steps"]
    if run.tokens is not None:
        facts.append(f"{number(run.tokens)} tokens")
    if run.metrics.seconds is not None:
        facts.append(clock(run.metrics.seconds))
    return {
        "eyebrow": "Transcoder run",
        "title": run.name,
        "pill": [run.status, "good" if run.finished else "warn"],
        "facts": facts,
        "progress": None if run.finished or total <= 0 else short((run.last_step or 0) / total),
    }


def section(run: Run) -> list[Block]:
    return [
        columns([_against_baselines(run)], [_what_ran(run)]),
        tiles([(f.label, f.text(f.of(run)), f.meaning) for f in (*_recovered(run), *_TILES)]),
        *_missing(run),
        *_ledger(run),
    ]


def _recovered(run: Run) -> list[SummaryMetric]:
    """What the transcoder is worth to the language model, where one was at hand."""
    return [] if summary_metrics.CE_RECOVERED.of(run) is None else [summary_metrics.CE_RECOVERED]


def _against_baselines(run: Run) -> Block:
    rows: list[tuple[SummaryMetric, float | None, str]] = [
        (summary_metrics.HELDOUT_FVU, summary_metrics.HELDOUT_FVU.of(run), "own"),
        (summary_metrics.LINEAR_BASELINE, summary_metrics.LINEAR_BASELINE.of(run), ""),
        (summary_metrics.MEAN_BASELINE, summary_metrics.MEAN_BASELINE.of(run), ""),
    ]
    own = rows[0][1]
    bars = [
        ["This transcoder" if k else f.label, None if v is None else short(v), number(v), f.meaning] for f, v, k in rows
    ]
    if own is None:
        words = "No evaluation on held-out tokens was recorded."
    else:
        linear = rows[1][1]
        words = "Lower is better; the bars share one scale."
        if linear is not None:
            better = "below" if own < linear else "NOT below"
            words = f"The fraction of variance left unexplained is {better} the best linear map's. " + words
    shown = {"is": "bars", "big": number(own), "rows": bars}
    return panel(summary_metrics.HELDOUT_FVU.label, [shown, text(words, "note")], "fvu")


def _what_ran(run: Run) -> Block:
    def setting(name: str) -> str:
        value = run.setting(name)
        if value is None:
            return MISSING
        if isinstance(value, (list, tuple)):
            return ", ".join(number(v) if isinstance(v, (int, float)) else str(v) for v in value)
        return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)

    widths = run.setting("transcoder.widths")
    rows = [
        *_data_rows(run, setting),
        (
            "Latents",
            f"{setting('transcoder.d_sae')}, {setting('transcoder.activation')}, k = {setting('transcoder.k')}",
        ),
        ("Prefixes", setting("transcoder.widths") if widths else "full width only"),
        *([] if run.data_source == "own batches" else [("Batch", f"{setting('training.batch_size')} tokens")]),
        ("Seed", setting("training.seed")),
    ]
    return panel("What ran", [{"is": "facts", "rows": [list(row) for row in rows]}])


def _data_rows(run: Run, setting: Callable[[str], str]) -> list[tuple[str, str]]:
    """Only what was really read: of a user's own batches the config knows nothing, of a cache not its hooks."""
    if run.data_source == "own batches":
        widths = [f"{name} {number(run.summary[name])}" for name in ("d_in", "d_out") if name in run.summary]
        return [("Data", ", ".join(["batches given to train_transcoder", *widths]))]
    if run.data_source == "cached":
        return [("Data", f"cached activations, {setting('activations.cached_path')}")]
    return [
        ("Model", setting("model.name")),
        ("Reads", setting("activations.source_hook")),
        ("Predicts", setting("activations.target_hook")),
        ("Text", setting("activations.dataset")),
    ]


def _missing(run: Run) -> list[Block]:
    missing = [*run.missing, *run.lacking]
    if not missing:
        return []
    return [panel("What is missing", [{"is": "list", "rows": [[m.what, m.why] for m in missing]}], "missing")]


def _ledger(run: Run) -> list[Block]:
    looks = {"used": "good", "off": "", "not proven": "bad", "unknown": "warn"}
    rows: list[list[Cell]] = []
    for v in verdicts(run):
        off = v.state == "off"
        rows.append(
            [
                v.title,
                {"text": v.state, "pill": looks[v.state], "note": v.why},
                MISSING if off and not v.calls else number(v.calls),
                v.effect or MISSING,
                MISSING if off and not v.files else number(v.files),
            ]
        )
    note = (
        "Used means: called, with an effect other than zero, and its files are in the run folder. A penalty of zero is "
        "an effect where its terms were evaluated: there was nothing to penalise."
    )
    return [
        heading("Was each anti-duplication part really used?"),
        table(["Part", "Verdict", "Calls", "Measured effect", "Files"], rows, [2, 4], caption="Verdicts of the ledger"),
        text(note, "note"),
    ]
