"""latents.parquet: what the final weights say of each latent, written once at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.samples import read_columns

FILE_NAME = "latents.parquet"
NUMBERS = ("latent", "tokens_fired", "max_activation")
LISTS = ("histogram", "promoted", "promoted_logits", "suppressed", "suppressed_logits")
ABOUT = b"transcoder"
"""Key of the file's own metadata: JSON with "tokens" (tokens counted) and "why" (what is lacking: reason)."""


@dataclass(frozen=True, eq=False)
class LatentTable:
    """Every latent's row, in order of ids.

    Fields:
        fired: int64, tokens it fired on; peak: float64, its highest activation there.
        tokens: tokens looked at in all.
        why: what the file lacks, and the reason.
    """

    latent: NDArray[np.int64]
    fired: NDArray[np.int64]
    peak: NDArray[np.float64]
    tokens: int
    why: dict[str, str]
    _path: Path

    def details(self, wanted: list[int]) -> dict[int, dict[str, Any]]:
        """The lists of the wanted latents by id; lists that a latent lacks are empty."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        lists = [*LISTS, *(name for name in ("quantiles",) if name in pq.read_schema(self._path).names)]
        rows = pq.read_table(self._path, columns=["latent", *lists], filters=pc.field("latent").isin(wanted))
        return {row.pop("latent"): {name: found or [] for name, found in row.items()} for row in rows.to_pylist()}


def read_latents(path: Path) -> LatentTable:
    """Read latents.parquet; the lists only when they are asked for.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not Parquet, or columns are lacking; the message names them.
    """
    table, metadata = read_columns(path, (*NUMBERS, *LISTS), NUMBERS)
    about = json.loads(metadata.get(ABOUT, b"{}"))
    why = about.get("why")
    return LatentTable(
        latent=table.column("latent").to_numpy().astype(np.int64),
        fired=table.column("tokens_fired").to_numpy().astype(np.int64),
        peak=table.column("max_activation").to_numpy().astype(np.float64),
        tokens=int(about.get("tokens", 0)),
        why={str(k): str(v) for k, v in why.items()} if isinstance(why, Mapping) else {},
        _path=path,
    )
