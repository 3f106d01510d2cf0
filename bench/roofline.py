"""Predicted time of every kernel on H100 and A100, worked out without a GPU. Nothing printed here was measured.

    python -m bench.roofline [--json] [--chip H100] [--latents 18432] [--rows 4096] [--k 48]

Three columns a kernel and shape:
- floor: bytes and operations that any exact implementation behind the same interface must move and do, at the achievable
  rates below. Inputs are read once, results written once, gradients are dense tensors.
- planned: the launches of this version. The real launchers run on fake tensors and are recorded (bench/launch_trace.py): grids,
  tiles, rounds and scratch are theirs. Each launch is then costed from its own arguments (bench/launch_cost.py).
- predicted: the planned launches one after the other, each as long as its busiest unit (memory, second-level cache, matrix
  units, fp32 units) takes at the achievable rate, and GAP between two launches. The host is assumed to keep ahead.

Training as it runs: fp32 masters under bf16 autocast, so W_enc is cast every step; decoding reads the fp32 masters; four
prefixes (1/8, 1/2, 7/8 and all of the dictionary); gradients for weights and biases, none for x.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from bench.launch_cost import Cost, distinct, total
from bench.launch_trace import Call, Launch, Recorder, recording

GAP = 2e-6
"""Seconds between dependent launches on one stream: an assumption, not a measurement."""
SKETCH = 128
PREDICTED = "2026-12-01"
"""Date of the rates and of the cost model: a change of either is a new prediction."""


@dataclass(frozen=True)
class Chip:
    """Peak rates from the vendor's data sheet, and the shares of them that are assumed to be achievable."""

    name: str
    architecture: str
    multiprocessors: int
    memory: float
    """Bytes a second."""
    matrix: float
    """Dense bf16 operations a second."""
    vector: float
    """fp32 operations a second outside the matrix units."""
    cache: float
    """Bytes of second-level cache."""
    cached: float
    """Bytes a second through it. Vendors give none. H100: 7.1 to 7.9 TB/s follow from the times in Triton's pull request 5461;
    the lower. A100: an assumption."""
    memory_share: float = 0.85
    matrix_share: float = 0.6
    vector_share: float = 0.5

    def seconds(self, cost: Cost) -> float:
        return max(self._by_unit(cost).values())

    def bound(self, cost: Cost) -> str:
        by_unit = self._by_unit(cost)
        return max(by_unit, key=by_unit.__getitem__)

    def _by_unit(self, cost: Cost) -> dict[str, float]:
        return {
            "memory": cost.memory / (self.memory * self.memory_share),
            "cache": cost.cached / self.cached,
            "matrix": cost.matrix / (self.matrix * self.matrix_share),
            "vector": cost.vector / (self.vector * self.vector_share),
        }


CHIPS = (
    Chip("H100 SXM", "sm_90", 132, 3.35e12, 989e12, 67e12, 50e6, 7.1e12),
    Chip("A100 SXM", "sm_80", 108, 2.0e12, 312e12, 19.5e12, 40e6, 4.0e12),
)


@dataclass(frozen=True)
class Shape:
    rows: int
    d: int
    latents: int
    k: int

    @property
    def entries(self) -> int:
        return self.rows * self.k

    @property
    def widths(self) -> list[int]:
        return [self.latents // 8, self.latents // 2, 7 * self.latents // 8, self.latents]

    @property
    def parameters(self) -> int:
        return 2 * self.latents * self.d + self.latents + self.d

    def __str__(self) -> str:
        return f"B {self.rows}, d {self.d}, N {self.latents}, k {self.k}"


SHAPES = [Shape(B, 2304, N, k) for N, k, B in itertools.product((18432, 131072, 1048576), (48, 64), (1024, 4096))]


def floors(s: Shape) -> dict[str, Cost]:
    """Least cost of any exact implementation of each kernel. fp32 is 4 bytes, an index 8."""
    dense_in, W, codes = 4 * s.rows * s.d, 4 * s.latents * s.d, 12 * s.entries
    touched = 4 * s.d * distinct(s.entries, s.latents)
    product = Cost(memory=dense_in + W + 4 * s.latents + codes, matrix=2 * s.rows * s.latents * s.d)
    pairs = s.entries * (s.k - 1) / 2
    met = distinct(pairs, s.latents * (s.latents - 1) / 2)
    fired = distinct(s.entries, s.latents)
    prefixes = len(s.widths)
    steps = 2 * s.entries * s.d
    found = {
        "topk_encode forward": product,
        "batch_topk_encode forward": product,
        "feature-major order": Cost(memory=24 * s.entries + 8 * s.latents),
        "encode backward": Cost(memory=codes + 4 * s.entries + dense_in + W + 4 * s.latents, vector=steps),
        "nested loss forward": Cost(memory=codes + touched + 2 * dense_in, vector=steps + 2 * prefixes * s.rows * s.d),
        "nested loss backward": Cost(memory=codes + touched + dense_in + W + 4 * s.entries, vector=2 * steps),
        "correlation sketch": Cost(memory=codes + 8 * SKETCH * fired, vector=2 * s.entries * SKETCH),
        "correlation exact": Cost(memory=codes + 24 * met, vector=3 * pairs),
        "Adam and projection": Cost(memory=28 * s.parameters, vector=12 * s.parameters),
    }
    # Fused to the end, a step reads its two batches (bf16) and turns over parameters and moments; gradients need no memory.
    step = Cost(
        memory=2 * 2 * s.rows * s.d + 24 * s.parameters, matrix=product.matrix, vector=4 * steps + 12 * s.parameters
    )
    return {**found, "whole step, topk": step, "whole step, batch_topk": step}


def planned(s: Shape, chip: Chip) -> Iterator[tuple[str, list[Launch | Call]]]:
    """(kernel, its launches) of every kernel that supports the shape."""
    with recording(chip.architecture, chip.multiprocessors) as recorder, torch.autocast("cpu", torch.bfloat16):
        yield from _ops(s, recorder)
        for activation in ("topk", "batch_topk"):
            yield from _steps(s, activation, recorder)


def _ops(s: Shape, recorder: Recorder) -> Iterator[tuple[str, list[Launch | Call]]]:
    from transcoder.kernels import FeatureCorrelation, batch_topk_encode, nested_loss, topk_encode
    from transcoder.kernels.correlation.op import EXACT_LIMIT

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape).requires_grad_()

    x, y, W_enc, W_dec = (
        torch.empty(s.rows, s.d),
        torch.empty(s.rows, s.d),
        matrix(s.latents, s.d),
        matrix(s.latents, s.d),
    )
    b_enc, b_dec = matrix(s.latents), matrix(s.d)
    recorder.section()
    batch_topk_encode(x, W_enc, b_enc, s.k)
    yield "batch_topk_encode forward", recorder.section()
    codes = topk_encode(x, W_enc, b_enc, s.k)
    yield "topk_encode forward", recorder.section()
    codes.by_latent()
    yield "feature-major order", recorder.section()
    torch.autograd.grad(codes.values, (W_enc, b_enc), torch.empty(codes.nnz))
    yield "encode backward", recorder.section()
    codes = codes.with_values(codes.values.detach().requires_grad_())
    nested_loss(codes, W_dec, b_dec, y, s.widths)
    recorder.section()
    value = nested_loss(codes, W_dec, b_dec, y, s.widths).value
    yield "nested loss forward", recorder.section()
    torch.autograd.grad(value, (codes.values, W_dec, b_dec))
    yield "nested loss backward", recorder.section()
    for name, dim in (("correlation sketch", SKETCH), ("correlation exact", None)):
        if dim is None and s.latents > EXACT_LIMIT:
            continue
        monitor = FeatureCorrelation(s.latents, dim)
        monitor.update(codes.detach())
        recorder.section()
        monitor.update(codes.detach())
        yield name, recorder.section()


def _steps(s: Shape, activation: Any, recorder: Recorder) -> Iterator[tuple[str, list[Launch | Call]]]:
    from transcoder.config import TrainingSection
    from transcoder.model import Transcoder, TranscoderConfig
    from transcoder.training.optimizer import make_optimizer, optimizer_step

    config = TranscoderConfig(s.d, s.d, s.latents, s.k, activation=activation, widths=s.widths)
    with mock.patch.object(Transcoder, "to", lambda self, device: self):  # parameters of fake tensors cannot be swapped
        model = Transcoder(config).train()
    optimizer = make_optimizer(model, TrainingSection(), 1e-3)
    x, y = (torch.empty(s.rows, s.d, dtype=torch.bfloat16) for _ in range(2))
    # The first step also makes moments and caches; the second is typical of a run.
    for _ in range(2):
        recorder.section()
        out = model.training_step(x, y)
        # As backward() does, which takes the gradients over as they are; fake ones, that the recorder refers to, it would copy.
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(out.loss, parameters), strict=True):
            parameter.grad = gradient
        before = recorder.section()
        optimizer_step(model, optimizer, 1e-3, 1.0)
        after = recorder.section()
    if activation == "topk":
        yield "Adam and projection", after
    yield f"whole step, {activation}", before + after


def rows(shapes: list[Shape], chips: list[Chip]) -> Iterator[dict[str, Any]]:
    for chip, shape in itertools.product(chips, shapes):
        lowest = floors(shape)
        for name, events in planned(shape, chip):
            cost, costs = total(events, chip.cache)
            launches = [(event, c) for event, c in zip(events, costs, strict=True) if c != Cost()]
            seconds = sum(chip.seconds(c) for _, c in launches)
            ours = sum(isinstance(event, Launch) for event, _ in launches)
            floor = lowest[name]
            yield {
                "chip": chip.name,
                "shape": asdict(shape),
                "kernel": name,
                "floor": {
                    "bytes": floor.memory,
                    "matrix_operations": floor.matrix,
                    "vector_operations": floor.vector,
                    "predicted_seconds": chip.seconds(floor),
                    "bound": chip.bound(floor),
                },
                "planned": {
                    "bytes": cost.memory,
                    "cached_bytes": cost.cached,
                    "matrix_operations": cost.matrix,
                    "vector_operations": cost.vector,
                    "launches": len(launches),
                    "triton_launches": ours,
                    "predicted_seconds": seconds + GAP * len(launches),
                    "bound": chip.bound(cost),
                },
            }


def assumptions() -> list[str]:
    lines = [f"PREDICTED {PREDICTED}, not measured: no GPU was asked. The first run on one is to be held against this."]
    for c in CHIPS:
        lines.append(
            f"{c.name}: {c.matrix / 1e12:.0f} TFLOP/s dense bf16 at {c.matrix_share:.0%}, {c.memory / 1e12:.2f} TB/s at "
            f"{c.memory_share:.0%}, {c.vector / 1e12:.1f} TFLOP/s fp32 at {c.vector_share:.0%}, second-level cache "
            f"{c.cache / 1e6:.0f} MB at {c.cached / 1e12:.1f} TB/s"
        )
    lines.append(
        f"{1e6 * GAP:.0f} us between launches; codes spread evenly over latents; no tied values; the host keeps ahead"
    )
    return lines


def show(found: list[dict[str, Any]]) -> None:
    print("\n".join(assumptions()))
    head = f"{'':<28}{'floor':>24}{'planned':>24}{'predicted':>22}{'of floor':>10}  bound    launches"
    by_table = itertools.groupby(found, key=lambda r: (r["chip"], str(Shape(**r["shape"]))))
    for (chip, shape), group in by_table:
        print(f"\n{chip}, {shape}: predicted\n{head}")
        for r in group:
            floor, plan = r["floor"], r["planned"]
            amounts = (f"{c['bytes'] / 1e9:.3f} GB {_operations(c):.2f} TFLOP" for c in (floor, plan))
            low, time = floor["predicted_seconds"], plan["predicted_seconds"]
            print(
                f"{r['kernel']:<28}{next(amounts):>24}{next(amounts):>24}"
                f"{1e3 * low:>9.3f} -> {1e3 * time:>6.3f} ms{low / time:>9.0%}  {plan['bound']:<9}{plan['launches']:>7}"
            )


def _operations(counted: dict[str, Any]) -> float:
    return float(counted["matrix_operations"] + counted["vector_operations"]) / 1e12


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="predicted times, without a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--chip", help="only chips whose name contains this")
    for name in ("latents", "rows", "k"):
        parser.add_argument(f"--{name}", type=int, help="only shapes with this")
    args = parser.parse_args(words)
    chips = [c for c in CHIPS if not args.chip or args.chip.lower() in c.name.lower()]
    wanted = {name: getattr(args, name) for name in ("latents", "rows", "k") if getattr(args, name) is not None}
    shapes = [s for s in SHAPES if all(getattr(s, name) == value for name, value in wanted.items())]
    if not chips or not shapes:
        parser.error("no chip or no shape is left")
    found = list(rows(shapes, chips))
    if args.json:
        print(json.dumps({"predicted": True, "assumptions": assumptions(), "rows": found}, indent=1))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
