"""The command line: `transcoder train | demo | validate | sweep | compare | report | export | import | doctor`.

Exit codes: 0 done; 1 the run failed; 2 bad input (settings, data, files); 3 an anti-duplication part was not
really used; 75 stopped by a signal with the state saved (add --resume to go on); 130 interrupted before there
was anything to save; 141 the reader of the output went away (`| head`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from transcoder import __version__
from transcoder.config import ConfigError, RunConfig, parse_flag
from transcoder.interop import commands as interop

# torch and the rooms are imported by the commands that need them: `--help` and `--version` answer at once.
if TYPE_CHECKING:
    from transcoder.training import RunResult

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_LEDGER, EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 3, 75, 130, 141

_CODES: dict[str, int] = {
    "LedgerError": EXIT_LEDGER,
    "CheckpointError": EXIT_FAILED,
    "TrainingDivergedError": EXIT_FAILED,
    "RunLockedError": EXIT_INPUT,
    "SweepStopped": EXIT_STOPPED,
    "ValueError": EXIT_INPUT,
    "TypeError": EXIT_INPUT,
    "FileNotFoundError": EXIT_INPUT,
    "FileExistsError": EXIT_INPUT,
    "NotADirectoryError": EXIT_INPUT,
    "OSError": EXIT_FAILED,
}
"""Exit code by the name of the first class that matches, from the most special to the most general. By name,
so that finding the code of an error imports nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `transcoder`; None takes them from the process.

    Returns:
        The exit code, see the module's first lines.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _guarded(words, debug)
    finally:
        # What is still buffered meets a reader that went away here, and not in the interpreter's last breath.
        _output_is_open()


def _output_is_open() -> bool:
    """Flush what was printed. Where nobody reads it any more, the rest of it goes nowhere, quietly."""
    try:
        sys.stdout.flush()
        if not _reader_is_gone():
            return True
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe whose other end is closed. Unbuffered output leaves nothing that a flush could find."""
    if not hasattr(select, "poll"):
        return False
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    watch = select.poll()
    watch.register(descriptor, 0)
    return any(found & select.POLLERR for _, found in watch.poll(0))


def _guarded(words: list[str], debug: bool) -> int:
    try:
        done = _run(words)
        # How a run ended matters more than who read of it.
        return EXIT_PIPE if done == EXIT_OK and not _output_is_open() else done
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _output_is_open():
            return EXIT_PIPE
        code = next((_CODES[c.__name__] for c in type(error).__mro__ if c.__name__ in _CODES), None)
        if debug or code is None:
            # An error that nobody foresaw is a fault of ours: the place matters more than one clean line.
            traceback.print_exc()
            return EXIT_FAILED if code is None else code
        # An error class of ours says enough; a plain one may come from anywhere.
        hint = " (--debug shows where)" if type(error) in (ValueError, TypeError, OSError) else ""
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}{hint}", file=sys.stderr)
        return code


def _run(words: list[str]) -> int:
    parser = _parser()
    commands: dict[str, _Parser] = parser.commands
    name = next((word for word in words if not word.startswith("-")), None)
    overrides: dict[str, Any] = {}
    if name in commands and commands[name].takes_settings:
        words, overrides = _take_settings(words, commands[name])
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help()
        return EXIT_INPUT
    command: Callable[[argparse.Namespace, dict[str, Any]], int] = options.run
    return command(options, overrides)


# -- commands
# ---------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = RunConfig.load(options.config, overrides)
    return _finish(_train_into(config, options))


def _demo(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = RunConfig.load("demo", overrides)
    return _finish(_train_into(config, options))


def _train_into(config: RunConfig, options: argparse.Namespace) -> RunResult:
    out = Path(options.out) if options.out is not None else Path("runs") / config.name
    if not options.resume:
        _refuse_used_folder(out)
    from transcoder.training import train_transcoder

    return train_transcoder(config, out, resume=options.resume)


def _finish(result: RunResult) -> int:
    if not result.finished:
        with contextlib.suppress(BrokenPipeError):
            print(f"run folder: {result.run_dir}")
            print(
                f"stopped by {result.interrupted_by} after step {result.step}; the state is saved, add --resume to go on"
            )
        return EXIT_STOPPED
    print(f"run folder: {result.run_dir}")
    print("fraction of variance unexplained on held-out non-sink tokens (lower is better):")
    for key, label in (
        ("evaluation/fvu", "transcoder"),
        ("evaluation/baseline_linear_fvu", "least-squares linear map"),
        ("evaluation/baseline_mean_fvu", "mean"),
    ):
        if key in result.summary:
            print(f"  {label:<26}{result.summary[key]:.4f}")
    if "evaluation/ce_recovered" in result.summary:
        print(
            f"cross-entropy recovered with the transcoder in the layer's place: {result.summary['evaluation/ce_recovered']:.1%}"
        )
    if result.report is not None:
        print(f"report: {result.report}")
    return EXIT_OK


def _validate(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = RunConfig.load(options.config, {"training.steps": 100, **overrides})
    out = Path(options.out) if options.out is not None else Path("runs") / f"validate-{config.name}"
    _refuse_used_folder(out, resumable=False)
    from transcoder.training.validate import validate

    result = validate(config, out)
    print(result.format())
    return EXIT_OK if result.passed else EXIT_FAILED


def _sweep(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    config = RunConfig.load(options.config, overrides)
    out = Path(options.out) if options.out is not None else Path("runs") / f"sweep-{config.name}"
    try:
        ks = [int(word) for word in options.k.split(",")]
    except ValueError as error:
        raise ConfigError(f"sweep: --k: expected whole numbers with commas between, got {options.k!r}") from error
    from transcoder.training.sweep import format_sweep, sweep_k

    print(format_sweep(sweep_k(config, ks, out)))
    print(f"sweep folder: {out}")
    return EXIT_OK


def _profile(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from transcoder.training.profile import QUIET, profile_run

    config = RunConfig.load(options.config, {**overrides, **QUIET})
    out = Path(options.out) if options.out is not None else Path("runs") / f"profile-{config.name}"
    print(profile_run(config, options.steps, out / "trace.json").format())
    return EXIT_OK


def _compare(options: argparse.Namespace, _: dict[str, Any]) -> int:
    if len(options.runs) < 2:
        raise ConfigError(f"compare: expected at least two run folders, got {len(options.runs)}")
    if any("=" in run and not Path(run).is_dir() for run in options.runs):
        return _compare_methods(options.runs, options.html)
    folders = [_run_folder(run) for run in options.runs]
    from transcoder.reporting.compare import compare_runs, format_comparison

    comparison = compare_runs(*folders)
    print(format_comparison(comparison))
    _print_similarity(folders)
    if options.html is not None:
        from transcoder.reporting.compare_page import write_run_comparison

        print(f"page: {write_run_comparison(comparison, options.html)}")
    return EXIT_OK


def _print_similarity(folders: list[Path], method: str | None = None) -> None:
    """CKA between the runs, where they have kept what it takes."""
    if len(folders) < 2 or not all((folder / "heldout_codes.safetensors").is_file() for folder in folders):
        return
    from transcoder.training.similarity import format_run_similarity, format_seed_similarity, run_similarity

    try:
        found = run_similarity(folders)
    except ValueError as error:
        print(f"\nno CKA between {method or 'these'} runs: {error}")
        return
    print("", format_run_similarity(found) if method is None else format_seed_similarity(method, found), sep="\n")


def _compare_methods(words: list[str], page: str | None) -> int:
    methods: dict[str, list[Path]] = {}
    for word in words:
        name, equals, runs = word.partition("=")
        if not (name and equals and runs) or name in methods:
            raise ConfigError(
                f"compare: expected NAME=RUN,RUN,... with a new name each (or run folders only), got {word!r}"
            )
        methods[name] = [_run_folder(run) for run in runs.split(",")]
    from transcoder.reporting.compare_seeds import compare_methods, format_methods

    comparison = compare_methods(methods)
    print(format_methods(comparison))
    for name, folders in methods.items():
        _print_similarity(folders, name)
    if page is not None:
        from transcoder.reporting.compare_page import write_method_comparison

        print(f"page: {write_method_comparison(comparison, page)}")
    return EXIT_OK


def _report(options: argparse.Namespace, _: dict[str, Any]) -> int:
    folder = _run_folder(options.run_folder)
    from transcoder.reporting import write_report

    print(write_report(folder))
    return EXIT_OK


def _watch(options: argparse.Namespace, _: dict[str, Any]) -> int:
    folder = _run_folder(options.run_folder)
    if options.terminal:
        from transcoder.reporting.watch_terminal import watch_terminal

        return watch_terminal(folder)
    from transcoder.reporting.watch_server import watch

    watch(folder, options.port)
    return EXIT_OK


def _sync(options: argparse.Namespace, _: dict[str, Any]) -> int:
    folder = _run_folder(options.run_folder)
    from transcoder.reporting.follower import sync_run

    try:
        done = sync_run(folder)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    for warning in done["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{done['lines']} lines sent to W&B: {done['url'] or folder / 'wandb'}")
    return EXIT_OK


def _doctor(options: argparse.Namespace, _: dict[str, Any]) -> int:
    from transcoder.doctor import examine

    facts = examine()
    for fact in facts:
        print(fact)
    return EXIT_OK if all(fact.fine for fact in facts) else EXIT_FAILED


def _run_folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{path}: expected a run folder, found no config.yaml in it")
    return folder


def _refuse_used_folder(out: Path, resumable: bool = True) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: expected a folder, this is a file")
    # A run that was refused before its first step leaves its lock file behind, and nothing to lose.
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        way = "add --resume to go on with its run, or " if resumable else ""
        raise FileExistsError(f"--out {out}: the folder is not empty; {way}choose another --out")


# -- words to options
# -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are ours to print, and the settings are listed under the help of the commands that take them."""

    takes_settings = False
    commands: dict[str, Any]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        if not self.takes_settings:
            return super().format_help()
        from transcoder.setting_help import settings_help

        return f"{super().format_help()}\n{settings_help()}"


def _parser() -> _Parser:
    parser = _Parser(prog="transcoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"transcoder {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parser.commands = {}

    def command(name: str, run: Callable[..., int], text: str, settings: bool) -> _Parser:
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        sub.takes_settings = settings
        if settings:
            sub.usage = f"transcoder {name} %s[options] [--section.field value ...]"
        parser.commands[name] = sub
        return sub

    resume = "go on from the newest good checkpoint"
    train = command("train", _train, "Train a transcoder.", True)
    train.usage = str(train.usage) % "CONFIG "
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or a preset's name: demo, gemma-2-2b-layer8")
    train.add_argument("--out", metavar="DIR", help="run folder (default: runs/<name>)")
    train.add_argument("--resume", action="store_true", help=resume)
    demo = command("demo", _demo, "Train the demo: the shipped model, this Python's own source as text.", True)
    demo.usage = str(demo.usage) % ""
    demo.add_argument("--out", metavar="DIR", help="run folder (default: runs/demo)")
    demo.add_argument("--resume", action="store_true", help=resume)
    text = "Short runs with the anti-duplication parts on and off, every output checked, the two compared."
    validate = command("validate", _validate, text, True)
    validate.usage = str(validate.usage) % "[CONFIG] "
    validate.add_argument("config", metavar="CONFIG", nargs="?", default="demo", help="as in train (default: demo)")
    validate.add_argument("--out", metavar="DIR", help="folder of both runs (default: runs/validate-<name>)")
    text = "Train with several k; show duplicates, decoder cosines and FVU against k. A k that is too large makes duplicates."
    sweep = command("sweep", _sweep, text, True)
    sweep.usage = str(sweep.usage) % "CONFIG --k K,K,... "
    sweep.add_argument("config", metavar="CONFIG", help="as in train")
    sweep.add_argument("--k", metavar="K,K,...", required=True, help="the k to try, with commas between")
    sweep.add_argument(
        "--out", metavar="DIR", help="folder of the runs (default: runs/sweep-<name>); finished runs are kept"
    )
    profile = command("profile", _profile, "Where a step's time goes, with a trace to open.", True)
    profile.usage = str(profile.usage) % "CONFIG "
    profile.add_argument("config", metavar="CONFIG", help="as in train")
    profile.add_argument("--steps", metavar="N", type=int, default=30, help="steps under the clock (default: 30)")
    profile.add_argument("--out", metavar="DIR", help="folder for trace.json (default: runs/profile-<name>)")
    compare = command("compare", _compare, "Compare finished runs with the first of them.", False)
    text = "a run folder; or NAME=RUN,RUN,... for a method's runs over seeds, compared with intervals over seeds"
    compare.add_argument("runs", metavar="RUN", nargs="+", help=text)
    text = "also write all of it as one page (default: comparison.html); give this after the runs"
    compare.add_argument("--html", metavar="PATH", nargs="?", const="comparison.html", help=text)
    report = command("report", _report, "Write report.html of a run again, from its files.", False)
    report.add_argument("run_folder", metavar="RUN", help="a run folder")
    interop.add_export(command("export", interop.run_export, interop.EXPORT, False))
    interop.add_import(command("import", interop.run_import, interop.IMPORT, False))
    text = "Show a run while it runs, as its report in a browser on this machine; nothing of it is written or locked."
    watch = command("watch", _watch, text, False)
    watch.add_argument("run_folder", metavar="RUN", help="a run folder")
    watch.add_argument("--terminal", action="store_true", help="in this terminal, as over ssh on a cluster")
    watch.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: a free one)")
    sync = command("sync", _sync, "Send the figures of a run to W&B afterwards, from its metrics.jsonl.", False)
    sync.add_argument("run_folder", metavar="RUN", help="a run folder")
    command("doctor", _doctor, "Say what this machine has and what is missing.", False)
    return parser


def _take_settings(words: list[str], parser: _Parser) -> tuple[list[str], dict[str, Any]]:
    """Split the words into argparse's and the settings: every `--x` that the command itself does not know is
    a setting.

    argparse cannot do this: it would take the value of an unknown flag for a positional word.
    """
    own = parser._option_string_actions
    rest: list[str] = []
    settings: dict[str, Any] = {}
    queue = iter(words)
    for word in queue:
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--":
            rest.append(word)
        elif flag in own:
            rest.append(word)
            if not equals and own[flag].nargs is None:
                rest.extend(part for part in [next(queue, None)] if part is not None)
        else:
            name = flag[2:]
            if not equals:
                following = next(queue, None)
                # An unknown name is the better thing to complain about.
                if following is None or following.startswith("--"):
                    parse_flag(name, "null") if name not in _setting_names() else None
                    raise ConfigError(f"--{name}: expected a value after it")
                value = following
            settings[name] = parse_flag(name, value)
    return rest, settings


def _setting_names() -> set[str]:
    from transcoder.config import flags

    return {name for name, _ in flags()}


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=file or sys.stderr)
