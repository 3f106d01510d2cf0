"""The commands of the command line, with their arguments and output. Each returns its exit code.

Commands import torch and the other packages when they run, so `--help` and `--version` are fast.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transcoder.config import ConfigError, RunConfig
from transcoder.files import local_path
from transcoder.layer_list import layer_folders


class Exit(enum.IntEnum):
    """Exit codes of the process; `transcoder --help` explains them."""

    OK = 0
    FAILED = 1
    INPUT = 2
    LEDGER = 3
    STOPPED = 75
    INTERRUPTED = 130
    PIPE = 141


Run = Callable[[argparse.Namespace, dict[str, Any]], int]
Argument = tuple[str, dict[str, Any]]


class Command(NamedTuple):
    """A command of the command line. The docstring of `run` is its help."""

    run: Run
    arguments: tuple[Argument, ...]
    words: str | None
    """Its required arguments in the usage line, if it takes settings as flags; None if it takes no settings."""


COMMANDS: dict[str, Command] = {}


def command(*arguments: Argument, words: str | None = None) -> Callable[[Run], Run]:
    """Register the decorated function as the command of its name."""

    def register(run: Run) -> Run:
        COMMANDS[run.__name__.strip("_")] = Command(run, arguments, words)
        return run

    return register


def argument(name: str, text: str, **options: Any) -> Argument:
    """An argument for argparse. `name` may include the placeholder of its value in the help: "--out DIR"."""
    name, _, metavar = name.partition(" ")
    return name, {"help": text, **({"metavar": metavar} if metavar else {}), **options}


def run_folder(path: str) -> Path:
    folder = local_path(path)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{path}: expected a run folder, found no config.yaml in it")
    return folder


CONFIG = argument("config CONFIG", "as in train")
RESUME = argument("--resume", "go on from the newest good checkpoint", action="store_true")
RUN = argument("run_folder RUN", "a run folder")
FORMATS = "saelens, sparsify, dictionary-learning, circuit-tracer, gemma-scope, original"
CHANGED = "convert even where the other side cannot hold the same function; conversion.json says what changed"
NORM_WEIGHT = "gemma-scope: the RMSNorm's factor before the MLP: a .npy file, or the model's Hugging Face folder"
PICKLE = "load a .pt file that holds Python objects: it can run any code"
CONVERSION = (
    argument("--allow-changed-function", CHANGED, action="store_true"),
    argument("--source-hook HOOK", "where it reads, such as blocks.8.ln2.hook_normalized"),
    argument("--target-hook HOOK", "where it writes, such as blocks.8.hook_mlp_out"),
    argument("--model-name NAME", "the language model"),
    argument("--norm-weight FILE", NORM_WEIGHT),
)


# -- runs
# ---------------------------------------------------------------------------------------------------


@command(
    argument("config CONFIG", "a YAML file, or a preset's name: demo, gemma-2-2b-layer8"),
    argument("--out DIR", "run folder (default: runs/<name>)"),
    argument("--seeds S,S,...", "train once a seed, into DIR-seed0, DIR-seed1, ...: what compare wants"),
    RESUME,
    words="CONFIG ",
)
def train(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Train a transcoder."""
    config = RunConfig.load(options.config, overrides)
    if options.seeds is None:
        return _train(config, _out(options, config.name), options.resume)
    if _several_processes():
        raise ConfigError("--seeds: expected one run under torchrun; start one after another")
    seeds = _whole_numbers("--seeds", options.seeds)
    runs = {
        seed: _out(options, config.name).with_name(f"{_out(options, config.name).name}-seed{seed}") for seed in seeds
    }
    if not options.resume:
        for out in runs.values():
            _refuse_used_folder(out)
    for seed, out in runs.items():
        code = _train(config.replace({"training.seed": seed, "name": f"{config.name}-seed{seed}"}), out, options.resume)
        if code != Exit.OK:
            return code
    print(
        f"to compare with another method: transcoder compare {config.name}={','.join(map(str, runs.values()))} OTHER=..."
    )
    return Exit.OK


def _whole_numbers(flag: str, text: str) -> list[int]:
    """Different whole numbers with commas between."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag}: expected whole numbers with commas between, got {text!r}") from error
    if len(set(found)) != len(found):
        raise ConfigError(f"{flag}: expected different numbers, got {text!r}")
    return found


@command(argument("--out DIR", "run folder (default: runs/demo)"), RESUME, words="")
def demo(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Train the demo: the shipped model, this Python's own source as text."""
    config = RunConfig.load("demo", overrides)
    return _train(config, _out(options, config.name), options.resume)


def _several_processes() -> bool:
    """As `transcoder.training.start_checks.under_torchrun`, without loading PyTorch."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _train(config: RunConfig, out: Path, resume: bool) -> int:
    # Under torchrun the first process looks at the folder once all have met, and speaks for them.
    first = not _several_processes() or os.environ["RANK"] == "0"
    if not resume and not _several_processes():
        _refuse_used_folder(out)
    from transcoder.reporting.progress import stages
    from transcoder.reporting.verdict import is_done, said_of

    if resume and is_done(out, config):
        if first:
            print(f"{out}: finished already; `transcoder report {out}` draws its page again", *said_of(out), sep="\n")
        return Exit.OK

    with stages(config.logging.progress and first) as stage:
        stage("loading PyTorch")
        from transcoder.training import train_transcoder

        if not first:
            logging.disable(logging.WARNING)
        result = train_transcoder(config, out, resume=resume)
    if not first:
        return Exit.OK if result.finished else Exit.STOPPED
    if not result.finished:
        # A closed pipe does not change the exit code of the run.
        with contextlib.suppress(BrokenPipeError):
            stopped = f"stopped by {result.interrupted_by} after step {result.step}"
            print(f"run folder: {result.run_dir}\n{stopped}; the state is saved, add --resume to go on")
        return Exit.STOPPED
    print(f"run folder: {result.run_dir}", *said_of(result.run_dir), sep="\n")
    return Exit.OK


@command(
    argument("config CONFIG", "as in train (default: demo)", nargs="?", default="demo"),
    argument("--out DIR", "folder of both runs (default: runs/validate-<name>)"),
    words="[CONFIG] ",
)
def validate(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Short runs with the anti-duplication parts on and off, every output checked, the two compared."""
    config = RunConfig.load(options.config, {"training.steps": 100, **overrides})
    out = _out(options, f"validate-{config.name}")
    _refuse_used_folder(out, resumable=False)
    from transcoder.training.validate import validate

    result = validate(config, out)
    print(result.format())
    return Exit.OK if result.passed else Exit.FAILED


@command(
    CONFIG,
    argument("--k K,K,...", "the k to try, with commas between", required=True),
    argument("--out DIR", "folder of the runs (default: runs/sweep-<name>); finished runs are kept"),
    words="CONFIG --k K,K,... ",
)
def sweep(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Train with several k; show duplicates, decoder cosines and FVU against k. A k that is too large makes duplicates."""
    config = RunConfig.load(options.config, overrides)
    out = _out(options, f"sweep-{config.name}")
    ks = _whole_numbers("sweep: --k", options.k)
    from transcoder.training.sweep import format_sweep, sweep_k

    print(format_sweep(sweep_k(config, ks, out)))
    print(f"sweep folder: {out}")
    return Exit.OK


@command(
    CONFIG,
    argument("--steps N", "steps under the clock (default: 30)", type=int, default=30),
    argument("--out DIR", "folder for trace.json (default: runs/profile-<name>)"),
    words="CONFIG ",
)
def profile(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Where a step's time goes, with a trace to open."""
    from transcoder.training.profile import QUIET, profile_run

    config = RunConfig.load(options.config, {**overrides, **QUIET})
    out = _out(options, f"profile-{config.name}")
    print(profile_run(config, options.steps, out / "trace.json").format())
    return Exit.OK


def _out(options: argparse.Namespace, name: str) -> Path:
    return Path("runs") / name if options.out is None else local_path(options.out, "--out")


def _refuse_used_folder(out: Path, resumable: bool = True) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: expected a folder, this is a file")
    # A run that was refused before its first step leaves only its lock file.
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        way = "add --resume to go on with its run, or " if resumable else ""
        raise FileExistsError(f"--out {out}: the folder is not empty; {way}choose another --out")


# -- what a run has written
# ---------------------------------------------------------------------------------------------------


FORMAT = f"the weights' format, of {FORMATS} (default: found out)"
WEIGHTS = "a run folder, a checkpoint, a saved transcoder, org/name of the hub, or the files of another library"


@command(
    argument("weights WEIGHTS", WEIGHTS),
    argument(
        "config CONFIG", "as in train (default: the run's own, or what the weights say of their place)", nargs="?"
    ),
    argument("--out DIR", "folder of the report (default: runs/evaluate-<name of the weights>)"),
    argument("--format FORMAT", FORMAT),
    CONVERSION[0],
    argument("--norm-weight FILE", NORM_WEIGHT),
    argument("--layer", "circuit-tracer, gemma-scope: which layer", type=int),
    argument("--k", "latents a token, where the files do not say", type=int),
    argument("--allow-pickle", PICKLE, action="store_true", default=None),
    words="WEIGHTS [CONFIG] ",
)
def evaluate(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Measure any weights on held-out text: FVU, L0, cross-entropy recovered, dead, duplicates, SAEBench's core metrics."""
    from transcoder.interop.formats import open_transcoder

    found = open_transcoder(
        options.weights, options.format, **_given(options, "weights", "config", "out", "format", "debug")
    )
    weights = local_path(options.weights)
    from transcoder.training.evaluate_weights import config_of_weights, evaluate_weights, format_metrics

    config = config_of_weights(weights, vars(found.hooks), options.config, overrides)
    out = Path("runs") / config.name if options.out is None else local_path(options.out, "--out")
    if not (out / "summary.json").is_file() or "evaluated" not in (out / "summary.json").read_text(encoding="utf-8"):
        _refuse_used_folder(out, resumable=False)
    print(format_metrics(evaluate_weights(found.transcoder, config, out, origin=str(options.weights))))
    if config.logging.report:
        print(f"report: {out / 'report.html'}")
    return Exit.OK


METHOD = "a run folder; or NAME=RUN,RUN,... for a method's runs over seeds, compared with intervals over seeds"
PAGE = "also write all of it as one page (default: comparison.html); give this after the runs"


@command(argument("runs RUN", METHOD, nargs="+"), argument("--html PATH", PAGE, nargs="?", const="comparison.html"))
def compare(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Compare finished runs with the first of them."""
    runs: list[str] = options.runs
    if len(runs) < 2:
        raise ConfigError(f"compare: expected at least two run folders, got {len(runs)}")
    from transcoder.training.similarity import similarity_text

    if any("=" in run and not local_path(run).is_dir() for run in runs):
        methods = _methods(runs)
        from transcoder.reporting.compare import compare_methods, format_methods

        comparison: Any = compare_methods(methods)
        print(_colored(format_methods(comparison)))
        for name, folders in methods.items():
            print(similarity_text(folders, name), end="")
    else:
        folders = [run_folder(run) for run in runs]
        from transcoder.reporting.compare import compare_runs, format_comparison

        methods, comparison = {}, compare_runs(*folders)
        print(_colored(format_comparison(comparison)))
        print(similarity_text(folders), end="")
        sets = [layer_folders(folder) for folder in folders]
        # A set's own metrics are means: each layer that all of them have.
        for layer in sorted(set.intersection(*map(set, sets))):
            layers = [one[layer] for one in sets]
            print(f"\nlayer {layer}", _colored(format_comparison(compare_runs(*layers))), sep="\n")
            print(similarity_text(layers), end="")
    if options.html is not None:
        from transcoder.reporting.compare_page import write_method_comparison, write_run_comparison

        write = write_method_comparison if methods else write_run_comparison
        print(f"page: {write(comparison, options.html)}")
    return Exit.OK


def _colored(table: str) -> str:
    """On a terminal, "better" green and "worse" red."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return table
    return table.replace("better", "\x1b[32mbetter\x1b[0m").replace("worse", "\x1b[31mworse\x1b[0m")


def _methods(words: list[str]) -> dict[str, list[Path]]:
    """{method: its run folders} of words such as `ours=runs/a,runs/b`."""
    methods: dict[str, list[Path]] = {}
    for word in words:
        name, _, runs = word.partition("=")
        if not (name and runs) or name in methods:
            raise ConfigError(
                f"compare: expected NAME=RUN,RUN,... with a new name each (or run folders only), got {word!r}"
            )
        methods[name] = [run_folder(run) for run in runs.split(",")]
    return methods


REFRESH = "first run its newest checkpoint on its text again, for contexts, histograms, densities and duplicates"


@command(RUN, argument("--refresh", REFRESH, action="store_true"))
def report(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Write report.html of a run again, from its files."""
    folder = run_folder(options.run_folder)
    from transcoder.reporting import write_report

    if options.refresh:
        from transcoder.training.describe_latents import refresh

        for run in list(layer_folders(folder).values()) or [folder]:
            refresh(run)
    for layer in layer_folders(folder).values():
        print(write_report(layer))
    print(write_report(folder))
    return Exit.OK


SOURCE = "a run folder (its newest checkpoint), a checkpoint, or a saved transcoder; several for circuit-tracer"
ACTIVATION = "circuit-tracer: topk keeps TopK, which its releases read as ReLU (default: threshold)"
ARCHITECTURE = "saelens: topk writes a TopK transcoder as its SAE; transcoder, skip_transcoder a plain ReLU"


@command(
    argument("runs RUN", SOURCE, nargs="+"),
    argument("--to FORMAT", FORMATS, required=True),
    argument("--out DIR", "a new folder (default: RUN/exports/FORMAT)"),
    *CONVERSION,
    argument("--layer", "circuit-tracer: the layer, where the source hook does not name it", type=int),
    argument("--n-layers", "circuit-tracer: layers of the model; those without a run are zeros", type=int),
    argument("--activation NAME", ACTIVATION),
    argument("--architecture NAME", ARCHITECTURE),
    argument("--threshold", "for TopK as thresholds: the one to use (default: the tracked one)", type=float),
)
def export(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Write a run's transcoder in another library's format."""
    from transcoder.interop.formats import export_transcoder, format_name

    name, first = format_name(options.to), local_path(options.runs[0])
    # Exports go into the run folder: a checkpoint folder is never changed.
    home = first.parent.parent if first.parent.name == "checkpoints" else first
    out = home / "exports" / name if options.out is None else local_path(options.out, "--out")
    runs = options.runs if len(options.runs) > 1 else options.runs[0]
    record = export_transcoder(runs, name, out, **_given(options, "runs", "to", "out"))
    print(f"{record.format_lines()}\nwritten: {out}")
    return Exit.OK


@command(
    argument("format FORMAT", f"{FORMATS}, llama-scope"),
    argument("path PATH", "the folder or file that the library wrote"),
    argument("--out DIR", "a new folder, which Transcoder.from_pretrained loads", required=True),
    *CONVERSION,
    argument("--layer", "circuit-tracer, gemma-scope: which layer", type=int),
    argument("--k", "latents a token, where the files do not say", type=int),
    argument("--threshold", "of a BatchTopK whose files have none", type=float),
    argument("--allow-pickle", PICKLE, action="store_true", default=None),
)
def import_(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Make a transcoder of another library's files."""
    from transcoder.interop.formats import read_transcoder

    found = read_transcoder(options.format, options.path, **_given(options, "format", "path", "out"))
    out = found.save(options.out)
    print(f"{found.record.format_lines()}\nwritten: {out}")
    return Exit.OK


def _given(options: argparse.Namespace, *own: str) -> dict[str, Any]:
    """The conversion options that were given on the command line."""
    others = {"command", "debug", *own}
    return {name: value for name, value in vars(options).items() if value is not None and name not in others}


@command(
    RUN,
    argument("--terminal", "in this terminal, as over ssh on a cluster", action="store_true"),
    argument("--port N", "port on 127.0.0.1 (default: a free one)", type=int, default=0),
)
def watch(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Show a run while it runs, as its report in a browser on this machine; nothing of it is written or locked."""
    folder = run_folder(options.run_folder)
    if layers := layer_folders(folder):
        print(
            f"a layer set: means over {len(layers)} layers; of one layer: transcoder watch {next(iter(layers.values()))}"
        )
    if options.terminal:
        from transcoder.reporting.watch_terminal import watch_terminal

        return watch_terminal(folder)
    from transcoder.reporting.watch_server import watch

    watch(folder, options.port)
    return Exit.OK


@command(RUN)
def sync(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Send the metrics of a run to W&B afterwards, from its metrics.jsonl."""
    folder = run_folder(options.run_folder)
    from transcoder.reporting.follower import sync_run

    try:
        done = sync_run(folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.FAILED
    for warning in done["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done['lines']} lines sent to W&B: {done['url'] or folder / 'wandb'}")
    return Exit.OK


@command()
def doctor(options: argparse.Namespace, _: dict[str, Any]) -> int:
    """Say what this machine has and what is missing."""
    from transcoder.doctor import examine

    facts = examine()
    print(*facts, sep="\n")
    return Exit.OK if all(fact.fine for fact in facts) else Exit.FAILED
