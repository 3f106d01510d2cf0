"""What the page's script shows of each latent: an index of all of them, and cards in packed chunks, bounded in bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transcoder.reporting.charts import short
from transcoder.reporting.duplicates import Duplicates
from transcoder.reporting.format import whole
from transcoder.reporting.page import pack
from transcoder.reporting.run import Run
from transcoder.reporting.samples import Context, SampleTable

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_LATENTS = 4096
"""Where the config does not say `logging.report_latents`."""
MAX_BYTES = 6_000_000
"""Most that packed cards may take, whatever the settings say: with the script of the charts the page stays below 10 MB."""
CHUNK = 128
"""Latents in a chunk: the page unpacks a chunk when one of its latents is opened."""
SAMPLES_OF_A_KIND = 12
LEAST_CONTEXTS = 5
"""Strongest contexts without which a latent is not shown as one to begin with."""
TOKENS_BEFORE, TOKENS_AFTER = 28, 12
TOKEN_CHARACTERS = 48
BYTES_A_ROW, BYTES_A_TOKEN = 16, 2
"""A guess of what a context takes when packed, to choose how many latents are read at all."""
LISTED_PAIRS = 500
"""Pairs on the page; the JSON report has the rest."""


@dataclass(eq=False)
class LatentCards:
    """`index`: columns over latents, see `build`. `chunks`: packed cards, gzip and base64."""

    index: dict[str, Any]
    chunks: list[str] = field(default_factory=list)
    with_contexts: int = 0
    """Latents whose contexts are in the chunks."""
    sampled: int = 0
    """Latents that have samples in the run's folder."""

    @property
    def packed_index(self) -> str:
        return packed(self.index)


def build(run: Run) -> LatentCards:
    """The latents of a run.

    index: {"ids": [...] | null (null: 0 to count - 1), "count", "widths", "peak": [...], "density": [...] | null,
        "samples": [...], "group": [...] (0: none), "chunk": [...] (-1: no card), "word": [...] (-1: none), "words": [...],
        "partners": {id: [[id, what the pair is], ...]}, "tokens": looked at,
        "interesting": six ids to begin with}
    A chunk is {"words": [...], "cards": [[id, rows, facts], ...]}; a row of a card is [is top, activation, position,
    sequence, column of the token, [word numbers], [[column, strength 0..1] where above 0, ...]].
    """
    samples, facts = run.samples, run.heldout_latents
    found = Duplicates(run)
    pairs = [(p.i, p.j) for p in found[:LISTED_PAIRS]]
    sampled = _by_latent([], []) if samples is None else _by_latent(samples.activation, samples.latent)
    heldout = _by_latent([], []) if facts is None else _by_latent(facts.peak, facts.latent)
    counted = facts is not None and facts.tokens > 0
    density = (
        _by_latent(facts.fired / facts.tokens, facts.latent) if facts is not None and counted else _by_latent([], [])
    )
    paired = _by_latent([0] * 2 * len(pairs), [i for pair in pairs for i in pair])
    ids = sampled.index.union(heldout.index).union(density.index).union(paired.index).unique()
    place = {int(i): n for n, i in enumerate(ids)}
    peak = sampled.groupby(level=0).max().reindex(ids).combine(heldout.reindex(ids), np.fmax)
    count = sampled.groupby(level=0).size().reindex(ids, fill_value=0)
    group = np.zeros(len(ids), np.int64)
    for number, members in enumerate(found.groups, 1):
        group[[place[i] for i in members if i in place]] = number
    partners: dict[str, list[list[Any]]] = {}
    for pair in found[:LISTED_PAIRS]:
        for latent in (pair.i, pair.j):
            partners.setdefault(str(latent), []).append([pair.other(latent), pair.said])
    cards = LatentCards({}, sampled=sampled.index.nunique())
    chunk, word, words, begin_with = (
        _fill(cards, run, samples, _choose(run, samples, pairs), place, density)
        if samples is not None
        else (np.full(len(ids), -1), np.full(len(ids), -1), [], [])
    )
    cards.index = {
        "ids": None if len(ids) and int(ids[-1]) == len(ids) - 1 else ids.tolist(),
        "count": len(ids),
        "widths": run.widths,
        "peak": _rounded(peak, 4),
        "density": None if density.isna().all() else _rounded(density.reindex(ids), 3),
        "samples": count.tolist(),
        "group": group.tolist(),
        "chunk": chunk.tolist(),
        "word": word.tolist(),
        "words": words,
        "partners": {i: found[:8] for i, found in partners.items()},
        "tokens": 0 if facts is None else facts.tokens,
        "interesting": begin_with,
    }
    return cards


def _by_latent(values: ArrayLike, latents: ArrayLike) -> pd.Series[float]:
    """float64 values by latent ids, int64."""
    import pandas as pd

    return pd.Series(np.asarray(values, np.float64), np.asarray(latents, np.int64))


def packed(value: Any) -> str:
    """`value` as packed JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return pack(text.encode("utf-8", errors="replace"))


def _rounded(values: Iterable[float], digits: int) -> list[float | int | None]:
    return [short(float(f"{value:.{digits}g}")) for value in values]


def _choose(run: Run, samples: SampleTable, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """At most `logging.report_latents` ids that have samples, as many as the bytes may hold: those of the strongest pairs, then
    the others evenly over the dictionary, so that every prefix has its share."""
    setting = whole(run.setting("logging.report_latents"))
    wanted = DEFAULT_LATENTS if setting is None else setting
    known, counts = np.unique(samples.latent, return_counts=True)
    rows = dict(zip(known.tolist(), np.minimum(counts, 2 * SAMPLES_OF_A_KIND).tolist(), strict=True))
    paired = list(dict.fromkeys(i for pair in pairs if rows.keys() >= set(pair) for i in pair))
    paired = paired[: wanted - wanted % 2 if wanted > 1 else wanted]
    cost = BYTES_A_ROW + BYTES_A_TOKEN * (min(int(samples.anchor.max(initial=0)), TOKENS_BEFORE) + TOKENS_AFTER // 2)
    budget = MAX_BYTES // cost - sum(rows[i] for i in paired)
    typical = max(1.0, float(np.mean(list(rows.values()))))
    rest = np.setdiff1d(known, np.asarray(paired, np.int64))
    room = int(min(wanted - len(paired), max(0.0, budget / typical), len(rest)))
    return [*paired, *rest[np.arange(room) * len(rest) // max(room, 1)].tolist()]


def _fill(
    cards: LatentCards,
    run: Run,
    samples: SampleTable,
    chosen: list[int],
    place: dict[int, int],
    density: pd.Series[float],
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str], list[int]]:
    """Pack the cards of the chosen latents; returns the columns `chunk` and `word` of the index, the `words`, and the latents
    to begin with."""
    chunk, word = np.full((2, len(place)), -1)
    contexts = _contexts(samples, chosen)
    facts = {} if run.heldout_latents is None else run.heldout_latents.details(chosen)
    near = {} if run.unverified_checkpoint is None else run.unverified_checkpoint.neighbours(chosen)
    peaks: dict[str, int] = {}
    spent = 0
    for begin in range(0, len(chosen), CHUNK):
        part = chosen[begin : begin + CHUNK]
        local: dict[str, int] = {}
        entries = []
        for latent in part:
            shown = contexts[latent]
            peak = max(float(samples.activation[samples.rows_of(latent)[0]]), 1e-12)
            rows = [_row(context, peak, local) for context in shown]
            entries.append([latent, rows, _facts(facts.get(latent), near.get(latent))])
            if shown:
                strongest = _shorten(shown[0].tokens[shown[0].anchor])
                word[place[latent]] = peaks.setdefault(strongest, len(peaks))
        text = packed({"words": list(local), "cards": entries})
        spent += len(text)
        if spent > MAX_BYTES:
            break
        chunk[[place[latent] for latent in part]] = len(cards.chunks)
        cards.chunks.append(text)
        cards.with_contexts += len(part)
    return chunk, word, list(peaks), interesting({i: contexts[i] for i in chosen if chunk[place[i]] >= 0}, density)


def _contexts(samples: SampleTable, chosen: list[int]) -> dict[int, list[Context]]:
    """The strongest contexts of each kind of the chosen latents."""
    shown = [np.zeros(0, np.int64)]
    for latent in chosen:
        rows = samples.rows_of(latent)
        top = samples.top[rows]
        others = rows[~top]
        # Evenly over the activations, strong and weak ones.
        others = others[np.linspace(0, len(others) - 1, min(SAMPLES_OF_A_KIND, len(others))).astype(int)]
        shown += [rows[top][:SAMPLES_OF_A_KIND], others]
    found: dict[int, list[Context]] = {latent: [] for latent in chosen}
    for context in samples.read_contexts(np.concatenate(shown)):
        found[context.latent].append(context)
    return found


def interesting(contexts: dict[int, list[Context]], density: pd.Series[float], count: int = 6) -> list[int]:
    """Up to `count` latents whose strongest contexts say something at a glance: they fire on words rather than whitespace, in
    contexts that differ, on alike tokens, neither once nor everywhere; no two on the same word."""
    ranked = []
    for latent, found in contexts.items():
        top = [c for c in found if c.kind == "top"]
        words = [c.tokens[c.anchor].strip().lower() for c in top]
        lettered = sum(sum(map(str.isalpha, word)) >= 2 for word in words)
        share = float(density.get(latent, np.nan))
        if len(top) < LEAST_CONTEXTS or lettered < 0.8 * len(top) or share < 1e-4 or share > 0.05:
            continue
        varied = len({"".join(c.tokens[max(0, c.anchor - 4) : c.anchor + 3]) for c in top}) / len(top)
        (word, often), *_ = Counter(words).most_common(1)
        ranked.append((varied * lettered / len(top) * (0.5 + 0.5 * often / len(top)), -latent, word))
    chosen: dict[str, int] = {}
    for _, latent, word in sorted(ranked, reverse=True):
        chosen.setdefault(word, -latent)
    return list(chosen.values())[:count]


def _row(context: Context, peak: float, words: dict[str, int]) -> list[Any]:
    """A context, packed; its new words are added to `words`."""
    begin = max(0, context.anchor - TOKENS_BEFORE)
    window = slice(begin, context.anchor + TOKENS_AFTER + 1)
    shades = np.nan_to_num(np.clip(context.activations[window] / peak, 0, 1)).round(2)
    numbers = [words.setdefault(_shorten(token), len(words)) for token in context.tokens[window]]
    (activation,) = _rounded([context.activation], 4)
    place = [context.position, context.sequence, context.anchor - begin]
    known = [[n, float(shades[n])] for n in np.flatnonzero(shades).tolist()]
    return [int(context.kind == "top"), activation, *place, numbers, known]


def _facts(details: dict[str, Any] | None, near: list[tuple[int, float]] | None) -> dict[str, Any]:
    """What latents.parquet and the checkpoint have of a latent, in the page's short names."""

    def words(name: str) -> list[list[Any]]:
        found = zip(details[name], _rounded(details[f"{name}_logits"], 3), strict=False) if details else ()
        return [[_shorten(str(word)), logit] for word, logit in found]

    return {
        "histogram": [int(v) for v in details["histogram"]] if details else [],
        "quantiles": _rounded(details.get("quantiles", ()), 4) if details else [],
        "near": [[i, *_rounded([cosine], 3)] for i, cosine in near or ()],
        "up": words("promoted"),
        "down": words("suppressed"),
    }


def _shorten(token: str) -> str:
    return token if len(token) <= TOKEN_CHARACTERS else token[: TOKEN_CHARACTERS - 1] + "…"
