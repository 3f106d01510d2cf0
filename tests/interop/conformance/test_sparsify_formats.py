"""Our files in sparsify and its files in ours: the same function both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.interop.formats import ChangedFunctionError, export_transcoder, read_transcoder

from .makers import check_same, inputs, transcoder

if not torch.cuda.is_available():
    # It takes its Triton decoder wherever Triton can be imported, which without a GPU then finds no driver.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
sparsify = pytest.importorskip(
    "sparsify", reason="sparsify is not installed here: python tests/interop/run.py sparsify"
)


def dense(theirs: sparsify.SparseCoder, x: Tensor) -> Tensor:
    codes = theirs.encode(x)
    return torch.zeros(len(x), theirs.num_latents).scatter(1, codes.top_indices, codes.top_acts)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_ours_is_a_sparse_coder_of_theirs(tmp_path: Path, skip: bool) -> None:
    model = transcoder("topk", skip=skip)
    export_transcoder(model, "sparsify", tmp_path / "out")
    theirs, x = sparsify.SparseCoder.load_from_disk(tmp_path / "out"), inputs(200, 16)
    assert (theirs.cfg.transcode, theirs.cfg.k, theirs.num_latents) == (True, 6, 96)
    check_same(model.encode(x).to_dense(), dense(theirs, x), x)
    check_same(model(x), theirs(x).sae_out, x)
    theirs.save_to_disk(tmp_path / "again")
    first, again = (read_transcoder("sparsify", tmp_path / name).transcoder for name in ("out", "again"))
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


@torch.no_grad()
def test_delphis_loader_takes_our_folder_of_a_hookpoint(tmp_path: Path) -> None:
    loader = pytest.importorskip("delphi.sparse_coders.load_sparsify", reason="delphi is not installed here")
    model, x = transcoder("topk", skip=True), inputs(200, 16)
    export_transcoder(model, "sparsify", tmp_path / "set" / "layers.1.mlp")
    block = torch.nn.ModuleDict({"mlp": torch.nn.Identity()})
    language_model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block, block])})
    language_model.device = torch.device("cpu")
    encoders, transcode = loader.load_sparsify_hooks(language_model, str(tmp_path / "set"), ["layers.1.mlp"])
    assert transcode
    ((name, encode),) = encoders.items()
    assert name == "layers.1.mlp"
    check_same(model.encode(x).to_dense(), encode(x), x)


@torch.no_grad()
def test_batch_topk_is_refused_and_on_request_becomes_their_topk(tmp_path: Path) -> None:
    model = transcoder("batch_topk")
    with pytest.raises(ChangedFunctionError, match="sparsify knows TopK only"):
        export_transcoder(model, "sparsify", tmp_path / "out")
    record = export_transcoder(model, "sparsify", tmp_path / "out", allow_changed_function=True)
    assert record.function == "changed"
    theirs, x = sparsify.SparseCoder.load_from_disk(tmp_path / "out"), inputs(200, 16)
    assert bool(((dense(theirs, x) > 0).sum(1) <= 6).all())


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_theirs_is_the_same_function_here(tmp_path: Path, transcode: bool, skip: bool) -> None:
    config = sparsify.SparseCoderConfig(num_latents=96, k=5, transcode=transcode, skip_connection=skip)
    theirs = sparsify.SparseCoder(16, config)
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_to_disk(tmp_path)
    found, x = read_transcoder("sparsify", tmp_path), inputs(200, 16)
    check_same(theirs(x).sae_out, found.transcoder(x), x)
    check_same(dense(theirs, x), found.transcoder.encode(x).to_dense(), x)


def test_groupmax_is_refused(tmp_path: Path) -> None:
    sparsify.SparseCoder(16, sparsify.SparseCoderConfig(num_latents=96, k=6, activation="groupmax")).save_to_disk(
        tmp_path
    )
    with pytest.raises(ChangedFunctionError, match="groupmax"):
        read_transcoder("sparsify", tmp_path)
