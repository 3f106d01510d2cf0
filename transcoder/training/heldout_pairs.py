"""The duplicates of a trained transcoder: pairs, each with one verdict, from held-out tokens and the final weights."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from transcoder.activations import ActivationBatch
from transcoder.antidup import CorrelationMonitor, UsageLedger
from transcoder.antidup.correlation_report import connected_components, distinct_latents
from transcoder.antidup.merge_cost import MergeTest, jackknifed
from transcoder.antidup.monitor import MOST_JUDGED
from transcoder.config import MonitorSection
from transcoder.kernels import sparse_decode
from transcoder.model import Transcoder
from transcoder.reporting.verdict import duplicate_kind, pair_verdict
from transcoder.training.evaluation import at_inference
from transcoder.usage import REQUIRED_EFFECTS

FILE_NAME = "heldout_duplicates.json"
"""In the run folder."""
SCHEMA_VERSION = 1
STRETCHES = 8
"""Parts of the held-out tokens that the error of the merge test is taken over."""
MOST_PRODUCTS = 4e11
"""Multiplications that the merge test may take on a CPU, about ten seconds; later held-out tokens are left out."""
KEPT = ("i", "j", "correlation", "lower", "upper", "cosine", "jaccard", "support", "sequences")
"""Fields of a pair that are those of a correlation report."""
Heldout = Callable[[], Iterable[ActivationBatch]]


def heldout_duplicates(
    transcoder: Transcoder, heldout: Iterable[ActivationBatch], section: MonitorSection
) -> dict[str, float]:
    """The metrics of `find_pairs` on these batches; {} without any."""
    batches = list(heldout)
    return report_metrics(find_pairs(transcoder, lambda: batches, section)) if batches else {}


@torch.no_grad()
def find_pairs(transcoder: Transcoder, heldout: Heldout, section: MonitorSection, step: int = 0) -> dict[str, Any]:
    """What a fresh `CorrelationMonitor` finds in the codes of held-out tokens, at inference (BatchTopK by its threshold), and
    the merge test's verdict on each pair from the same tokens. No flags: those are of training.

    Args:
        transcoder: of any device; its mode is restored.
        heldout: gives the non-sink tokens, the same ones each time (they are read twice), on its device.
        section: thresholds, support and sketch; `enabled`, `update_every` and the blocks are not read.

    Returns JSON values: {"schema_version": 1, "step", "tokens", "d_sae", "live_latents", "thresholds", "pairs_total" (above the
    threshold), "pairs": of the `MOST_JUDGED` strongest {"i", "j", "correlation", "lower", "upper", "cosine", "jaccard",
    "support", "sequences", "decoder_cosine", "merge_share", "merge_share_error", "merge_fvu_change", "verdict": "duplicate" |
    "correlated" | "undecided", "kind": "twin" | "split" | null}, "verdicts": {verdict or kind: pairs}, "components": groups
    joined by duplicate pairs, "candidate_components": by any, "distinct_latents": live ones with each group of duplicates
    counted once, "duplicate_share_of_live", "share_of_live_with_neighbour", "share_judged": of the live latents, those that
    fire on half of `min_support` or more, among which pairs can be found, "effective_dictionary_size", "histogram",
    "decoder_cosine", "encoder_cosine"}.
    """
    asked = section.max_reported_pairs
    section = dataclasses.replace(
        section, update_every=1, halflife_tokens=None, block_tokens=2**62, max_reported_pairs=MOST_JUDGED
    )
    d_sae, device = transcoder.config.d_sae, transcoder.W_dec.device
    counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
    with at_inference(transcoder), tempfile.TemporaryDirectory() as folder:
        # The monitor's own files and ledger belong to a run; here only its report is wanted.
        ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, False), Path(folder) / "usage.json")
        monitor = CorrelationMonitor(section, d_sae, device, Path(folder), ledger)
        for batch in heldout():
            codes = transcoder.encode(batch.source)
            monitor.update_correlations(codes, 0, sequences=batch.sequences)
            counts += torch.bincount(codes.indices[codes.values > 0], minlength=d_sae)
        report = monitor.report(step, transcoder.W_dec.detach(), W_enc=transcoder.W_enc.detach())
        pairs = _judged(transcoder, heldout, report["pairs"])
    live = int((counts > 0).sum())
    duplicate = [(p["i"], p["j"]) for p in pairs if p["verdict"] == "duplicate"]
    verdicts = Counter(p["verdict"] for p in pairs) + Counter(p["kind"] for p in pairs if p["kind"])
    # Pairs beyond those that are judged are undecided.
    verdicts["undecided"] += report["pairs_total"] - len(pairs)
    groups = connected_components(duplicate)
    same = ("candidate_components", "share_of_live_with_neighbour", "effective_dictionary_size", "histogram")
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: report[name] for name in ("step", "tokens", "d_sae", "live_latents", "thresholds", "pairs_total")},
        "pairs": pairs[:asked],
        "verdicts": {name: verdicts[name] for name in ("duplicate", "twin", "split", "correlated", "undecided")},
        "components": groups,
        "distinct_latents": distinct_latents(live, groups),
        "duplicate_share_of_live": sum(map(len, groups)) / live if live else 0.0,
        "share_judged": float((2 * counts >= section.min_support).sum()) / max(1, live),
        **{name: report[name] for name in (*same, "decoder_cosine", "encoder_cosine")},
    }


def report_metrics(report: dict[str, Any]) -> dict[str, float]:
    """{"heldout_duplicates/<metric>"} of a report of `find_pairs`: pairs, mergeable (the duplicates), twins, splits,
    correlated, undecided, share_of_live (in any of these pairs), duplicate_share (in a duplicate pair), distinct_latents,
    live_latents, share_supported, tokens, effective_dictionary_size (absent under a sketch)."""
    verdicts = report["verdicts"]
    found = {
        "pairs": report["pairs_total"],
        "mergeable": verdicts["duplicate"],
        "twins": verdicts["twin"],
        "splits": verdicts["split"],
        "correlated": verdicts["correlated"],
        "undecided": verdicts["undecided"],
        "share_of_live": report["share_of_live_with_neighbour"],
        "duplicate_share": report["duplicate_share_of_live"],
        "distinct_latents": report["distinct_latents"],
        "live_latents": report["live_latents"],
        "share_supported": report["share_judged"],
        "tokens": report["tokens"],
        "effective_dictionary_size": report["effective_dictionary_size"],
    }
    return {f"heldout_duplicates/{name}": float(value) for name, value in found.items() if value is not None}


def _judged(transcoder: Transcoder, heldout: Heldout, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, each with the merge test's result on held-out tokens and the verdict that follows from it."""
    if not pairs:
        return []
    W_dec, device = transcoder.W_dec.detach(), transcoder.W_dec.device
    i, j = (torch.tensor([p[side] for p in pairs], device=device) for side in ("i", "j"))
    tests = [MergeTest(i, j, W_dec, transcoder.widths) for _ in range(STRETCHES)]
    a_token = torch.cat([i, j]).unique().numel() * W_dec.shape[1] + len(pairs)
    most = MOST_PRODUCTS / a_token if device.type == "cpu" else math.inf
    seen = used = 0
    for number, batch in enumerate(heldout()):
        if seen >= most:
            break
        seen += len(batch)
        codes = transcoder.encode(batch.source)
        target = transcoder.residual_target(batch.source, batch.target)
        error = sparse_decode(codes, W_dec, transcoder.b_dec) - target
        tests[number % STRETCHES].update(codes, error, transcoder.normalize_target(batch.target))
        used = min(STRETCHES, number + 1)
    found, error = jackknifed(tests[:used])
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    cosine = (rows[i] * rows[j]).sum(1)
    columns = (found.known, found.cost_share, error, found.fvu_change, cosine)
    entries = []
    for pair, known, share, spread, change, direction in zip(pairs, *(c.tolist() for c in columns), strict=True):
        tested = known and math.isfinite(share)
        # Not finite: removing the latent costs nothing, and the merge does.
        verdict = pair_verdict(share, spread if math.isfinite(spread) else None) if tested else "undecided"
        entries.append(
            {
                **{name: pair[name] for name in KEPT},
                "decoder_cosine": direction,
                "merge_share": share if tested else None,
                "merge_share_error": spread if tested and math.isfinite(spread) else None,
                "merge_fvu_change": change if tested else None,
                "verdict": verdict,
                "kind": duplicate_kind(direction) if verdict == "duplicate" else None,
            }
        )
    return entries
