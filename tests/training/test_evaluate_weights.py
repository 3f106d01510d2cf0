"""`transcoder evaluate`: any weights on a model and a text; SAEBench's core metrics against its formulas on dense tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from transcoder.activations import build_stream
from transcoder.cli import main
from transcoder.config import RunConfig
from transcoder.interop.formats import export_transcoder
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.saebench import saebench_core

SETTINGS = {
    "activations.source_hook": "blocks.1.mlp.hook_in",
    "activations.target_hook": "blocks.1.mlp.hook_out",
    "activations.sequence_length": 32,
    "activations.sequences_per_forward": 8,
    "activations.buffer_tokens": 1024,
    "training.batch_size": 64,
    "training.evaluation_tokens": 256,
    "training.evaluation_ce_tokens": 256,
    "logging.report_tokens": 256,
    "logging.progress": False,
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value).lower())]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transcoder fitted to nothing, saved."""
    folder = tmp_path_factory.mktemp("weights") / "mine"
    model = Transcoder(TranscoderConfig(128, 128, 64, 4), seed=1)
    generator = torch.Generator().manual_seed(1)
    model.set_normalization(
        torch.randn(99, 128, generator=generator), torch.randn(99, 128, generator=generator), "standardize"
    )
    model.save_pretrained(folder)
    return folder


def test_the_core_metrics_are_those_of_the_formulas(weights: Path) -> None:
    transcoder = Transcoder.from_pretrained(weights)
    with build_stream(RunConfig().replace(SETTINGS), torch.device("cpu")) as stream:
        found = saebench_core(transcoder, stream, 256)
        ((text, counted, run),) = list(stream.heldout_groups(256, 8))
        special = torch.tensor(stream.special_ids)
    seen: list[torch.Tensor] = []

    def catch(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.extend((source.double(), target.double()))
        return target

    original = run(catch).double()
    assert torch.equal(original.float(), run(None))
    assert torch.equal(counted, ~torch.isin(text, special))
    assert not bool(counted.all())
    source, y = seen
    mask = counted.flatten()
    with torch.no_grad():
        y_hat = transcoder(source.float())
        dense = transcoder.encode(source.float()).to_dense().double()[mask]
    replaced = run(lambda _, target: torch.where(mask[:, None], y_hat, target)).double()
    ablated = run(lambda _, target: 0 * target).double()
    y, out = y[mask], y_hat.double()[mask]
    expected = {
        "l0": (dense != 0).sum(1).double().mean(),
        "l1": dense.sum(1).mean(),
        "frac_alive": ((dense > 0).double().mean(0) > 0).double().mean(),
        "explained_variance": 1 - ((y - out) ** 2).sum(1).mean() / ((y**2).sum(1).mean() - (y**2).mean() ** 2),
        "explained_variance_legacy": (1 - ((y - out) ** 2).sum(1) / ((y - y.mean(0)) ** 2).sum(1)).mean(),
        "cossim": torch.nn.functional.cosine_similarity(y, out).mean(),
        "l2_norm_in": y.norm(dim=1).mean(),
        "l2_norm_out": out.norm(dim=1).mean(),
        "l2_ratio": (out.norm(dim=1) / y.norm(dim=1)).mean(),
        "relative_reconstruction_bias": (out**2).sum(1).mean() / (out * y).sum(1).mean(),
    }

    def ce(logits: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")
        return losses[counted[:, :-1]].mean()

    def kl(logits: torch.Tensor) -> torch.Tensor:
        probabilities = original.softmax(-1)
        return (probabilities * (probabilities.log() - logits.softmax(-1).log())).sum(-1)[counted].mean()

    for name, logits in (("sae", replaced), ("ablation", ablated)):
        expected[f"ce_loss_with_{name}"], expected[f"kl_div_with_{name}"] = ce(logits), kl(logits)
    expected["ce_loss_without_sae"] = ce(original)
    zero = expected["ce_loss_with_ablation"]
    expected["ce_loss_score"] = (zero - expected["ce_loss_with_sae"]) / (zero - expected["ce_loss_without_sae"])
    zero = expected["kl_div_with_ablation"]
    expected["kl_div_score"] = (zero - expected["kl_div_with_sae"]) / zero
    assert found.keys() == {f"saebench/{name}" for name in expected}
    for name, value in expected.items():
        assert found[f"saebench/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_own_and_imported_weights_measure_the_same(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = {name: str(SETTINGS[f"activations.{name}"]) for name in ("source_hook", "target_hook")}
    export_transcoder(weights, "saelens", tmp_path / "theirs", architecture="topk", model_name="demo", **hooks)
    summaries = []
    for path in (weights, tmp_path / "theirs"):
        out = tmp_path / f"of-{path.name}"
        assert main(["evaluate", str(path), "demo", *FLAGS, "--out", str(out)]) == 0
        summaries.append(json.loads((out / "summary.json").read_text()))
        assert "<html" in (out / "report.html").read_text()[:200].lower()
    own, theirs = summaries
    for name in (
        "evaluation/fvu",
        "evaluation/l0",
        "evaluation/ce_recovered",
        "saebench/cossim",
        "saebench/frac_alive",
    ):
        assert theirs[name] == pytest.approx(own[name], rel=1e-4)
    assert "heldout_duplicates/pairs" in own
    assert own["evaluation/dead_share"] == pytest.approx(1 - own["evaluation/live_share"])
    assert "SAEBench: CE loss score" in capsys.readouterr().out
    # The same folder again; but never a folder of something else.
    assert main(["evaluate", str(weights), "demo", *FLAGS, "--out", str(tmp_path / "of-mine")]) == 0
    assert main(["evaluate", str(weights), "demo", *FLAGS, "--out", str(weights)]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "does not say where it belongs (model.name)"),
        (["demo", "--activations.source_hook", "blocks.1.mlp.hook_post"], "expected a hook of width 128"),
        (["demo", "--activations.heldout_fraction", "0", "--activations.dataset", "TEXT"], "heldout_fraction"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A few words of text.\n" * 500)
    words = [str(text) if word == "TEXT" else word for word in words]
    assert main(["evaluate", str(weights), *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_no_format_are_refused_with_what_each_format_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    assert main(["evaluate", str(tmp_path / "x"), "demo"]) == 2
    said = capsys.readouterr().err
    assert all(f"{name}: " in said for name in ("saelens", "sparsify", "gemma-scope"))
