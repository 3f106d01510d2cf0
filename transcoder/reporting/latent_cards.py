"""What the page's script shows of each latent: an index of all of them, and cards in packed chunks, bounded in bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transcoder.reporting.charts import short
from transcoder.reporting.duplicates import Duplicates
from transcoder.reporting.format import whole
from transcoder.reporting.page import pack
from transcoder.reporting.run import Run
from transcoder.reporting.samples import SampleTable, Windows

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
LOOKED_AT = 512
"""Latents among which `telling` looks for some."""
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
    rows, ends = _shown_rows(samples, chosen)
    windows = samples.read_windows(rows, TOKENS_BEFORE, TOKENS_AFTER)
    facts = {} if run.heldout_latents is None else run.heldout_latents.details(chosen)
    near = {} if run.unverified_checkpoint is None else run.unverified_checkpoint.neighbours(chosen)
    peaks: dict[str, int] = {}
    spent = 0
    for begin in range(0, len(chosen), CHUNK):
        part = range(begin, min(begin + CHUNK, len(chosen)))
        shown = slice(ends[part[0]], ends[part[-1] + 1])
        words, packed_rows = _rows(samples, rows[shown], windows.part(shown))
        entries = []
        for n in part:
            latent, first = chosen[n], ends[n]
            own = [row for row in packed_rows[first - shown.start : ends[n + 1] - shown.start] if row is not None]
            entries.append([latent, own, _facts(facts.get(latent), near.get(latent))])
            if own:
                strongest = words[own[0][5][own[0][4]]]
                word[place[latent]] = peaks.setdefault(strongest, len(peaks))
        text = packed({"words": words, "cards": entries})
        spent += len(text)
        if spent > MAX_BYTES:
            break
        chunk[[place[chosen[n]] for n in part]] = len(cards.chunks)
        cards.chunks.append(text)
        cards.with_contexts += len(part)
    top = samples.top[rows] & windows.known
    tops = {
        chosen[n]: (np.flatnonzero(top[ends[n] : ends[n + 1]]) + ends[n]).tolist() for n in range(cards.with_contexts)
    }
    return chunk, word, list(peaks), interesting(windows, tops, density.to_dict())


def _shown_rows(samples: SampleTable, chosen: list[int]) -> tuple[NDArray[np.int64], list[int]]:
    """The strongest samples of each kind of the chosen latents, and where each latent's begin and end among them."""
    shown, ends = [np.zeros(0, np.int64)], [0]
    for latent in chosen:
        rows = samples.rows_of(latent)
        top = samples.top[rows]
        others = rows[~top]
        # Evenly over the activations, strong and weak ones.
        others = others[np.linspace(0, len(others) - 1, min(SAMPLES_OF_A_KIND, len(others))).astype(int)]
        shown += [rows[top][:SAMPLES_OF_A_KIND], others]
        ends.append(ends[-1] + len(shown[-1]) + len(shown[-2]))
    return np.concatenate(shown), ends


def _rows(samples: SampleTable, rows: NDArray[np.int64], windows: Windows) -> tuple[list[str], list[list[Any] | None]]:
    """The words of some samples, and each packed; None where its token is not known."""
    there = windows.word >= 0
    used, numbers = np.unique(windows.word[there], return_inverse=True)
    ends = np.cumsum(there.sum(1)).tolist()
    column = np.cumsum(there, axis=1) - 1
    peak = np.maximum(_peaks(samples, rows), 1e-12)
    shade = np.where(there, np.nan_to_num(np.clip(windows.activation / peak[:, None], 0, 1)).round(2), 0.0)
    at, shaded = np.nonzero(shade)
    pairs = [list(pair) for pair in zip(column[at, shaded].tolist(), shade[at, shaded].tolist(), strict=True)]
    pair_ends = np.searchsorted(at, np.arange(1, len(rows) + 1)).tolist()
    columns = (
        samples.top[rows].astype(int).tolist(),
        _rounded(samples.activation[rows].tolist(), 4),
        samples.position[rows].tolist(),
        samples.sequence[rows].tolist(),
        column[:, windows.anchor].tolist(),
    )
    plain = numbers.tolist()
    found: list[list[Any] | None] = []
    for n, (known, *place) in enumerate(zip(windows.known.tolist(), *columns, strict=True)):
        begin, pair_begin = (ends[n - 1], pair_ends[n - 1]) if n else (0, 0)
        found.append([*place, plain[begin : ends[n]], pairs[pair_begin : pair_ends[n]]] if known else None)
    return [_shorten(windows.words[i]) for i in used.tolist()], found


def _peaks(samples: SampleTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The strongest activation of each row's latent."""
    latents, place = np.unique(samples.latent[rows], return_inverse=True)
    strongest = [samples.activation[samples.rows_of(latent)[0]] for latent in latents.tolist()]
    return np.asarray(strongest, np.float64)[place]


def telling(run: Run, count: int = 3) -> list[tuple[int, str]]:
    """(latent, the token that it fires on most) of up to `count` latents of which this says something, out of `LOOKED_AT` that
    are spread over the dictionary; none without samples."""
    samples, facts = run.samples, run.heldout_latents
    if samples is None or facts is None or not facts.tokens or not len(samples):
        return []
    known = np.unique(samples.latent)
    chosen = known[np.linspace(0, len(known) - 1, min(LOOKED_AT, len(known))).astype(int)].tolist()
    strongest = [rows[samples.top[rows]][:SAMPLES_OF_A_KIND] for rows in map(samples.rows_of, chosen)]
    ends = np.cumsum([0, *map(len, strongest)]).tolist()
    windows = samples.read_windows(np.concatenate(strongest), TOKENS_BEFORE, TOKENS_AFTER)
    tops = {
        latent: [row for row in range(begin, end) if windows.known[row]]
        for latent, begin, end in zip(chosen, ends, ends[1:], strict=False)
    }
    density = dict(zip(facts.latent.tolist(), (facts.fired / facts.tokens).tolist(), strict=True))

    def word(latent: int) -> str:
        ((number, _),) = Counter(windows.word[tops[latent], windows.anchor].tolist()).most_common(1)
        return _shorten(windows.words[number])

    return [(latent, word(latent)) for latent in interesting(windows, tops, density, count)]


def interesting(
    windows: Windows, tops: dict[int, list[int]], density: Mapping[int, float], count: int = 6
) -> list[int]:
    """Up to `count` latents whose strongest contexts say something at a glance: they fire on words rather than whitespace, in
    contexts that differ, on alike tokens, neither once nor everywhere; no two on the same word.

    Args:
        tops: each latent's strongest contexts, as rows of `windows`.
    """
    ranked = []
    own = [windows.words[i].strip().lower() if i >= 0 else "" for i in windows.word[:, windows.anchor].tolist()]
    near = [tuple(ids) for ids in windows.word[:, windows.anchor - 4 : windows.anchor + 3].tolist()]
    for latent, top in tops.items():
        words = [own[row] for row in top]
        lettered = sum(sum(map(str.isalpha, word)) >= 2 for word in words)
        share = float(density.get(latent, np.nan))
        if len(top) < LEAST_CONTEXTS or lettered < 0.8 * len(top) or share < 1e-4 or share > 0.05:
            continue
        varied = len({near[row] for row in top}) / len(top)
        (word, often), *_ = Counter(words).most_common(1)
        ranked.append((varied * lettered / len(top) * (0.5 + 0.5 * often / len(top)), -latent, word))
    chosen: dict[str, int] = {}
    for _, latent, word in sorted(ranked, reverse=True):
        chosen.setdefault(word, -latent)
    return list(chosen.values())[:count]


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
