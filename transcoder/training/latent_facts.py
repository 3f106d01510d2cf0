"""latents.parquet: how often and how strongly each latent of a trained transcoder fires, and which tokens it promotes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.files import replacing
from transcoder.model import Transcoder
from transcoder.reporting.latent_table import ABOUT, FILE_NAME
from transcoder.training.firings import Firings

TOKENS_SHOWN = 8
"""Promoted and suppressed tokens of a latent, of each so many."""
LOGITS = 1 << 25
"""Logits in memory at a time: 128 MB."""
MOST_PRODUCTS = 4e12
"""Multiplications that the tokens may take on a CPU, about a minute; a GPU has more in a second."""


@torch.no_grad()
def write_latent_facts(
    run_dir: Path,
    transcoder: Transcoder,
    firings: Firings,
    shown: Tensor | None = None,
    unembedding: Tensor | str = "the run had no language model at hand",
    decode_tokens: Callable[[Sequence[int]], list[str]] | None = None,
) -> Path:
    """Write `run_dir/latents.parquet`, one row a latent, and return its path.

    Columns: latent int32, tokens_fired int64 and max_activation float32 on the tokens of `firings`, histogram list<int32> (20
    bins of activation from 0 to its maximum), quantiles list<float32> of its activations (25, 50, 75, 95 %), promoted and
    suppressed list<string> with their logits list<float32>. The logits are a decoder row's direct effect
    through the model's norms at a fixed scale and the unembedding, less their mean over the vocabulary. Columns that could
    not be computed are empty; the file's metadata says why.

    Args:
        firings: of these weights; of no tokens leaves the first columns 0.
        shown: [n] int64 latents that get tokens; None is all of them.
        unembedding: [d_out, vocabulary], a row's effect on the logits, see `HookedModel.unembedding`; or why there is none.

    Raises:
        OSError: the file could not be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    why: dict[str, str] = {} if len(firings) else {"activation histograms": "no token was looked at"}
    counts = firings.counts()
    d_sae = transcoder.config.d_sae
    tokens: dict[str, list[Any]] = {
        name: [[] for _ in range(d_sae)] for name in ("promoted", "promoted_logits", "suppressed", "suppressed_logits")
    }
    rows = torch.arange(d_sae) if shown is None else shown.cpu()
    if isinstance(unembedding, Tensor) and decode_tokens is not None:
        products = rows.numel() * unembedding.numel()
        if unembedding.device.type == "cpu" and products > MOST_PRODUCTS:
            rows = rows[: int(MOST_PRODUCTS // unembedding.numel())]
            why["promoted and suppressed tokens of some latents"] = "they would take minutes on a CPU"
        _promoted(transcoder, rows, unembedding, decode_tokens, tokens)
    else:
        why["promoted and suppressed tokens"] = str(unembedding)
    columns = [
        ("latent", pa.int32(), list(range(d_sae))),
        ("tokens_fired", pa.int64(), counts.fired.tolist()),
        ("max_activation", pa.float32(), counts.peak.tolist()),
        ("histogram", pa.list_(pa.int32()), counts.histogram.tolist()),
        ("quantiles", pa.list_(pa.float32()), counts.quantiles.tolist()),
        ("promoted", pa.list_(pa.string()), tokens["promoted"]),
        ("promoted_logits", pa.list_(pa.float32()), tokens["promoted_logits"]),
        ("suppressed", pa.list_(pa.string()), tokens["suppressed"]),
        ("suppressed_logits", pa.list_(pa.float32()), tokens["suppressed_logits"]),
    ]
    types = [(name, kind) for name, kind, _ in columns]
    schema = pa.schema(types, metadata={ABOUT: json.dumps({"tokens": len(firings), "why": why}).encode()})
    path = run_dir / FILE_NAME
    with replacing(path) as file:
        pq.write_table(pa.table([values for _, _, values in columns], schema=schema), file)
    return path


def _promoted(
    transcoder: Transcoder,
    rows: Tensor,
    unembedding: Tensor,
    decode_tokens: Callable[[Sequence[int]], list[str]],
    found: dict[str, list[Any]],
) -> None:
    weight = unembedding.to(transcoder.W_dec.device, torch.float32)
    weight = weight - weight.mean(1, keepdim=True)
    count = min(TOKENS_SHOWN, weight.shape[1])
    spelled: dict[int, str] = {}
    for part in rows.split(max(1, LOGITS // weight.shape[1])):
        logits = transcoder.W_dec[part.to(transcoder.W_dec.device)].float() @ weight
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(count, dim=1, largest=largest)
            listed = ids.tolist()
            fresh = sorted({i for row in listed for i in row} - spelled.keys())
            spelled.update(zip(fresh, decode_tokens(fresh), strict=True))
            for latent, row, numbers in zip(part.tolist(), listed, values.tolist(), strict=True):
                found[name][latent] = [spelled[i] for i in row]
                found[f"{name}_logits"][latent] = numbers
