"""Our files in dictionary_learning and its files in ours: the same function both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.interop.formats import ChangedFunctionError, export_transcoder, read_transcoder

from .makers import check_same, inputs, transcoder

dictionary_learning = pytest.importorskip(
    "dictionary_learning",
    reason="dictionary_learning is not installed here: python tests/interop/run.py dictionary-learning",
)


def loaded(folder: Path) -> Any:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), device="cpu")
    return dictionary


@pytest.mark.parametrize(
    ("activation", "widths", "name"),
    [
        ("topk", None, "AutoEncoderTopK"),
        ("batch_topk", None, "BatchTopKSAE"),
        ("batch_topk", [24, 40, 96], "MatryoshkaBatchTopKSAE"),
    ],
)
@torch.no_grad()
def test_ours_is_a_dictionary_of_theirs(tmp_path: Path, activation: str, widths: list[int] | None, name: str) -> None:
    model = transcoder(activation, widths=widths)
    export_transcoder(model, "dictionary_learning", tmp_path / "out")
    theirs, x = loaded(tmp_path / "out"), inputs(200, 16)
    assert type(theirs).__name__ == name
    check_same(model.encode(x).to_dense(), theirs.encode(x), x)
    check_same(model(x), theirs(x), x)
    again = read_transcoder("dictionary-learning", tmp_path / "out").transcoder
    assert again.widths == model.widths
    check_same(theirs(x), again(x), x)


@torch.no_grad()
def test_a_threshold_a_latent_is_their_jump_relu(tmp_path: Path) -> None:
    model = transcoder("batch_topk", latent_thresholds=True)
    model.threshold.copy_(torch.linspace(0.5, 3, 96))
    export_transcoder(model, "dictionary-learning", tmp_path / "out")
    theirs, x = loaded(tmp_path / "out"), inputs(200, 16)
    check_same(model(x), theirs(x), x)


def test_a_skip_connection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChangedFunctionError, match="no skip connection"):
        export_transcoder(transcoder("topk", skip=True), "dictionary-learning", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
@torch.no_grad()
def test_theirs_is_the_same_function_here(tmp_path: Path, name: str) -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    homes = {
        "AutoEncoderTopK": top_k,
        "BatchTopKSAE": batch_top_k,
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k,
    }
    arguments: dict[str, Any] = {"k": 5} if name in homes else {}
    if name == "MatryoshkaBatchTopKSAE":
        arguments["group_sizes"] = [24, 16, 56]
    theirs = getattr(homes.get(name, dictionary), name)(16, 96, **arguments)
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theirs.threshold.fill_(1.5)
    if name == "JumpReluAutoEncoder":
        theirs.threshold.copy_(torch.linspace(-0.2, 2, 96))
    # As its training loop saves.
    torch.save({key: value.cpu() for key, value in theirs.state_dict().items()}, tmp_path / "ae.pt")
    trainer = {"dict_class": name, **arguments}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}), encoding="utf-8")
    found, x = read_transcoder("dictionary-learning", tmp_path), inputs(200, 16)
    check_same(theirs(x), found.transcoder(x), x)
    if name == "MatryoshkaBatchTopKSAE":
        assert found.transcoder.widths == (24, 40, 96)
    if arguments:
        assert found.transcoder.config.k == 5
