"""The input of a row of the benchmark: sizes, weights and inputs drawn from one seed, the expected results, and the floor of
its time."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench import machine
from bench.interleaved_timing import pool_size
from bench.roofline import Shape, floors
from bench.selection import clear
from transcoder.kernels import SparseCodes, batch_topk_encode, topk_encode
from transcoder.kernels.correlation.counter_rng import signs
from transcoder.kernels.correlation.op import EXACT_LIMIT
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference
from transcoder.kernels.encode.reference import batch_topk_encode_reference, topk_encode_reference

Activation = Literal["topk", "batch_topk"]
ENCODE = {"topk": topk_encode, "batch_topk": batch_topk_encode}
ENCODE_REFERENCE = {"topk": topk_encode_reference, "batch_topk": batch_topk_encode_reference}
HEAD = 64
"""Rows of the small probe."""
LEAST = 8
"""Fewest rows of a probe, for any width of the dictionary."""
CHECKED = 1 << 23
"""Entries of dense codes up to which the other probe has as many rows as the row that is timed: the reference builds several
such arrays in float64."""
LEARNING_RATE = 1e-4
CHECK_RATE = 1e-2
"""Learning rate for the check of an optimizer: large enough that steps exceed the rounding of the weights."""
BETAS = (0.9, 0.99)
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
ENCODED = 4
"""Inputs whose codes the encoder itself makes."""
SKETCH = 128
"""Signs a token in the statistics of dictionaries that are too wide for exact ones."""


@dataclass(frozen=True)
class Size:
    rows: int
    d: int
    d_sae: int
    k: int

    @property
    def prefixes(self) -> list[int]:
        """Four Matryoshka widths in the proportions of the lost run."""
        return [self.d_sae // 8, 3 * self.d_sae // 8, 7 * self.d_sae // 8, self.d_sae]

    def __str__(self) -> str:
        return f"B{self.rows}-d{self.d}-N{self.d_sae}-k{self.k}"


SIZES = {
    "cuda": [Size(1024, 2304, 18432, 48), Size(4096, 2304, 18432, 48), Size(4096, 2304, 131072, 64)],
    "cpu": [Size(1024, 128, 2048, 16), Size(1024, 512, 8192, 32)],
    # For a machine that is busy with other work, and for tests.
    "small": [Size(1024, 128, 2048, 16)],
    "tiny": [Size(64, 16, 128, 4)],
}


def dense_bytes(size: Size) -> int:
    """Approximate peak memory of a dense step: ten arrays [B, N] (activations, codes, their gradients, the selection) and
    six copies of both matrices (masters, gradients, moments, and temporaries)."""
    return 4 * (10 * size.rows * size.d_sae + 12 * size.d_sae * size.d)


@dataclass(frozen=True)
class Floor:
    """Bytes and operations that any exact implementation must move and compute, on any machine (bench.roofline)."""

    bytes: float
    operations: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes + other.bytes, self.operations + other.operations)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Probe:
    """An input on which results are compared; rounding cannot change its selection."""

    x: Tensor
    """[rows, d], source and target."""
    codes: SparseCodes

    @functools.cached_property
    def dense(self) -> Tensor:
        """[rows, N] codes."""
        return self.codes.to_dense()

    @functools.cached_property
    def busiest(self) -> tuple[Tensor, Tensor]:
        """Pairs (i, j) of the latents that fire most."""
        counts = (self.dense > 0).sum(0)
        ids = counts.topk(min(8, len(counts))).indices
        i, j = torch.triu_indices(len(ids), len(ids), 1, device=ids.device)
        return ids[i], ids[j]


class Case:
    """One size and activation. Latents are rows; weights as at initialisation: unit decoder rows, biases 0."""

    def __init__(
        self, size: Size, activation: Activation = "topk", nested: bool = False, seed: int = 0, checked: int = CHECKED
    ) -> None:
        """`checked`: entries of the dense codes of a probe, at most (but for LEAST rows)."""
        self.size, self.activation, self._checked = size, activation, checked
        self.widths = size.prefixes if nested else [size.d_sae]
        self.device = machine.device()
        self._generator = torch.Generator().manual_seed(seed)
        # A transcoder's rows are the decoder's own directions, so that what fires also reconstructs.
        self.W_dec = torch.nn.functional.normalize(self.draw(size.d_sae, size.d), dim=1)
        self.W_enc = self.W_dec.clone()
        self.b_enc = torch.zeros(size.d_sae, device=self.device)
        self.b_dec = torch.zeros(size.d, device=self.device)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    @functools.cached_property
    def pool(self) -> list[Tensor]:
        """[B, d] inputs, together more than the cache holds."""
        return [self.draw(self.size.rows, self.size.d) for _ in range(pool_size(4 * self.size.rows * self.size.d))]

    def x(self, i: int) -> Tensor:
        """Input i modulo the number of inputs."""
        return self.pool[i % len(self.pool)]

    def leaf(self, name: str) -> Tensor:
        """A copy of a weight that collects gradients."""
        weight: Tensor = getattr(self, name)
        return weight.clone().requires_grad_()

    def encode(self, x: Tensor) -> SparseCodes:
        return ENCODE[self.activation](x, self.W_enc, self.b_enc, self.size.k)

    @functools.cached_property
    def coded(self) -> list[tuple[SparseCodes, Tensor]]:
        """(codes, targets) to decode, together more than the cache holds."""
        bytes_each = 12 * self.size.rows * self.size.k + 4 * self.size.rows * self.size.d
        return [(self._codes(n), self.pool[n % len(self.pool)]) for n in range(pool_size(bytes_each))]

    @functools.cached_property
    def codes(self) -> list[SparseCodes]:
        """Codes alone, together more than the cache holds."""
        return [self._codes(n) for n in range(pool_size(12 * self.size.rows * self.size.k))]

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        """[B, N] codes for variants that need dense ones, together more than the cache holds."""
        return [self._codes(n).to_dense() for n in range(pool_size(4 * self.size.rows * self.size.d_sae))]

    def _codes(self, n: int) -> SparseCodes:
        """The n-th input's codes. The encoder makes the first ones; the others are copies of these with shifted latent ids: the
        same values and entries per row, at other places of every matrix."""
        made = self._encoded[n % len(self._encoded)]
        moved = (made.indices + 7919 * (n // len(self._encoded))) % self.size.d_sae
        rows = torch.arange(made.shape[0], device=self.device).repeat_interleave(made.row_ptr.diff())
        order = (rows * self.size.d_sae + moved).argsort()
        return SparseCodes.trusted(made.values[order], moved[order], made.row_ptr.clone(), made.shape)

    @functools.cached_property
    def _encoded(self) -> list[SparseCodes]:
        return [self.encode(x).detach() for x in self.pool[:ENCODED]]

    # Expected results, from dense code.

    @functools.cached_property
    def probes(self) -> list[Probe]:
        """A small input, and one of the size that is timed (fewer rows where the reference would be too large): the number of
        rows decides which code runs."""
        rows = min(self.size.rows, max(LEAST, self._checked // self.size.d_sae))
        small = [self.draw(HEAD, self.size.d)] if rows > HEAD else []
        found = []
        for x in (*small, self.pool[0][:rows]):
            x = clear(x, self.W_enc, self.size.k, self.activation == "batch_topk", self.draw)
            found.append(Probe(x, self.encode(x).detach()))
        return found

    def expect(self, operation: str, probe: Probe) -> dict[str, Tensor]:
        """{name: expected result} of an operation."""
        expected: dict[str, Tensor] = getattr(self, f"_expect_{operation}")(probe)
        return expected

    def _expect_encode(self, probe: Probe) -> dict[str, Tensor]:
        weights = [self.leaf(name) for name in ("W_enc", "b_enc")]
        z = ENCODE_REFERENCE[self.activation](probe.x, *weights, self.size.k)
        z.sum().backward()
        return {"codes": z, **_gradients(weights, ("W_enc", "b_enc"))}

    def _expect_decode(self, probe: Probe) -> dict[str, Tensor]:
        z = probe.dense.clone().requires_grad_()
        weights = [self.leaf(name) for name in ("W_dec", "b_dec")]
        y = sparse_decode_reference(z, *weights)
        y.square().sum().backward()
        return {"reconstruction": y, "codes.grad": selected(z), **_gradients(weights, ("W_dec", "b_dec"))}

    def _expect_nested_loss(self, probe: Probe) -> dict[str, Tensor]:
        z = probe.dense.clone().requires_grad_()
        weights = [self.leaf(name) for name in ("W_dec", "b_dec")]
        losses, _ = nested_loss_reference(z, *weights, probe.x, self.widths)
        losses.sum().backward()
        return {"losses": losses, "codes.grad": selected(z), **_gradients(weights, ("W_dec", "b_dec"))}

    def _expect_step(self, probe: Probe) -> dict[str, Tensor]:
        """Loss (sum of squares over d, mean over tokens, sum over prefixes) and its gradients for y = x."""
        weights = {name: self.leaf(name) for name in WEIGHTS}
        z = ENCODE_REFERENCE[self.activation](probe.x, weights["W_enc"], weights["b_enc"], self.size.k)
        losses, _ = nested_loss_reference(z, weights["W_dec"], weights["b_dec"], probe.x, self.widths)
        loss = losses.sum() * self.size.d
        loss.backward()
        return {"loss": loss, **_gradients(list(weights.values()), WEIGHTS)}

    @functools.cached_property
    def given_gradients(self) -> dict[str, Tensor]:
        """One for each weight: where an optimizer is timed, they are its input."""
        return {name: 1e-3 * self.draw(*getattr(self, name).shape) for name in WEIGHTS}

    def gradients(self) -> list[dict[str, Tensor]]:
        """Those of STEPS steps, one for each weight, the same each time. The first step's norm is clipped, the second's is not:
        wrong moments give other weights."""
        g = torch.Generator().manual_seed(7)
        norm = math.sqrt(sum(getattr(self, name).numel() for name in WEIGHTS))
        scales = (1.0, 0.3 / norm)
        draw = functools.partial(torch.randn, generator=g)
        return [{n: scale * draw(getattr(self, n).shape).to(self.device) for n in WEIGHTS} for scale in scales]

    def _expect_optimizer(self, probe: Probe) -> dict[str, Tensor]:
        """What two steps of Adam add to each weight: along the sphere for the decoder, gradients clipped to norm 1."""
        now = {name: getattr(self, name).double() for name in WEIGHTS}
        first = {name: torch.zeros_like(value) for name, value in now.items()}
        second = {name: torch.zeros_like(value) for name, value in now.items()}
        a, b = BETAS
        for step, given in enumerate(self.gradients(), start=1):
            grads = {name: grad.double() for name, grad in given.items()}
            W = now["W_dec"]
            grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * W).sum(1, keepdim=True) * W
            norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
            for name, grad in grads.items():
                clipped = grad * (1 / norm).clamp(max=1)
                first[name] = a * first[name] + (1 - a) * clipped
                second[name] = b * second[name] + (1 - b) * clipped.square()
                size = (second[name] / (1 - b**step)).sqrt() + 1e-8
                now[name] = now[name] - CHECK_RATE * first[name] / (1 - a**step) / size
            now["W_dec"] = torch.nn.functional.normalize(now["W_dec"], dim=1)
        return self.steps_of(now)

    def steps_of(self, after: dict[str, Tensor]) -> dict[str, Tensor]:
        """The change of each weight."""
        return {f"{n} step": after[n].detach().double() - getattr(self, n).double() for n in WEIGHTS}

    def _expect_correlation(self, probe: Probe) -> dict[str, Tensor]:
        """Correlation of the busiest pairs: exact, or beyond EXACT_LIMIT by the definition of the sketch."""
        i, j = probe.busiest
        z = probe.dense.double()
        if self.size.d_sae <= EXACT_LIMIT:
            left, right = (z[:, ids] - z[:, ids].mean(0) for ids in (i, j))
        else:
            drawn = signs(len(z), SKETCH, self.device, 0, 0, 0).double()
            left, right = (drawn.T @ z[:, ids] - drawn.sum(0)[:, None] * z[:, ids].mean(0) for ids in (i, j))
        return {"correlation": (left * right).sum(0) / (left.norm(dim=0) * right.norm(dim=0))}

    # The floors.

    def floors(self) -> dict[str, dict[str, Floor]]:
        """{operation: {direction: floor}}, fp32. A gradient of the codes' values is small against all else."""
        s = self.size
        shape = Shape(s.rows, s.d, s.d_sae, s.k)
        least = {name: Floor(c.memory, c.matrix + c.vector) for name, c in floors(shape).items()}
        forward, backward = least[f"{self.activation}_encode forward"], least["encode backward"]
        decode, decode_back = least["nested loss forward"], least["nested loss backward"]
        dense_x = 4 * s.rows * s.d
        step = least[f"whole step, {self.activation}"]
        # bench.roofline counts bf16 batches; here they are fp32, one for source and target.
        step = Floor(step.bytes - 2 * 2 * s.rows * s.d + dense_x, step.operations)
        return {
            "encode": _directions(forward, backward + least["feature-major order"]),
            "decode": _directions(decode, decode_back + least["feature-major order"]),
            "nested_loss": _directions(decode, decode_back + least["feature-major order"]),
            "correlation": {"forward": least["correlation exact"]},
            "optimizer": {"forward": least["Adam and projection"]},
            "step": {"forward": step},
        }


def _directions(forward: Floor, backward: Floor) -> dict[str, Floor]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _gradients(weights: list[Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    found = {f"{name}.grad": w.grad for name, w in zip(names, weights, strict=True)}
    return {name: grad for name, grad in found.items() if grad is not None}


def selected(z: Tensor) -> Tensor:
    """Gradients of the active entries: sparse implementations have no others."""
    assert z.grad is not None
    return z.grad[z.detach() > 0]


def answers(names: tuple[str, ...], *weights: Any) -> dict[str, Tensor]:
    return _gradients(list(weights), names)
