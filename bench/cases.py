"""What a row of the benchmark is about: sizes, weights and inputs drawn from one seed, and the floor under its time."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench import machine
from bench.race import pool_size
from bench.roofline import Shape, floors
from transcoder.kernels import SparseCodes, batch_topk_encode, topk_encode
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference
from transcoder.kernels.encode.reference import batch_topk_encode_reference, topk_encode_reference

Activation = Literal["topk", "batch_topk"]
ENCODE = {"topk": topk_encode, "batch_topk": batch_topk_encode}
ENCODE_REFERENCE = {"topk": topk_encode_reference, "batch_topk": batch_topk_encode_reference}
HEAD = 64
"""Rows of the small input on which results are compared."""
LEARNING_RATE = 1e-4
CHECK_RATE = 1e-2
"""Learning rate where an optimizer is checked: a step that is not lost in the rounding of the weights."""
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


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
    """What a dense step holds at its peak, roughly: ten arrays [B, N] (activations, codes, their gradients, the selection) and
    six copies of both matrices (masters, gradients, moments, and what is in passing)."""
    return 4 * (10 * size.rows * size.d_sae + 12 * size.d_sae * size.d)


@dataclass(frozen=True)
class Floor:
    """What any exact implementation must move and compute (bench.roofline), whatever the machine."""

    bytes: float
    operations: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes + other.bytes, self.operations + other.operations)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Case:
    """One size and activation. Latents are rows; weights as at initialisation: unit decoder rows, biases 0."""

    def __init__(self, size: Size, activation: Activation = "topk", nested: bool = False, seed: int = 0) -> None:
        self.size, self.activation = size, activation
        self.widths = size.prefixes if nested else [size.d_sae]
        self.device = machine.device()
        self._generator = torch.Generator().manual_seed(seed)
        # A transcoder's rows are the decoder's own directions, so that what fires also reconstructs.
        self.W_dec = torch.nn.functional.normalize(self.draw(size.d_sae, size.d), dim=1)
        self.W_enc = self.W_dec.clone()
        self.b_enc = torch.zeros(size.d_sae, device=self.device)
        self.b_dec = torch.zeros(size.d, device=self.device)
        self.head = self.draw(min(HEAD, size.rows), size.d)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    @functools.cached_property
    def pool(self) -> list[Tensor]:
        """[B, d] inputs, together more than the cache holds."""
        return [self.draw(self.size.rows, self.size.d) for _ in range(pool_size(4 * self.size.rows * self.size.d))]

    def leaf(self, name: str) -> Tensor:
        """A copy of a weight that collects gradients."""
        weight: Tensor = getattr(self, name)
        return weight.clone().requires_grad_()

    def encode(self, x: Tensor) -> SparseCodes:
        return ENCODE[self.activation](x, self.W_enc, self.b_enc, self.size.k)

    @functools.cached_property
    def coded(self) -> list[tuple[SparseCodes, Tensor]]:
        """(codes, targets) to decode, as many as keep dense codes [B, N] out of the cache."""
        count = min(len(self.pool), pool_size(4 * self.size.rows * self.size.d_sae) + 2)
        return [(self.encode(x).detach(), x) for x in self.pool[:count]]

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        """The same codes as [B, N], for those who need them dense."""
        return [codes.to_dense() for codes, _ in self.coded]

    @functools.cached_property
    def head_codes(self) -> SparseCodes:
        return self.encode(self.head).detach()

    # What is right, dense and obvious.

    def expect_encode(self) -> dict[str, Tensor]:
        weights = [self.leaf(name) for name in ("W_enc", "b_enc")]
        z = ENCODE_REFERENCE[self.activation](self.head, *weights, self.size.k)
        z.sum().backward()
        return {"codes": z, **_gradients(weights, ("W_enc", "b_enc"))}

    def expect_decode(self) -> dict[str, Tensor]:
        z = self.head_codes.to_dense().requires_grad_()
        weights = [self.leaf(name) for name in ("W_dec", "b_dec")]
        y = sparse_decode_reference(z, *weights)
        y.square().sum().backward()
        return {"reconstruction": y, "codes.grad": _selected(z), **_gradients(weights, ("W_dec", "b_dec"))}

    def expect_nested_loss(self) -> dict[str, Tensor]:
        z = self.head_codes.to_dense().requires_grad_()
        weights = [self.leaf(name) for name in ("W_dec", "b_dec")]
        losses, _ = nested_loss_reference(z, *weights, self.head, self.widths)
        losses.sum().backward()
        return {"losses": losses, "codes.grad": _selected(z), **_gradients(weights, ("W_dec", "b_dec"))}

    def expect_step(self) -> dict[str, Tensor]:
        """Loss (sum of squares over d, mean over tokens, sum over prefixes) and its gradients for y = x."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        weights = dict(zip(names, map(self.leaf, names), strict=True))
        z = ENCODE_REFERENCE[self.activation](self.head, weights["W_enc"], weights["b_enc"], self.size.k)
        losses, _ = nested_loss_reference(z, weights["W_dec"], weights["b_dec"], self.head, self.widths)
        loss = losses.sum() * self.size.d
        loss.backward()
        return {"loss": loss, **_gradients(list(weights.values()), names)}

    def gradients(self) -> dict[str, Tensor]:
        """One for each weight, the same each time, of a norm that is clipped."""
        g = torch.Generator().manual_seed(7)
        return {name: torch.randn(getattr(self, name).shape, generator=g).to(self.device) for name in WEIGHTS}

    def expect_optimizer(self) -> dict[str, Tensor]:
        """What the first step of Adam adds to each weight: along the sphere for the decoder, gradients clipped to norm 1."""
        before = {name: getattr(self, name).double() for name in WEIGHTS}
        grads = {name: grad.double() for name, grad in self.gradients().items()}
        W = before["W_dec"]
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * W).sum(1, keepdim=True) * W
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        after = {}
        for name, grad in grads.items():
            clipped = grad / norm
            # Both moments are corrected for their start: the first step is g / (|g| + eps).
            after[name] = before[name] - CHECK_RATE * clipped / (clipped.abs() + 1e-8)
        after["W_dec"] = torch.nn.functional.normalize(after["W_dec"], dim=1)
        return {f"{name} step": after[name] - before[name] for name in WEIGHTS}

    def steps_of(self, after: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `expect_optimizer`, from weights after the step."""
        return {f"{n} step": after[n].detach().double() - getattr(self, n).double() for n in WEIGHTS}

    @functools.cached_property
    def busiest(self) -> tuple[Tensor, Tensor]:
        """Pairs (i, j) of the latents that fire most on the small input."""
        counts = torch.bincount(self.head_codes.indices[self.head_codes.values > 0], minlength=self.size.d_sae)
        ids = counts.topk(min(8, self.size.d_sae)).indices
        i, j = torch.triu_indices(len(ids), len(ids), 1, device=ids.device)
        return ids[i], ids[j]

    def expect_correlation(self) -> dict[str, Tensor]:
        i, j = self.busiest
        return {
            "correlation": torch.corrcoef(self.head_codes.to_dense().double().T[torch.cat([i, j])])[
                torch.arange(len(i)), len(i) + torch.arange(len(i))
            ]
        }

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


def _selected(z: Tensor) -> Tensor:
    """Gradients of the entries that are on: sparse implementations have no others."""
    assert z.grad is not None
    return z.grad[z.detach() > 0]


def answers(names: tuple[str, ...], *weights: Any) -> dict[str, Tensor]:
    return _gradients(list(weights), names)
