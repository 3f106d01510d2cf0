"""All layers in one run against a run for each: the same weights, and a table of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import layer_set


@pytest.mark.slow
def test_both_ways_train_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_set, "LAYERS", 2)

    def here(_: str, way: str, layer: int, data: Path, out: Path, steps: int) -> dict[str, float]:
        return layer_set.one(way, layer, data, out, steps)

    monkeypatch.setattr(layer_set, "in_process", here)
    found = layer_set.measure(2, 1, None)
    assert list(found["ways"]) == ["one run", "a run each"]
    assert len(layer_set.table(found)) == 4

    def differs(out: Path) -> list[str]:
        return ["layer 1: W_enc"]

    monkeypatch.setattr(layer_set, "differing", differs)
    with pytest.raises(RuntimeError, match="differ: layer 1: W_enc"):
        layer_set.measure(2, 1, None)


def test_what_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transcoder.tensor_file as tensor_file

    for layer in range(layer_set.LAYERS):
        for folder in (f"one run-0/layers/{layer:02}", f"a run each-{layer}"):
            (tmp_path / folder / "checkpoints" / "step_00000002").mkdir(parents=True)

    def read(path: Path) -> dict[str, Any]:
        return {"W_enc": torch.ones(2), "b_enc": torch.tensor(float("a run each-3" in str(path)))}

    monkeypatch.setattr(tensor_file, "read_tensors", read)
    assert list(layer_set.differing(tmp_path)) == ["layer 3: b_enc"]
