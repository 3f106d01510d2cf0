"""What `--help` says about every setting: names, types, defaults and the docstrings that stand under them in config.py."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from typing import Any, Literal

from transcoder.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf field of the configuration."""

    name: str
    """Dotted, as on the command line without its dashes."""
    kind: str
    default: str
    text: str
    """Its docstring on one line, or empty."""

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


def settings() -> list[Setting]:
    """Every leaf field of RunConfig, in order."""
    return list(_settings(RunConfig, RunConfig(), ""))


def settings_help(width: int = 100) -> str:
    """All settings, grouped by section, for the end of a `--help` page."""
    lines = ["settings (each a flag: `--training.steps 100` or `--training.steps=100`, values as in YAML):"]
    section: str | None = None
    for setting in settings():
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section or 'run'}:"]
        lines.append(f"  --{setting.name} {setting.kind}  (default: {setting.default})")
        if setting.text:
            lines += textwrap.wrap(setting.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _settings(cls: type, defaults: Any, prefix: str) -> typing.Iterator[Setting]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = getattr(defaults, f.name)
        if dataclasses.is_dataclass(default):
            yield from _settings(type(default), default, f"{prefix}{f.name}.")
        else:
            text = next((found[f.name] for c in cls.__mro__ if f.name in (found := _docstrings(c))), "")
            yield Setting(prefix + f.name, _kind(hints[f.name]), _shown(default), text)


@functools.cache
def _docstrings(cls: type) -> dict[str, str]:
    """{field: docstring} of what a class itself declares: Python keeps no docstrings of fields, so its source is read."""
    if not dataclasses.is_dataclass(cls):
        return {}
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    found = {}
    if isinstance(node, ast.ClassDef):
        for field, text in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _kind(a) for a in args)
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin is tuple:
        return f"[{_kind(args[0])}, ...]"
    return {int: "INT", float: "FLOAT", bool: "{true,false}", str: "TEXT"}.get(hint, str(hint))


def _shown(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(list(default)) if isinstance(default, tuple) else str(default)
