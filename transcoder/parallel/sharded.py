"""ShardedTranscoder: one dictionary whose latents lie on several ranks, trained on tokens of several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from transcoder.kernels import SparseCodes, batch_topk_encode, sparse_decode, threshold_encode, topk_encode
from transcoder.losses import Reconstruction, auxk_by_convention, by_convention, never_zero
from transcoder.model import Transcoder
from transcoder.parallel.lanes import Lanes
from transcoder.parallel.selection import top_of_batch, top_of_row
from transcoder.selection import Selected, smallest_active

OF_LATENTS = ("W_enc", "b_enc", "W_dec", "tokens_since_fired", "dead")
"""Tensors with a row a latent. `threshold` is one of them where it has d_sae numbers."""


class ShardedTranscoder(Transcoder):
    """A Transcoder over the ranks of a mesh. Its codes are those of one process for the same tokens, bit for bit; its losses
    and gradients are, up to rounding.

    The ranks of dimension `tp` share the latents and are given the same tokens; the ranks of dimension `dp` share the tokens:
    the batch of the run is the batches of dp rank 0, 1, ... one after another, all of one length. Codes have the rank's own
    latents [B, d_sae / tp]; `lanes.ids` gives their ids in the whole dictionary. W_enc, b_enc, W_dec and the dead counters are
    the rank's; b_dec, W_skip, a single threshold and the normalisation are equal on all ranks.

    Losses and gradients are of the rank's tokens until `clip_gradients` (which `transcoder.training.optimizer.optimizer_step`
    calls) takes the mean over `dp`. Every method that takes activations has to be called on all ranks together.

    Args:
        whole: equal on all ranks, for example made with one seed. Its tensors are copied, to the device of the mesh.
        mesh: 2 dimensions named dp and tp.
        lanes: how the latents are spread, see `Lanes`: a multiple of tp that divides d_sae. Any tp that divides it reads the
            same shards.

    Raises: ValueError for a mesh or numbers that do not fit; NotImplementedError for activation jumprelu.
    """

    def __init__(self, whole: Transcoder, mesh: DeviceMesh, lanes: int = 8) -> None:
        if whole.config.activation == "jumprelu":
            raise NotImplementedError("ShardedTranscoder: activation: expected topk or batch_topk, got jumprelu")
        if mesh.mesh_dim_names != ("dp", "tp"):
            raise ValueError(f"ShardedTranscoder: mesh: expected dimensions ('dp', 'tp'), got {mesh.mesh_dim_names}")
        nn.Module.__init__(self)
        self.config, self.selection, self.in_one_process = whole.config, whole.selection, False
        self.dp, self.tp = mesh.get_group("dp"), mesh.get_group("tp")
        self.copies = dist.get_world_size(self.dp)
        """Ranks of `dp`: each has the same latents and other tokens."""
        self.lanes = Lanes(whole.config.d_sae, lanes, dist.get_world_size(self.tp), dist.get_rank(self.tp))
        for name, value in whole.state_dict().items():
            value = value.to(mesh.device_type)
            part = (self.lanes.take(value) if self._has_latents(name, value) else value).clone()
            if name in dict(whole.named_parameters()):
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)
        if whole.W_skip is None:
            self.register_parameter("W_skip", None)
        self._dead_ids: Tensor | None = None
        self.refresh_dead()

    # -- what one process has whole -----------------------------------------------------------------------------------

    def gather(self) -> Transcoder:
        """The whole transcoder, on every rank, on the device of the shards."""
        self.agree_on_counters()
        whole = Transcoder(self.config).to(self.W_enc.device, self.W_enc.dtype)
        whole.load_state_dict({name: self._joined(name, part) for name, part in self.state_dict().items()})
        return whole.train(self.training)

    def save_pretrained(self, directory: str | Path) -> None:
        """As `Transcoder.save_pretrained`: the files of the whole, which rank 0 writes."""
        whole = self.gather()
        if dist.get_rank() == 0:
            whole.save_pretrained(directory)
        dist.barrier()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Transcoder:
        raise NotImplementedError("expected ShardedTranscoder(Transcoder.from_pretrained(...), mesh)")

    def recycle(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("ShardedTranscoder cannot recycle latents: pairs may lie on two ranks")

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load this rank's shard, as `state_dict` gave it."""
        result = nn.Module.load_state_dict(self, state_dict, strict, assign)
        self._list_dead()
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Unlike Transcoder's, without collectives: `.double()` may be called on one rank alone.
        moved = nn.Module._apply(self, fn, recurse)
        if self._dead_ids is not None:
            self._dead_ids = fn(self._dead_ids)
        return moved

    def _has_latents(self, name: str, value: Tensor) -> bool:
        return name in OF_LATENTS or (name == "threshold" and value.dim() == 1)

    def _joined(self, name: str, part: Tensor) -> Tensor:
        if not self._has_latents(name, part):
            return part
        parts = [torch.empty_like(part) for _ in range(self.lanes.ranks)]
        dist.all_gather(parts, part.contiguous(), group=self.tp)
        return self.lanes.join(parts)

    # -- selection ------------------------------------------------------------------------------------------------------

    def _select(self, x: Tensor, token_weights: Tensor | None = None) -> Selected:
        if self.selection.by_threshold and not self.training:
            return Selected(threshold_encode(x, self.W_enc, self.b_enc, self.threshold))
        if self.selection.name == "batch_topk":
            return Selected(self._batch_topk(x))
        return Selected(self._topk(x, self.W_enc, self.b_enc, self.config.k, self.lanes.local, self._ids(None)))

    def _ids(self, local: Tensor | None) -> Tensor:
        every = torch.arange(self.lanes.local, device=self.W_enc.device) if local is None else local
        return self.lanes.ids(every)

    def _topk(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, most: int, ids: Tensor) -> SparseCodes:
        """Codes of the given rows, ids [rows]; `most` rows at most on any rank. `k` is at most the rows of all ranks."""
        rows, offered = len(x), min(k, most)
        mine = min(offered, len(ids))
        codes = topk_encode(x, W_enc, b_enc, mine) if mine else _no_codes(x, b_enc)
        # Ranks with fewer rows fill up with what is never chosen.
        values, place = x.new_full((rows, offered), -1.0), ids.new_full((rows, offered), self.config.d_sae)
        values = values.to(codes.dtype)
        values[:, :mine] = codes.values.detach().view(rows, mine)
        place[:, :mine] = ids[codes.indices].view(rows, mine)
        return _only(codes, top_of_row(values, place, k, self.tp)[:, :mine].reshape(-1))

    def _batch_topk(self, x: Tensor) -> SparseCodes:
        rows, d_sae, copies = len(x), self.config.d_sae, self.copies
        # One rank's tokens may take the budget of all.
        codes = batch_topk_encode(x, self.W_enc, self.b_enc, min(self.lanes.local, self.config.k * copies))
        token = codes.rows() + dist.get_rank(self.dp) * rows
        place = token * d_sae + self._ids(codes.indices)
        every, wanted = rows * copies * d_sae, rows * copies * self.config.k
        if wanted == 0:
            return codes
        return _only(codes, top_of_batch(codes.values.detach(), place, wanted, every, [self.tp, self.dp]))

    # -- losses ---------------------------------------------------------------------------------------------------------

    def decode(self, codes: SparseCodes) -> Tensor:
        """Raw-unit reconstruction [B, d_out] from every rank's codes of the same tokens: without the skip connection."""
        return self._to_raw_target(self._decoded(codes))

    def forward(self, x: Tensor) -> Tensor:
        self._check_source("forward", x)
        x = self.normalize_source(x)
        y_hat = self._decoded(self._select(x).codes)
        return self._to_raw_target(y_hat if self.W_skip is None else y_hat + self._skip(x))

    def _decoded(self, codes: SparseCodes) -> Tensor:
        return _sum(sparse_decode(codes, self.W_dec, torch.zeros_like(self.b_dec)), self.tp) + self.b_dec

    def _reconstruction(
        self, codes: SparseCodes, target: Tensor, explained: Tensor, token_weights: Tensor | None
    ) -> Reconstruction:
        config, nothing = self.config, torch.zeros_like(self.b_dec)
        edges = [0, *(self.lanes.width(width) for width in self.widths)]
        steps = [_between(codes, a, b) for a, b in itertools.pairwise(edges)]
        # One sum over ranks for all prefixes; each prefix adds its step to the one before.
        by_step = _sum(torch.stack([sparse_decode(step, self.W_dec, nothing) for step in steps]), self.tp)
        errors = by_step.cumsum(0) + self.b_dec - target
        squares = errors.square() if token_weights is None else errors.square() * token_weights[:, None]
        per_prefix = squares.sum((1, 2)) / max(1, target.numel())
        weights: Sequence[float] = config.prefix_weights or ()
        value = torch.stack([w * m for w, m in zip(weights, per_prefix, strict=True)]).sum()
        with torch.no_grad():
            variance = self._spread(explained)
            mse = per_prefix.detach()
        loss = by_convention(value, weights, config.loss, config.d_out, variance)
        return Reconstruction(loss, mse, mse / variance, errors[-1].detach(), variance)

    def _auxk(self, x: Tensor, rec: Reconstruction, dead: Tensor, token_weights: Tensor | None) -> Tensor:
        config, k = self.config, min(self.config.aux_latents, self._dead_everywhere)
        codes = self._topk(x, self.W_enc[dead], self.b_enc[dead], k, self._most_dead, self.lanes.ids(dead))
        nothing = torch.zeros_like(self.b_dec)
        partial = sparse_decode(codes, self.W_dec[dead], nothing) if len(dead) else torch.zeros_like(rec.residual)
        squares = (_sum(partial, self.tp) + rec.residual).square()
        squares = squares if token_weights is None else squares * token_weights[:, None]
        mse = squares.sum() / max(1, rec.residual.numel())
        variance, count = rec.target_variance, self._dead_everywhere
        return auxk_by_convention(mse, rec.residual, count, config.aux_latents, variance, config.loss, self._spread)

    def _spread(self, y: Tensor) -> Tensor:
        """`losses.spread` of the tokens of all ranks."""
        count = max(1, len(y)) * self.copies
        mean = self._total(y.sum(0)) / count
        sums = self._total(torch.stack([(y - mean).square().sum(), y.square().sum()])) / (count * y.shape[1])
        return never_zero(sums[0], sums[1])

    def _total(self, value: Tensor) -> Tensor:
        if self.copies > 1:
            dist.all_reduce(value, group=self.dp)
        return value

    # -- counters, gradients --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _track(self, codes: SparseCodes) -> None:
        active = codes.values > 0
        fired = torch.zeros_like(self.tokens_since_fired).index_add_(0, codes.indices, active.long())
        older = self.tokens_since_fired + codes.shape[0] * self.copies
        # Of this rank's tokens: the least over `dp`, which a refresh takes, is the count over all tokens.
        self.tokens_since_fired.copy_(torch.where(fired > 0, torch.zeros_like(older), older))
        values = codes.values
        smallest = smallest_active(values) if codes.nnz else values.new_full((), torch.inf)
        for group in (self.tp, self.dp):
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
        self.selection.move(self.threshold, smallest)

    def agree_on_counters(self) -> None:
        """Let `tokens_since_fired` count the tokens of all ranks, which call it together."""
        if self.copies > 1:
            dist.all_reduce(self.tokens_since_fired, dist.ReduceOp.MIN, group=self.dp)

    @torch.no_grad()
    def refresh_dead(self) -> int:
        """As `Transcoder.refresh_dead`, for all ranks together. Returns the number of dead latents of the dictionary."""
        self.agree_on_counters()
        return super().refresh_dead()

    def _list_dead(self) -> int:
        ids = self.dead.nonzero().squeeze(1)
        counts = torch.tensor([ids.numel()], device=ids.device).repeat(2)
        dist.all_reduce(counts[:1], group=self.tp)
        dist.all_reduce(counts[1:], dist.ReduceOp.MAX, group=self.tp)
        self._dead_everywhere, self._most_dead = counts.tolist()
        # A rank without dead latents still takes part in the sums of those that have some.
        self._dead_ids = ids if self._dead_everywhere else None
        return self._dead_everywhere

    @torch.no_grad()
    def clip_gradients(self, limit: float, bad: Tensor | None = None) -> Tensor:
        """Take the mean of the gradients over `dp`, then clip by the norm over all latents, as `Transcoder.clip_gradients`."""
        squares = self.W_enc.new_zeros(2)
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            self._total(parameter.grad).div_(self.copies)
            squares[int(self._has_latents(name, parameter))] += parameter.grad.square().sum()
        dist.all_reduce(squares[1:], group=self.tp)
        norm = squares.sum().sqrt()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        if bad is not None:
            flag = bad.to(torch.int32)
            for group in (self.tp, self.dp):
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
            bad.copy_(flag > 0)
        return norm


class _Sum(torch.autograd.Function):
    """Sum over ranks that all go on with it in the same way: each rank's gradient is then that of its own summand. (PyTorch's
    differentiable all-reduce also sums the gradients, which multiplies those of shards by the number of ranks.)"""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total: Tensor = _Sum.apply(value, group)
    return total


def _only(codes: SparseCodes, chosen: Tensor) -> SparseCodes:
    """The chosen entries [nnz] of codes. On a CPU the others are removed; elsewhere they stay with value 0, so that the host
    reads no size."""
    if codes.device.type != "cpu":
        return codes.with_values(torch.where(chosen, codes.values, torch.zeros_like(codes.values)))
    before = torch.zeros(codes.nnz + 1, dtype=torch.int64)
    torch.cumsum(chosen, 0, out=before[1:])
    return SparseCodes.trusted(codes.values[chosen], codes.indices[chosen], before[codes.row_ptr], codes.shape)


def _between(codes: SparseCodes, first: int, last: int) -> SparseCodes:
    """The entries whose latents lie in [first, last)."""
    if (first, last) == (0, codes.shape[1]):
        return codes
    return _only(codes, (codes.indices >= first) & (codes.indices < last))


def _no_codes(x: Tensor, like: Tensor) -> SparseCodes:
    ids = torch.zeros(0, dtype=torch.int64, device=x.device)
    return SparseCodes.trusted(like.new_zeros(0), ids, ids.new_zeros(len(x) + 1), (len(x), 0))
