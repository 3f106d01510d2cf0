"""Train and inspect sparse transcoders. Start with `transcoder demo`.

`transcoder COMMAND --help` explains a command, with every setting that it takes.

Exit codes: 0 done; 1 the run failed; 2 bad input (settings, data, files); 3 an enabled anti-duplication part
did nothing; 75 stopped by a signal with the state saved (add --resume to go on); 130 interrupted before
there was anything to save; 141 broken pipe (`| head`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import select
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from transcoder import __version__
from transcoder.commands import COMMANDS, Exit
from transcoder.config import ConfigError, parse_flag

GROUPS = {
    "train": ("demo", "train", "sweep", "profile"),
    "look at runs": ("report", "watch", "compare", "sync"),
    "other libraries": ("export", "import"),
    "check": ("doctor", "validate"),
}
"""Commands in the help, by heading. One that is not named here comes last."""

_CODES: dict[str, int] = {
    "LedgerError": Exit.LEDGER,
    "CheckpointError": Exit.FAILED,
    "TrainingDivergedError": Exit.FAILED,
    "RankError": Exit.FAILED,
    "RunLockedError": Exit.INPUT,
    "SweepStopped": Exit.STOPPED,
    "ValueError": Exit.INPUT,
    "TypeError": Exit.INPUT,
    "FileNotFoundError": Exit.INPUT,
    "FileExistsError": Exit.INPUT,
    "NotADirectoryError": Exit.INPUT,
    "OSError": Exit.FAILED,
}
"""Exit code by the name of an error's class or its nearest base class. Names avoid importing the classes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `transcoder`; None takes those of the process.

    Returns:
        The exit code, see the module docstring.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _show_any_character()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return _guarded(words)
    finally:
        # Flush here, so that a closed pipe raises now and not while the interpreter shuts down.
        _output_is_open()


def _guarded(words: list[str]) -> int:
    """Run the command; turn an error into its exit code and one line."""
    try:
        code = _run(words)
        # The exit code of a failed run matters more than a closed pipe.
        return Exit.PIPE if code == Exit.OK and not _output_is_open() else code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _output_is_open():
            return Exit.PIPE
        known = [_CODES[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _CODES]
        if "--debug" in words or not known:
            # An unexpected error is a bug of this package: show its traceback.
            traceback.print_exc()
            return known[0] if known else Exit.FAILED
        # An error class of this package needs no traceback; a built-in one may come from anywhere.
        hint = " (--debug shows where)" if type(error) in (ValueError, TypeError, OSError) else ""
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}{hint}", file=sys.stderr)
        return known[0]


def _show_any_character() -> None:
    """Print a character that the terminal's encoding lacks as its escape (`\\xe4`): how a run ended matters more."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _output_is_open() -> bool:
    """Flush what was printed. If its reader is gone, standard output is discarded from here on."""
    if sys.stdout is None:
        # Closed before this process began (`>&-`): Python prints to nowhere then.
        return True
    try:
        sys.stdout.flush()
        if not _reader_is_gone():
            return True
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return False


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe whose other end is closed: a flush does not find this if output is unbuffered."""
    if not hasattr(select, "poll"):
        return False
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(words: list[str]) -> int:
    parser, parsers = _parsers()
    name = next((word for word in words if not word.startswith("-")), None)
    overrides: dict[str, Any] = {}
    if name in COMMANDS and COMMANDS[name].words is not None:
        words, overrides = _take_settings(words, parsers[name])
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help()
        return Exit.INPUT
    return COMMANDS[options.command].run(options, overrides)


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting. Help lists commands in groups, and the settings of commands that take them."""

    takes_settings = False
    has_commands = False

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        if self.has_commands:
            return f"{self.format_usage()}\n{self.description}\n{_commands_help()}"
        if not self.takes_settings:
            return super().format_help()
        from transcoder.setting_help import settings_help

        return f"{super().format_help()}\n{settings_help()}"


def _commands_help() -> str:
    named = {name for names in GROUPS.values() for name in names}
    lines = []
    for heading, names in {**GROUPS, "more": tuple(name for name in COMMANDS if name not in named)}.items():
        lines += [f"{heading}:"] if names else []
        for name in names:
            text = textwrap.wrap(COMMANDS[name].run.__doc__ or "", 88)
            lines += [f"  {name:<10}{text[0]}", *(f"{'':12}{more}" for more in text[1:])]
        lines += [""] if names else []
    return "\n".join([*lines, "  --version   the version of this package"]) + "\n"


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and that of each command."""
    parser = _Parser(prog="transcoder", description=__doc__)
    parser.has_commands = True
    parser.add_argument("--version", action="version", version=f"transcoder {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    parsers: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        sub = parsers[name] = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for argument, options in command.arguments:
            sub.add_argument(argument, **options)
        if command.words is not None:
            sub.takes_settings = True
            sub.usage = f"transcoder {name} {command.words}[options] [--section.field value ...]"
    return parser, parsers


def _take_settings(words: list[str], parser: _Parser) -> tuple[list[str], dict[str, Any]]:
    """Split the arguments into those for argparse and the settings: every `--x` that the command does not define.

    argparse would take the value of an unknown flag for a positional argument.
    """
    own = parser._option_string_actions
    rest: list[str] = []
    settings: dict[str, Any] = {}
    queue = iter(words)
    for word in queue:
        flag, equals, value = word.partition("=")
        if flag in own or not word.startswith("--") or word == "--":
            rest.append(word)
            if not equals and flag in own and own[flag].nargs is None:
                rest += itertools.islice(queue, 1)
        elif equals:
            settings[flag[2:]] = parse_flag(flag[2:], value)
        else:
            following = next(queue, "--")
            settings[flag[2:]] = parse_flag(flag[2:], None if following.startswith("--") else following)
    return rest, settings
