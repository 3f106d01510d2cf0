"""The settings in `--help`: names, types, defaults and the docstrings under the fields in config.py."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transcoder.config import RunConfig
from transcoder.settings import field_types

FIRST = (
    *("model.name", "activations.dataset", "activations.source_hook", "activations.target_hook"),
    *("transcoder.d_sae", "transcoder.k", "transcoder.activation"),
    *("training.steps", "training.batch_size", "training.lr"),
)
"""What a new run of one's own sets. `--help` shows these before the others."""


class Setting(NamedTuple):
    """One leaf field of the configuration."""

    name: str
    """Dotted, as on the command line without its dashes."""
    kind: str
    default: str
    text: str
    """Its docstring on one line, or empty."""


def settings() -> list[Setting]:
    """Every leaf field of RunConfig, in order."""
    return list(_settings(RunConfig, ""))


def settings_help(width: int = 100) -> str:
    """The settings that nearly every run changes, then all of them by section, for the end of a `--help` page."""
    found = settings()
    lines = [
        "settings (each a flag: `--training.steps 100` or `--training.steps=100`, values as in YAML)",
        "",
        "first:",
    ]
    for name in FIRST:
        setting = next(s for s in found if s.name == name)
        lines += _lines(setting, setting.text.partition(". ")[0].rstrip("."), width)
    shown = None
    for setting in found:
        section = setting.name.rpartition(".")[0]
        if section != shown:
            lines += ["", f"{section or 'run'}:"]
            shown = section
        lines += _lines(setting, setting.text, width)
    return "\n".join(lines) + "\n"


def _lines(setting: Setting, text: str, width: int) -> list[str]:
    head = f"  --{setting.name} {setting.kind}  (default: {setting.default})"
    return [head, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _settings(cls: type, prefix: str) -> Iterator[Setting]:
    from docstring_parser import parse_from_object

    # Python does not keep docstrings of fields, so they are read from the source, also of base classes.
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    texts = {text.args[1]: text.description for base in bases for text in parse_from_object(base).params}
    for name, kind in field_types(cls, bounds=False).items():
        if dataclasses.is_dataclass(kind):
            yield from _settings(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            default, text = getattr(cls, name), " ".join((texts.get(name) or "").split())
            shown = default if isinstance(default, str) else json.dumps(default)
            yield Setting(prefix + name, _kind(kind), shown, text)


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _kind(a) for a in args)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin in (tuple, Sequence):
        return f"[{_kind(args[0])}, ...]"
    return {int: "INT", float: "FLOAT", bool: "{true,false}", str: "TEXT", Any: "VALUE"}.get(hint, str(hint))
