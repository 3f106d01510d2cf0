"""Duplicates of a trained transcoder on held-out tokens: one measure for every run, whether it had a monitor or not."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from transcoder.activations import ActivationBatch
from transcoder.antidup import CorrelationMonitor, UsageLedger
from transcoder.config import MonitorSection
from transcoder.model import Transcoder
from transcoder.training.evaluation import at_inference, merge_test
from transcoder.usage import REQUIRED_EFFECTS

_METRICS = tuple(
    f"duplicates/{name}"
    for name in ("pairs", "mergeable", "share_of_live", "share_supported", "live_latents", "effective_dictionary_size")
)


@torch.no_grad()
def heldout_duplicates(
    transcoder: Transcoder, heldout: Sequence[ActivationBatch], section: MonitorSection
) -> dict[str, float]:
    """What a fresh `CorrelationMonitor` finds in the codes of all held-out batches together, at inference (BatchTopK by its
    threshold). No flags: those rest on several blocks.

    Args:
        transcoder: of any device; its mode is restored.
        heldout: non-sink tokens, on its device.
        section: thresholds, support and sketch; `enabled`, `update_every` and the blocks are not read.

    Returns: {"heldout_duplicates/<metric>"} for pairs, mergeable (those that the merge test on the same tokens passes),
    share_of_live, live_latents, effective_dictionary_size (absent under a sketch) and share_supported: of the live latents,
    those that fire on half of `min_support` or more, among which pairs can be found. Empty without held-out tokens.
    """
    if not heldout:
        return {}
    section = dataclasses.replace(section, update_every=1, halflife_tokens=None, block_tokens=2**62)
    d_sae, device = transcoder.config.d_sae, transcoder.W_dec.device
    counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
    with at_inference(transcoder), tempfile.TemporaryDirectory() as folder:
        # The monitor's own files and ledger belong to a run; here only its metrics are wanted.
        ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, False), Path(folder) / "usage.json")
        monitor = CorrelationMonitor(section, d_sae, device, Path(folder), ledger)
        for batch in heldout:
            codes = transcoder.encode(batch.source)
            monitor.update_correlations(codes, 0, sequences=batch.sequences)
            counts += torch.bincount(codes.indices[codes.values > 0], minlength=d_sae)
        monitor.report(0, transcoder.W_dec, lambda i, j: merge_test(transcoder, heldout, i, j))
    found = monitor.metrics()
    supported = (2 * counts >= section.min_support).sum() / (counts > 0).sum().clamp(min=1)
    found["duplicates/share_supported"] = float(supported)
    return {f"heldout_{name}": found[name] for name in _METRICS if name in found}
