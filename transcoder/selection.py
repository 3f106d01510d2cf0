"""Which latents of a token are active: one class an activation, all of them in `SELECTIONS`.

A selection defines how the model encodes in training and in evaluation, the meaning of the model's `threshold`, and its penalty
in the loss. It holds settings; the model holds the tensors. To add one, add its class here and its name to
`dictionary_config.Activation`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoder.dictionary_config import TranscoderConfig
from transcoder.kernels import SparseCodes, batch_topk_encode, threshold_encode, topk_encode
from transcoder.kernels.segments import segment_sum


class Selected(NamedTuple):
    """The selected codes of a training batch, and the penalty."""

    codes: SparseCodes
    """Values in the graph. An entry of value 0 is stored, but not active."""
    penalty: Tensor | None = None
    """Scalar in the graph, relative to a reconstruction loss of convention `mse`; None where nothing is added to the loss."""


class Selection(ABC):
    """How the latents of one dictionary are selected. Shared arguments of the methods:

    x: [B, d_in] normalised.   W_enc: [d_sae, d_in].   b_enc: [d_sae].
    threshold: the model's tensor of that name, fp32, of shape `threshold_shape`.
    """

    name: ClassVar[str]
    """Name in settings and files."""
    label: ClassVar[str]
    """Name in texts."""
    by_threshold: ClassVar[bool] = True
    """Evaluation selects activations above `threshold`; if False, a fixed number of latents a token."""
    trains_threshold: ClassVar[bool] = False
    """Whether `threshold` is a parameter and not a buffer."""

    def __init__(self, config: TranscoderConfig) -> None:
        self.config = config

    @property
    def most_a_token(self) -> int:
        """Latents that can be active on one token."""
        return self.config.d_sae

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        """(), or (d_sae,)."""
        return ()

    @property
    def initial_threshold(self) -> float:
        """Value before training. Below 0: no batch has set it yet."""
        return -1.0

    @abstractmethod
    def select(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, token_weights: Tensor | None
    ) -> Selected:
        """Codes of a training batch. token_weights: [B] importance weights of mean about 1, or None."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCodes:
        """Codes in evaluation. The codes of a token do not depend on the other tokens of its batch."""
        return threshold_encode(x, W_enc, b_enc, threshold)

    @torch.no_grad()
    def track(self, threshold: Tensor, codes: SparseCodes) -> None:
        """Move `threshold`, in place, towards the smallest active value of a training batch. Reads nothing back."""
        if codes.nnz:
            self.move(threshold, smallest_active(codes.values))

    def move(self, threshold: Tensor, smallest: Tensor) -> None:
        """Move `threshold`, in place, towards `smallest` (0-dim); infinity, where no value is active, leaves it."""
        smallest = smallest.to(threshold.dtype)
        moved = torch.lerp(threshold, smallest, self.config.threshold_rate)
        moved = torch.where(threshold < 0, smallest, moved)
        threshold.copy_(torch.where(torch.isfinite(smallest), moved, threshold))

    def penalty_factor(self, step: int) -> float:
        """Factor on the penalty in the step of index `step`, for its warm-up."""
        return 1.0

    def finish_update(self, threshold: Tensor, before: Tensor) -> None:  # noqa: B027
        """Correct a trained `threshold`, in place, after the optimizer has changed it from `before`."""


def smallest_active(values: Tensor) -> Tensor:
    """The smallest positive number of values [nnz], nnz >= 1, 0-dim; infinity where there is none."""
    return torch.where(values > 0, values, torch.full_like(values, torch.inf)).min()


class TopK(Selection):
    """The k largest of each token (Gao et al. 2024). `threshold` is tracked for exports to formats without TopK."""

    name, label, by_threshold = "topk", "TopK", False

    @property
    def most_a_token(self) -> int:
        return self.config.k

    def select(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, token_weights: Tensor | None
    ) -> Selected:
        return Selected(topk_encode(x, W_enc, b_enc, self.config.k))

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCodes:
        return topk_encode(x, W_enc, b_enc, self.config.k)


class BatchTopK(Selection):
    """The k * B largest of a batch of B tokens (Bussmann et al. 2024); in evaluation all activations above the tracked
    threshold."""

    name, label = "batch_topk", "BatchTopK"

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        return (self.config.d_sae,) if self.config.latent_thresholds else ()

    def select(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, token_weights: Tensor | None
    ) -> Selected:
        return Selected(batch_topk_encode(x, W_enc, b_enc, self.config.k))


class JumpReLU(Selection):
    """Activations above a trained threshold of each latent (Rajamanoharan et al. 2024, arXiv:2407.14435).

    With h = x @ W_enc.T + b_enc, thresholds t [d_sae], bandwidth e and the window w = (|h - t| < e / 2):

        z = h * (h > t)       dz/dh = (h > t)    dz/dt = -t / e * w     (straight-through)
        L0 = sum (h > t)      dL0/dh = 0         dL0/dt = -1 / e * w    (straight-through)

    Penalties, of the mean over the batch (by token weights):
        `l0_target`  (L0 / k - 1)^2, after the same paper: leads the mean L0 of training to k, from both sides.
        `l0`         L0 / k. The paper's lambda, for targets of mean square 1, is coefficient / k.
        `tanh`       sum tanh(tanh_scale * z) / k: Anthropic's circuits update of January 2025, with decoder rows of norm 1.
                     Its gradient also reaches h where z > 0. Their additional term for dead latents needs every pre-activation;
                     AuxK replaces it here.

    The codes hold pre-activations above max(t - e / 2, 0), so no [B, d_sae] exists; entries below their threshold have value 0.
    The number of entries depends on the data and is read on the host: such a step cannot be captured in a CUDA graph.

    Thresholds are stored as they are, as in imported files (the paper trains their logarithms), and set to 0 where the
    optimizer makes them negative. Their learning rate is `learning_rate_ratio` times that of the weights: Adam changes each
    number by about its learning rate a step, but d_in weights together change a pre-activation, so thresholds at the same rate
    are too slow. `initial_threshold` null starts near L0 = k. The paper starts near 0, where half the dictionary is active on a
    token.
    """

    name, label, trains_threshold = "jumprelu", "JumpReLU", True

    @property
    def threshold_shape(self) -> tuple[int, ...]:
        return (self.config.d_sae,)

    @property
    def initial_threshold(self) -> float:
        given, config = self.config.jumprelu.initial_threshold, self.config
        return NormalDist().inv_cdf(1 - min(config.k / config.d_sae, 0.5)) if given is None else given

    def select(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, token_weights: Tensor | None
    ) -> Selected:
        settings = self.config.jumprelu
        stored = threshold_encode(x, W_enc, b_enc, threshold - settings.bandwidth / 2)
        order = stored.by_latent()
        values, active = _Jump.apply(
            stored.values, threshold, stored.indices, order.permutation, order.latent_ptr, settings.bandwidth
        )
        counted = torch.tanh(settings.tanh_scale * values) if settings.penalty == "tanh" else active
        if token_weights is not None:
            counted = counted * token_weights.to(counted.dtype)[stored.rows()]
        share = counted.sum() / (max(1, len(x)) * self.config.k)
        penalty = (share - 1).square() if settings.penalty == "l0_target" else share
        # NaN is above no threshold: a row of x that holds one has no codes, and only this lets the loss show it.
        hidden = (x - x).detach().sum().to(penalty.dtype)
        return Selected(stored.with_values(values), settings.coefficient * penalty + hidden)

    def track(self, threshold: Tensor, codes: SparseCodes) -> None:
        """Nothing: the threshold is trained."""

    def penalty_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.config.jumprelu.warmup_steps))

    @torch.no_grad()
    def finish_update(self, threshold: Tensor, before: Tensor) -> None:
        ratio = self.config.jumprelu.learning_rate_ratio
        faster = torch.lerp(before, threshold, math.sqrt(self.config.d_in) if ratio is None else ratio)
        threshold.copy_(faster.clamp_min(0))


class _Jump(torch.autograd.Function):
    """(pre-activations [nnz], threshold [d_sae]) -> (z [nnz], h > t as numbers [nnz]), with the gradients of `JumpReLU`."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        threshold: Tensor,
        indices: Tensor,
        permutation: Tensor,
        latent_ptr: Tensor,
        bandwidth: float,
    ) -> tuple[Tensor, Tensor]:
        limit = threshold.to(pre.dtype)[indices]
        active = pre > limit
        ctx.save_for_backward(pre, limit, active, permutation, latent_ptr)
        ctx.bandwidth, ctx.dtype = bandwidth, threshold.dtype
        return torch.where(active, pre, 0), active.to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_active: Tensor) -> tuple[Tensor | None, ...]:
        pre, limit, active, permutation, latent_ptr = ctx.saved_tensors
        inside = (pre - limit).abs() < ctx.bandwidth / 2
        at_entries = torch.where(inside, -(limit * grad_values + grad_active) / ctx.bandwidth, 0)
        # One owner a latent and a fixed order of additions, as in the gradients of the ops.
        by_latent = segment_sum(at_entries[permutation], latent_ptr).to(ctx.dtype)
        return torch.where(active, grad_values, 0), by_latent, None, None, None, None


SELECTIONS: dict[str, type[Selection]] = {kind.name: kind for kind in (TopK, BatchTopK, JumpReLU)}
