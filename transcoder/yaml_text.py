"""YAML as a configuration needs it: safe, no dates, no key twice, and one kind of error; and the presets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from transcoder.files import local_path
from transcoder.settings import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates (no setting is one, and a name such as 2026-01-31 is text), and without duplicate keys, of which
    PyYAML would keep the last one and lose the others without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Checked as written: a merge (`<<`) adds keys later, which may be written again.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            line, known = key.start_mark.line + 1, (key.tag, key.value)
            if known in lines:
                raise ValueError(
                    f"the key {key.value!r} stands twice, in line {lines[known]} and in line {line}; join the two"
                )
            lines[known] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _first in "+-0123456789":
    # Nor is 010 the number 8, or 1:30 the number 90.
    _odd_number = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)$")
    _Loader.yaml_implicit_resolvers[_first] = [
        ("tag:yaml.org,2002:str", _odd_number),
        *_Loader.yaml_implicit_resolvers.get(_first, []),
    ]


def read_yaml(text: str) -> Any:
    """What YAML text stands for. Raises ValueError, whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        # PyYAML raises all of these, at `!!bool x` or `!!timestamp x` for two.
        raise ValueError(str(error) or type(error).__name__) from error


def preset_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.yaml"))


def load_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the preset of that name. A file named as a preset is read if it has a suffix."""
    path = local_path(source, "config")
    if isinstance(source, str) and source in preset_names():
        path = Path(__file__).parent / "presets" / f"{source}.yaml"
    elif not path.is_file():
        raise ConfigError(
            f"config {str(source)!r}: no such file, and no preset of that name; presets: {preset_names()}"
        )
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from error
    if not isinstance(values, (dict, type(None))):
        raise ConfigError(f"config {path}: expected a mapping of sections, got {type(values).__name__}")
    return values or {}
