"""The command line: flags, exit codes, one line an error; and real runs of a few steps through it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder import Run, Transcoder, TranscoderConfig, __version__, cli
from transcoder.activations.documents import Reader
from transcoder.activations.record_sources import record_sources
from transcoder.checkpoint_folder import find_checkpoint
from transcoder.cli import main
from transcoder.commands import COMMANDS
from transcoder.config import ActivationsSection, ConfigError, RunConfig
from transcoder.files import file_digest
from transcoder.reporting.verdict import is_done, verdict_lines
from transcoder.setting_help import FIRST
from transcoder.training.checkpoint import CheckpointStore

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "demo", "device": "cpu"},
    "activations": {
        "sequence_length": 32,
        "sequences_per_forward": 4,
        "buffer_tokens": 256,
        "prefetch": 0,
        "mask_norm_multiple": 10.0,
    },
    "transcoder": {"d_sae": 64, "k": 4, "widths": [16, 64], "normalization_tokens": 256},
    "training": {"steps": 3, "batch_size": 64, "warmup_steps": 1, "evaluation_tokens": 128},
    "antidup": {
        # Every part has something to act on within three steps.
        "regularizer": {"orthogonality_weight": 0.01, "orthogonality_every": 1, "orthogonality_threshold": 0.0},
        "samples": {"collect_every": 1, "min_activation": 0.0},
        "verify_at_step": 3,
    },
    "logging": {"every": 1, "progress": False},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def outcome(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def assert_refused(capsys: pytest.CaptureFixture[str], words: list[object], message: str, code: int = 2) -> None:
    got, out, err = outcome(capsys, *words)
    assert got == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one line"
    assert message in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"transcoder {__version__}\n"


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys)
    assert code == 2
    assert "75" in out
    assert set(re.findall(r"^  ([a-z]+) ", out, flags=re.M)) == set(COMMANDS), "each once, under a heading"
    assert {name for names in cli.GROUPS.values() for name in names} <= set(COMMANDS)


@pytest.mark.parametrize("command", ["train", "demo", "validate"])
def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str], command: str) -> None:
    from transcoder.config import flags

    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    for name, _ in flags():
        assert f"--{name} " in out
    assert "(default: 1000)" in out
    first = out[out.index("\nfirst:") : out.index("\nrun:")]
    assert re.findall(r"^  --(\S+)", first, flags=re.M) == list(FIRST)
    assert "null is 2e-4 / sqrt(d_sae / 2^14)." in out


def test_settings_are_taken_in_both_spellings_and_anywhere() -> None:
    parser = cli._parsers()[1]["train"]
    words = ["train", "--training.steps", "7", "demo", "--logging.wandb=off", "--out", "there"]
    words += ["--transcoder.widths", "[8,2048]", "--resume"]
    rest, settings = cli._take_settings(words, parser)
    assert rest == ["train", "demo", "--out", "there", "--resume"]
    assert settings == {"training.steps": 7, "logging.wandb": "off", "transcoder.widths": (8, 2048)}


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], debug: bool) -> None:
    code, _, err = outcome(capsys, "train", "nope", *(["--debug"] if debug else []))
    assert code == 2
    assert ("Traceback" in err) is debug


def test_an_error_that_nobody_foresaw_shows_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(RunConfig, "load", broken)
    code, _, err = outcome(capsys, "train", "demo")
    assert code == 1
    assert "Traceback" in err
    assert "lost" in err


def test_long_messages_become_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ConfigError("a\n  b\nc")

    monkeypatch.setattr(RunConfig, "load", broken)
    assert_refused(capsys, ["train", "demo"], "error: a b c")


@pytest.mark.slow
def test_train_then_report_then_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    run = tmp_path / "run"
    code, out, err = outcome(capsys, "train", tiny, "--out", run, "--training.seed", "1")
    assert code == 0, err
    assert f"run folder: {run}" in out
    assert out.splitlines()[1:4] == verdict_lines(Run(run))
    assert f"report: {run / 'report.html'}" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["seed"] == 1
    assert json.loads((run / "summary.json").read_text())["finished"] is True

    assert_refused(capsys, ["train", tiny, "--out", run], "add --resume")
    code, out, err = outcome(capsys, "train", tiny, "--out", run, "--training.seed", "1", "--resume")
    assert code == 0, err
    assert "finished already" in out
    assert out.splitlines()[1:4] == verdict_lines(Run(run))

    values = yaml.safe_load((run / "config.yaml").read_text())
    del values["parallel"]  # a run of a version without that section
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert is_done(run, RunConfig.load(tiny, {"training.seed": 1}))
    assert not is_done(run, RunConfig.load(tiny, {"training.seed": 2}))

    last = find_checkpoint(run)
    before = file_digest(last / "transcoder.safetensors")
    shutil.rmtree(last)
    code, out, err = outcome(capsys, "train", tiny, "--out", run, "--training.seed", "1", "--resume")
    assert code == 0, err
    assert file_digest(last / "transcoder.safetensors") == before, "its last checkpoint is made again"

    (run / "report.html").unlink()
    code, out, err = outcome(capsys, "report", run)
    assert (code, out.strip()) == (0, str(run / "report.html")), err
    code, out, err = outcome(capsys, "compare", run, run)
    assert code == 0, err
    assert "fvu" in out.lower()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("words", "code"), [(["compare", "one", "two"], 141), (["train", "--help"], 0), ([], 2)])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, words: list[str], code: int, unbuffered: str) -> None:
    """As in `transcoder compare A B | head -1`."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: x\n")
    command = [sys.executable, "-m", "transcoder", *words]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=env) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        # Python 3.10's argparse does not swallow the error of what it prints: the command then ends as others do.
        assert process.wait(timeout=120) in ((code,) if sys.version_info >= (3, 11) else (code, 141))


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("a worker died")

    monkeypatch.setattr(RunConfig, "load", broken)
    assert_refused(capsys, ["train", "demo"], "a worker died", code=1)


@pytest.mark.slow
def test_without_progress_nothing_is_shown(tmp_path: Path, tiny: Path) -> None:
    command = [sys.executable, "-m", "transcoder", "train", str(tiny), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Loading" not in done.stderr
    assert "%|" not in done.stderr


def test_text_flags_stay_text(tmp_path: Path) -> None:
    parser = cli._parsers()[1]["train"]
    _, settings = cli._take_settings(["train", "demo", "--name", "123", "--training.lr", "1e-3"], parser)
    assert settings == {"name": "123", "training.lr": 1e-3}
    assert RunConfig.load("demo", settings).name == "123"


def test_a_part_that_was_not_really_used_has_its_own_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    words = ["train", tiny, "--out", tmp_path / "run", "--antidup.samples.min_activation", "1.0e+9"]
    got, _, err = outcome(capsys, *words)
    assert got == 3, err
    assert "activation_samples" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_state_and_has_its_own_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, name: str
) -> None:
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.02):
            if metrics.exists() and metrics.read_text().count("\n") > 3:
                os.kill(os.getpid(), getattr(signal, name))
                return

    sender = threading.Thread(target=send)
    sender.start()
    # More steps than the test has time for: without the signal it fails by its time limit.
    code, out, err = outcome(capsys, "train", tiny, "--out", run, "--training.steps", 1_000_000)
    ended.set()
    sender.join()
    assert code == 75, err
    assert f"stopped by {name}" in out
    assert "--resume" in out
    assert list((run / "checkpoints").glob("step_*"))


@settings(deadline=None)
@given(text=st.text(max_size=12), encoding=st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_what_a_terminal_cannot_show_changes_no_exit_code(text: str, encoding: str) -> None:
    raw = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
        patch.setattr(sys, "stdout", stream)
        patch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(run=lambda *_: print(f"<{text}>") or 0))
        assert cli.main(["doctor"]) == 0
        stream.flush()
        assert raw.getvalue().decode(encoding).startswith("<")


def test_a_standard_output_that_is_closed_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(run=lambda *_: print("fine") or 0))
    assert cli.main(["doctor"]) == 0


@pytest.mark.parametrize("home", ["~", "$PLACE", "${PLACE}"])
def test_paths_of_settings_and_arguments_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = Transcoder(TranscoderConfig(3, 3, 5, 2))
    model.save_pretrained(f"{home}/saved")
    assert torch.equal(Transcoder.from_pretrained(f"{home}/saved").W_dec, model.W_dec)
    (tmp_path / "my.yaml").write_text(f"name: x\ncheckpoint: {{second_location: '{home}/second'}}\n")
    config = RunConfig.load(f"{home}/my.yaml")
    # The setting itself stays as written, so that another machine may resume the run.
    assert config.checkpoint.second_location == f"{home}/second"
    CheckpointStore(f"{home}/run", config.checkpoint)._second_folder(create=True).mkdir(parents=True)
    (tmp_path / "text.jsonl").write_text('{"text": "here"}\n')
    source, _, _ = record_sources(ActivationsSection(dataset=f"{home}/text.jsonl"))
    assert [document.content for document in Reader(source)] == ["here"]
    words = f"export {home}/saved --to original --allow-changed-function --threshold 0.1 --out={home}/exported"
    assert cli.main(words.split()) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "my.yaml", "run", "saved", "second", "text.jsonl"]
