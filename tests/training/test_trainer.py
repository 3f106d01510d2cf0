"""Whole runs on synthetic activations: what is called, what is written, what resuming and switching off must not change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.planted import ALL_OFF, D_IN, D_OUT, Planted, assert_same, config, records, weights
from transcoder.activations import ActivationBatch
from transcoder.checkpoint_folder import CheckpointError
from transcoder.config import ConfigError, RunConfig
from transcoder.kernels import SparseCodes
from transcoder.losses import penalty_scale, reconstruction_loss
from transcoder.model import Transcoder
from transcoder.training import RunResult, train_transcoder
from transcoder.training import trainer as trainer_module
from transcoder.training.checkpoint import load_checkpoint
from transcoder.training.sources import TrainingDataError
from transcoder.training.start_checks import as_started
from transcoder.training.validate import check_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One undisturbed run that several tests look at."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train_transcoder(config(logging__report=True), folder, batches=Planted())


def test_a_run_leaves_everything_it_promises(whole: RunResult) -> None:
    run_dir = whole.run_dir
    assert whole.finished
    assert whole.step == 30
    assert RunConfig.load(run_dir / "config.yaml") == as_started(config(logging__report=True), run_dir, resume=False)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) >= ["step_00000020", "step_00000030"]
    reports = sorted(p.name for p in (run_dir / "anti_duplication_logs").glob("correlation_step_*.json"))
    assert {"correlation_step_00000008.json", "correlation_step_00000030.json"} <= set(reports)
    assert (run_dir / "activation_samples" / "samples.parquet").stat().st_size > 0
    assert whole.report is not None
    assert "<html" in whole.report.read_text()[:200].lower()
    assert json.loads((run_dir / "summary.json").read_text())["evaluation/fvu"] == whole.summary["evaluation/fvu"]


def test_the_metrics_have_the_names_users_know(whole: RunResult) -> None:
    seen = set().union(*(r.keys() for r in records(whole.run_dir)))
    assert {
        "losses/overall_loss",
        "losses/mse_loss",
        "losses/inner_mse_loss_16",
        "losses/inner_mse_loss_64",
        "losses/auxiliary_reconstruction_loss",
        "losses/diversity_penalty",
        "metrics/explained_variance",
        "metrics/fvu",
        "metrics/fvu_prefix_16",
        "metrics/l0",
        "metrics/topk_threshold",
        "metrics/tokens_per_second",
        "sparsity/dead_features",
        "sparsity/dead_share",
        "details/n_training_samples",
        "details/learning_rate",
        "details/gradient_norm",
        "evaluation/fvu",
        "evaluation/baseline_linear_fvu",
        "evaluation/baseline_mean_fvu",
    } <= seen
    assert any(name.startswith("duplicates/") for name in seen)
    logged = [r for r in records(whole.run_dir) if "losses/overall_loss" in r]
    shares = [[value for name, value in r.items() if name.startswith("time/")] for r in logged]
    assert all(len(parts) == 4 and sum(parts) == pytest.approx(1) and min(parts) >= 0 for parts in shares)
    assert [r["step"] for r in logged] == [5, 10, 15, 20, 25, 30]
    assert logged[-1]["losses/mse_loss"] < logged[0]["losses/mse_loss"]
    assert logged[-1]["metrics/l0"] == pytest.approx(4, abs=0.5)


def test_the_ledger_shows_real_use(whole: RunResult) -> None:
    parts = json.loads((whole.run_dir / "usage.json").read_text())["components"]
    assert parts["position_sampler"]["calls"] == 10
    assert parts["position_sampler"]["effect"]["positions_seen"] == 10 * 64
    assert 0 < parts["position_sampler"]["effect"]["positions_resampled"] < 10 * 64
    assert parts["diversity_regularizer"]["calls"] == 30
    assert parts["diversity_regularizer"]["effect"]["penalty"] > 0
    assert parts["diversity_regularizer"]["effect"]["gradient_norm"] > 0
    assert parts["correlation_monitor"]["calls"] == 30
    assert parts["correlation_monitor"]["effect"]["pairs_seen"] > 0
    assert parts["activation_samples"]["calls"] == 10
    assert parts["activation_samples"]["effect"]["samples_kept"] > 0
    for name in parts:
        assert parts[name]["files"]
        for file in parts[name]["files"]:
            assert (whole.run_dir / file).stat().st_size > 0


def test_a_second_run_is_the_same_to_the_bit(whole: RunResult, tmp_path: Path) -> None:
    assert_same(weights(whole), weights(train_transcoder(config(), tmp_path / "again", batches=Planted())))


@pytest.mark.parametrize("stop_at", [5, 17, 28])
def test_a_stopped_run_resumes_to_the_same_bits(whole: RunResult, tmp_path: Path, stop_at: int) -> None:
    stopped_and_resumed(whole, tmp_path / "run", stop_at)
    steps = [r["step"] for r in records(tmp_path / "run") if "losses/overall_loss" in r]
    assert steps == [5, 10, 15, 20, 25, 30]


def test_jumprelu_runs_with_every_part_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"transcoder__activation": "jumprelu", "transcoder__jumprelu__warmup_steps": 12}
    settings |= {"antidup__recycle__enabled": True, "antidup__monitor__block_tokens": 320, "antidup__recycle__every": 8}
    run = train_transcoder(config(**settings), tmp_path / "whole", batches=Planted())
    logged = [r for r in records(run.run_dir) if "losses/sparsity_penalty" in r]
    assert len(logged) == 6
    assert 2 < logged[-1]["metrics/l0"] < 8
    stopped_and_resumed(run, tmp_path / "run", 17, **settings)


def stopped_and_resumed(whole: RunResult, run_dir: Path, stop_at: int, **overrides: Any) -> None:
    """A run of the settings of `whole`, stopped and resumed: the same weights and state."""
    # Evaluation takes the first 4 batches and the normalisation looks at the next 4: batch n + 4 trains step n.
    first = train_transcoder(config(**overrides), run_dir, batches=Planted(stop_at=stop_at + 4))
    assert not first.finished
    assert first.interrupted_by == "SIGTERM"
    assert 0 < first.step < 30
    held = [next(b) for b in [Planted()] for _ in range(4)]
    second = train_transcoder(config(**overrides), run_dir, resume=True, batches=Planted(), heldout=held)
    assert second.finished
    assert_same(weights(whole), weights(second))
    ours = load_checkpoint(run_dir / "checkpoints" / "step_00000030").trainer_tree
    theirs = load_checkpoint(whole.run_dir / "checkpoints" / "step_00000030").trainer_tree
    compare_trees(ours, theirs, "")


def compare_trees(first: Any, second: Any, place: str) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            compare_trees(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for i, pair in enumerate(zip(first, second, strict=True)):
            compare_trees(*pair, f"{place}/{i}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second) or bool(torch.isnan(first).any()), place
    else:
        assert first == second, place


def test_watching_changes_nothing_and_off_is_absent(tmp_path: Path) -> None:
    """Monitor and samples only look: with the regulariser off, a run with them is the run without, to the bit."""
    off = train_transcoder(config(**ALL_OFF), tmp_path / "off", batches=Planted())
    watched = train_transcoder(config(antidup__regularizer__enabled=False), tmp_path / "watched", batches=Planted())
    assert_same(weights(off), weights(watched))
    assert not (tmp_path / "off" / "anti_duplication_logs").exists()
    assert not (tmp_path / "off" / "activation_samples").exists()
    with_penalty = train_transcoder(config(), tmp_path / "on", batches=Planted())
    assert not torch.equal(weights(off)["W_dec"], weights(with_penalty)["W_dec"])


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """TopK selects by token, so two halves and the whole differ by the order of sums only."""
    shared = {
        **ALL_OFF,
        "transcoder__activation": "topk",
        "transcoder__aux_k": 0,
        "transcoder__normalize": "none",
        "training__steps": 3,
        "training__gradient_clip": None,
    }
    held = [next(Planted())]
    whole = train_transcoder(config(**shared), tmp_path / "whole", batches=Halves(64), heldout=held)
    halves = train_transcoder(
        config(**shared, training__accumulation=2, training__batch_size=32),
        tmp_path / "halves",
        batches=Halves(32),
        heldout=held,
    )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(weights(whole)[name], weights(halves)[name], rtol=1e-3, atol=1e-4)


class Halves(Planted):
    """The same stream of 64-token batches, cut into pieces of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.rest = size, []

    def __next__(self) -> ActivationBatch:
        if not self.rest:
            b = super().__next__()
            cuts = range(0, self.rows, self.size)
            self.rest = [
                ActivationBatch(*(t[i : i + self.size] for t in (b.source, b.target, b.tokens, b.positions)))
                for i in cuts
            ]
        return self.rest.pop(0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rest = []


def test_bfloat16_compute_keeps_fp32_masters(whole: RunResult, tmp_path: Path) -> None:
    result = train_transcoder(config(training__compute_dtype="bfloat16"), tmp_path / "run", batches=Planted())
    assert {t.dtype for n, t in weights(result).items() if n not in ("tokens_since_fired", "dead")} == {torch.float32}
    moments = load_checkpoint(result.run_dir / "checkpoints" / "step_00000030").trainer_tree["optimizer"]["state"][0]
    assert moments["exp_avg"].dtype == torch.float32
    # Rounded inputs choose other latents at near-ties only: the run goes the same way.
    assert result.summary["evaluation/fvu"] == pytest.approx(whole.summary["evaluation/fvu"], rel=0.05)
    assert not torch.equal(weights(result)["W_enc"], weights(whole)["W_enc"])


def test_a_checkpoint_folder_is_a_model(whole: RunResult) -> None:
    model = Transcoder.from_pretrained(whole.run_dir / "checkpoints" / "step_00000030")
    x = next(Planted()).source
    assert torch.equal(model(x), whole.transcoder.eval()(x))


def test_nothing_is_overwritten_without_being_asked(whole: RunResult) -> None:
    with pytest.raises(FileExistsError, match="add --resume to go on with it, or choose another --out"):
        train_transcoder(config(), whole.run_dir, batches=Planted())


def test_resuming_with_other_settings_is_refused_by_name(whole: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"training\.lr differ"):
        train_transcoder(config(training__lr=1e-3), whole.run_dir, resume=True, batches=Planted())


def test_resuming_a_finished_run_changes_nothing(whole: RunResult) -> None:
    before = (whole.run_dir / "checkpoints" / "step_00000030" / "state.json").read_bytes()
    again = train_transcoder(config(), whole.run_dir, resume=True, batches=Planted())
    assert again.finished
    assert_same(weights(whole), weights(again))
    assert (whole.run_dir / "checkpoints" / "step_00000030" / "state.json").read_bytes() == before


def test_data_that_ends_leaves_a_state_to_go_on_from(whole: RunResult, tmp_path: Path) -> None:
    class Short(Planted):
        def __next__(self) -> ActivationBatch:
            if self.index == 17:
                raise StopIteration
            return super().__next__()

    with pytest.raises(TrainingDataError, match=r"training data ended after 13 of 30 steps.*--resume goes on"):
        train_transcoder(config(), tmp_path / "run", batches=Short())
    held = [next(b) for b in [Planted()] for _ in range(4)]
    second = train_transcoder(config(), tmp_path / "run", resume=True, batches=Planted(), heldout=held)
    assert_same(weights(whole), weights(second))


def test_an_error_of_the_data_loses_no_step(tmp_path: Path) -> None:
    class Broken(Planted):
        def __next__(self) -> ActivationBatch:
            if self.index == 21:
                raise ConnectionError("the stream broke")
            return super().__next__()

    with pytest.raises(ConnectionError, match="the stream broke"):
        train_transcoder(config(), tmp_path / "run", batches=Broken())
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000017").step == 17


def test_files_that_cannot_be_written_for_a_while_stop_nothing(whole: RunResult, tmp_path: Path) -> None:
    """A file stands where the folder of reports must be, until step 15: every write fails, then they come back."""
    run_dir = tmp_path / "run"
    blockade = run_dir / "anti_duplication_logs"

    class Blocked(Planted):
        def __next__(self) -> ActivationBatch:
            if self.index == 5:
                blockade.write_text("in the way")
            if self.index == 19:
                blockade.unlink()
            return super().__next__()

    result = train_transcoder(config(), run_dir, batches=Blocked())
    assert result.finished
    assert_same(weights(whole), weights(result))
    failed = [r["payload"]["what"] for r in records(run_dir) if r.get("event") == "write_failed"]
    assert "correlation report" in failed
    assert sorted(p.name for p in blockade.glob("correlation_step_*")) == [
        "correlation_step_00000016.json",
        "correlation_step_00000020.json",
        "correlation_step_00000024.json",
        "correlation_step_00000030.json",
    ]


def test_a_folder_that_vanishes_costs_what_was_in_it_and_no_step(whole: RunResult, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    class Vanishing(Planted):
        def __next__(self) -> ActivationBatch:
            while self.index == 4 + 14 and run_dir.exists():  # A writer in the background may make a file meanwhile.
                shutil.rmtree(run_dir, ignore_errors=True)
            return super().__next__()

    result = train_transcoder(config(), run_dir, batches=Vanishing())
    assert result.finished
    assert_same(weights(whole), weights(result))
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_00000020", "step_00000030"]
    assert [r["step"] for r in records(run_dir) if "losses/overall_loss" in r] == [5, 10, 15, 20, 25, 30]
    assert train_transcoder(config(), run_dir, resume=True, batches=Planted()).finished


def test_the_disk_budget_bounds_what_checkpoints_take(whole: RunResult) -> None:
    budgets = [
        r["payload"]["bytes_each_at_most"] for r in records(whole.run_dir) if r.get("event") == "checkpoint_budget"
    ]
    budget = min(budgets)
    real = sum(f.stat().st_size for f in (whole.run_dir / "checkpoints" / "step_00000030").iterdir())
    assert real <= budget <= 20 * real


def test_the_regularizer_without_the_monitor_leaves_the_pair_term_out(tmp_path: Path) -> None:
    result = train_transcoder(config(antidup__monitor__enabled=False), tmp_path / "run", batches=Planted())
    assert result.finished


def test_a_regularizer_of_the_pair_term_alone_is_off_without_the_monitor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only_pairs = config(antidup__monitor__enabled=False, antidup__regularizer__orthogonality_weight=0.0)
    without = train_transcoder(only_pairs, tmp_path / "pairs", batches=Planted())
    assert without.finished
    assert "the pair penalty is off too" in caplog.text
    off = config(antidup__monitor__enabled=False, antidup__regularizer__enabled=False)
    assert_same(weights(train_transcoder(off, tmp_path / "off", batches=Planted())), weights(without))


@pytest.mark.parametrize("convention", ["mse", "saelens", "dictionary_learning"])
def test_penalties_follow_the_loss_convention(convention: str) -> None:
    codes = SparseCodes.from_dense(torch.rand(6, 5, generator=torch.Generator().manual_seed(0)))
    W, b, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(3), torch.ones(6, 3)
    widths, prefix_weights = [2, 5], [0.5, 2.0]
    losses = {
        name: float(reconstruction_loss(codes, W, b, y, widths, prefix_weights, name).loss)
        for name in (convention, "mse")
    }
    assert penalty_scale(convention, 3, prefix_weights) == pytest.approx(losses[convention] / losses["mse"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"antidup__positions__train": True}, "position sampler chooses among a sequence's tokens"),
        (
            {"antidup__regularizer__correlation_weight": 0.0, "antidup__regularizer__orthogonality_weight": 0.0},
            "enabled with every weight 0",
        ),
        ({"model__device": "warp:9"}, "model.device"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_transcoder(config(**change), tmp_path / "run", batches=Planted())
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_late_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty() -> Iterator[ActivationBatch]:
        yield from ()

    with pytest.raises(TrainingDataError, match="empty iterable"):
        train_transcoder(config(), tmp_path / "runs" / "deep" / "run", batches=empty())
    assert list(tmp_path.iterdir()) == []
    huge = config(transcoder__normalize="none", checkpoint__second_location=str(tmp_path / "run" / "file" / "x"))
    mine = tmp_path / "run"
    mine.mkdir()
    (mine / "file").write_text("a file, no folder")
    with pytest.raises(CheckpointError, match="second_location"):
        train_transcoder(huge, mine, batches=Planted())
    assert [path.name for path in mine.iterdir()] == ["file"], "what was there stays"

    def refuses(*_: object, **__: object) -> None:
        raise ConfigError("logging.wandb: not installed")

    monkeypatch.setattr(trainer_module, "MetricsWriter", refuses)
    with pytest.raises(ConfigError, match="not installed"):
        train_transcoder(config(), tmp_path / "late", batches=Planted())
    assert not (tmp_path / "late").exists(), "config.yaml was written by then"
    monkeypatch.undo()
    assert train_transcoder(config(training__steps=3), tmp_path / "late", batches=Planted()).finished


def test_a_resume_that_fails_leaves_the_run_as_it_was(whole: RunResult) -> None:
    def content() -> dict[Path, bytes]:
        # The lock file names its last owner.
        return {p: p.read_bytes() for p in whole.run_dir.rglob("*") if p.is_file() and p.name != ".lock"}

    before = content()
    with pytest.raises(TrainingDataError, match="empty iterable"):
        train_transcoder(config(), whole.run_dir, resume=True, batches=[])
    assert content() == before


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_a_run_does_not_depend_on_the_processes_defaults(tmp_path: Path, default: torch.dtype | torch.device) -> None:
    terms = {"antidup__regularizer__position_entropy_weight": 0.1, "antidup__regularizer__all_pairs_weight": 0.1}
    made = [next(b) for b in [Planted()] for _ in range(60)]
    usual = train_transcoder(config(**terms), tmp_path / "usual", batches=iter(made))
    try:
        torch.set_default_device(default) if isinstance(default, torch.device) else torch.set_default_dtype(default)
        other = train_transcoder(config(**terms), tmp_path / "other", batches=iter(made))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same(weights(usual), weights(other))
    assert usual.summary == other.summary
    folder = "checkpoints/step_00000030"
    compare_trees(*(load_checkpoint(run.run_dir / folder).trainer_tree for run in (usual, other)), "")
    report = "anti_duplication_logs/correlation_step_00000030.json"
    assert (usual.run_dir / report).read_text() == (other.run_dir / report).read_text()


def test_it_learns_planted_features(tmp_path: Path) -> None:
    """Far below the mean, and below the best linear map: the target is a nonlinear function of sparse factors."""
    learning = config(
        training__steps=300,
        training__lr=1e-2,
        transcoder__d_sae=128,
        transcoder__widths=[32, 128],
        training__batch_size=256,
        training__evaluation_tokens=2048,
        antidup__monitor__correlation_save_frequency=100,
        checkpoint__every=300,
    )
    summary = train_transcoder(learning, tmp_path / "run", batches=Planted(rows=256)).summary
    assert summary["evaluation/baseline_mean_fvu"] == pytest.approx(1, abs=0.02)
    assert summary["evaluation/fvu"] < 0.55
    assert summary["evaluation/fvu"] < 0.75 * summary["evaluation/baseline_linear_fvu"]
    assert summary["evaluation/fvu"] < summary["evaluation/fvu_prefix_32"] < 0.75
    assert summary["evaluation/l0"] == pytest.approx(4, abs=0.5)
    assert summary["tokens"] == 300 * 256


@pytest.mark.parametrize(("d_sae", "activation"), [(1, "topk"), (1, "batch_topk"), (64, "topk")])
def test_one_latent_a_token(tmp_path: Path, d_sae: int, activation: str) -> None:
    """No pairs are possible then: that none was seen is a finding, not a part that was not used."""
    one = config(transcoder__d_sae=d_sae, transcoder__k=1, transcoder__widths=None, transcoder__activation=activation)
    result = train_transcoder(one, tmp_path / "run", batches=Planted())
    assert result.finished
    report = json.loads((tmp_path / "run" / "anti_duplication_logs" / "correlation_step_00000030.json").read_text())
    assert report["pairs_total"] == 0
    if d_sae == 1:
        assert (report["live_latents"], report["effective_dictionary_size"]) == (1, 1)
    monitor = json.loads((tmp_path / "run" / "usage.json").read_text())["components"]["correlation_monitor"]
    assert monitor["effect"]["pairs_seen"] == 0
    assert "no token can have two latents" in monitor["effect"]["finding"]
    assert all(check.passed for check in check_run(tmp_path / "run", one)), check_run(tmp_path / "run", one)


def test_the_page_says_what_ran(whole: RunResult) -> None:
    """On one's own batches neither the config's language model nor its text was read."""
    page = (whole.run_dir / "report.html").read_text()
    ran = page[page.index("What ran") :].split("</dl>")[0]
    assert f"batches given to train_transcoder, d_in {D_IN}, d_out {D_OUT}" in ran
    for wrong in ("stdlib", "demo", "blocks.2"):
        assert wrong not in ran


def test_tokens_are_counted_as_they_come(tmp_path: Path) -> None:
    result = train_transcoder(config(training__steps=4), tmp_path / "run", batches=Planted(rows=50))
    assert result.summary["tokens"] == 4 * 50
    assert records(tmp_path / "run")[-1].get("details/n_training_samples", 200) == 200


def test_held_out_batches_need_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heldout: expected it only with `batches`"):
        train_transcoder(config(), tmp_path / "run", heldout=[next(Planted())])
