"""A run folder as a trainer would leave it: every file, plausible curves, contexts from real source code."""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter
from transcoder.training.heldout_pairs import report_metrics

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!-- <script>",
    "\u2028\u2029",
    '"><b onmouseover=alert(3)>',
    "&lt;i&gt;",
    "]]>",
    "\x00\x07",
]
WIDTHS = (64, 192, 448, 512)
LENGTH = 128

MakeRun = Callable[..., Path]

RANDOM_COSINES = {"median": 0.1, "p99": 0.14, "p999": 0.16}


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """`make_run(steps=..., interrupted=..., hostile=..., seed=...) -> Path` of a new run folder."""

    def make(**options: Any) -> Path:
        return synthetic_run(tmp_path_factory.mktemp("run") / "synthetic", **options)

    return make


@pytest.fixture(scope="session")
def finished_run(make_run: MakeRun) -> Path:
    """One finished run that tests only read (a report may be written into it)."""
    return make_run(hostile=True)


def synthetic_run(
    path: Path,
    *,
    steps: int = 600,
    interrupted: bool = False,
    hostile: bool = False,
    seed: int = 0,
    latents: int = 60,
    overrides: dict[str, Any] | None = None,
) -> Path:
    config = RunConfig(name=path.name).replace(
        {
            "transcoder.d_sae": WIDTHS[-1],
            "transcoder.widths": list(WIDTHS),
            "training.steps": steps,
            "training.seed": seed,
            "training.evaluation_every": 100,
            "activations.sequence_length": LENGTH,
            **(overrides or {}),
        }
    )
    draw = random.Random(seed)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml())
    done = int(steps * 0.45) if interrupted else steps
    final = _metrics(path, config, done, draw)
    pairs = _correlation(path, done, draw)
    _samples(path, done, draw, latents, pairs, hostile)
    _usage(path, done)
    if not interrupted:
        final |= _heldout(path, done)
        summary = {
            "name": config.name,
            "step": done,
            "finished": True,
            "interrupted_by": None,
            "tokens": done * config.training.batch_size,
            "d_in": 128,
            "d_out": 128,
            **final,
            "data": {"documents": 812.0, "masked_by_id": 4810.0},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def _metrics(path: Path, config: RunConfig, done: int, draw: random.Random) -> dict[str, float]:
    every = config.logging.every
    final: dict[str, float] = {}
    with MetricsWriter(path, config) as writer:
        for step in range(every, done + 1, every):
            rest = math.exp(-step / 110)
            fvu = 0.21 + 0.75 * rest + draw.gauss(0, 0.008)
            prefixes = {w: min(1.0, fvu + 0.09 * (len(WIDTHS) - 1 - i)) for i, w in enumerate(WIDTHS)}
            row = {
                "losses/mse_loss": fvu,
                "losses/auxiliary_reconstruction_loss": 0.03 * rest + 0.002,
                "losses/diversity_penalty": 0.004 * rest + 0.0004,
                "metrics/fvu": fvu,
                "metrics/explained_variance": 1 - fvu,
                "metrics/l0": 16 + draw.gauss(0, 0.02),
                "metrics/topk_threshold": 0.4 * (1 - rest),
                "metrics/tokens_per_second": 9400 + draw.gauss(0, 350) - (4000 if step == every else 0),
                "sparsity/dead_share": 0.18 * rest + 0.004,
                "sparsity/dead_features": round((0.18 * rest + 0.004) * WIDTHS[-1]),
                "details/n_training_samples": step * config.training.batch_size,
                "details/learning_rate": 2e-4 * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / 600)),
                "details/gradient_norm": 0.3 + rest + abs(draw.gauss(0, 0.05)),
                "data/documents": float(step),
                "data/sink_norm_ratio": 41.5,
                "regularizer/correlation_value": 0.002 * rest,
                **{f"metrics/fvu_prefix_{w}": v for w, v in prefixes.items()},
                **{f"losses/inner_mse_loss_{w}": v for w, v in prefixes.items()},
            }
            row["losses/overall_loss"] = sum(prefixes.values()) / 4 + row["losses/diversity_penalty"]
            if step % 100 == 0:
                row.update(_duplicates(step))
                evaluation = {
                    "evaluation/fvu": fvu + 0.01,
                    "evaluation/baseline_mean_fvu": 1.0,
                    "evaluation/baseline_linear_fvu": 0.41,
                    "evaluation/sink_fvu": 0.97,
                    **{f"evaluation/fvu_prefix_{w}": v + 0.01 for w, v in prefixes.items()},
                }
                row.update(evaluation)
                final.update(evaluation)
                final.update(_duplicates(step))
            if step == 40:
                row["details/gradient_norm"] = math.inf
            writer.write(step, row)
        writer.write_event("checkpoint", {"step": done, "folder": f"checkpoints/step_{done:08d}"})
    return final


def _duplicates(step: int) -> dict[str, float]:
    pairs = round(31 * math.exp(-step / 300))
    return {
        "duplicates/pairs": pairs,
        "duplicates/flagged": pairs // 4,
        "duplicates/share_of_live": 2 * pairs / WIDTHS[-1],
        "duplicates/effective_dictionary_size": 430 + step / 10,
    }


def _correlation(path: Path, done: int, draw: random.Random) -> list[tuple[int, int]]:
    folder = path / "anti_duplication_logs"
    folder.mkdir()
    pairs: list[tuple[int, int]] = []
    for step in range(100, done + 1, 100):
        found = round(31 * math.exp(-step / 300))
        pairs = [(3 + 7 * n, 5 + 7 * n) for n in range(found)]
        rows = []
        for n, (i, j) in enumerate(pairs):
            r = 0.985 - 0.17 * n / max(found, 1)
            rows.append(
                {
                    "i": i,
                    "j": j,
                    "correlation": r,
                    "cosine": r - 0.01,
                    "jaccard": r - 0.2,
                    "support": 150 + draw.randrange(2000),
                    "sequences": 40 + draw.randrange(200) if n % 5 else None,
                    "lower": r - 0.03,
                    "upper": min(1.0, r + 0.02),
                    "bounds": "jackknife" if n % 2 else "rule",
                    "blocks_above": 4 if n < found // 4 else 1,
                    "flagged": n < found // 4,
                    "mergeable": (None, True, False)[n % 3],
                    "merge_share": (None, 0.04, 0.31)[n % 3],
                    "merge_fvu_change": (None, 2e-5, 4e-4)[n % 3],
                }
            )
        report = {
            "schema_version": 5,
            "step": step,
            "tokens": step * 1024,
            "block_tokens": 102400,
            "d_sae": WIDTHS[-1],
            "live_latents": 505,
            "thresholds": {"correlation": 0.8, "release": 0.7, "min_support": 100, "min_sequences": 30},
            "pairs": rows,
            "pairs_total": len(rows),
            "pairs_flagged": sum(p["flagged"] for p in rows),
            "pairs_mergeable": sum(p["mergeable"] is True for p in rows),
            "pairs_refused": sum(p["mergeable"] is False for p in rows),
            "pairs_untested": sum(p["mergeable"] is None for p in rows),
            "components": [[i, j] for (i, j) in pairs[: found // 4]],
            "candidate_components": [[i, j] for (i, j) in pairs],
            "distinct_latents": 505 - found // 4,
            "distinct_latents_candidates": 505 - found,
            "share_of_live_with_neighbour": 2 * found / 505,
            "effective_dictionary_size": 430 + step / 10,
            "decoder_cosine": {"median": 0.11, "p99": 0.31, "p999": 0.52, "random": RANDOM_COSINES},
            "encoder_cosine": {"median": 0.12, "p99": 0.33, "p999": 0.55, "random": RANDOM_COSINES},
            "histogram": {
                "edges": [round(-0.2 + 0.1 * b, 1) for b in range(13)],
                "counts": [40, 5200, 98000, 21000, 2600, 700, 210, 90, 35, 20, found, found // 4],
            },
        }
        (folder / f"correlation_step_{step:08d}.json").write_text(json.dumps(report))
    return pairs


def _heldout(path: Path, done: int) -> dict[str, float]:
    """heldout_duplicates.json with the pairs of the newest correlation report, and its metrics."""
    report = json.loads(max(path.glob("anti_duplication_logs/correlation_step_*.json")).read_text())
    kept = ("i", "j", "correlation", "lower", "upper", "cosine", "jaccard", "support", "sequences", "merge_share")
    pairs = [{name: pair[name] for name in (*kept, "merge_fvu_change")} for pair in report["pairs"]]
    for n, pair in enumerate(pairs):
        pair["decoder_cosine"] = 0.97 if n % 2 else 0.1
        pair["merge_share_error"] = None if pair["merge_share"] is None else 0.01
        pair["verdict"] = ("undecided", "duplicate", "correlated")[n % 3]
        pair["kind"] = ("twin" if n % 2 else "split") if n % 3 == 1 else None
    said = [pair["verdict"] for pair in pairs] + [pair["kind"] for pair in pairs]
    verdicts = {name: said.count(name) for name in ("duplicate", "twin", "split", "correlated", "undecided")}
    groups = [[pair["i"], pair["j"]] for pair in pairs if pair["verdict"] == "duplicate"]
    same = ("d_sae", "live_latents", "thresholds", "pairs_total", "candidate_components", "histogram")
    cosines = ("share_of_live_with_neighbour", "effective_dictionary_size", "decoder_cosine", "encoder_cosine")
    found = {
        "schema_version": 1,
        "step": done,
        "tokens": 65536,
        **{name: report[name] for name in (*same, *cosines)},
        "pairs": pairs,
        "verdicts": verdicts,
        "components": groups,
        "distinct_latents": 505 - len(groups),
        "duplicate_share_of_live": 2 * len(groups) / 505,
        "share_judged": 0.9,
    }
    (path / "heldout_duplicates.json").write_text(json.dumps(found))
    return report_metrics(found)


def _samples(
    path: Path, done: int, draw: random.Random, latents: int, pairs: list[tuple[int, int]], hostile: bool
) -> None:
    words = re.findall(r"\n *|\s?\w+|\s?[^\w\s]", inspect.getsource(textwrap) + inspect.getsource(json))
    followed = sorted({*(x for pair in pairs for x in pair), *draw.sample(range(WIDTHS[-1]), latents)})
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    partner = {j: i for i, j in pairs}
    for latent in followed:
        # A latent of a pair fires where the other one does: the same places, as real duplicates have.
        place = random.Random(1000 + partner.get(latent, latent))
        peak = place.uniform(1, 6)
        locked = latent % 17 == 0
        centre = place.randrange(len(words) - LENGTH)
        for n in range(16):
            top = n < 8
            at = centre + place.randrange(-30, 30) if n % 3 else place.randrange(len(words) - LENGTH)
            at = max(20, min(len(words) - 10, at))
            context = words[at - 14 : at + 6]
            ids = [hash_id(w) for w in context]
            if hostile and latent == followed[0] and n < len(HOSTILE):
                context = [*context[:14], HOSTILE[n], *context[15:]]
            if n == 5:
                ids[:3], context[:3] = [-1, -1, -1], ["", "", ""]
            rows["latent"].append(latent)
            rows["kind"].append("top" if top else "stratified")
            rows["activation"].append(peak * (1 - 0.05 * n) if top else peak * place.uniform(0.05, 0.7))
            rows["token"].append(ids[14])
            rows["position"].append(3 if locked and top else (at * 7) % LENGTH)
            rows["sequence"].append(at // LENGTH)
            rows["step"].append(done)
            rows["context"].append(ids)
            rows["anchor"].append(14)
            rows["tokens"].append(context)
            fires = [math.nan if i < 0 else 0.0 for i in ids]
            fires[12], fires[14] = rows["activation"][-1] / 4, rows["activation"][-1]
            rows["activations"].append(fires)
    folder = path / "activation_samples"
    folder.mkdir()
    pq.write_table(pa.table(rows, schema=SCHEMA), folder / "samples.parquet")
    bins = [sum(1 for p in rows["position"] if p * 10 // LENGTH == b) for b in range(10)]
    summary = {
        "schema_version": 1,
        "step": done,
        "latents_followed": WIDTHS[-1],
        "latents_with_samples": len(followed),
        "samples_kept": len(rows["latent"]),
        "position_bins": bins,
        "sink_fraction": 0.013,
        "file": "samples.parquet",
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_latents(path: Path, fired: list[int], tokens: int) -> None:
    """latents.parquet of a run whose latents fired so often."""
    count = len(fired)
    lists = {name: pa.array([["<b>up</b>"]] * count, pa.list_(pa.string())) for name in ("promoted", "suppressed")}
    columns = {
        "latent": pa.array(range(count), pa.int32()),
        "tokens_fired": pa.array(fired, pa.int64()),
        "max_activation": pa.array([0.5 * (n > 0) for n in fired], pa.float32()),
        "histogram": pa.array([[n] + [0] * 19 for n in fired], pa.list_(pa.int32())),
        "quantiles": pa.array([[0.1, 0.2, 0.3, 0.4]] * count, pa.list_(pa.float32())),
        **lists,
        **{f"{name}_logits": pa.array([[1.5]] * count, pa.list_(pa.float32())) for name in lists},
    }
    about = {b"transcoder": json.dumps({"tokens": tokens, "why": {"something": "a reason"}}).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path / "latents.parquet")


def hash_id(word: str) -> int:
    return sum(ord(c) * 31**n for n, c in enumerate(word)) % 4000


def _usage(path: Path, done: int) -> None:
    (path / "anti_duplication_logs" / "regularizer.jsonl").write_text('{"step": 100}\n')
    files = sorted(str(p.relative_to(path)) for p in (path / "anti_duplication_logs").glob("corr*"))
    components = {
        "diversity_regularizer": {
            "enabled": True,
            "calls": done,
            "effect": {
                "penalty": 0.00041,
                "gradient_norm": 0.0123,
                "correlation_evaluations": done,
                "correlation_pairs": 12 * done,
                "orthogonality_evaluations": done // 10,
                "orthogonality_rows": 1024 * (done // 10),
                "surveys": 9,
            },
            "files": ["anti_duplication_logs/regularizer.jsonl"],
        },
        "position_sampler": {
            "enabled": True,
            "calls": done // 3,
            "effect": {"positions_resampled": 0},
            "files": ["anti_duplication_logs/positions.json"],
        },
        "correlation_monitor": {
            "enabled": True,
            "calls": done,
            "effect": {"pairs_seen": 130816},
            "files": files,
        },
        "activation_samples": {"enabled": False, "calls": 0, "effect": {}, "files": []},
    }
    (path / "usage.json").write_text(json.dumps({"components": components}))


SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("activation", pa.float32()),
        ("token", pa.int32()),
        ("position", pa.int32()),
        ("sequence", pa.int64()),
        ("step", pa.int32()),
        ("context", pa.list_(pa.int32())),
        ("anchor", pa.int16()),
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
    ]
)
