"""A whole training step on tensors that have no values.

On the meta device only shapes exist: `.item()`, `bool(tensor)`, `nonzero`, a boolean mask as an index, `unique`, or a size
taken from a tensor raise. All branches by device are those of a GPU (they ask for "cpu"). What this cannot see: copies
from the host that wait (pageable memory), and the Triton kernels.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.planted import Planted, config
from transcoder.kernels import use_backend
from transcoder.model import Transcoder
from transcoder.training import layer_trainer, nonfinite, sources, trainer

META = torch.device("meta")


class Later:
    """Stands in for a size that is on its way through pinned memory, which only a machine with a GPU has."""

    def __init__(self, size: torch.Tensor) -> None:
        assert size.device == META

    def arrived(self) -> bool:
        return True

    def read(self) -> int:
        return 50


class Good(Later):
    """The verdict on a step."""

    def arrived(self) -> bool:
        return False

    def read(self) -> int:
        return 0


class PlainAdam(torch.optim.Adam):
    """PyTorch has no fused Adam for meta, and the others do not know the flag that the fused ones skip a step by."""

    def step(self, closure: Any = None) -> None:
        assert self.found_inf.device == META
        vars(self)["found_inf"] = None
        super().step(closure)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs before a step may read values; for a step on meta it is replaced."""
    from transcoder.kernels.correlation import op

    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    # There is no autocast for meta: types are then fp32 throughout, which changes no shape.
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
    monkeypatch.setattr(op, "DeferredSize", Later)
    monkeypatch.setattr(nonfinite, "DeferredSize", Good)
    monkeypatch.setattr(sources, "check_values", lambda *_: None)
    monkeypatch.setattr(
        layer_trainer, "make_optimizer", lambda model, section, lr: PlainAdam(model.parameters(), lr=lr, foreach=False)
    )

    def five_dead(self: Transcoder) -> int:
        self._dead_ids = torch.empty(5, dtype=torch.int64, device=META)
        return 5

    monkeypatch.setattr(Transcoder, "_list_dead", five_dead)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("loss", ["mse", "fvu", "dictionary_learning"])
def test_no_part_of_a_step_reads_a_tensor(on_meta: None, tmp_path: Path, activation: str, loss: str) -> None:
    settings: dict[str, Any] = {
        "transcoder__activation": activation,
        "transcoder__loss": loss,
        "transcoder__skip": True,
        "transcoder__normalize": "none",
        "training__accumulation": 2,
        "antidup__regularizer__position_entropy_weight": 0.1,
        "antidup__regularizer__all_pairs_weight": 0.1,
        "antidup__regularizer__orthogonality_every": 1,
        "antidup__samples__collect_every": 1,
    }
    with use_backend("torch"), contextlib.ExitStack() as stack:
        made, run_dir = config(**settings), tmp_path / "run"
        parts = trainer.RunParts(made, run_dir, META, Planted(), None, stack)
        run = trainer.Trainer(made, run_dir, META, parts, stack)
        monitor = run.parts.monitor
        assert monitor is not None
        pairs = torch.empty(7, dtype=torch.int64, device=META)
        monitor._targets = (pairs, pairs)
        run.layers[0].transcoder.train()
        for _ in range(3):
            run._train_step()
            run.step += 1
        run.look(0)
    used = run.parts.metrics_log.meters._sums
    for name in ("correlation", "orthogonality", "all_pairs", "position_entropy"):
        assert f"regularizer/{name}_penalty" in used
    assert {"losses/auxiliary_reconstruction_loss", "details/gradient_norm", "metrics/fvu_prefix_16"} <= set(used)
    assert all(total.device == META for total in used.values())


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.unique(),
        lambda t: torch.repeat_interleave(t, t.long()),
        lambda t: t.cpu().float(),
    ],
)
def test_such_a_tensor_lets_nobody_read_it(read: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(3, device=META))
