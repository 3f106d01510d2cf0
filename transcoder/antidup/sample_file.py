"""samples.parquet and its summary: columns, display strings, atomic replacement."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.files import replacing_all

COLUMNS = ("latent", "kind", "activation", "token", "position", "sequence", "step")


def write_samples(
    folder: Path,
    columns: dict[str, NDArray[Any]],
    contexts: NDArray[np.int32],
    anchor: int,
    decode_tokens: Callable[[Sequence[int]], list[str]],
    summary: dict[str, Any],
) -> list[Path]:
    """Write `samples.parquet` and `summary.json` into `folder`; both are written before either takes its place.

    Args:
        columns: the columns of `COLUMNS`, each [n]; `kind` is bool, True for "top".
        contexts: [n, C] int32 token ids, -1 where there is none (left out of the file's lists).
        anchor: the column of `contexts` that holds the token itself.
        decode_tokens: ids to display strings, one each.
        summary: content of summary.json without `file`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    present = contexts >= 0
    lengths = present.sum(1)
    ids = contexts[present]
    # By the vocabulary and not by a sort: there are millions of ids and few different ones.
    used = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
    used[ids] = True
    distinct, place = np.flatnonzero(used), (np.cumsum(used) - 1)[ids]
    # Half of a surrogate pair, which a byte-level vocabulary may hold, is no UTF-8.
    words = [w.encode("utf-8", "replace").decode("utf-8") for w in decode_tokens(distinct.tolist())]
    if len(words) != len(distinct):
        raise ValueError(f"decode_tokens: expected {len(distinct)} strings, got {len(words)}")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    strings = pa.array(words, type=pa.string()).take(pa.array(place))
    kind = pa.array(np.where(columns["kind"], "top", "stratified"), type=pa.string())
    table = pa.table(
        {
            "latent": pa.array(columns["latent"].astype(np.int32)),
            "kind": kind,
            "activation": pa.array(columns["activation"].astype(np.float32)),
            "token": pa.array(columns["token"].astype(np.int32)),
            "position": pa.array(columns["position"].astype(np.int32)),
            "sequence": pa.array(columns["sequence"].astype(np.int64)),
            "step": pa.array(columns["step"].astype(np.int32)),
            "context": pa.ListArray.from_arrays(offsets, pa.array(ids.astype(np.int32))),
            "anchor": pa.array(present[:, :anchor].sum(1).astype(np.int16)),
            "tokens": pa.ListArray.from_arrays(offsets, strings),
        }
    )
    data, about = folder / "samples.parquet", folder / "summary.json"
    content = json.dumps({**summary, "file": data.name}, indent=1, allow_nan=False) + "\n"
    with replacing_all(data, about) as (samples, text):
        pq.write_table(table, samples)
        text.write(content.encode())
    return [data, about]
