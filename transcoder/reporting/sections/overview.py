"""What ran, how it ended, its figures against the baselines, and whether every part was really used."""

from __future__ import annotations

from collections.abc import Callable

from transcoder.reporting import figures
from transcoder.reporting.figures import Figure
from transcoder.reporting.html import escape, table
from transcoder.reporting.ledger_verdict import verdicts
from transcoder.reporting.numbers import MISSING, clock, number
from transcoder.reporting.runfolder import RunFolder

_TILES = (
    figures.TRAINING_FVU,
    figures.L0,
    figures.DEAD,
    figures.PAIRS,
    figures.FLAGGED,
    figures.DICTIONARY_SIZE,
    figures.TOKENS_PER_SECOND,
)


def header(run: RunFolder) -> str:
    steps = run.setting("training.steps")
    state = "good" if run.finished else "warn"
    last = number(run.last_step)
    progress = f"{last} of {number(steps)} steps" if isinstance(steps, (int, float)) else f"{last} steps"
    facts = [progress]
    if isinstance(run.summary.get("tokens"), (int, float)):
        facts.append(f"{number(run.summary['tokens'])} tokens")
    if run.metrics.seconds is not None:
        facts.append(clock(run.metrics.seconds))
    return (
        f'<p class="eyebrow">Transcoder run</p><h1>{escape(run.name)}</h1>'
        f'<p class="facts"><span class="pill {state}">{escape(run.status)}</span>'
        + "".join(f"<span>{escape(f)}</span>" for f in facts)
        + "</p>"
    )


def section(run: RunFolder) -> str:
    return (
        f'<div class="hero">{_against_baselines(run)}{_what_ran(run)}</div>{_tiles(run)}{_missing(run)}{_ledger(run)}'
    )


def _against_baselines(run: RunFolder) -> str:
    rows: list[tuple[Figure, float | None, str]] = [
        (figures.HELDOUT_FVU, figures.HELDOUT_FVU.of(run), "own"),
        (figures.LINEAR_BASELINE, figures.LINEAR_BASELINE.of(run), ""),
        (figures.MEAN_BASELINE, figures.MEAN_BASELINE.of(run), ""),
    ]
    own = rows[0][1]
    longest = max((v for _, v, _ in rows if v is not None), default=0.0)
    bars = []
    for figure, value, kind in rows:
        label = "This transcoder" if kind else figure.label
        share = 0.0 if value is None or longest <= 0 else 100 * max(value, 0.0) / longest
        bars.append(
            f'<div class="bar-row {kind}" title="{escape(figure.meaning)}"><span>{escape(label)}</span>'
            f'<span class="track"><i style="width:{share:.1f}%"></i></span><b>{number(value)}</b></div>'
        )
    if own is None:
        words = "No evaluation on held-out tokens was recorded."
    else:
        linear = rows[1][1]
        words = "Lower is better; the bars share one scale."
        if linear is not None:
            better = "below" if own < linear else "NOT below"
            words = f"The fraction of variance left unexplained is {better} the best linear map's. " + words
    return (
        f'<div class="panel fvu"><h3>{escape(figures.HELDOUT_FVU.label)}</h3><p class="big">{number(own)}</p>'
        f'{"".join(bars)}<p class="note">{escape(words)}</p></div>'
    )


def _what_ran(run: RunFolder) -> str:
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
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<div class="panel"><h3>What ran</h3><dl class="what">{items}</dl></div>'


def _data_rows(run: RunFolder, setting: Callable[[str], str]) -> list[tuple[str, str]]:
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


def _tiles(run: RunFolder) -> str:
    tiles = "".join(
        f'<div class="tile" title="{escape(f.meaning)}"><span>{escape(f.label)}</span><b>{escape(f.text(f.of(run)))}</b></div>'
        for f in _TILES
    )
    return f'<div class="tiles">{tiles}</div>'


def _missing(run: RunFolder) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li><b>{escape(m.what)}</b> {escape(m.why)}</li>" for m in run.missing)
    return f'<div class="panel missing" role="note"><h3>What is missing</h3><ul>{items}</ul></div>'


def _ledger(run: RunFolder) -> str:
    classes = {"used": "good", "off": "", "not proven": "bad", "unknown": "warn"}
    rows = []
    for v in verdicts(run):
        pill = f'<span class="pill {classes[v.state]}">{v.state}</span>'
        why = f"<br><small>{escape(v.why)}</small>" if v.why else ""
        calls = MISSING if v.state == "off" and not v.calls else number(v.calls)
        effect = escape(v.effect) or MISSING
        rows.append(
            [
                escape(v.title),
                pill + why,
                calls,
                effect,
                MISSING if v.state == "off" and not v.files else number(v.files),
            ]
        )
    return (
        "<h3>Was each anti-duplication part really used?</h3>"
        + table(["Part", "Verdict", "Calls", "Measured effect", "Files"], rows, numeric=[2, 4])
        + '<p class="note">Used means: called, with an effect other than zero, and its files are in the run folder. '
        "A penalty of zero is an effect where its terms were evaluated: there was nothing to penalise.</p>"
    )
