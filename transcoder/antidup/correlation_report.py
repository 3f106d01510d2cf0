"""The correlation report, schema version 5: how its fields are made, and a check of its JSON without a schema library."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.flags import FlagBook, Pair
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.pair_errors import correlation_bounds
from transcoder.antidup.row_cosines import cosine_tail, random_cosine_tail
from transcoder.kernels import CorrelatedPairs
from transcoder.kernels.correlation.statistics import Survey

HISTOGRAM_BINS = 40
SCHEMA_VERSION = 5
"""Version 1 listed candidates in `components` until the first flag and had no fields for candidates; version 2 had no merge
test; version 3 had no `bounds`."""

BOUNDS = ("jackknife", "rule")
"""Source of a pair's 95 % bounds: its own error over groups of sequences, or a rule of thumb, which is too narrow for heavy
tails."""
_NUMBER = (int, float)
_TOP: dict[str, Any] = {
    "schema_version": int,
    "step": int,
    "tokens": int,
    "block_tokens": int,
    "d_sae": int,
    "live_latents": int,
    "thresholds": dict,
    "pairs": list,
    "pairs_total": int,
    "pairs_flagged": int,
    "pairs_mergeable": (int, type(None)),
    "pairs_refused": (int, type(None)),
    "pairs_untested": int,
    "components": list,
    "candidate_components": list,
    "distinct_latents": int,
    "distinct_latents_candidates": int,
    "share_of_live_with_neighbour": _NUMBER,
    "effective_dictionary_size": (*_NUMBER, type(None)),
    "decoder_cosine": (dict, type(None)),
    "encoder_cosine": (dict, type(None)),
    "histogram": dict,
}
_THRESHOLDS = {"correlation": _NUMBER, "release": _NUMBER, "min_support": int, "min_sequences": int}
_PAIR: dict[str, Any] = {
    "i": int,
    "j": int,
    "correlation": _NUMBER,
    "cosine": _NUMBER,
    "jaccard": _NUMBER,
    "support": int,
    "sequences": (int, type(None)),
    "lower": _NUMBER,
    "upper": _NUMBER,
    "bounds": str,
    "blocks_above": int,
    "flagged": bool,
    "mergeable": (bool, type(None)),
    "merge_share": (*_NUMBER, type(None)),
    "merge_fvu_change": (*_NUMBER, type(None)),
}
_COSINE = {"median": _NUMBER, "p99": _NUMBER, "p999": _NUMBER}


def pair_entries(
    pairs: CorrelatedPairs,
    sequences: list[int | None],
    errors: list[float | None],
    verdicts: MergeResult | None,
    book: FlagBook,
    flagged: set[Pair],
    most: int,
) -> list[dict[str, Any]]:
    """The report's entries of the first `most` pairs.

    Args:
        sequences: distinct sequences of each pair, None where not known.
        errors: each pair's own standard error of atanh(r); None takes the rule of thumb.
        verdicts: of the merge test, one a pair; None where nothing was tested.
        book: gives the number of blocks in which a pair was above the threshold.
    """
    tests = [_untested()] * min(most, len(pairs)) if verdicts is None else _tests(verdicts, min(most, len(pairs)))
    columns = (pairs.i, pairs.j, pairs.correlation, pairs.cosine, pairs.jaccard, pairs.support)
    rows = zip(*(c[:most].tolist() for c in columns), sequences[:most], errors[:most], strict=True)
    entries = []
    for (i, j, r, cosine, jaccard, support, seen, error), test in zip(rows, tests, strict=True):
        lower, upper = correlation_bounds(r, support, error)
        entries.append(
            {
                "i": i,
                "j": j,
                "correlation": r,
                "cosine": cosine,
                "jaccard": jaccard,
                "support": support,
                "sequences": seen,
                "lower": lower,
                "upper": upper,
                "bounds": "rule" if error is None else "jackknife",
                "blocks_above": book.blocks_above((i, j)),
                "flagged": (i, j) in flagged,
                **test,
            }
        )
    return entries


def _untested() -> dict[str, Any]:
    return {"mergeable": None, "merge_share": None, "merge_fvu_change": None}


def _tests(verdicts: MergeResult, listed: int) -> list[dict[str, Any]]:
    """The merge test's part of each of the first `listed` entries; None where there is no verdict."""
    rows = zip(
        verdicts.known.tolist(),
        verdicts.mergeable().tolist(),
        verdicts.cost_share.tolist(),
        verdicts.fvu_change.tolist(),
        strict=True,
    )
    tests = []
    for known, passed, share, change in itertools.islice(rows, listed):
        finite = math.isfinite(share) and math.isfinite(change)
        test = (
            {"mergeable": passed, "merge_share": share, "merge_fvu_change": change} if known and finite else _untested()
        )
        tests.append({**test, "mergeable": passed if known else None})
    return tests


def report_text(report: Mapping[str, Any]) -> str:
    """As JSON, a field a line: what json.dumps makes with an indent takes fifty times as long."""
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in report.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def distinct_latents(live: int, components: list[list[int]]) -> int:
    """Live latents with each component counted once."""
    return max(0, live - sum(len(c) - 1 for c in components))


def merged_groups(pairs: CorrelatedPairs, verdicts: MergeResult | None, untested: list[list[int]]) -> list[list[int]]:
    """Groups of latents joined by pairs that passed the merge test; `untested` where there was none."""
    if verdicts is None:
        return untested
    passed = verdicts.mergeable()
    return connected_components(zip(pairs.i[passed].tolist(), pairs.j[passed].tolist(), strict=True))


def effective_size(live: int, survey: Survey, tokens: float) -> float | None:
    """N^2 / sum_ij r_ij^2 over live latents, with the noise N (N - 1) / n of independent latents subtracted from the sum; None
    under a sketch.

    N copies of one latent give 1, N independent latents give N.
    """
    if survey.squared_sum is None or live == 0 or tokens <= 0:
        return None
    noise = live * (live - 1) / tokens
    return live**2 / (live + max(0.0, 2 * survey.squared_sum - noise))


def histogram(counts: Tensor | None, correlation: Tensor, edges: Tensor) -> dict[str, list[float]]:
    """`counts` of all pairs that fired together; None (under a sketch) counts the reported pairs' `correlation` only."""
    if counts is None:
        place = (torch.searchsorted(edges, correlation, right=True) - 1).clamp(0, HISTOGRAM_BINS - 1)
        counts = torch.bincount(place, minlength=HISTOGRAM_BINS)
    return {"edges": [round(x, 9) for x in edges.tolist()], "counts": counts.tolist()}


def report_metrics(report: dict[str, Any]) -> dict[str, float]:
    metrics = {
        "duplicates/pairs": float(report["pairs_total"]),
        "duplicates/flagged": float(report["pairs_flagged"]),
        "duplicates/share_of_live": float(report["share_of_live_with_neighbour"]),
        "duplicates/distinct_latents": float(report["distinct_latents"]),
        "duplicates/distinct_latents_candidates": float(report["distinct_latents_candidates"]),
        "duplicates/live_latents": float(report["live_latents"]),
        "duplicates/largest_component": float(max(map(len, report["components"]), default=0)),
        "duplicates/largest_candidate_component": float(max(map(len, report["candidate_components"]), default=0)),
    }
    for name in ("mergeable", "refused", "untested"):
        if report[f"pairs_{name}"] is not None:
            metrics[f"duplicates/{name}"] = float(report[f"pairs_{name}"])
    if report["effective_dictionary_size"] is not None:
        metrics["duplicates/effective_dictionary_size"] = float(report["effective_dictionary_size"])
    for side in ("decoder_cosine", "encoder_cosine"):
        if report[side] is not None:
            metrics.update({f"duplicates/{side}_{k}": v for k, v in report[side].items() if k != "random"})
    return metrics


def cosines(rows: Tensor | None) -> dict[str, Any] | None:
    tail = None if rows is None else cosine_tail(rows)
    if rows is None or tail is None:
        return None
    return {**tail, "random": random_cosine_tail(*rows.shape)}


def connected_components(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Groups of latents joined by pairs: each sorted, the largest group first, ties by the smallest
    latent."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for i, j in pairs:
        a, b = root(i), root(j)
        if a != b:
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for x in sorted(parent):
        groups.setdefault(root(x), []).append(x)
    return sorted(groups.values(), key=lambda g: (-len(g), g[0]))


def validate_correlation_report(report: Any) -> None:
    """Raise ValueError, naming the place, unless `report` is a correlation report of schema version 5.

    `components` joins latents by flagged pairs, `candidate_components` by candidate or flagged ones; the distinct
    latents of each count a component once.
    """
    _fields(report, _TOP, "report")
    if report["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"report.schema_version: expected {SCHEMA_VERSION}, got {report['schema_version']}")
    _fields(report["thresholds"], _THRESHOLDS, "report.thresholds")
    for name in ("decoder_cosine", "encoder_cosine"):
        if report[name] is not None:
            _fields(report[name], {**_COSINE, "random": dict}, f"report.{name}")
            _fields(report[name]["random"], _COSINE, f"report.{name}.random")
    d_sae = report["d_sae"]
    before: tuple[float, int, int] | None = None
    for n, pair in enumerate(report["pairs"]):
        where = f"report.pairs[{n}]"
        _fields(pair, _PAIR, where)
        if not 0 <= pair["i"] < pair["j"] < d_sae:
            raise ValueError(f"{where}: expected 0 <= i < j < d_sae = {d_sae}, got i = {pair['i']}, j = {pair['j']}")
        if not -1 <= pair["lower"] <= pair["correlation"] <= pair["upper"] <= 1:
            raise ValueError(
                f"{where}: expected -1 <= lower <= correlation <= upper <= 1, got {pair['lower']}, {pair['correlation']}, "
                f"{pair['upper']}"
            )
        if pair["bounds"] not in BOUNDS:
            raise ValueError(f"{where}.bounds: expected one of {BOUNDS}, got {pair['bounds']!r}")
        place = (-pair["correlation"], pair["i"], pair["j"])
        if before is not None and place <= before:
            raise ValueError(f"{where}: expected pairs sorted by falling correlation, then (i, j), each once")
        before = place
    if report["pairs_total"] < len(report["pairs"]):
        raise ValueError(f"report.pairs_total: expected at least {len(report['pairs'])}, got {report['pairs_total']}")
    for name in ("components", "candidate_components"):
        _components(report[name], d_sae, f"report.{name}")
    edges, counts = report["histogram"].get("edges"), report["histogram"].get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        raise ValueError("report.histogram: expected lists edges [bins + 1] and counts [bins]")


def _components(components: list[Any], d_sae: int, where: str) -> None:
    seen: set[int] = set()
    for n, component in enumerate(components):
        ids = isinstance(component, list) and all(type(x) is int and 0 <= x < d_sae for x in component)
        if not ids or len(component) < 2 or len(set(component)) != len(component) or seen & set(component):
            raise ValueError(f"{where}[{n}]: expected two or more latents, none in two components, got {component!r}")
        seen |= set(component)


def _fields(value: Any, kinds: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(value).__name__}")
    lacking, unknown = sorted(set(kinds) - set(value)), sorted(set(value) - set(kinds))
    if lacking or unknown:
        raise ValueError(f"{where}: lacking {', '.join(lacking) or 'none'}; unknown {', '.join(unknown) or 'none'}")
    for name, kind in kinds.items():
        got = value[name]
        kinds_of = kind if isinstance(kind, tuple) else (kind,)
        wrong = not isinstance(got, kind) or (isinstance(got, bool) and bool not in kinds_of)
        if wrong or (isinstance(got, float) and not math.isfinite(got)):
            raise ValueError(f"{where}.{name}: expected {kind}, got {got!r}")
