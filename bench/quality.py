"""python -m bench.quality --cache FOLDER [--libraries ours,saelens] [--seeds 3] [--steps 300] [--document docs/quality.md]

Our training against that of SAELens, dictionary_learning and sparsify on the same rows: same order, steps, k and width, each
library in an environment of its own (tests/interop/environment.py), with its own trainer and defaults. All autoencode: SAELens
and dictionary_learning cannot train a transcoder. Each learns at every learning rate of a grid of factors 2, which grows until
its best one is inside; then the other seeds run at the rates within 4 times of the best.

The rows are the cache's non-sink tokens, centred and scaled to mean square 1 for all, held-out ones by document. FVU and L0 are
of held-out rows with the selection of training (BatchTopK over batches of the training's size), so that L0 is k for all; a
latent is dead that fires on none of them. Finished runs are kept in --out, one JSON file each, so a stopped command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import machine
from bench.document import replace_between
from bench.peers.__main__ import NoEnvironmentError, python_of

WIDTHS = (0.125, 0.375, 0.875, 1.0)
"""Matryoshka widths as shares of d_sae."""
KINDS = {
    "ours": ("matryoshka", "topk"),
    "saelens": ("matryoshka", "topk"),
    "dictionary-learning": ("matryoshka", "topk"),
    "sparsify": ("topk",),
}
GRID = (1e-3, 2e-3, 4e-3, 8e-3)
LIMITS = (6e-5, 0.3)
HELDOUT_TOKENS = 16_384


@dataclass(frozen=True)
class Task:
    library: str
    kind: str
    lr: float | None
    """None takes the library's default."""
    seed: int
    steps: int
    batch: int
    d_sae: int
    k: int

    @property
    def file(self) -> str:
        rate = "default" if self.lr is None else f"{self.lr:.4g}"
        return f"{self.library}-{self.kind}-{self.d_sae}-{self.steps}x{self.batch}-{rate}-{self.seed}.json"

    @property
    def widths(self) -> list[int]:
        return [int(share * self.d_sae) for share in WIDTHS]


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A batch -> (its reconstruction, [d_sae] which latents fire)."""


def ours(task: Task, batches: Iterator[Tensor]) -> tuple[Encode, float]:
    from transcoder import ActivationBatch, RunConfig
    from transcoder.antidup.ledger import REQUIRED_EFFECTS
    from transcoder.training.layer_trainer import LayerTrainer
    from transcoder.training.nonfinite import StepLedger
    from transcoder.training.schedule import length_defaults
    from transcoder.training.sources import BatchSource

    parts = ("regularizer", "positions", "monitor", "samples", "recycle")
    nested = task.kind == "matryoshka"
    config = RunConfig.from_dict(
        {
            "transcoder": {
                "d_sae": task.d_sae,
                "k": task.k,
                "activation": "batch_topk" if nested else "topk",
                "widths": task.widths if nested else None,
                "normalize": "none",
            },
            "training": {"steps": task.steps, "batch_size": task.batch, "lr": task.lr, "seed": task.seed},
            "antidup": {part: {"enabled": False} for part in parts},
        }
    )
    config = config.replace(length_defaults(config))
    x = next(batches)
    width = x.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        ledger = StepLedger(dict.fromkeys(REQUIRED_EFFECTS, False), Path(folder) / "usage.json")
        trainer = LayerTrainer(config, width, width, torch.device("cpu"), ledger, None, (), Path(folder))
        nothing = torch.zeros(task.batch, dtype=torch.int64)
        first = [ActivationBatch(x, x, nothing, nothing)]
        trainer.fit_normalization(cast(BatchSource, SimpleNamespace(look_ahead=lambda tokens: first)))
        for step in range(task.steps):
            trainer.step(step, [ActivationBatch(x, x, nothing, nothing)])
            if (step + 1) % config.training.dead_refresh_steps == 0:
                trainer.transcoder.refresh_dead()
            x = next(batches)
    model = trainer.transcoder

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = model.encode(rows)  # in training mode: BatchTopK over the batch
        return model.decode(codes), codes.to_dense().gt(0).any(0)

    return encode, trainer.peak


def saelens(task: Task, batches: Iterator[Tensor]) -> tuple[Encode, float]:
    from sae_lens import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = next(batches)
    shared: dict[str, Any] = {"d_in": x.shape[1], "d_sae": task.d_sae, "k": task.k, "device": "cpu"}
    if task.kind == "matryoshka":
        sae: Any = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**shared, matryoshka_widths=task.widths)
        )
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared))
    lr = SAETrainerConfig.lr if task.lr is None else task.lr
    # lr_end is what its runner fills in; the default schedule, constant, does not use it.
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=lr,
        lr_end=lr / 10,
        device="cpu",
    )
    SAETrainer(config, sae, batches).fit()

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes, _ = sae.encode_with_hidden_pre(rows)
        codes = codes.to_dense() if codes.is_sparse else codes
        return sae.decode(codes), codes.gt(0).any(0)

    return encode, lr


def dictionary_learning(task: Task, batches: Iterator[Tensor]) -> tuple[Encode, float]:
    from bench.peers.dictionary_learning import missing

    missing()  # hides a broken torchvision
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    x = next(batches)
    shared: dict[str, Any] = {
        "steps": task.steps,
        "activation_dim": x.shape[1],
        "dict_size": task.d_sae,
        "k": task.k,
        "layer": 0,
        "lm_name": "none",
        "lr": task.lr,
        "seed": task.seed,
        "device": "cpu",
        # The library's 1000 steps are refused in a shorter run; thresholds play no part here.
        "warmup_steps": min(1000, task.steps // 10),
    }
    if task.kind == "matryoshka":
        shares = [b - a for a, b in zip((0.0, *WIDTHS), WIDTHS, strict=False)]
        trainer: Any = MatryoshkaBatchTopKTrainer(**shared, group_fractions=shares)
    else:
        trainer = TopKTrainer(**shared)
    for step in range(task.steps):
        trainer.update(step, x)
        x = next(batches)

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = trainer.ae.encode(rows, use_threshold=False)
        return trainer.ae.decode(codes), codes.gt(0).any(0)

    return encode, trainer.lr


def sparsify(task: Task, batches: Iterator[Tensor]) -> tuple[Encode, float]:
    """Its trainer wants a language model and its tokens; this is that trainer's loop, with its default optimizer."""
    from bench.peers.sparsify import missing

    missing()
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    x = next(batches)
    coder = SparseCoder(
        x.shape[1], SparseCoderConfig(num_latents=task.d_sae, k=task.k), device="cpu", dtype=torch.float32
    )
    lr = task.lr or 5e-3 / (task.d_sae / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD([{"params": coder.parameters(), "lr": lr}]), momentum=0.95)
    optimizer.train()
    for step in range(task.steps):
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        x = next(batches)
    optimizer.eval()

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = coder.encode(rows)
        fires = torch.zeros(task.d_sae, dtype=torch.bool)
        fires[indices[values > 0]] = True
        return coder.decode(values, indices), fires

    return encode, lr


LEARNERS = {"ours": ours, "saelens": saelens, "dictionary-learning": dictionary_learning, "sparsify": sparsify}


def batches_of(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for part in order.split(size):
            if len(part) == size:
                yield rows[part]


def learned(task: Task, rows: dict[str, Tensor]) -> dict[str, Any]:
    """Train and measure one."""
    torch.manual_seed(task.seed)
    start = time.process_time()
    encode, lr = LEARNERS[task.library](task, batches_of(rows["train"], task.batch, task.seed))
    seconds = time.process_time() - start
    heldout = rows["heldout"]
    error, fires = 0.0, torch.zeros(task.d_sae, dtype=torch.bool)
    whole = [part for part in heldout.split(task.batch) if len(part) == task.batch]
    with torch.no_grad():
        for part in whole:
            guess, fired = encode(part)
            error += float((guess - part).double().square().sum())
            fires |= fired
        seen = torch.cat(whole).double()
        fvu = error / float((seen - seen.mean(0)).square().sum())
    dead = 1 - float(fires.double().mean())
    return {**asdict(task), "used_lr": lr, "fvu": fvu, "dead": dead, "seconds": seconds}


def one(task: Task, rows: dict[str, Tensor], out: Path) -> dict[str, Any]:
    done = out / task.file
    if not done.is_file():
        done.write_text(json.dumps(learned(task, rows)) + "\n", encoding="utf-8")
        print(done.read_text(encoding="utf-8"), end="", flush=True)
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def at_rates(first: Task, rates: list[float], rows: dict[str, Tensor], out: Path, seeds: int) -> None:
    """All seeds at these rates and at the default."""
    for seed in range(seeds):
        for lr in (*rates, None):
            one(replace(first, lr=lr, seed=seed), rows, out)


def searched(first: Task, rows: dict[str, Tensor], out: Path, seeds: int) -> None:
    """Seed 0 over the grid and beyond it until the best rate is inside and the rates up to a factor 4 away have run; then
    the other seeds at the rates within 4 times of it, and at the default."""
    fvu = {lr: one(replace(first, lr=lr), rows, out)["fvu"] for lr in GRID}
    one(first, rows, out)
    while True:
        best = min(fvu, key=lambda lr: fvu[lr])
        near = [best * factor for factor in (0.25, 0.5, 1, 2, 4) if LIMITS[0] < best * factor < LIMITS[1]]
        missing = [lr for lr in near if lr not in fvu]
        if not missing:
            break
        fvu |= {lr: one(replace(first, lr=lr), rows, out)["fvu"] for lr in missing}
    for seed in range(1, seeds):
        for lr in (best, None, *(lr for lr in near if lr != best)):
            one(replace(first, lr=lr, seed=seed), rows, out)


def make_rows(cache: Path, file: Path) -> None:
    """Write the non-sink tokens of the cache: train [T, d] and heldout [H, d]."""
    from transcoder import RunConfig
    from transcoder.activations import build_stream

    config = RunConfig.from_dict(
        {
            "activations": {"kind": "cached", "cached_path": str(cache), "heldout_fraction": 0.06, "prefetch": 0},
            "training": {"batch_size": 1024},
        }
    )
    stream = build_stream(config, torch.device("cpu"))
    heldout = torch.cat([batch.source for batch in stream.heldout(HELDOUT_TOKENS)]).float()
    tokens = int(json.loads((cache / "index.json").read_text(encoding="utf-8"))["tokens"])
    train = torch.cat([next(stream).source for _ in range(int(tokens * 0.88) // 1024)]).float()
    mean = train.mean(0)
    scale = (train - mean).square().mean().rsqrt()
    save_file({"train": (train - mean) * scale, "heldout": (heldout - mean) * scale}, file)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row a library and kind, a column a learning rate; FVU, and under it the share of dead latents."""
    lines = []
    for kind in ("matryoshka", "topk"):
        mine = [r for r in found if r["kind"] == kind]
        rates = sorted({r["lr"] for r in mine if r["lr"] is not None})
        named = {"matryoshka": "Matryoshka BatchTopK", "topk": "TopK"}[kind]
        lines += ["", f"| {named} | " + " | ".join(f"{lr:.3g}" for lr in rates) + " | its default |"]
        lines.append("| --- |" + " ---: |" * (len(rates) + 1))
        for library in KINDS:
            runs = [r for r in mine if r["library"] == library]
            if not runs:
                continue
            by_rate = {lr: [r for r in runs if r["lr"] == lr] for lr in [*rates, None]}
            best = min(
                (lr for lr in rates if by_rate[lr]), key=lambda lr: statistics.fmean(r["fvu"] for r in by_rate[lr])
            )
            cells = [_cell(by_rate[lr], lr == best) for lr in [*rates, None]]
            lines.append(f"| {library} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def _cell(runs: list[dict[str, Any]], best: bool) -> str:
    if not runs:
        return ""
    values = [r["fvu"] for r in runs]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    fvu = f"{statistics.fmean(values):.4f}{spread}"
    rate = f" (lr {runs[0]['used_lr']:.2g})" if runs[0]["lr"] is None else ""
    dead = statistics.fmean(r["dead"] for r in runs)
    return f"{f'**{fvu}**' if best else fvu}<br>{dead:.1%} dead{rate}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--cache", type=Path, help="activation shards; needed until --out has rows.safetensors")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--libraries", default=",".join(KINDS))
    parser.add_argument("--kinds", default="matryoshka,topk")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", help="learning rates, with commas, in place of the search for the best")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--into", type=Path, help="folder of the environments (default: .interop/ of the checkout)")
    parser.add_argument("--document", type=Path, help="write the table into this document")
    parser.add_argument("--here", action="store_true", help="in this interpreter, which has the libraries")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.safetensors"
    if not file.is_file():
        if options.cache is None:
            parser.error(f"--cache: needed, since {file} is not there")
        make_rows(options.cache, file)
    chosen, kinds = options.libraries.split(","), options.kinds.split(",")
    code = 0
    for library in chosen:
        if not options.here and library != "ours":
            code |= _there(options, library)
            continue
        rows = load_file(file)
        for kind in [kind for kind in KINDS[library] if kind in kinds]:
            first = Task(library, kind, None, 0, options.steps, options.batch, options.d_sae, options.k)
            if options.rates is None:
                searched(first, rows, options.out, options.seeds)
            else:
                at_rates(first, [float(rate) for rate in options.rates.split(",")], rows, options.out, options.seeds)
    if not options.here:
        same = (options.steps, options.batch, options.d_sae, options.k)
        every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("*.json"))]
        found = [r for r in every if (r["steps"], r["batch"], r["d_sae"], r["k"]) == same]
        said = (
            f"{options.steps} steps of {options.batch} tokens, d_sae {options.d_sae}, k {options.k}; means over seeds with "
            "their standard deviation (one seed where there is none); the best rate of each in bold."
        )
        print(table(found))
        if options.document is not None:
            replace_between(options.document, "bench.quality", f"{said}\n\n{table(found)}")
    return code


def _there(options: argparse.Namespace, library: str) -> int:
    try:
        python = python_of(library, options.into)
    except NoEnvironmentError as error:
        print(f"bench.quality: no environment for {library}: {error}", file=sys.stderr)
        return 1
    given = {name: getattr(options, name) for name in ("out", "kinds", "seeds", "steps", "batch", "d_sae", "k")} | {
        "out": options.out.resolve(),
        "libraries": library,
    }
    command = [python, "-m", "bench.quality", "--here"]
    command += [] if options.rates is None else ["--rates", options.rates]
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    # sparsify decodes eagerly on the CPU only where it is told to, if Triton is installed.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
    return subprocess.run(command, cwd=machine.ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
