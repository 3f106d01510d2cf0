"""What circuit-tracer's viewer shows of a feature: one JSON file for each latent, from the files of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transcoder.reporting.parts import RunPartMissingError
from transcoder.reporting.run import Run

FOLDER = "features"
SCAN = f"./data/{FOLDER}"
"""`scan` of a set whose features lie in `features/` of the folder that the viewer serves: names that begin with a point are
read from there, others from the hub."""


def write_features(run_dir: Path, layer: int, folder: Path) -> int:
    """Write `folder/<id>.json` of each latent that the run kept contexts of. Returns how many.

    The id is the viewer's own: Cantor's pair (layer + latent) (layer + latent + 1) / 2 + latent. Where a context's neighbours'
    activations are not known they are 0.
    """
    run = Run(run_dir)
    if run.samples is None:
        return 0
    latents = run.latents
    table = run.heldout_latents
    shown = sorted({int(latent) for latent in run.samples.latent})
    details = {} if table is None else table.details(shown)
    folder.mkdir(parents=True, exist_ok=True)
    for latent in shown:
        try:
            contexts = latents.by_id(latent)
            groups = {"Top": contexts.top, "Drawn evenly over positions": contexts.stratified}
        except RunPartMissingError:
            continue
        known = details.get(latent, {})
        peak = max((context.activation for group in groups.values() for context in group), default=0.0)
        feature: dict[str, Any] = {
            "transcoder_id": str(layer),
            "index": latent,
            "examples_quantiles": [
                {"quantile_name": name, "examples": [_example(context) for context in group]}
                for name, group in groups.items()
                if group
            ],
            "top_logits": [str(token) for token in known.get("promoted", [])],
            "bottom_logits": [str(token) for token in known.get("suppressed", [])],
            "act_min": 0.0,
            "act_max": float(peak),
            "quantile_values": [],
            "histogram": [float(count) for count in known.get("histogram", [])],
            "activation_frequency": 0.0 if table is None else float(table.fired[latent]) / max(1, table.tokens),
        }
        pair = layer + latent
        (folder / f"{pair * (pair + 1) // 2 + latent}.json").write_text(json.dumps(feature), encoding="utf-8")
    return len(shown)


def _example(context: Any) -> dict[str, Any]:
    values = [float(value) if value == value else 0.0 for value in context.activations]
    values[context.anchor] = float(context.activation)
    return {
        "tokens_acts_list": values,
        "train_token_ind": context.anchor,
        "is_repeated_datapoint": False,
        "tokens": list(context.tokens),
    }
