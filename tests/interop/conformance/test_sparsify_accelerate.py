"""`transcoder.accelerate` on sparsify's SparseCoder: outputs, losses, gradients, optimizer steps, saving and loading."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

# Their Triton decoder has no CPU side; read when the package is imported.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
sparsify = pytest.importorskip(
    "sparsify", reason="sparsify is not installed here: python tests/interop/run.py sparsify"
)

import transcoder  # noqa: E402
from transcoder.interop.accelerate import DenseView, PeerVersionError  # noqa: E402
from transcoder.interop.accelerate.dispatch import FEWEST_ROWS  # noqa: E402

from .makers import global_state  # noqa: E402

B, D, N, K = 33, 24, 96, 5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CASES: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "multi": {"multi_topk": True},
}


def make(**settings: Any) -> Any:
    torch.manual_seed(0)
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K, **settings))
    with torch.no_grad():
        coder.W_dec.add_(0.1 * torch.randn(N, D))
        coder.encoder.bias.uniform_(-0.1, 0.1)
        coder.b_dec.uniform_(-0.1, 0.1)
    return coder


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.randn(B, D, generator=generator)


def loss(coder: Any, seed: int = 1, dead: int = 0) -> torch.Tensor:
    x, y = batch(seed)
    mask = torch.arange(N) >= N - dead if dead else None
    out = coder(x, y if coder.cfg.transcode else None, dead_mask=mask)
    total: torch.Tensor = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
    return total


@pytest.mark.parametrize("dead", [0, 7, 40])
@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_gradients(case: str, dead: int) -> None:
    theirs = make(**CASES[case])
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    assert isinstance(ours, sparsify.SparseCoder)
    x, y = batch()
    mask = torch.arange(N) >= N - dead
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        left, right = (c(x, y, dead_mask=mask) for c in (theirs, ours))
        for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
            torch.testing.assert_close(getattr(right, name), getattr(left, name), **CLOSE)
        order = left.latent_indices.sort(1)
        assert torch.equal(right.latent_indices, order.values)
        torch.testing.assert_close(right.latent_acts, left.latent_acts.gather(1, order.indices), **CLOSE)
        for coder in (theirs, ours):
            loss(coder, dead=dead).backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_auxk_reaches_the_encoder_where_that_is_asked_for() -> None:
    kept, repaired = make(), make()
    transcoder.accelerate(kept, always=True)
    transcoder.accelerate(repaired, repair_auxk=True, always=True)
    x, y = batch()
    mask = torch.arange(N) >= N - 7
    grads = []
    for coder in (kept, repaired):
        coder(x, y, dead_mask=mask).auxk_loss.backward()
        grads.append(coder.encoder.weight.grad)
    assert grads[0] is None
    # The gradient that plain autograd gives.
    plain = make()
    read = x - plain.b_dec
    acts = torch.relu(plain.encoder(read))[:, mask]
    with torch.no_grad():
        out = make()(x, y)
    e = y - out.sae_out
    variance = (y - y.mean(0)).pow(2).sum()
    ((7 / (D // 2)) * (acts @ plain.W_dec[mask] - e).pow(2).sum() / variance).backward()
    torch.testing.assert_close(grads[1], plain.encoder.weight.grad, **CLOSE)


def test_ten_optimizer_steps_side_by_side() -> None:
    theirs = make(**CASES["skip"])
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.Adam(c.parameters(), lr=1e-3) for c in (theirs, ours)]
    transcoder.accelerate(ours, always=True)
    for seed in range(10):
        for coder, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss(coder, seed, dead=10).backward()
            optimizer.step()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        far = (q - p).abs() > 1e-4
        assert far.float().mean() < 0.01, f"{name}: {int(far.sum())} of {far.numel()}"


def test_saved_by_one_and_loaded_by_the_other(tmp_path: Path) -> None:
    ours, theirs = transcoder.accelerate(make(**CASES["skip"]), always=True), make(**CASES["skip"])
    ours.save_to_disk(tmp_path / "ours")
    theirs.save_to_disk(tmp_path / "theirs")
    x, y = batch()
    loaded = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    assert type(loaded) is type(theirs)
    torch.testing.assert_close(loaded(x, y).sae_out, theirs(x, y).sae_out, **CLOSE)
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is type(ours)
    torch.testing.assert_close(again(x, y).sae_out, theirs(x, y).sae_out, **CLOSE)
    quick = transcoder.accelerate(sparsify.SparseCoder.load_from_disk(tmp_path / "theirs"), always=True)
    torch.testing.assert_close(quick(x, y).sae_out, theirs(x, y).sae_out, **CLOSE)


def test_what_is_dense_is_announced_and_right() -> None:
    theirs = _groupmax()
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    x, y = batch()
    with pytest.warns(DenseView, match="groupmax"):
        right = ours(x, y)
    torch.testing.assert_close(right.sae_out, theirs(x, y).sae_out, **CLOSE)
    coder = transcoder.accelerate(make(), always=True)
    with pytest.warns(DenseView):
        dense = coder.encode(x).pre_acts + 0
    torch.testing.assert_close(dense, torch.relu(coder.encoder(x - coder.b_dec)), **CLOSE)


def test_it_stays_the_same_object_and_the_library_as_it_was() -> None:
    coder = make(**CASES["skip"])
    before = {n: (p, p.data_ptr(), tuple(p.shape)) for n, p in coder.named_parameters()}
    keys, cls = list(coder.state_dict()), type(coder)
    seen: list[tuple[int, ...]] = []
    coder.register_forward_hook(lambda module, args, out: seen.append(tuple(out.sae_out.shape)))
    state = global_state("sparsify")
    assert transcoder.accelerate(coder, always=True) is coder
    assert transcoder.accelerate(coder, always=True) is coder
    loss(coder, dead=7).backward()
    after = global_state("sparsify")
    assert {name: after.get(name) for name in state} == state
    assert isinstance(coder, cls)
    assert type(make()) is cls
    assert list(coder.state_dict()) == keys
    assert {n: (p, p.data_ptr(), tuple(p.shape)) for n, p in coder.named_parameters()} == before
    assert seen == [(B, D)], "a forward hook made before acceleration"


def test_a_dense_view_is_announced_once() -> None:
    coder = transcoder.accelerate(make(), always=True)
    with pytest.warns(DenseView):
        assert bool((coder.encode(batch()[0]).pre_acts + 0).isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        assert bool((coder.encode(batch()[0]).pre_acts + 0).isfinite().all())


def test_few_rows_take_the_librarys_own_path() -> None:
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=2048, k=K))
    transcoder.accelerate(coder)
    x = torch.randn(FEWEST_ROWS, D)
    assert not hasattr(coder.encode(x[1:]).top_indices, "_transcoder_codes")
    assert hasattr(coder.encode(x).top_indices, "_transcoder_codes")
    assert hasattr(transcoder.accelerate(coder, always=True).encode(x[1:]).top_indices, "_transcoder_codes")


def _groupmax() -> Any:
    torch.manual_seed(0)
    return sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=8, activation="groupmax"))


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.0")
    with pytest.raises(PeerVersionError, match=r"tested with eai-sparsify 1\.3\.3, found 9\.0"):
        transcoder.accelerate(make(), always=True)


def test_a_missing_part_is_named_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsify.fused_encoder as encoder

    coder = make()
    monkeypatch.delattr(encoder, "EncoderOutput")
    with pytest.raises(
        PeerVersionError, match=r"tested with eai-sparsify 1\.3\.3, found .*a part is missing: .*EncoderOutput"
    ):
        transcoder.accelerate(coder)


def test_calling_again_leaves_what_is_not_given() -> None:
    coder = transcoder.accelerate(make(), repair_auxk=True)
    transcoder.accelerate(coder)
    x, y = batch()
    coder(x, y, dead_mask=torch.arange(N) >= N - 7).auxk_loss.backward()
    assert coder.encoder.weight.grad.abs().sum() > 0


def test_indices_changed_in_place_are_decoded_as_they_are() -> None:
    grads = []
    for coder in (make(), transcoder.accelerate(make(), always=True)):
        with torch.no_grad():
            acts, indices, _ = coder.encode(batch()[0])
            order = indices.sort(1)
            acts = acts.gather(1, order.indices)
        coder.decode(acts, indices.copy_(order.values)).square().sum().backward()
        indices.copy_((indices + 1) % N)
        coder.W_dec.grad = None
        coder.decode(acts, indices).square().sum().backward()
        grads.append(coder.W_dec.grad)
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)
