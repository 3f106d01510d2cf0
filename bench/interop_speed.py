"""Full training steps of the peer libraries, their own against accelerated: run it in a library's environment.

    $(python tests/interop/environment.py saelens) bench/interop_speed.py
    $(python tests/interop/environment.py sparsify) bench/interop_speed.py --batch 256 --d 64 --latents 512 --k 16
    $(python tests/interop/environment.py sparsify) bench/interop_speed.py --sweep   # every size; the worst ratio at the end

A step is what the library's trainer does: forward and loss, its own bookkeeping of fired latents, backward, gradient clipping,
its Adam. Both sides run in turn in one process on the same inputs; a step's losses are compared before anything is timed. On a
machine with other work: `--processor`, which counts the processor's time of one thread instead of the clock's.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import transcoder
from transcoder.interop.accelerate.dispatch import FEWEST_ROWS, OWN_CODE_BELOW

Step = Callable[[torch.Tensor], float]


def saelens(kind: str, d: int, latents: int, k: int, quick: bool, always: bool = False) -> Step:
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(0)
    extra = {"matryoshka_widths": [latents // 16, latents // 4, latents // 2, latents]} if "Matryoshka" in kind else {}
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(
        getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=d, d_sae=latents, k=k, **extra)
    )
    if quick:
        transcoder.accelerate(sae, always=always)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    since, counts = torch.zeros(latents), torch.zeros(latents)

    def step(x: torch.Tensor) -> float:
        # SAETrainer._train_step, without its scheduler.
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=since > 1000, n_training_steps=0, is_logging_step=False
            )
        )
        with torch.no_grad():
            fired = out.feature_acts.bool().float()
            did_fire = fired.sum(-2).bool()
            since.add_(1)
            since[did_fire] = 0
            counts.add_(fired.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss)

    return step


def sparsify(kind: str, d: int, latents: int, k: int, quick: bool, always: bool = False) -> Step:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder has no CPU side
    import sparsify as library

    torch.manual_seed(0)
    coder = library.SparseCoder(d, library.SparseCoderConfig(num_latents=latents, k=k))
    if quick:
        transcoder.accelerate(coder, always=always)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
    fired = torch.zeros(latents, dtype=torch.bool)

    def step(x: torch.Tensor) -> float:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, x, dead_mask=torch.zeros(latents, dtype=torch.bool))
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return float(out.fvu)

    return step


def dictionary_learning(kind: str, d: int, latents: int, k: int, quick: bool, always: bool = False) -> Step:
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    classes = {
        "TopK": top_k.TopKTrainer,
        "BatchTopK": batch_top_k.BatchTopKTrainer,
        "MatryoshkaBatchTopK": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
    }
    extra = {"group_fractions": [1 / 16, 3 / 16, 1 / 4, 1 / 2]} if "Matryoshka" in kind else {}
    trainer: Any = classes[kind](
        steps=10**6,
        activation_dim=d,
        dict_size=latents,
        k=k,
        layer=0,
        lm_name="none",
        lr=1e-4,
        seed=0,
        device="cpu",
        **extra,
    )
    if quick:
        transcoder.accelerate(trainer.ae, always=always)
    return lambda x: float(trainer.update(1001, x))


LIBRARIES: dict[str, tuple[str, Callable[..., Step], tuple[str, ...]]] = {
    "sae_lens": ("SAELens", saelens, ("TopK", "BatchTopK", "MatryoshkaBatchTopK")),
    "sparsify": ("sparsify", sparsify, ("SparseCoder",)),
    "dictionary_learning": ("dictionary_learning", dictionary_learning, ("TopK", "BatchTopK", "MatryoshkaBatchTopK")),
}


def inputs(rows: int, d: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(rows, d, generator=generator)


def measure(
    make: Callable[..., Step], kind: str, size: tuple[int, int, int, int], given: argparse.Namespace, seconds: float
) -> dict[str, float]:
    """Medians in milliseconds of both sides, in turn; the ratio is the median of the turns' own."""
    rows, d, latents, k = size
    theirs, ours = (make(kind, d, latents, k, quick, given.always) for quick in (False, True))
    clock = time.process_time if given.processor else time.perf_counter
    source = inputs(rows, d)
    for _ in range(2):
        x = next(source)
        left, right = theirs(copy.copy(x)), ours(copy.copy(x))
        if abs(left - right) > 1e-3 * abs(left):
            raise SystemExit(f"{kind}: losses differ before anything is timed: {left} and {right}")
    took: dict[str, list[float]] = {"theirs": [], "ours": []}
    turns = [("theirs", theirs), ("ours", ours)]
    began_all = time.perf_counter()
    # Small steps are repeated for a while: a median of nine of them is too noisy on a busy machine.
    while len(took["ours"]) < given.repeats or (time.perf_counter() - began_all < seconds and len(took["ours"]) < 400):
        x = next(source)
        turns.reverse()
        for name, step in turns:
            began = clock()
            step(x)
            took[name].append(1e3 * (clock() - began))
    found = {name: statistics.median(values) for name, values in took.items()}
    ratio = statistics.median(a / b for a, b in zip(took["theirs"], took["ours"], strict=True))
    return {**found, "ratio": ratio, "turns": len(took["ours"])}


def sizes(given: argparse.Namespace) -> list[tuple[int, int, int, int]]:
    """(batch, d, latents, k) to measure."""
    if not given.sweep:
        return [(given.batch, given.d, given.latents, given.k)]
    return [
        (batch, d, latents, min(given.k, latents // 16))
        for d in (64, given.d)
        for batch in (32, 64, 128, 512, 1024)
        for latents in (128, 256, 512, 2048, 8192)
    ]


def worst(rows: list[dict[str, Any]]) -> str:
    """One line for the sizes that our kernels ran and one for those left to the library's own code."""
    lines = []
    for name, which in (("on our kernels", "ours"), ("left to the library's own code", "own")):
        found = sorted((row for row in rows if row["path"] == which), key=lambda row: row["ratio"])
        if found:
            low = found[0]
            lines.append(
                f"{name}: {len(found)} sizes, worst {low['ratio']:.2f}x ({low['class']}, B {low['batch']}, d {low['d']}, "
                f"N {low['latents']}), median {found[len(found) // 2]['ratio']:.2f}x"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="full steps of a peer library, its own against accelerated")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kind", help="one class only")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="batches of 32 to 1024, 128 to 8192 latents, d 64 and --d; ends with the worst",
    )
    parser.add_argument("--processor", action="store_true", help="the processor's time of one thread, not the clock's")
    parser.add_argument(
        "--always", action="store_true", help="our kernels for batches too that are left to the library"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.processor:
        torch.set_num_threads(1)
    rows = []
    for module, (name, make, kinds) in LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            continue
        for kind in kinds:
            if given.kind not in (None, kind):
                continue
            for size in sizes(given):
                batch, d, latents, k = size
                case = {"batch": batch, "d": d, "latents": latents, "k": k, "threads": torch.get_num_threads()}
                few = batch * latents < OWN_CODE_BELOW or (batch < FEWEST_ROWS and name != "SAELens")
                path = "own" if few and not given.always else "ours"
                # Where the same code runs on both sides, there is little to find out.
                found = measure(make, kind, size, given, seconds=0.3 if path == "own" else 1.0)
                rows.append({"library": name, "class": kind, **case, **found, "path": path})
                print(
                    f"{name} {kind}, B {batch}, d {d}, N {latents}, k {k}: {found['theirs']:.2f} ms, accelerated "
                    f"{found['ours']:.2f} ms: {found['ratio']:.2f}x" + (" (own code)" if path == "own" else ""),
                    flush=True,
                )
    if given.sweep:
        print(worst(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
