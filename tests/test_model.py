from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.kernels.encode.reference import batch_topk_encode_reference, topk_encode_reference
from transcoder.model import Transcoder, TranscoderConfig


def data(rows: int, d_in: int = 10, d_out: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Source and target with statistics of their own, the target a nonlinear function of the source."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(40, d_in, generator=torch.Generator().manual_seed(99))
    second = torch.randn(d_out, 40, generator=torch.Generator().manual_seed(98))
    x = torch.randn(rows, d_in, generator=g)
    return 3 * x + 5, 0.2 * torch.relu(x @ first.T - 3) @ second.T - 1


def train(model: Transcoder, steps: int, rows: int = 256, lr: float = 5e-3) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        x, y = data(rows, seed=step + 1)
        model.training_step(x, y).loss.backward()
        model.remove_parallel_gradient()
        optimizer.step()
        optimizer.zero_grad()
        model.normalize_decoder()


def fvu(model: Transcoder) -> float:
    x, y = data(2048, seed=10**6)
    with torch.no_grad():
        return float((model.eval()(x) - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("loss", ["mse", "saelens"])
def test_step_and_forward_match_the_dense_formula(activation: str, skip: bool, loss: str) -> None:
    model = Transcoder(
        TranscoderConfig(10, 7, 30, 4, activation=activation, widths=[8, 30], skip=skip, loss=loss)
    ).double()
    x, y = (t.double() for t in data(20))
    model.set_normalization(x, y, "standardize")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    xn, yn = (x - x.mean(0)), (y - y.mean(0))
    xn, yn = xn / xn.square().mean().sqrt(), yn / yn.square().mean().sqrt()
    reference = topk_encode_reference if activation == "topk" else batch_topk_encode_reference
    z = reference(xn, model.W_enc, model.b_enc, 4)
    linear = xn @ model.W_skip.T if skip else 0
    errors = [(z[:, :w] @ model.W_dec[:w] + model.b_dec + linear - yn) ** 2 for w in (8, 30)]
    want = sum(e.mean() for e in errors) / 2 if loss == "mse" else sum(e.sum(-1).mean() for e in errors)
    out = model.training_step(x, y)
    # The statistics are fp32 by contract; everything after them is fp64 here.
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.fvu_per_prefix[-1], errors[-1].mean() / yn.square().mean(), rtol=1e-5, atol=1e-7)
    parameters = [p for p in model.parameters() if p is not None]
    for got, expected in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    if activation == "topk":
        y_hat = (z @ model.W_dec + model.b_dec + linear) * (y - y.mean(0)).square().mean().sqrt() + y.mean(0)
        torch.testing.assert_close(model(x), y_hat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_learns_what_a_linear_map_cannot(activation: str) -> None:
    model = Transcoder(TranscoderConfig(10, 7, 128, 8, activation=activation, widths=[32, 128]))
    model.set_normalization(*data(2048), "standardize")
    train(model, 250)
    x, y = data(2048, seed=10**6)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    linear = design @ torch.linalg.lstsq(design, y).solution
    assert fvu(model) < 0.6 * float((linear - y).square().sum() / (y - y.mean(0)).square().sum())


def test_nested_loss_trains_every_prefix() -> None:
    """The lost run's prefixes never entered its loss. With them in it, every narrow prefix reconstructs better."""

    def prefix_fvus(prefix_weights: list[float]) -> list[float]:
        config = TranscoderConfig(10, 7, 96, 6, widths=[12, 32, 96], prefix_weights=prefix_weights)
        model = Transcoder(config)
        model.set_normalization(*data(2048), "standardize")
        train(model, 200)
        return model.training_step(*data(2048, seed=10**6)).fvu_per_prefix.tolist()

    nested, full_only = prefix_fvus([1.0, 1.0, 1.0]), prefix_fvus([0.0, 0.0, 1.0])
    assert nested[0] < 0.8 * full_only[0]
    assert nested[1] < 0.8 * full_only[1]


def test_decoder_stays_on_the_sphere_and_its_gradient_in_the_tangent() -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4))
    x, y = data(64)
    model.training_step(x, y).loss.backward()
    model.remove_parallel_gradient()
    along = (model.W_dec.grad * model.W_dec).sum(1)
    assert float(model.W_dec.grad.abs().sum()) > 0
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-6 * float(model.W_dec.grad.abs().max()), rtol=0)
    train(model, 3)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(30))


def test_dead_latents_are_listed_and_auxk_brings_them_back() -> None:
    def live_after_training(aux_coefficient: float) -> int:
        config = TranscoderConfig(10, 7, 64, 4, dead_after_tokens=512, aux_k=16, aux_coefficient=aux_coefficient)
        model = Transcoder(config)
        model.set_normalization(*data(2048), "standardize")
        with torch.no_grad():
            model.b_enc[32:] = -3.0
        for _ in range(40):
            model.refresh_dead()
            train(model, 5)
        model.tokens_since_fired.zero_()
        model.training_step(*data(4096, seed=7))
        return int((model.tokens_since_fired == 0).sum())

    assert live_after_training(1.0) > live_after_training(0.0) + 5


def test_dead_counter_counts_tokens() -> None:
    model = Transcoder(TranscoderConfig(2, 2, 3, 1, dead_after_tokens=10))
    with torch.no_grad():
        model.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1.0], [-1.0, -1.0]]))
    x = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    for expected in ([0, 4, 4], [0, 8, 8], [0, 12, 12]):
        assert model.refresh_dead() == 0
        model.training_step(x, x)
        assert model.tokens_since_fired.tolist() == expected
    assert model.refresh_dead() == 2
    assert model.dead.tolist() == [False, True, True]


def test_threshold_follows_the_smallest_selected_value_in_fp32() -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4, activation="batch_topk", threshold_rate=0.25))
    seen = []
    for seed in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = model.training_step(*data(16, seed=seed)).codes.values.detach()
        seen.append(float(values[values > 0].min()))
    expected = seen[0]
    for smallest in seen[1:]:
        expected += 0.25 * (smallest - expected)
    assert model.threshold.dtype == torch.float32
    assert float(model.threshold) == pytest.approx(expected, rel=1e-6)
    model.eval()
    assert float(model.encode(data(16)[0]).values.detach().min()) > expected
    rows = data(16)[0]
    alone = torch.cat([model.encode(row[None]).to_dense() for row in rows])
    torch.testing.assert_close(alone, model.encode(rows).to_dense())


def test_normalization_uses_each_sides_own_statistics() -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4))
    x, y = data(4096)
    model.set_normalization(x, y, "standardize")
    for normalized in (model.normalize_source(x), model.normalize_target(y)):
        torch.testing.assert_close(normalized.mean(0), torch.zeros(normalized.shape[1]), atol=1e-5, rtol=0)
        assert float(normalized.square().mean()) == pytest.approx(1, rel=1e-5)
    model.set_normalization(x, y, "rms")
    assert float(model.normalize_source(x).square().mean()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(model.source_mean, torch.zeros(10))
    with pytest.raises(ValueError, match="source: expected finite activations that vary"):
        model.set_normalization(torch.ones(5, 10), y, "standardize")
    with pytest.raises(ValueError, match="mode: expected"):
        model.set_normalization(x, y, "layer")


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4, activation="batch_topk", widths=[8, 30], skip=True))
    model.set_normalization(*data(512), "standardize")
    train(model, 5)
    model.save_pretrained(tmp_path / "here")
    loaded = Transcoder.from_pretrained(tmp_path / "here")
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    x, _ = data(9, seed=3)
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected transcoder\.safetensors"):
        Transcoder.from_pretrained(tmp_path)
    Transcoder(TranscoderConfig(3, 3, 4, 1)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(ValueError, match="unknown fields \\['colour'\\]"):
        Transcoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not a transcoder config"):
        Transcoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Transcoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k: expected at least 1"),
        ({"k": 31}, "k: expected at most d_sae = 30, got 31"),
        ({"widths": [8, 8, 30]}, "strictly increasing"),
        ({"widths": [8, 20]}, "expected the last to be d_sae = 30"),
        ({"widths": [30, 8]}, "strictly increasing"),
        ({"prefix_weights": [1.0, 1.0]}, "expected 1 finite weights"),
        ({"activation": "relu"}, "activation: expected 'topk' or 'batch_topk'"),
        ({"loss": "l2"}, "loss: expected one of"),
        ({"d_in": 0}, "d_in: expected at least 1"),
        ({"aux_k": -1}, "aux_k"),
        ({"aux_coefficient": -1.0}, "aux_coefficient: expected finite, at least 0"),
        ({"dead_after_tokens": 0}, "dead_after_tokens: expected at least 1"),
        ({"threshold_rate": 0.0}, "threshold_rate: expected in"),
    ],
)
def test_bad_shapes_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TranscoderConfig(**{"d_in": 10, "d_out": 7, "d_sae": 30, "k": 4, **change})


@pytest.mark.parametrize("shape", [(5, 1), (5, 9), (10,)])
def test_inputs_of_another_width_are_refused_not_broadcast(shape: tuple[int, ...]) -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4))
    x, y = data(5)
    for call in (model, model.encode, lambda wrong: model.training_step(wrong, y)):
        with pytest.raises(ValueError, match=r"x: expected shape \[\*, 10\]"):
            call(torch.ones(shape))
    for wrong in (torch.ones(5, 1), torch.ones(4, 7)):
        with pytest.raises(ValueError, match=r"y: expected shape \[5, 7\]"):
            model.training_step(x, wrong)


def test_a_step_reads_nothing_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the CPU's own slow paths, the step has no `.item()`, `.tolist()` or `bool(tensor)`; counted at dispatch."""
    model = Transcoder(TranscoderConfig(10, 7, 30, 4, widths=[8, 30]))
    x, y = data(16)
    codes_reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def spy(self: Tensor, *args: object, _name: str = name, _original: object = original) -> object:
            codes_reads.append(_name)
            return _original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Tensor, name, spy)
    from transcoder.kernels.decode import torch_backend as decode
    from transcoder.kernels.encode import torch_backend as encode

    monkeypatch.setattr(encode, "_topk_ids", encode._topk_ids_static)
    monkeypatch.setattr(decode, "groups_of", _masked_groups)
    model.training_step(x, y).loss.backward()
    assert set(codes_reads) <= {"tolist"}, codes_reads
    assert len(codes_reads) <= 1, "only the CPU's slice bounds in the nested backward"


def _masked_groups(codes, widths):  # type: ignore[no-untyped-def]
    from transcoder.kernels.decode.torch_backend import Group

    return [
        Group(
            first,
            last,
            codes.rows(),
            codes.indices,
            codes.row_ptr,
            None,
            (codes.indices >= first) & (codes.indices < last),
        )
        for first, last in zip([0, *widths], widths, strict=False)
    ]
