"""The stream against the bare model: both compute the same, and a round holds whole refills."""

from __future__ import annotations

import pytest
import torch

from bench import harvest
from bench.interleaved_timing import WrongResultError
from bench.results import label, table

TINY = {"activations.sequences_per_forward": 2, "activations.sequence_length": 16}


def test_a_row_has_both_and_their_ratio() -> None:
    row = harvest.measured(TINY, 2)
    assert label(row) == "harvest, demo, 2 x 16 tokens, to layer 2"
    bare, stream = row["kinds"]["the bare model"], row["kinds"]["the stream"]
    assert stream["ratio"]["total"] == pytest.approx(
        stream["seconds_per_step"]["total"] / bare["seconds_per_step"]["total"]
    )
    assert sum("x the bare model" in line for line in table([row])) == 2


def test_another_layer_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = harvest.Bare.__call__
    monkeypatch.setattr(harvest.Bare, "__call__", lambda self, tokens: plain(self, tokens).flip(0))
    with pytest.raises(WrongResultError, match="the stream's model: off by"):
        harvest.measured(TINY, 1)
    assert torch.is_grad_enabled()
