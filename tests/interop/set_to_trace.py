"""Train and export a small set of the shipped model, and write what its evaluation says: `set_to_trace.py FOLDER`.

circuit-tracer pins an older TransformerLens than a run needs, so the Python that runs tests/interop/run.py trains the set,
which is traced in the environment of circuit-tracer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from transcoder.activations.stream import open_source, resolved_layers
from transcoder.config import RunConfig
from transcoder.interop.formats import export_transcoder
from transcoder.training import train_transcoder
from transcoder.training.layer_set import set_cross_entropy

SMALL: dict[str, Any] = {
    "activations.layers": "all",
    # No sinks, which keep their own activations in our evaluation and have none in circuit-tracer.
    "activations.mask_bos": False,
    "activations.mask_norm_multiple": None,
    "activations.buffer_tokens": 4096,
    "activations.sequences_per_forward": 4,
    "antidup.monitor.enabled": False,
    "antidup.verify_at_step": 20,
    "antidup.samples.collect_every": 5,
    "training.steps": 20,
    "training.batch_size": 256,
    "training.evaluation_tokens": 512,
    "training.evaluation_ce_tokens": 0,
    "training.similarity_tokens": 0,
    "transcoder.d_sae": 128,
    "transcoder.k": 8,
    "transcoder.widths": None,
    "transcoder.normalization_tokens": 1024,
    "logging.report": False,
    "logging.report_tokens": 2000,
    "logging.progress": False,
}


def main(folder: Path) -> None:
    config = RunConfig.load("demo", SMALL)
    layers = train_transcoder(config, folder / "run").layers
    export_transcoder(folder / "run", "circuit-tracer", folder / "set")
    torch.set_grad_enabled(False)
    source = open_source(resolved_layers(config), torch.device("cpu"))
    passes = next(source.from_start(heldout=True))
    sequences, length = passes[0].shape or (0, 0)
    # Of the first text without its first position, at which circuit-tracer has no features.
    rows = slice(1, length)
    errors = [
        float((passes[n].target[rows] - one.transcoder.eval()(passes[n].source[rows])).square().sum())
        for n, one in enumerate(layers.values())
    ]
    by_place = {n: one.transcoder for n, one in enumerate(layers.values())}
    said = {
        "tokens": passes[0].tokens.view(sequences, length).tolist(),
        "errors": errors,
        **set_cross_entropy(by_place, source, sequences * length),
    }
    (folder / "evaluation.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
