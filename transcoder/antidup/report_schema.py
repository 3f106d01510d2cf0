"""The correlation report, schema version 4: what its JSON holds, checked without a schema library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 5
"""Version 1 had candidates in `components` until the first flag, and no fields of candidates; version 2 no merge test;
version 3 did not say where a pair's bounds are from."""

BOUNDS = ("jackknife", "rule")
"""95 % bounds by the pair's own error over groups of sequences, or by a rule of thumb that heavy tails break."""
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
