"""python -m bench.layer_set [--steps 150] [--rounds 3] [--peer sparsify] [--json FILE] [--document FILE]

Every layer of the shipped model: in one run, in a run for each layer, and by sparsify's own trainer in its environment. All
train on the same rows of token ids, with the same number of tokens, latents and k (TopK), without evaluation, page and
anti-duplication parts, which sparsify does not have; ours shuffle tokens, sparsify takes sequences as they come, and the MLP's
output before the norm behind it. A time is that of a whole process's training, the language model's loading included; memory is
the largest resident set of a process. The ways take turns, in the other order each round.

Checked first: each layer's weights have the same bits in one run and in a run of its own, and sparsify's are finite.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, results
from bench.document import replace_between
from bench.peers.__main__ import NoEnvironmentError, python_of
from bench.statistics import summary

LAYERS, LENGTH, BATCH = 4, 128, 1024
D_SAE, K = 2048, 16
WAYS = ("one run", "a run each", "sparsify")


def text_rows(count: int) -> list[list[int]]:
    """`count` rows of token ids of the standard library's text."""
    from transformers import AutoTokenizer

    from transcoder.demo import language_model_path
    from transcoder.demo.stdlib_text import iter_documents

    tokenizer = AutoTokenizer.from_pretrained(str(language_model_path()))
    rows: list[list[int]] = []
    rest: list[int] = []
    for document in iter_documents("train"):
        rest += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        while len(rest) >= LENGTH and len(rows) < count:
            rows.append(rest[:LENGTH])
            rest = rest[LENGTH:]
        if len(rows) == count:
            break
    return rows


def ours(layers: Sequence[int], data: Path, out: Path, steps: int) -> None:
    """A layer set, or a single run of one layer."""
    from transcoder import RunConfig, train_transcoder

    hooks: dict[str, Any] = {"activations.layers": list(layers)}
    if len(layers) == 1:
        (layer,) = layers
        hooks = {"activations.source_hook": f"blocks.{layer}.hook_resid_mid"}
        hooks["activations.target_hook"] = f"blocks.{layer}.hook_mlp_out"
    parts = ("regularizer", "positions", "monitor", "samples", "recycle")
    settings = {
        **hooks,
        "activations.dataset": str(data),
        "activations.tokens_column": "input_ids",
        "activations.sequence_length": LENGTH,
        "activations.heldout_fraction": 0.0,
        "activations.buffer_tokens": 8 * BATCH,
        # Found in the data of one layer or of all, it is the same; a fixed one spares both the search.
        "activations.mask_norm_multiple": 10.0,
        "transcoder.d_sae": D_SAE,
        "transcoder.k": K,
        "transcoder.activation": "topk",
        "transcoder.widths": None,
        "training.steps": steps,
        "training.batch_size": BATCH,
        "training.evaluation_every": 0,
        "training.evaluation_ce_tokens": 0,
        "training.similarity_tokens": 0,
        "checkpoint.every": steps,
        "logging.report": False,
        "logging.report_tokens": 0,
        "logging.progress": False,
        **{f"antidup.{part}.enabled": False for part in parts},
    }
    train_transcoder(RunConfig.load("demo", settings), out)


def sparsify(data: Path, out: Path) -> None:
    """sparsify's Trainer as its command runs it, on the MLPs of all layers."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModel

    from transcoder.demo import language_model_path

    rows = [json.loads(line)["input_ids"] for line in data.read_text().splitlines()]
    dataset = Dataset.from_dict({"input_ids": rows}).with_format("torch")
    config = TrainConfig(
        SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True),
        batch_size=BATCH // LENGTH,
        hookpoints=[f"layers.{layer}.mlp" for layer in range(LAYERS)],
        save_every=10**9,
        log_to_wandb=False,
        run_name="sparsify",
        save_dir=str(out),
    )
    trainer = Trainer(config, dataset, AutoModel.from_pretrained(str(language_model_path())))
    trainer.fit()
    if not all(bool(torch.isfinite(p).all()) for coder in trainer.saes.values() for p in coder.parameters()):
        raise RuntimeError("sparsify: weights are not finite")


def one(way: str, layer: int, data: Path, out: Path, steps: int) -> dict[str, float]:
    """In this process: seconds and bytes."""
    began = time.perf_counter()
    if way == "sparsify":
        sparsify(data, out)
    else:
        ours(range(LAYERS) if way == "one run" else [layer], data, out, steps)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def in_process(python: str, way: str, layer: int, data: Path, out: Path, steps: int) -> dict[str, float]:
    command = [python, "-m", "bench.layer_set", "--one", way, "--layer", str(layer), "--steps", str(steps)]
    # sparsify decodes eagerly on the CPU only where it is told to, if Triton is installed.
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--data", str(data), "--out", str(out)],
        cwd=machine.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{way}, layer {layer}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def taken(python: str, way: str, data: Path, out: Path, steps: int) -> dict[str, float]:
    """Seconds of a way in all, and the most bytes of one of its processes."""
    layers = range(LAYERS) if way == "a run each" else range(1)
    each = [in_process(python, way, layer, data, out / f"{way}-{layer}", steps) for layer in layers]
    return {"seconds": sum(one["seconds"] for one in each), "bytes": max(one["bytes"] for one in each)}


def differing(out: Path) -> Iterator[str]:
    """What differs in the weights of one run and of a run for each layer."""
    from transcoder.tensor_file import read_tensors

    for layer in range(LAYERS):
        pair = []
        for folder in (out / "one run-0" / "layers" / f"{layer:02}", out / f"a run each-{layer}"):
            newest = max((folder / "checkpoints").glob("step_*"))
            pair.append(dict(read_tensors(newest / "transcoder.safetensors")))
        yield from (f"layer {layer}: {name}" for name in pair[0] if not torch.equal(pair[0][name], pair[1][name]))


def measure(steps: int, rounds: int, peer: str | None) -> dict[str, Any]:
    pythons = {"one run": sys.executable, "a run each": sys.executable}
    if peer is not None:
        pythons[peer] = python_of(peer, None)
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in pythons}
    with tempfile.TemporaryDirectory(prefix="transcoder-bench-") as folder:
        data = Path(folder) / "rows.jsonl"
        rows = text_rows(steps * BATCH // LENGTH)
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        for turn in range(rounds):
            out = Path(folder) / str(turn)
            for way in pythons if turn % 2 == 0 else reversed(pythons):
                samples[way].append(taken(pythons[way], way, data, out, steps))
                print(f"round {turn + 1} of {rounds}, {way}: {samples[way][-1]['seconds']:.1f} s", flush=True)
            wrong = list(differing(out))
            if wrong:
                raise RuntimeError(f"one run and a run for each layer differ: {', '.join(wrong)}")
    base = [sample["seconds"] for sample in samples["one run"]]
    return {
        **results.about(),
        "steps": steps,
        "ways": {
            way: {
                "seconds": [sample["seconds"] for sample in found],
                "tokens_per_second": summary([steps * BATCH / sample["seconds"] for sample in found]),
                "bytes": max(sample["bytes"] for sample in found),
                "ratio": summary([sample["seconds"] / own for sample, own in zip(found, base, strict=True)]),
            }
            for way, found in samples.items()
        },
    }


def table(found: dict[str, Any]) -> list[str]:
    """A table in Markdown."""
    names = {"one run": "all layers in one run", "a run each": "a run for each layer", "sparsify": "sparsify's trainer"}
    lines = ["| way | tokens/s, all layers | time, of one run | memory |", "| --- | ---: | ---: | ---: |"]
    for way, row in found["ways"].items():
        speed, ratio = row["tokens_per_second"]["median"], row["ratio"]
        spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(f"| {names[way]} | {speed:,.0f} | {spread} | {row['bytes'] / 1e9:.2f} GB |")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layer_set", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH} tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peer", choices=["sparsify"], help="measured too; its environment is made where it is missing"
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--document", type=Path, help="write the table into this document, between its marks")
    for name in ("--one", "--data", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.one:
        found = one(options.one, options.layer, Path(options.data), Path(options.out), options.steps)
        print(json.dumps(found))
        return 0
    try:
        measured = measure(options.steps, options.rounds, options.peer)
    except NoEnvironmentError as error:
        print(f"bench.layer_set: no environment for {options.peer}: {error}", file=sys.stderr)
        return 1
    lines = table(measured)
    print("\n".join(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if options.document is not None:
        replace_between(options.document, "bench.layer_set", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
