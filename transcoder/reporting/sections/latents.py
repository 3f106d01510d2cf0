"""The latents that the page shows with contexts: chosen, bounded in bytes, and packed for the page's script."""

from __future__ import annotations

import bisect
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.numbers import number
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.sample_table import SampleTable
from transcoder.reporting.sections.duplicates import pairs_of

DEFAULT_LATENTS = 100
"""Where the config does not say `logging.report_latents`."""
MAX_BYTES = 7_000_000
"""Most that the embedded contexts may take, whatever the settings say: the page stays below 10 MB."""
SAMPLES_OF_A_KIND = 12
TOKENS_BEFORE, TOKENS_AFTER = 28, 12
TOKEN_CHARACTERS = 48


def section(run: RunFolder, payload: dict[str, Any]) -> str:
    if run.samples is None:
        why = next((m.why for m in run.missing if m.what == "activation samples"), "")
        return f'<p class="empty">No contexts to show: {escape(why)}.</p>'
    if not payload["latents"]:
        return '<p class="empty">logging.report_latents is 0: this page shows no latents.</p>'
    options = "".join(
        f'<option value="{n}">{escape(label)}</option>' for n, label in enumerate(_prefix_labels(payload["widths"]))
    )
    prefix = (
        f'<label>Prefix <select id="latent-prefix"><option value="">all</option>{options}</select></label>'
        if options
        else ""
    )
    shown, total = len(payload["latents"]), payload["total"]
    chosen = (
        f"{number(shown)} of the {number(total)} latents with samples are in this page"
        if shown < total
        else f"All {number(total)} latents with samples"
    )
    return (
        f'<p class="lead">{escape(chosen)}: the strongest duplicate pairs first, then those with the highest activations '
        "(logging.report_latents sets how many). A context is shaded by how strongly the latent fires on a token, as far as "
        "samples of it were kept; the framed token is the one the sample was kept for.</p>"
        '<noscript><p class="empty">The latents need this page\'s own script; nothing is loaded from a network.</p></noscript>'
        '<div class="tools" data-for="latents" hidden>'
        '<label class="grow">Search <input type="search" id="latent-search" '
        'placeholder="latent id, or text in a context"></label>'
        f"{prefix}"
        '<label>Order <select id="latent-order"><option value="shown">duplicates first</option><option value="max">highest '
        'activation</option><option value="id">id</option></select></label>'
        '<label class="check"><input type="checkbox" id="latent-paired"> in a pair</label>'
        '<label class="check"><input type="checkbox" id="latent-wrap"> whole contexts</label>'
        '<span class="count" id="latent-count" role="status"></span></div>'
        '<div id="cards"></div><p><button type="button" id="latent-more" hidden>Show more</button></p>'
    )


def build_payload(run: RunFolder) -> dict[str, Any]:
    """What the page's script shows: {"strings", "widths", "total", "latents": [...]}.

    A latent is {"id", "prefix", "max", "samples", "pairs", "rows"}; a row is [is top, activation, position, sequence, column of
    the token, [string numbers], [[column, strength 0..1], ...]].
    """
    samples = run.samples
    pairs = pairs_of(run)
    listed = run.setting("transcoder.widths")
    widths = [w for w in listed if isinstance(w, int)] if isinstance(listed, list) else []
    payload: dict[str, Any] = {"strings": [], "widths": widths, "total": 0, "latents": []}
    if samples is None:
        return payload
    order = np.lexsort((-samples.activation, samples.latent))
    ids, starts, counts = np.unique(samples.latent[order], return_index=True, return_counts=True)
    payload["total"] = len(ids)
    place = {int(i): n for n, i in enumerate(ids)}
    wanted = run.setting("logging.report_latents", DEFAULT_LATENTS)
    chosen = _choose(
        ids, samples.activation[order][starts], pairs, wanted if isinstance(wanted, int) else DEFAULT_LATENTS
    )
    partners: dict[int, list[int]] = {}
    for i, j in pairs:
        partners.setdefault(i, []).append(j)
        partners.setdefault(j, []).append(i)
    strings: dict[str, int] = {}
    spent = 0
    for latent in chosen:
        n = place[latent]
        rows = order[starts[n] : starts[n] + counts[n]]
        known = len(strings)
        entry = {
            "id": latent,
            "prefix": bisect.bisect_right(widths, latent) if widths and latent < widths[-1] else 0,
            "max": _round(samples.activation[rows[0]]),
            "samples": int(counts[n]),
            "pairs": partners.get(latent, [])[:8],
            "rows": _rows(samples, rows, strings),
        }
        fresh = list(itertools.islice(reversed(strings), len(strings) - known))[::-1]
        spent += len(embedded_json(entry).encode(errors="replace")) + len(embedded_json(fresh).encode(errors="replace"))
        if spent > MAX_BYTES:
            break
        payload["latents"].append(entry)
        payload["strings"].extend(fresh)
    return payload


def _choose(ids: NDArray[np.int64], peaks: NDArray[np.float64], pairs: list[tuple[int, int]], wanted: int) -> list[int]:
    """At most `wanted` ids: those of the strongest pairs up to half, then by highest activation."""
    known = set(ids.tolist())
    paired = list(dict.fromkeys(i for pair in pairs if known.issuperset(pair) for i in pair))
    # An even number keeps both latents of a pair.
    chosen = dict.fromkeys(paired[: 2 * ((wanted + 2) // 4)][:wanted])
    for n in np.argsort(-peaks, kind="stable"):
        if len(chosen) >= wanted:
            break
        chosen.setdefault(int(ids[n]))
    return list(chosen)


def _rows(samples: SampleTable, rows: NDArray[np.int64], strings: dict[str, int]) -> list[list[Any]]:
    """The strongest few of each kind; `rows` come strongest first. New strings are added to `strings`."""
    top = rows[samples.top[rows]][:SAMPLES_OF_A_KIND]
    rest = rows[~samples.top[rows]][:SAMPLES_OF_A_KIND]
    peak = max(float(samples.activation[rows[0]]), 1e-12)
    # Two samples of one sequence shade each other's contexts.
    strength = {
        (int(samples.sequence[r]), int(samples.position[r])): float(samples.activation[r]) / peak
        for r in rows[::-1]
        if samples.sequence[r] >= 0
    }
    shown = np.concatenate([top, rest])
    found = []
    for r, context in zip(shown, samples.contexts(shown), strict=True):
        anchor, position, sequence = int(samples.anchor[r]), int(samples.position[r]), int(samples.sequence[r])
        if not 0 <= anchor < len(context):
            continue
        begin = max(0, anchor - TOKENS_BEFORE)
        while begin < anchor and context[begin] == "":
            begin += 1
        window = context[begin : anchor + TOKENS_AFTER + 1]
        shades = []
        for column in range(len(window)):
            at = strength.get((sequence, position - anchor + begin + column))
            if column == anchor - begin:
                at = float(samples.activation[r]) / peak
            if at is not None:
                shades.append([column, round(max(0.0, min(1.0, at)), 2)])
        numbers = [strings.setdefault(_shorten(token), len(strings)) for token in window]
        found.append(
            [int(samples.top[r]), _round(samples.activation[r]), position, sequence, anchor - begin, numbers, shades]
        )
    return found


def _shorten(token: str) -> str:
    return token if len(token) <= TOKEN_CHARACTERS else token[: TOKEN_CHARACTERS - 1] + "…"


def _round(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _prefix_labels(widths: list[int]) -> list[str]:
    return [f"{number(low)} to {number(high - 1)}" for low, high in zip([0, *widths], widths, strict=False)]
