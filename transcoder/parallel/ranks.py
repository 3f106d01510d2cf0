"""The processes of one run under torchrun: what they tell each other, and how they end together."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from transcoder.activations.batch import ActivationBatch, batch_of, columns_of
from transcoder.kernels import SparseCodes
from transcoder.model import StepOutput, Transcoder
from transcoder.parallel.sharded import ShardedTranscoder

T = TypeVar("T")

_RUNS = itertools.count()
CAUSE, TOLD = "cause", "told"
"""Keys of torchrun's store: why the run ends, and how many processes have said so."""
CAUSE_SECONDS = 3.0
"""How long a process that lost another one waits for the cause: the store gets it before the connection is closed."""
SIGNALS = (None, "SIGUSR1", "SIGTERM", "SIGINT")


class RankError(RuntimeError):
    """Another process of this run failed or was killed. The message is its cause."""


class Ranks:
    """Every process of a run trains on its part of each batch; all of them hold equal weights and equal observers.

    Collectives of a step run on `device` (NCCL on GPUs), those of the host on gloo. `joined` makes it.
    """

    def __init__(self, device: torch.device, store: dist.Store, rank: int, count: int) -> None:
        self.device, self.rank, self.count, self._store = device, rank, count, store
        self.mesh = init_device_mesh(device.type, (count, 1), mesh_dim_names=("dp", "tp"))
        self._group = self.mesh.get_group("dp")
        # A group of its own: an exchange of the host never meets a collective of a step.
        self._host = dist.new_group(backend="gloo")
        self.agreed = False
        """All processes know of the failure, at the same place of the run: they can still save its state together."""

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator[Ranks]:
        """The processes that torchrun has started, each with its device. An error that leaves the block is told to the others;
        one that comes of another process's end is raised as a `RankError` that names that process's cause."""
        store, rank, count = next(dist.rendezvous("env://"))
        # Runs of one process after another do not read each other's keys.
        store = dist.PrefixStore(f"run {next(_RUNS)}", store)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        wait = datetime.timedelta(minutes=30)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=count, timeout=wait
        )
        ranks = cls(device, store, rank, count)
        try:
            yield ranks
        except Exception as error:
            if ranks.agreed:
                raise
            lost = ranks._peers_cause(error)
            if lost is None:
                ranks._tell(error)
                raise
            raise RankError(lost) from None
        dist.destroy_process_group()

    # -- agreement ------------------------------------------------------------------------------------------------

    def signal(self, mine: str | None) -> str | None:
        """The signal that any process has received: they stop after the same step."""
        number = torch.tensor([SIGNALS.index(mine)])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._host)
        return SIGNALS[int(number)]

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every process; where it fails on one, all raise: that one its error, the others a `RankError`."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = torch.tensor([self.count if error is None else self.rank])
        dist.all_reduce(failed, dist.ReduceOp.MIN, group=self._host)
        first = int(failed)
        if first < self.count:
            said = [None if error is None else _words(error)]
            dist.broadcast_object_list(said, src=first, group=self._host)
            self.agreed = True
            raise error or RankError(f"process {first} of the run: {said[0]}")
        return result  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` gives on process 0, on all of them."""
        found = [self.together(lambda: make() if self.rank == 0 else None)]
        dist.broadcast_object_list(found, src=0, group=self._host)
        return found[0]  # type: ignore[return-value]

    def objects(self, mine: T) -> list[T]:
        """What each process has, by rank. Tensors come on the CPU."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine, group=self._host)
        return found

    def _tell(self, error: Exception) -> None:
        with contextlib.suppress(Exception):
            if self._store.add(TOLD, 1) == 1:
                self._store.set(CAUSE, f"process {self.rank} of the run: {_words(error)}")

    def _peers_cause(self, error: Exception) -> str | None:
        """Why another process ended, where `error` comes of that; None where it is this process's own."""
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection"))
        until = time.monotonic() + CAUSE_SECONDS
        while lost and time.monotonic() < until:
            with contextlib.suppress(Exception):
                if self._store.check([CAUSE]):
                    return self._store.get(CAUSE).decode()
            time.sleep(0.1)
        if not lost:
            return None
        return (
            "another process of the run ended without a word (killed, or out of memory; torchrun names it): the last "
            "checkpoint is whole, and --resume goes on from it"
        )

    # -- what all processes have whole ------------------------------------------------------------------------------

    def shared(self, transcoder: Transcoder) -> ShardedTranscoder:
        """The transcoder for a step on parts of a batch."""
        return ShardedTranscoder(transcoder, self.mesh, lanes=1)

    def gathered(self, transcoder: Transcoder) -> Transcoder:
        """The whole of what `shared` gave."""
        return transcoder.gather() if isinstance(transcoder, ShardedTranscoder) else transcoder

    def agree_on_counters(self, transcoder: Transcoder) -> None:
        """Let `tokens_since_fired` count the tokens of all processes."""
        if isinstance(transcoder, ShardedTranscoder):
            transcoder.agree_on_counters()

    def rows(self, mine: Tensor) -> Tensor:
        """[B, ...] of every process's rows [B / processes, ...], in the order of ranks."""
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, mine.contiguous(), group=self._group)
        return torch.cat(parts)

    def codes(self, mine: SparseCodes) -> SparseCodes:
        """The codes of the whole batch. The gradient of a value reaches the process that has its token, multiplied by the
        number of processes: their gradients are averaged."""
        sizes = mine.row_ptr[1:] - mine.row_ptr[:-1]
        most = mine.nnz
        if mine.device.type == "cpu":  # Elsewhere all processes store equally many.
            count = torch.tensor([most])
            dist.all_reduce(count, dist.ReduceOp.MAX, group=self._group)
            most = int(count)
        values: Tensor = _Rows.apply(_padded(mine.values, most), self)
        indices = self.rows(_padded(mine.indices, most))
        lengths = self.rows(sizes)
        if mine.device.type == "cpu":
            of_rank = lengths.view(self.count, -1).sum(1)
            kept = (torch.arange(most) < of_rank[:, None]).flatten()
            values, indices = values[kept], indices[kept]
        row_ptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return SparseCodes.trusted(values, indices, row_ptr, (len(lengths), mine.shape[1]))

    def whole(self, mine: StepOutput, batch: ActivationBatch) -> tuple[StepOutput, ActivationBatch]:
        """A step of the whole batch: losses are means over processes, and `loss` has this process's gradient; codes, residual
        and batch are those of all."""
        names = ("loss", "reconstruction_loss", "aux_loss", "mse_per_prefix", "fvu_per_prefix")
        means = dict(zip(names, self.means([getattr(mine, name) for name in names]), strict=True))
        # The value of the mean, and the gradient of this process's loss.
        means["loss"] = mine.loss + (means["loss"] - mine.loss.detach())
        whole = mine._replace(**means, codes=self.codes(mine.codes), residual=self.rows(mine.residual))
        return whole, batch_of(
            {name: self.rows(value) for name, value in columns_of(batch).items()}, batch.context_anchor
        )

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean over processes of each 0-dim tensor or vector."""
        flat = torch.cat([value.detach().reshape(-1) for value in values])
        dist.all_reduce(flat, group=self._group)
        parts = (flat / self.count).split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


class _Rows(torch.autograd.Function):
    """`Ranks.rows`, with the gradient that `Ranks.codes` describes."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.rows(mine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.ranks
        return grad.chunk(ranks.count)[ranks.rank] * ranks.count, None


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def device_of_rank(name: str) -> str:
    """`model.device` for this process: of `auto` and `cuda`, the GPU of its place on the machine."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name
