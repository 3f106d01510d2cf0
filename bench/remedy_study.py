"""python -m bench.remedy_study [--seeds 5] [--steps 600] [--out runs/realistic]: remedies on a real language model, over seeds.
python -m bench.remedy_study --model FOLDER --text FILE --layer 8 --out runs/real: the same on another model.

Trains a transcoder of a layer (hook_resid_mid -> hook_mlp_out; without --model of the package's own model) without
the sink mask, with it, with it and one remedy each, and with all; measures all of them on the same held-out non-sink tokens;
writes the paired differences with their intervals as tables and a plot. Without --model they go into docs/anti-duplication.md,
else into --document. Finished runs are kept, so a stopped command can be resumed.

Pairs are counted three times: as the run's own report of held-out tokens does (candidates, mergeable), and independently of the
package's statistics, by a product of all codes in float64; flags of the run's last report are compared with the latter.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.document import ANTI_DUPLICATION, replace_between
from transcoder import ActivationBatch, RunConfig, Transcoder, train_transcoder
from transcoder.activations import ActivationStream, build_stream, cache_activations
from transcoder.reporting.statistics import interval
from transcoder.training.evaluation import at_inference, cross_entropy, evaluate
from transcoder.training.heldout_pairs import heldout_duplicates

PRESET = "demo"
CACHE_TOKENS = 600_000
CE_TOKENS = 16_384
HELDOUT_TOKENS = 65_536
BELOW = {"07": 0.7, "08": 0.8}
OFF = {f"antidup.{part}.enabled": False for part in ("regularizer", "positions", "samples", "recycle")}
PENALTY = {"antidup.regularizer.enabled": True, "antidup.regularizer.all_pairs_weight": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"activations.mask_bos": False, "activations.mask_norm_multiple": None},
    "mask": {},
    "mask + pair": {**PENALTY, "antidup.regularizer.orthogonality_weight": 0.0},
    "mask + pair, all": {
        **PENALTY,
        "antidup.regularizer.orthogonality_weight": 0.0,
        "antidup.monitor.merge_share_to_act": None,
    },
    "mask + decoder": {
        **PENALTY,
        "antidup.regularizer.correlation_weight": 0.0,
        "antidup.regularizer.orthogonality_weight": 0.01,
    },
    # One block in place of three of four: in a run this short a rare pair seldom has the support three times.
    "mask + recycle": {
        "antidup.recycle.enabled": True,
        "antidup.recycle.every": 50,
        "antidup.monitor.blocks_to_flag": 1,
        "antidup.monitor.blocks_remembered": 2,
    },
    "everything": {
        **PENALTY,
        **{f"antidup.{part}.enabled": True for part in ("positions", "samples", "recycle")},
        "antidup.regularizer.orthogonality_weight": 0.0,
        "antidup.recycle.every": 50,
    },
}
FIGURES = {
    "fresh/pairs": "pairs, float64",
    "heldout_duplicates/pairs": "candidate pairs",
    "heldout_duplicates/mergeable": "mergeable pairs",
    "heldout_duplicates/twins": "twins",
    "heldout_duplicates/splits": "splits",
    "fresh/flagged": "flagged at the end",
    "fresh/flagged_below_07": "share of them below 0.7",
    "fresh/flagged_below_08": "share of them below 0.8",
    "fresh/recall_085": "found of the pairs above 0.85",
    "evaluation/sink_only_latents": "sink-only latents",
    "evaluation/fvu": "FVU",
    "evaluation/fvu_prefix_256": "FVU, prefix 256",
    "evaluation/fvu_prefix_768": "FVU, prefix 768",
    "evaluation/fvu_prefix_1792": "FVU, prefix 1792",
    "evaluation/ce_recovered": "CE recovered",
    "dead": "dead share",
    "evaluation/l0": "L0",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.remedy_study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/realistic"))
    parser.add_argument("--only", type=int, help="train this seed only and write no document (to share the work)")
    parser.add_argument("--model", help="a local Hugging Face folder or a hub name; needs --text")
    parser.add_argument("--text", help="file, folder or hub dataset of text for --model")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=CACHE_TOKENS, help="of the cache that all runs train on")
    parser.add_argument("--lr", type=float, help="learning rate of all runs; default: the package's")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="must have mask")
    parser.add_argument("--document", type=Path, help="has the marks of bench.remedy_study")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text: expected both or neither")
    chosen = options.variants.split(",")
    if "mask" not in chosen or not set(chosen) <= set(VARIANTS):
        parser.error(f"--variants: expected mask and some of {', '.join(VARIANTS)}, got {options.variants}")
    if options.document is None and options.model is None:
        options.document = ANTI_DUPLICATION
    seeds = range(options.seeds) if options.only is None else [options.only]
    measured = {name: [run(options, name, seed) for seed in seeds] for name in chosen}
    if options.only is None:
        found = {"steps": options.steps, "k": options.k, "seeds": options.seeds, "runs": measured}
        (options.out / "realistic.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if options.document is not None:
            write_document(found, options.document)
        print(table(found))
    return 0


def slug(variant: str) -> str:
    return "-".join(re.findall(r"\w+", variant))


def of_model(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the model, its layer and its text."""
    hooks = {"source": "hook_resid_mid", "target": "hook_mlp_out"}
    found = {f"activations.{side}_hook": f"blocks.{options.layer}.{hook}" for side, hook in hooks.items()}
    found["logging.progress"] = False
    if options.model is not None:
        found |= {"model.name": options.model, "activations.dataset": options.text}
    return found


def settings(options: argparse.Namespace, variant: str, seed: int) -> RunConfig:
    return RunConfig.load(
        PRESET,
        {
            **of_model(options),
            "name": f"{slug(variant)}-{seed}",
            "activations.kind": "cached",
            "activations.cached_path": str(options.out / "cache"),
            "transcoder.k": options.k,
            "training.steps": options.steps,
            "training.lr": options.lr,
            "training.seed": seed,
            "training.evaluation_every": 0,
            "training.evaluation_tokens": 16_384,
            "training.evaluation_ce_tokens": 0,
            # Blocks of 60 steps: a flag rests on three of them.
            "antidup.monitor.block_tokens": 60_000,
            "antidup.monitor.correlation_save_frequency": 50,
            # Every pair is listed, so that flags can be compared.
            "antidup.monitor.max_reported_pairs": 1_000_000,
            "checkpoint.every": options.steps,
            "checkpoint.keep_last": 1,
            **OFF,
            **VARIANTS[variant],
        },
    )


def run(options: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """The metrics of one run, which is trained unless its figures.json exists."""
    folder = options.out / f"{slug(variant)}-{seed}"
    done = folder / "figures.json"
    if done.is_file() and RunConfig.load(folder / "config.yaml") != settings(options, variant, seed):
        raise SystemExit(f"{folder} was trained with other settings: choose another --out, or delete it")
    if not done.is_file():
        if not (options.out / "cache" / "index.json").is_file():
            text = RunConfig.load(PRESET, of_model(options))
            cache_activations(text, options.out / "cache", tokens=options.tokens, device=torch.device("cpu"))
        trained = train_transcoder(settings(options, variant, seed), folder, resume=(folder / "config.yaml").is_file())
        if not trained.finished:
            raise SystemExit("stopped; the same command goes on")
        batches = heldout(tuple(sorted(of_model(options).items())))
        found = measure(trained.transcoder.eval(), *batches) | flags_on(trained.transcoder, batches[1], folder)
        done.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{variant}, seed {seed}: {done.read_text()}", flush=True)
    figures: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
    return figures


@functools.cache
def heldout(
    model: tuple[tuple[str, Any], ...],
) -> tuple[ActivationStream, list[ActivationBatch], ActivationBatch | None]:
    """(the language model's stream, held-out tokens with the mask on, the sinks among them); `model`: of `of_model`."""
    config = RunConfig.load(PRESET, {**dict(model), "activations.prefetch": 0})
    stream = build_stream(config, torch.device("cpu"))
    return stream, stream.heldout(HELDOUT_TOKENS), stream.heldout_sinks()


def measure(
    transcoder: Transcoder, stream: ActivationStream, batches: list[ActivationBatch], sinks: ActivationBatch | None
) -> dict[str, float]:
    """Metrics on the same held-out tokens for every variant: the non-sink tokens, and the sinks, which masked variants are also
    given."""
    found = evaluate(transcoder, batches, sinks)
    found |= heldout_duplicates(transcoder, batches, RunConfig.load(PRESET).antidup.monitor)
    found |= cross_entropy(transcoder, stream, CE_TOKENS)
    found["dead"] = 1 - found["evaluation/live_share"]
    return found


@torch.no_grad()
def correlations(transcoder: Transcoder, batches: list[ActivationBatch]) -> tuple[Any, Any]:
    """(r, support), each [d_sae, d_sae] float64 arrays: correlations of the final weights' codes, and tokens on which at least
    one of two latents fires, by one product over all tokens; nothing of the package but the codes."""
    import numpy as np
    from scipy.sparse import csr_matrix, vstack

    parts = []
    with at_inference(transcoder):
        for batch in batches:
            codes = transcoder.encode(batch.source)
            entries = (codes.values.double().numpy(), codes.indices.numpy(), codes.row_ptr.numpy())
            parts.append(csr_matrix(entries, shape=(len(batch), transcoder.config.d_sae)))
    z = vstack(parts)
    fires = (z > 0).astype(np.float64)
    together, mean = (fires.T @ fires).toarray(), np.asarray(z.mean(0)).ravel()
    covariance = (z.T @ z).toarray() / z.shape[0] - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    counts = np.diag(together)
    return covariance / np.outer(spread, spread) * np.outer(counts > 0, counts > 0), counts[:, None] + counts - together


def flags_on(transcoder: Transcoder, batches: list[ActivationBatch], folder: Path) -> dict[str, float]:
    """fresh/...: pairs above 0.8 on 100 tokens or more; of the last report the flags, the shares of them below 0.7 and 0.8, and
    the share of all pairs above 0.85 that it lists. Shares are left out where there is nothing to share."""
    import numpy as np

    r, support = correlations(transcoder, batches)
    upper = np.triu(support >= 100, 1)
    found = {"fresh/pairs": float((upper & (r > 0.8)).sum())}
    files = sorted((folder / "anti_duplication_logs").glob("correlation_step_*.json"))
    if files:
        listed = json.loads(files[-1].read_text(encoding="utf-8"))["pairs"]
        flagged = np.array([r[p["i"], p["j"]] for p in listed if p["flagged"] and support[p["i"], p["j"]] >= 100])
        high = set(zip(*(side.tolist() for side in np.nonzero(upper & (r > 0.85))), strict=True))
        found["fresh/flagged"] = float(len(flagged))
        if len(flagged):
            found |= {f"fresh/flagged_below_{name}": float((flagged < bound).mean()) for name, bound in BELOW.items()}
        if high:
            found["fresh/recall_085"] = len(high & {(p["i"], p["j"]) for p in listed}) / len(high)
    return found


def differences(found: dict[str, Any], figure: str) -> dict[str, dict[str, float | None]]:
    """variant -> paired difference from `mask` ("base" included)."""
    runs = found["runs"]
    return {
        name: interval([b[figure] - a[figure] for a, b in zip(runs["mask"], runs[name], strict=True)])
        for name in runs
        if name != "mask"
    }


def table(found: dict[str, Any]) -> str:
    """Markdown: means over seeds, and behind each the paired difference from `mask` with its 95 % interval."""
    runs = found["runs"]
    lines = ["| | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    for figure, label in FIGURES.items():
        if any(figure not in one for column in runs.values() for one in column):
            continue
        apart = differences(found, figure)
        cells = []
        for name, column in runs.items():
            cell = f"{statistics.fmean(one[figure] for one in column):.4g}"
            if name in apart:
                d = apart[name]
                span = "" if d["low"] is None else f" [{d['low']:+.3g}, {d['high']:+.3g}]"
                cell += f"<br>{d['mean']:+.3g}{span}"
            cells.append(cell)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_document(found: dict[str, Any], document: Path) -> None:
    """Replace what stands between the marks, and draw the plot that goes with it."""
    said = (
        f"{found['seeds']} seeds, {found['steps']} steps of 1024 tokens, k = {found['k']}; means over seeds, and below each "
        "the paired difference from `mask` with its 95 % interval (Student's t over seeds). All variants are measured on the "
        "same held-out non-sink tokens; sink-only latents fire on the sinks among these alone, which masked variants are given "
        "for this row only: they were not trained there, so theirs are latents that are dead elsewhere."
    )
    figure = document.with_name("anti-duplication.svg")
    draw(found, figure)
    picture = f"![Paired differences from mask]({figure.name})"
    replace_between(document, "bench.remedy_study", f"{said}\n\n{table(found)}\n\n{picture}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Paired differences with their intervals, one panel a figure."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "transcoder"
    from matplotlib import pyplot

    shown = ("heldout_duplicates/pairs", "heldout_duplicates/mergeable", "evaluation/fvu", "evaluation/ce_recovered")
    panels, axes = pyplot.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.8), sharey=True, layout="constrained")
    for axis, figure in zip(axes, shown, strict=True):
        apart = differences(found, figure)
        for row, d in enumerate(apart.values()):
            low, high = (d["mean"] if v is None else v for v in (d["low"], d["high"]))
            assert d["mean"] is not None
            assert low is not None
            assert high is not None
            axis.errorbar(
                d["mean"], row, xerr=[[d["mean"] - low], [high - d["mean"]]], fmt="o", color="#2b6cb0", capsize=3
            )
        axis.axvline(0, color="#888888", linewidth=1)
        axis.set_yticks(range(len(apart)), list(apart))
        axis.set_title(FIGURES[figure], fontsize=10)
        axis.margins(y=0.15)
        assert math.isfinite(axis.get_xlim()[1])
    panels.savefig(path, metadata={"Date": None})
    pyplot.close(panels)


if __name__ == "__main__":
    raise SystemExit(main())
