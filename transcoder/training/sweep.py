"""`transcoder sweep`: the same run with several k. A k above what the data need is a cause of duplicates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transcoder.activations.stream import resolved_layers
from transcoder.antidup.row_cosines import cosine_tail, random_cosine_tail
from transcoder.config import ConfigError, RunConfig
from transcoder.files import local_path, replace_atomically
from transcoder.training.run_end import RunResult
from transcoder.training.start_checks import changed_settings, check_one_process
from transcoder.training.train import train_transcoder

COLUMNS = (
    ("evaluation/fvu", "FVU"),
    ("evaluation/ce_recovered", "CE recovered"),
    ("evaluation/l0", "L0"),
    ("heldout_duplicates/pairs", "pairs"),
    ("heldout_duplicates/mergeable", "mergeable"),
    ("heldout_duplicates/share_of_live", "share paired"),
    ("heldout_duplicates/share_supported", "share judged"),
    ("evaluation/live_share", "live share"),
    ("decoder_cosine/median", "cosine 50 %"),
    ("decoder_cosine/p99", "99 %"),
    ("decoder_cosine/p999", "99.9 %"),
)


class SweepStopped(RuntimeError):
    """A signal stopped one of the runs; the same call goes on with it."""


def sweep_k(config: RunConfig, ks: Sequence[int], out: Path | str) -> dict[str, Any]:
    """Train once a k into out/k<k> and write out/sweep.json. Runs that are finished are not trained again.

    The metrics are those of held-out non-sink tokens (BatchTopK by its threshold), the pairs counted by the monitor's
    thresholds on all held-out tokens, "mergeable" those that the merge test passes. A pair is only counted with enough tokens:
    "share_supported" is the share of live latents that fire on half of `min_support` or more, and where it differs
    much between k, `training.evaluation_tokens` is too small to compare pairs. "decoder_cosine" are quantiles over latents
    of the cosine with the nearest other decoder row; "random" holds those of random rows of the same shape, below which
    no dictionary of this size can be expected to stay.

    Args:
        config: the run; its k and name are set here.
        ks: at least one, each at most d_sae.

    Returns: {"schema_version": 1, "runs": [{"k", metric: number | null, ...}, ...], "random": {"median", "p99", "p999"}}.

    Raises: ConfigError for a k that cannot be; others as `train_transcoder`. SweepStopped.
    """
    check_one_process()
    if not ks or len(set(ks)) != len(ks):
        raise ConfigError(f"sweep: k: expected one or more different numbers, got {list(ks)}")
    config = resolved_layers(config)
    runs = {k: config.replace({"transcoder.k": k, "name": f"{config.name}-k{k}"}) for k in ks}
    out, rows = local_path(out), []
    for k, run in runs.items():
        done = out / f"k{k}" / "figures.json"
        if done.is_file():
            # Metrics of other settings must not be taken for those of this sweep.
            if changed := changed_settings(out / f"k{k}" / "config.yaml", run):
                raise ConfigError(
                    f"sweep: {out / f'k{k}'} was trained with other settings ({', '.join(changed)}): choose another --out, or "
                    "delete it"
                )
        else:
            result = train_transcoder(run, out / f"k{k}", resume=(out / f"k{k}" / "config.yaml").is_file())
            if not result.finished:
                raise SweepStopped(
                    f"sweep: stopped by {result.interrupted_by} in the run of k = {k}; the same command goes on"
                )
            metrics = {
                **result.summary,
                **_decoder_cosines(result),
            }
            kept = {name: metrics.get(name) for name in (*dict(COLUMNS), "d_out")}
            replace_atomically(done, json.dumps({"k": k, **kept}, indent=2))
        rows.append(json.loads(done.read_bytes()))
    (d_out,) = {row.pop("d_out") for row in rows}
    found = {"schema_version": 1, "runs": rows, "random": random_cosine_tail(config.transcoder.d_sae, d_out)}
    replace_atomically(out / "sweep.json", json.dumps(found, indent=2))
    return found


def _decoder_cosines(result: RunResult) -> dict[str, float]:
    """Quantiles of the decoder's cosines; of a layer set their means over layers."""
    tails = [cosine_tail(one.transcoder.W_dec) or {} for one in result.layers.values() or [result]]
    return {f"decoder_cosine/{name}": sum(tail[name] for tail in tails) / len(tails) for name in tails[0]}


def format_sweep(found: dict[str, Any]) -> str:
    """A table for a terminal, one row a k."""
    import pandas as pd

    quantiles = {"cosine 50 %": "median", "99 %": "p99", "99.9 %": "p999"}
    rows = [{"k": str(row["k"]), **{label: row[name] for name, label in COLUMNS}} for row in found["runs"]]
    if found["random"] is not None:
        rows.append({"k": "random", **{label: found["random"][name] for label, name in quantiles.items()}})
    table = pd.DataFrame(rows).astype({label: float for _, label in COLUMNS})
    return table.to_string(index=False, na_rep="–", float_format="{:.4g}".format)
