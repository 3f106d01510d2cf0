from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def test_loading_a_runs_folder_points_to_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (8, 24, 16):
        saved(tmp_path).rename(tmp_path / f"step_{step:08d}")
    (tmp_path / "run").mkdir()
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir()
    for folder in tmp_path.glob("step_*"):
        folder.rename(checkpoints / folder.name)
    for place in (checkpoints, tmp_path / "run"):
        with pytest.raises(FileNotFoundError, match=rf"a run's folder.*{checkpoints}/step_00000024"):
            Transcoder.from_pretrained(place)
    Transcoder.from_pretrained(checkpoints / "step_00000024")


def test_loading_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected config\.json or a checkpoint's state\.json"):
        Transcoder.from_pretrained(tmp_path)
    folder = saved(tmp_path)
    (folder / "transcoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected transcoder\.safetensors"):
        Transcoder.from_pretrained(folder)


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


# -- numbers that are fp32 whatever the process's default, and normalisation ---------------------------------------


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_changes_nothing(default: torch.dtype) -> None:
    config = TranscoderConfig(10, 7, 30, 4, activation="batch_topk", widths=[8, 30], skip=True, dead_after_tokens=20)
    x, y = data(64)

    def trained() -> Transcoder:
        model = Transcoder(config)
        model.set_normalization(x, y, "standardize")
        for _ in range(2):
            model.refresh_dead()
            model.training_step(x, y).loss.backward()
        return model

    before = trained()
    torch.set_default_dtype(default)
    try:
        after = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in before.state_dict().items():
        assert after.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(after.state_dict()[name], tensor), name
    for name, parameter in before.named_parameters():
        assert torch.equal(after.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize(
    ("mode", "source", "words"),
    [
        ("rms", torch.full((5, 10), 1e-42), "between 1e-30 and 1e"),
        ("rms", torch.zeros(5, 10), "between 1e-30 and 1e"),
        ("standardize", torch.eye(5, 10) * 1e-42, "between 1e-30 and 1e"),
        ("standardize", torch.eye(5, 10).double() * 1e200, "between 1e-30 and 1e"),
        # In float64 this mean is not 0.1 to the last bit: the rest is rounding, not variation.
        ("standardize", torch.full((5, 10), 0.1), "vary"),
        ("rms", torch.empty(0, 10), "at least one row"),
        ("rms", torch.ones(5, 9), r"expected shape \[\*, 10\]"),
        ("standardize", torch.ones(10), r"expected shape \[\*, 10\]"),
        ("rms", torch.ones(5, 10).fill_diagonal_(torch.nan), "NaN or Inf in 5 rows"),
        ("standardize", torch.ones(5, 10).fill_diagonal_(torch.inf), "NaN or Inf in 5 rows"),
    ],
)
def test_normalization_refuses_what_it_cannot_scale(mode: str, source: Tensor, words: str) -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4))
    with pytest.raises(ValueError, match=f"source: .*{words}"):
        model.set_normalization(source, data(len(source))[1], mode)


def test_a_normalization_that_is_refused_sets_nothing() -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4))
    x, y = data(5)
    with pytest.raises(ValueError, match="target: NaN or Inf in 5 rows"):
        model.set_normalization(x, y * torch.nan, "rms")
    with pytest.raises(ValueError, match="as many rows of source and target, got 5 and 4"):
        model.set_normalization(x, y[:4], "rms")
    assert float(model.source_scale) == 1


# -- saved models --------------------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> Path:
    Transcoder(TranscoderConfig(3, 3, 4, 1)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changes: object) -> None:
    """Set keys of config.json; `...` takes one away."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"not safetensors at all", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run `git lfs pull`"),
        (None, "not a safetensors file"),
        ({"W_enc": torch.zeros(4, 3)}, "missing: W_dec"),
        ({"extra": torch.zeros(1)}, "not expected: extra"),
        ({"W_enc": torch.zeros(5, 3)}, r"W_enc: expected shape \[4, 3\], got \[5, 3\]"),
        ({"dead": torch.zeros(4)}, "dead: expected bool, got float32"),
        ({"W_enc": torch.zeros(4, 3, dtype=torch.int64)}, "W_enc: expected a floating dtype, got int64"),
    ],
)
def test_weights_that_are_torn_or_anothers_are_refused_by_file(
    tmp_path: Path, content: bytes | dict[str, Tensor] | None, words: str
) -> None:
    folder = saved(tmp_path)
    path = folder / "transcoder.safetensors"
    if content is None:
        path.write_bytes(path.read_bytes()[:-7])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        whole = {} if words.startswith("missing") else load_file(path)
        save_file({**whole, **content}, path)
    with pytest.raises(ValueError, match=rf"transcoder\.safetensors: .*{words}"):
        Transcoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": ...}, "expected d_in, missing from"),
        ({"activaton": 1}, "unknown key 'TranscoderConfig.activaton'; did you mean 'TranscoderConfig.activation'"),
        ({"d_in": "three"}, "d_in: expected a whole number"),
        ({"k": 1.5}, "k: expected a whole number"),
        ({"widths": 4}, "widths: expected a list"),
        ({"d_sae": 10**15, "widths": None}, "W_enc: expected shape"),
        ({"format": "other"}, "not a transcoder config"),
        ({"version": 2}, "not a transcoder config"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_file(tmp_path: Path, changes: dict, words: str) -> None:
    folder = saved(tmp_path)
    rewrite(folder, **changes)
    with pytest.raises(
        ValueError, match=rf"({'transcoder.safetensors' if 'W_enc' in words else 'config.json'}): .*{words}"
    ):
        Transcoder.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["config.json", "state.json"])
def test_a_config_that_is_no_json_object_is_refused_by_file(tmp_path: Path, text: str, name: str) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").unlink()
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Transcoder.from_pretrained(folder)


@pytest.mark.parametrize("state", [{}, {"summary": 3}, {"summary": {}}, {"summary": {"transcoder": [1]}}])
def test_a_checkpoints_state_without_a_transcoder_is_refused(tmp_path: Path, state: dict) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").unlink()
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json: .*transcoder"):
        Transcoder.from_pretrained(folder)


def test_a_state_in_other_dtypes_loads_as_for_any_module() -> None:
    model, other = (Transcoder(TranscoderConfig(3, 3, 4, 1), seed=seed) for seed in (0, 1))
    model.load_state_dict({name: tensor.double() for name, tensor in other.state_dict().items()})
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].dtype == tensor.dtype


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "File too large" in child.stdout, child.stdout + child.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


FULL_DISK = """
import resource, signal, sys
from transcoder import Transcoder, TranscoderConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    Transcoder(TranscoderConfig(64, 64, 128, 1)).save_pretrained(sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"k": 4.5}, TypeError, "k: expected a whole number, got 4.5"),
        ({"k": True}, TypeError, "k: expected a whole number, got True"),
        ({"k": "four"}, TypeError, "k: expected a whole number, got 'four'"),
        ({"k": 0}, ValueError, "k: expected between 1 and d_sae = 30, got 0"),
        ({"k": 31}, ValueError, "k: expected between 1 and d_sae = 30, got 31"),
        ({"widths": [8, 8, 30]}, ValueError, "strictly increasing"),
        ({"widths": [8, 20]}, ValueError, "expected a last width of d_sae = 30"),
        ({"prefix_weights": [1.0, 1.0]}, ValueError, "expected 1 finite weights"),
        ({"activation": "relu"}, ValueError, "activation: expected one of 'topk', 'batch_topk'"),
        ({"loss": "l2"}, ValueError, "loss: expected one of"),
        ({"aux_coefficient": -1.0}, ValueError, "aux_coefficient: expected at least 0"),
        ({"dead_after_tokens": 0}, ValueError, "dead_after_tokens: expected at least 1"),
        ({"threshold_rate": 0.0}, ValueError, "threshold_rate: expected in"),
        ({"d_in": 0}, ValueError, "d_in: expected at least 1"),
        ({"widths": "128"}, TypeError, "widths: expected a list"),
        ({"widths": (w for w in (8, 30))}, TypeError, "widths: expected a list"),
        ({"widths": [8.5, 30]}, TypeError, r"widths\[0\]: expected a whole number, got 8.5"),
        ({"prefix_weights": ["one"]}, TypeError, r"prefix_weights\[0\]: expected a number"),
        ({"prefix_weights": [float("inf")]}, ValueError, r"prefix_weights\[0\]: expected a finite number, got inf"),
        ({"skip": 1}, TypeError, "skip: expected true or false, got 1"),
        ({"aux_k": 2.5}, TypeError, "aux_k: expected a whole number"),
        ({"aux_k": -1}, ValueError, "aux_k: expected at least 0 or null, got -1"),
        ({"aux_coefficient": "much"}, TypeError, "aux_coefficient: expected a number"),
        ({"aux_coefficient": float("nan")}, ValueError, "aux_coefficient: expected a finite number"),
        ({"threshold_rate": None}, TypeError, "threshold_rate: expected a number"),
        ({"activation": ["topk"]}, ValueError, "activation: expected"),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=rf"TranscoderConfig\..*{words}"):
        TranscoderConfig(**{"d_in": 10, "d_out": 7, "d_sae": 30, "k": 4, **change})


def test_config_takes_lists_and_tuples_alike() -> None:
    lists, tuples = (
        TranscoderConfig(3, 3, 9, 2, widths=kind([4, 9]), prefix_weights=kind([1, 2])) for kind in (list, tuple)
    )
    assert lists == tuples
    assert lists.widths == (4, 9)
    assert lists.prefix_weights == (1.0, 2.0)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_full_checks_name_the_row_that_holds_a_nan(activation: str) -> None:
    """Without them a NaN row is silent at a threshold: no comparison with NaN holds, so the row has no code."""
    model = Transcoder(TranscoderConfig(10, 7, 30, 4, activation=activation)).eval()
    x, _ = data(5)
    x[3, 1] = torch.nan
    model.encode(x)
    with pytest.raises(ValueError, match="NaN or Inf in 1 rows, the first is row 3"):
        model.encode(x, checks="full")
    with pytest.raises(ValueError, match="checks: expected 'fast' or 'full'"):
        model.encode(x, checks="some")


def test_a_threshold_a_latent_is_compared_saved_and_loaded(tmp_path: Path) -> None:
    model = Transcoder(TranscoderConfig(10, 7, 30, 4, activation="batch_topk", latent_thresholds=True))
    with torch.no_grad():
        model.threshold.copy_(torch.linspace(0, 3, 30))
    model.save_pretrained(tmp_path)
    loaded = Transcoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.threshold, model.threshold)
    x, _ = data(40)
    pre = x @ model.W_enc.T + model.b_enc
    want = torch.where(pre > model.threshold, pre, torch.zeros_like(pre))
    torch.testing.assert_close(loaded.encode(x).to_dense(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"latent_thresholds.*batch_topk"):
        TranscoderConfig(10, 7, 30, 4, latent_thresholds=True)


def test_repr_names_the_shape_the_selection_and_the_device() -> None:
    model = Transcoder(TranscoderConfig(6, 7, 32, 4, activation="batch_topk", widths=[8, 32], skip=True))
    count = 32 * 6 + 32 + 32 * 7 + 7 + 7 * 6
    assert repr(model) == (
        "Transcoder(d_in=6, d_out=7, d_sae=32, batch_topk, k=4, widths=[8, 32], skip=True, "
        f"parameters={count}, device=cpu)"
    )
