"""A checkpoint that an earlier version wrote (tests/faults/earlier, of commit d7cfb7f) is still resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.training.planted import Planted
from transcoder.checkpoint_folder import content_digest
from transcoder.config import RunConfig
from transcoder.training import train_transcoder
from transcoder.training.checkpoint import CheckpointError, CheckpointStore, load_checkpoint

EARLIER = Path(__file__).with_name("earlier")


def test_it_goes_on_with_its_weights_and_moments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(EARLIER, run_dir)
    before = load_checkpoint(run_dir / "checkpoints" / "step_00000011")
    held = [next(b) for b in [Planted()] for _ in range(4)]
    settings = RunConfig.load(run_dir / "config.yaml")
    result = train_transcoder(settings, run_dir, resume=True, batches=Planted(), heldout=held)
    assert result.finished
    assert (before.step, result.step) == (11, 20)
    after = load_checkpoint(run_dir / "checkpoints" / "step_00000020")
    assert after.trainer_tree["tokens"] == before.trainer_tree["tokens"] + 9 * 64
    assert after.trainer_tree["optimizer"]["state"][0]["step"] == 20
    assert not torch.equal(after.model["W_enc"], before.model["W_enc"])
    assert "monitor begins anew: the checkpoint is of an earlier version" in caplog.text


@pytest.mark.parametrize(("version", "message"), [(99, r"format 99.*upgrade"), (0, "format 0"), ("1", "format '1'")])
def test_a_format_that_cannot_be_read_is_refused_by_number(tmp_path: Path, version: object, message: str) -> None:
    shutil.copytree(EARLIER, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000011" / "state.json"
    body = json.loads(file.read_text())
    del body["sha256"]
    body["version"] = version
    file.write_text(json.dumps({**body, "sha256": content_digest(body)}))
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path / "run").latest()
