"""Recycling: a fold keeps the function where the pair was one, the freed latent begins anew, runs with it resume exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from bench.science.toy import BATCH, Toy, independent
from transcoder import ActivationBatch, RunConfig, Transcoder, TranscoderConfig, train_transcoder
from transcoder.antidup.merge_cost import MergeResult
from transcoder.config import ConfigError, RecycleSection
from transcoder.training.optimizer import make_optimizer
from transcoder.training.recycling import Recycler, _disjoint


def pair_of_copies() -> Transcoder:
    """Latent 5 fires exactly where latent 2 does, at 0.6 of its size, with a decoder row of its own."""
    model = Transcoder(TranscoderConfig(d_in=6, d_out=5, d_sae=8, k=8), seed=3)
    with torch.no_grad():
        model.b_enc.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
        model.W_enc[5], model.b_enc[5] = 0.6 * model.W_enc[2], 0.6 * model.b_enc[2]
    return model


def test_a_fold_of_copies_keeps_the_function() -> None:
    model = pair_of_copies()
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    before = model(x)
    model.recycle(torch.tensor([2]), torch.tensor([5]), torch.tensor([0.6]), seed=9)
    fresh = model.encode(x).to_dense()[:, 5]
    assert bool((fresh > 0).any())  # anew, it does something else
    after = model(x) - fresh[:, None] * model.W_dec[5]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


def test_the_freed_latent_is_dead_small_and_follows_the_seed() -> None:
    rows = []
    for seed in (9, 9, 10):
        model = pair_of_copies()
        model.recycle(torch.tensor([2]), torch.tensor([5]), torch.tensor([0.6]), seed=seed)
        assert model.refresh_dead() == 1
        assert model.dead.nonzero().flatten().tolist() == [5]
        assert float(model.W_enc[5].detach().norm()) < 0.25
        assert not bool(model.b_enc[5].any())
        rows.append(torch.cat([model.W_enc[5], model.W_dec[5]]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_latent_twice_is_refused() -> None:
    model = pair_of_copies()
    with pytest.raises(ValueError, match="no latent twice"):
        model.recycle(torch.tensor([2, 5]), torch.tensor([5, 6]), torch.ones(2), seed=0)
    with pytest.raises(ValueError, match=r"scale of shape \[1\]"):
        model.recycle(torch.tensor([2, 3]), torch.tensor([5, 6]), torch.ones(1), seed=0)
    with pytest.raises(ValueError, match=r"in \[0, 8\)"):
        model.recycle(torch.tensor([2]), torch.tensor([8]), torch.ones(1), seed=0)


def result(pairs: list[tuple[int, int]]) -> MergeResult:
    kept, dropped = (torch.tensor(side, dtype=torch.int64) for side in zip(*pairs, strict=True))
    real = torch.zeros(len(pairs), dtype=torch.float64)
    return MergeResult(kept, dropped, real + 0.6, real, real + 1, torch.full_like(kept, 99))


def test_rows_that_cancel_are_not_folded() -> None:
    W = torch.eye(9)
    W[2] = -W[1] / 0.6  # the scale of these results
    found = _disjoint(result([(1, 2), (4, 5)]), W, most=9)
    assert found.kept.tolist() == [4]
    model = pair_of_copies()
    with torch.no_grad():
        model.W_dec[5] = -model.W_dec[2]
    with pytest.raises(ValueError, match=r"rows of \[2\] and their partners cancel"):
        model.recycle(torch.tensor([2]), torch.tensor([5]), torch.tensor([1.0]), seed=0)


def test_a_round_takes_each_latent_once() -> None:
    found = _disjoint(result([(1, 2), (2, 3), (4, 5), (6, 4), (7, 8)]), torch.eye(9), most=2)
    assert list(zip(found.kept.tolist(), found.dropped.tolist(), strict=True)) == [(1, 2), (4, 5)]


class Foldable:
    """What a recycler asks of a monitor."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs, self.forgotten = pairs, torch.empty(0)

    def foldable(self) -> MergeResult:
        return result(self.pairs)

    def forget(self, latents: Tensor) -> None:
        self.forgotten = latents


def test_a_round_resets_the_moments_and_logs_each_pair(tmp_path: Path) -> None:
    model = pair_of_copies()
    config = RunConfig().replace({"training.lr": 1e-3})
    optimizer = make_optimizer(model, config.training, 1e-3)
    model(torch.randn(9, 6)).square().sum().backward()
    optimizer.step()
    before = optimizer.state[model.W_enc]["exp_avg"].clone()
    assert bool((before[5] != 0).any())
    recycler, monitor = Recycler(RecycleSection(every=10, until=0.5), 0, tmp_path), Foldable([(2, 5)])
    fvu = iter([0.5, 0.6])
    lines = recycler.act(10, model, optimizer, monitor, lambda: next(fvu))  # type: ignore[arg-type]
    assert (lines[0]["round_fvu_before"], lines[0]["round_fvu_after"]) == (0.5, 0.6)
    for parameter in (model.W_enc, model.W_dec, model.b_enc):
        assert not bool(optimizer.state[parameter]["exp_avg"][5].any())
        assert not bool(optimizer.state[parameter]["exp_avg_sq"][5].any())
    assert torch.equal(optimizer.state[model.W_enc]["exp_avg"][2], before[2])
    assert sorted(monitor.forgotten.tolist()) == [2, 5]
    assert model.dead.nonzero().flatten().tolist() == [5]
    recycler.log(10, lines)
    recycler.log(20, [{**lines[0], "step": 20}])
    recycler.log(20, [{**lines[0], "step": 20}])  # a resumed run writes its lines again, not twice
    written = [json.loads(line) for line in recycler.path.read_text().splitlines()]
    assert [(line["step"], line["kept"], line["dropped"]) for line in written] == [(10, 2, 5), (20, 2, 5)]


class Stream:
    """A toy's batches, resumable."""

    def __init__(self) -> None:
        self.toy, self.index = Toy(independent(160, 5), 160, 0), 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> ActivationBatch:
        self.index += 1
        return self.toy.tokens(BATCH, self.index)[0]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def recycling(**settings: Any) -> RunConfig:
    return RunConfig().replace(
        {
            "name": "recycling",
            "model.device": "cpu",
            "transcoder.d_sae": 256,
            "transcoder.k": 16,
            "transcoder.dead_after_tokens": 200 * BATCH,
            "training.steps": 600,
            "training.batch_size": BATCH,
            "training.lr": 3e-3,
            "training.evaluation_tokens": 4 * BATCH,
            "antidup.positions.enabled": False,
            # Samples of all of training, not those of a last look by the final weights.
            "logging.report_tokens": 0,
            "antidup.samples.forget_after": 1.0,
            "antidup.regularizer.enabled": False,
            "antidup.monitor.block_tokens": 20 * BATCH,
            "antidup.monitor.correlation_save_frequency": 25,
            "antidup.monitor.blocks_to_flag": 1,
            "antidup.monitor.blocks_remembered": 2,
            "antidup.monitor.min_support": 50,
            "antidup.recycle.enabled": True,
            "antidup.recycle.every": 50,
            "checkpoint.every": 400,
            "logging.progress": False,
            "logging.report": False,
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
    )


@pytest.mark.slow
def test_a_run_recycles_and_resumes_exactly(tmp_path: Path) -> None:
    whole = train_transcoder(recycling(), tmp_path / "whole", batches=Stream())
    lines = (tmp_path / "whole" / "anti_duplication_logs" / "recycled.jsonl").read_text()
    recycled = [json.loads(line) for line in lines.splitlines()]
    assert recycled
    assert all(line["merge_share"] <= 0.1 and line["step"] <= 480 and line["step"] % 50 == 0 for line in recycled)
    assert any(line["step"] > 400 for line in recycled)  # after the checkpoint that is resumed from
    figures = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    totals = [line["duplicates/recycled"] for line in figures if "duplicates/recycled" in line]
    assert totals[-1] == len(recycled)
    assert all(abs(line["round_fvu_after"] / line["round_fvu_before"] - 1) < 0.2 for line in recycled)
    samples = pq.read_table(tmp_path / "whole" / "activation_samples" / "samples.parquet").to_pylist()
    began = {line["dropped"]: line["step"] for line in recycled}
    of_freed = [(began[row["latent"]], row["step"]) for row in samples if row["latent"] in began]
    assert of_freed
    assert all(step >= begin for begin, step in of_freed)  # none of what the latent was before
    # The same run, lost after its checkpoint of step 400.
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "step_00000600")
    again = train_transcoder(recycling(), cut, resume=True, batches=Stream())
    for mine, theirs in zip(
        again.transcoder.state_dict().values(), whole.transcoder.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert (cut / "anti_duplication_logs" / "recycled.jsonl").read_text() == lines


def test_recycling_needs_flags_and_the_merge_test(tmp_path: Path) -> None:
    for settings in (
        {"antidup__monitor__enabled": False},
        {"antidup__monitor__merge_test_tokens": 0},
        {"transcoder__aux_k": 0},
    ):
        with pytest.raises(ConfigError, match=r"antidup\.recycle\.enabled"):
            train_transcoder(recycling(**settings), tmp_path / "run", batches=Stream())
