"""A table of bad inputs: what a user may get wrong on the command line, in a YAML file, in overrides or in a dataclass. Each
is refused with exit code 2 and one line that names the field, what was expected, what came, and the nearest known name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from transcoder import cli, config
from transcoder.config import ConfigError, RunConfig

FORMATS = (
    "expected one of saelens, sparsify, dictionary-learning, circuit-tracer, gemma-scope, original, llama-scope, "
    "got 'onnx'"
)

WORDS: list[tuple[str, list[str]]] = [
    # Unknown names.
    ("train demo --training.step 5", ["--training.step", "did you mean 'training.steps'?"]),
    ("train demo --trainig.steps=5", ["--trainig.steps", "did you mean 'training.steps'?"]),
    ("train --seed 5 demo", ["--seed", "did you mean 'training.seed'?"]),
    (
        "train demo --training.steps 5 --corelation_threshold .5",
        ["did you mean 'antidup.monitor.correlation_threshold'?"],
    ),
    ("train demo --training 5", ["--training;", "did you mean 'training."]),
    ("train demo --steps", ["--steps", "did you mean 'training.steps'?"]),
    ("train demo --zzzzz 5", ["--zzzzz", "known: name, model.name, model.dtype"]),
    ("train demo -x 5", ["unrecognized arguments: -x"]),
    ("trian demo", ["COMMAND", "invalid choice: 'trian'", "train", "doctor"]),
    ("train gemma-2-2b", ["'gemma-2-2b'", "no such file", "presets: ['demo', 'gemma-2-2b-layer8']"]),
    ("validate nope.yaml", ["'nope.yaml'", "no such file", "'gemma-2-2b-layer8'"]),
    # Missing and surplus values.
    ("train", ["required: CONFIG", "transcoder train --help"]),
    ("train demo demo", ["unrecognized arguments: demo"]),
    ("train demo --out", ["--out: expected one argument"]),
    ("train demo --resume now", ["unrecognized arguments: now"]),
    ("train demo --training.steps", ["--training.steps: expected a value"]),
    ("train demo --training.steps --resume", ["--training.steps: expected a value"]),
    ("train demo --training.steps=", ["training.steps: expected a whole number, got ''"]),
    ("report", ["required: RUN", "transcoder report --help"]),
    ("report nowhere --training.steps 5", ["unrecognized arguments: --training.steps"]),
    ("doctor now", ["unrecognized arguments: now"]),
    ("sweep demo", ["required: --k"]),
    ("export nowhere", ["required: --to"]),
    ("import saelens nowhere", ["required: --out"]),
    ("compare one", ["compare: expected at least two run folders, got 1"]),
    ("compare a= b", ["compare: expected NAME=RUN,RUN,...", "got 'a='"]),
    # Values of the wrong type or out of bounds.
    ("train demo --training.steps many", ["training.steps: expected a whole number, got 'many'"]),
    ("train demo --training.steps -5", ["training.steps: expected at least 1, got -5"]),
    ("train demo --training.steps true", ["training.steps: expected a whole number, got True"]),
    ("train demo --training.steps 7 --training.steps 0", ["training.steps: expected at least 1, got 0"]),
    ("train demo --training.lr -1e-3", ["training.lr: expected positive or null, got -0.001"]),
    ("train demo --training.lr [1", ["training.lr: cannot read '[1'"]),
    (
        "train demo --training.seed 9223372036854775808",
        ["training.seed: expected in [0, 2^63), got 9223372036854775808"],
    ),
    ("train demo --logging.progress 1", ["logging.progress: expected true or false, got 1"]),
    ("train demo --logging.wandb on", ["logging.wandb: expected one of 'off', 'offline', 'online', got True"]),
    (
        "train demo --transcoder.activation relu",
        ["transcoder.activation: expected", "'topk'", "'batch_topk'", "'relu'"],
    ),
    ("train demo --training.steps 2026-01-31", ["training.steps: expected a whole number, got '2026-01-31'"]),
    ("train demo --transcoder.k 0", ["transcoder.k: expected between 1 and d_sae = 2048, got 0"]),
    ("train demo --transcoder.widths 256", ["transcoder.widths: expected a list, got 256"]),
    ("train demo --transcoder.widths [256,x]", ["transcoder.widths[1]: expected a whole number, got 'x'"]),
    ("train demo --antidup.recycle.until 1", ["antidup.recycle.until: expected in (0, 1), got 1.0"]),
    ("sweep demo --k 4,many", ["--k: expected whole numbers with commas between, got '4,many'"]),
    ("profile demo --steps many", ["--steps: invalid int value: 'many'"]),
    ("profile demo --steps 0", ["--steps: expected at least 1, got 0"]),
    ("watch nowhere --port http", ["--port: invalid int value: 'http'"]),
    ("export nowhere --to saelens --layer two", ["--layer: invalid int value: 'two'"]),
    ("train demo --model.device meta", ["('auto', 'cpu'", "got 'meta'"]),
    ("train demo --model.device mps", ["('auto', 'cpu'", "got 'mps'"]),
    ("train demo --model.device gpu", ["model.device: expected a device of this machine ('auto', 'cpu'", "got 'gpu'"]),
    # Files and folders.
    ("report nowhere", ["nowhere: expected a run folder, found no config.yaml in it"]),
    ("compare nowhere elsewhere", ["nowhere: expected a run folder, found no config.yaml in it"]),
    ("sync nowhere", ["nowhere: expected a run folder, found no config.yaml in it"]),
    ("train demo --out used", ["--out used: the folder is not empty", "add --resume", "choose another --out"]),
    ("validate demo --out used/notes.txt", ["--out used/notes.txt: expected a folder, this is a file"]),
    ("export nowhere --to onnx", [FORMATS]),
    ("import onnx nowhere --out new", [FORMATS]),
    ("export nowhere --to saelens", ["nowhere: expected a run folder, a checkpoint or a saved transcoder"]),
    ("import saelens nowhere --out new", ["nowhere: expected a folder or file of this format, there is none"]),
    ("train demo --model.name ./nowhere", ["model.name: no model folder at './nowhere'", "a hub name"]),
    ("train demo --activations.dataset ./nowhere.txt", ["activations.dataset: no file or folder at './nowhere.txt'"]),
]

FILES: list[tuple[bytes, list[str]]] = [
    (b"- 1\n", ["bad.yaml", "expected a mapping of sections, got list"]),
    (b"training:\n  steps: [", ["bad.yaml", "not valid YAML", "line 2, column 11"]),
    (b"\xff\xfe\x00", ["bad.yaml", "not valid YAML"]),
    (b"a: !!python/object/apply:os.system ['true']", ["bad.yaml", "not valid YAML"]),
    (b"[" * 100_000, ["bad.yaml", "not valid YAML"]),
    (b"a: " + b"1" * 10_000, ["bad.yaml", "not valid YAML"]),
    (b"a: !!bool x", ["bad.yaml", "not valid YAML"]),
    (b"name: a\ntraining: {lr: 1}\ntraining: {steps: 3}", ["'training' stands twice, in line 2 and in line 3"]),
    (b"training:\n  lr: 1\n  steps: 3\n  'lr': 2", ["'lr' stands twice, in line 2 and in line 4"]),
    (b"trainig: {steps: 3}", ["unknown key 'trainig'", "did you mean 'training'?"]),
    (b"d_sae: 5", ["unknown key 'd_sae'", "did you mean 'transcoder.d_sae'?"]),
    (b"antidup: {monitr: {}}", ["unknown key 'antidup.monitr'", "did you mean 'antidup.monitor'?"]),
    (b"1: 2", ["unknown key '1'", "known: name, model.name"]),
    (b"training: {1: 2}", ["unknown key 'training.1'", "did you mean 'training."]),
    (b"training: 5", ["training: expected a mapping, got 5"]),
    (b"antidup: {monitor: [1]}", ["antidup.monitor: expected a mapping, got [1]"]),
    (b"training:\n  steps:", ["training.steps: expected a whole number, got None"]),
    (b"training: {steps: 1.5}", ["training.steps: expected a whole number, got 1.5"]),
    (b"training: {lr: .nan}", ["training.lr: expected a finite number, got nan"]),
    (b"training: {betas: [0.9, 0.95, 0.99]}", ["training.betas: expected 2 values, got [0.9, 0.95, 0.99]"]),
    (b"training: {betas: [0.9, 1]}", ["training.betas", "in [0, 1)", "1.0"]),
    (b"training: {betas: 0.9}", ["training.betas: expected a list, got 0.9"]),
    (b"logging: {progress: 'yes'}", ["logging.progress: expected true or false, got 'yes'"]),
    (b"antidup: {samples: {enabled: 1}}", ["antidup.samples.enabled: expected true or false, got 1"]),
    (b"model: {name: 3}", ["model.name: expected text, got 3; put it in quotes"]),
    (b"model: {name: ''}", ["model.name: expected a hub name, a folder or 'demo', got ''"]),
    (b"model: {dtype: float64}", ["model.dtype: expected one of 'float32', 'bfloat16', 'float16', got 'float64'"]),
    (b"name: a/b", ["name: expected letters, digits, '.', '_' and '-'", "got 'a/b'"]),
]

OVERRIDES: list[tuple[dict[str, Any], list[str]]] = [
    ({"training.stepz": 5}, ["unknown key 'training.stepz'", "did you mean 'training.steps'?"]),
    ({"training": 5, "training.steps": 5}, ["training.steps: 'training' is not a section"]),
    ({"name.first": 5}, ["name.first: 'name' is not a section"]),
    ({"training.steps": "1e"}, ["training.steps: expected a whole number, got '1e'"]),
    ({"training.lr": 10**400}, ["training.lr: expected a finite number, got 1000"]),
    ({"training.gradient_clip": 0}, ["training.gradient_clip: expected positive or null, got 0.0"]),
    (
        {"activations.mask_norm_multiple": 1},
        ["activations.mask_norm_multiple: expected above 1, 'auto' or null, got 1.0"],
    ),
    ({"antidup.monitor.min_sequences": 1001}, ["antidup.monitor.min_sequences: expected", "1000", "got 1001"]),
    ({"antidup.monitor.sketch_dim": 4}, ["antidup.monitor.sketch_dim: expected at least 8 or null, got 4"]),
    # Settings that contradict each other.
    (
        {"training.batch_size": 65536},
        ["activations.buffer_tokens: expected at least training.batch_size = 65536, got 32768"],
    ),
    (
        {"activations.kind": "cached"},
        ["activations.cached_path: expected a folder of shards when kind is 'cached', got None"],
    ),
    (
        {"transcoder.widths": [512, 256, 2048]},
        ["transcoder.widths: expected", "strictly increasing", "[512, 256, 2048]"],
    ),
    ({"transcoder.widths": [256, 1024]}, ["transcoder.widths: expected", "last", "2048", "[256, 1024]"]),
    ({"transcoder.prefix_weights": [1, 2]}, ["transcoder.prefix_weights: expected 4", "weights", "[1.0, 2.0]"]),
    (
        {"antidup.monitor.release_threshold": 0.9},
        ["antidup.monitor.release_threshold: expected in (0, correlation_threshold = 0.8], got 0.9"],
    ),
    (
        {"antidup.monitor.blocks_to_flag": 5},
        ["antidup.monitor.blocks_remembered: expected at least blocks_to_flag = 5, got 4"],
    ),
    (
        {"antidup.regularizer.correlation_weight": 1},
        ["antidup.regularizer.correlation_weight_max: expected at least correlation_weight = 1.0, got 0.05"],
    ),
]

MADE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("TrainingSection", {"steps": 0}, ["training.steps: expected at least 1, got 0"]),
    ("TrainingSection", {"betas": (0.9, 1.0)}, ["training.betas", "in [0, 1)", "1.0"]),
    ("CheckpointSection", {"keep_every": 0}, ["checkpoint.keep_every: expected", "or null, got 0"]),
    (
        "RegularizerSection",
        {"adaptive_step": -1.0},
        ["antidup.regularizer.adaptive_step: expected positive or null, got -1.0"],
    ),
    (
        "RegularizerSection",
        {"orthogonality_weight": float("nan")},
        ["antidup.regularizer.orthogonality_weight", "got nan"],
    ),
    ("SamplesSection", {"max_sink_fraction": 1.5}, ["antidup.samples.max_sink_fraction: expected in [0, 1], got 1.5"]),
    ("LoggingSection", {"wandb": "on"}, ["logging.wandb: expected", "'off'", "'offline'", "'online'", "got 'on'"]),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the test's own, but for `used/notes.txt`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]) -> None:
    code = cli.main(words)
    printed = capsys.readouterr()
    # A model that is loaded first may show its progress above the error.
    *_, error = printed.err.splitlines()
    assert (code, printed.out) == (2, ""), printed.err
    assert error.startswith("error: ")
    assert [part for part in parts if part not in error] == [], error
    assert not list(Path().glob("runs/*/metrics.jsonl"))
    assert [path.name for path in Path("used").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("words", "parts"), WORDS, ids=[words for words, _ in WORDS])
def test_words(capsys: pytest.CaptureFixture[str], words: str, parts: list[str]) -> None:
    refused(capsys, words.split(), parts)


@pytest.mark.parametrize(("content", "parts"), FILES, ids=[repr(content)[:60] for content, _ in FILES])
def test_files(capsys: pytest.CaptureFixture[str], content: bytes, parts: list[str]) -> None:
    Path("bad.yaml").write_bytes(content)
    refused(capsys, ["train", "bad.yaml"], parts)


@pytest.mark.parametrize(("given", "parts"), OVERRIDES, ids=[str(given)[:60] for given, _ in OVERRIDES])
def test_overrides(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.load("demo", given)
    assert [part for part in parts if part not in str(refusal.value)] == [], refusal.value


@pytest.mark.parametrize(("section", "given", "parts"), MADE, ids=[f"{name}({given})" for name, given, _ in MADE])
def test_dataclasses(section: str, given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        getattr(config, section)(**given)
    assert [part for part in parts if part not in str(refusal.value)] == [], refusal.value


def test_messages_have_no_machine_words() -> None:
    """No name of a class or a module of ours stands in a message for a user."""
    with pytest.raises(ConfigError) as refusal:
        RunConfig.load("demo", {"training.betas": 5})
    assert not re.search(r"Annotated|Section|typing|object at", str(refusal.value))
