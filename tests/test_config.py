"""Configuration: YAML <-> dataclass <-> flags lose nothing; wrong settings are refused by name."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.config import ConfigError, RunConfig, flags, parse_flag, preset_names
from transcoder.setting_help import settings as all_settings
from transcoder.setting_help import settings_help
from transcoder.settings import convert
from transcoder.yaml_text import read_yaml

LEAVES = dict(flags())


def leaf(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def values_for(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Values that are valid for a field on its own; ties between fields are made below."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.none() | st.one_of(*(values_for(a, name) for a in args if a is not type(None)))
    if origin is Literal:
        return st.sampled_from(args)
    if kind is Any:
        # Layers, and rules by layer, which need them: tests/training/test_layer_set.py.
        return st.none()
    if name.endswith(("sequence_length", "normalization_tokens", "sketch_dim")):
        return st.integers(8, 2**20)
    if name.endswith("min_sequences"):
        return st.integers(1, 1000)
    if name.endswith("mask_norm_multiple"):
        return st.floats(1.5, 100)
    if origin in (tuple, Sequence):
        return st.tuples(*[st.floats(0, 0.999)] * 2).map(list)
    if kind is str:
        # As a folder's name, and never what YAML reads as a number, a date or a word of its own.
        return st.from_regex(r"x[A-Za-z0-9._-]{0,12}x", fullmatch=True)
    simple = {bool: st.booleans(), int: st.integers(1, 2**20), float: st.floats(1e-6, 0.999)}
    return simple[kind]


@st.composite
def overrides(draw: st.DrawFn) -> dict[str, Any]:
    """Any choice of settings that fit together."""
    names = draw(st.lists(st.sampled_from(sorted(LEAVES)), unique=True, max_size=12))
    chosen = {name: draw(values_for(LEAVES[name], name)) for name in names}
    widths = sorted(draw(st.sets(st.integers(1, 5000), min_size=1, max_size=4)))
    chosen["transcoder.d_sae"] = widths[-1]
    chosen["transcoder.widths"] = draw(st.sampled_from([None, widths]))
    prefixes = 1 if chosen["transcoder.widths"] is None else len(widths)
    weights = st.lists(st.floats(0.01, 10), min_size=prefixes, max_size=prefixes)
    chosen["transcoder.prefix_weights"] = draw(st.none() | weights)
    chosen["transcoder.k"] = draw(st.integers(1, widths[-1]))
    chosen["activations.cached_path"] = "shards"
    chosen.pop("activations.cross_layer", None)  # needs activations.layers
    batch = chosen.get("training.batch_size", 1024)
    chosen["activations.buffer_tokens"] = draw(st.integers(batch, 2 * batch))
    monitor, regularizer = "antidup.monitor.", "antidup.regularizer."
    low, high = sorted(draw(st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99))))
    chosen[monitor + "release_threshold"], chosen[monitor + "correlation_threshold"] = low, high
    few, many = sorted(draw(st.tuples(st.integers(1, 9), st.integers(1, 9))))
    chosen[monitor + "blocks_to_flag"], chosen[monitor + "blocks_remembered"] = few, many
    low, high = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    chosen[regularizer + "correlation_weight"], chosen[regularizer + "correlation_weight_max"] = low, high
    return chosen


def as_text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


@settings(max_examples=60, deadline=None)
@given(overrides())
def test_dataclass_yaml_and_flags_say_the_same(chosen: dict[str, Any]) -> None:
    config = RunConfig().replace(chosen)
    for name, value in chosen.items():
        found = leaf(config, name)
        assert (list(found) if isinstance(found, tuple) else found) == value
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig().replace({name: parse_flag(name, as_text(value)) for name, value in chosen.items()}) == config
    assert RunConfig().replace({name: leaf(config, name) for name in LEAVES}) == config


def test_every_field_is_a_flag_and_has_help() -> None:
    def count(cls: Any) -> int:
        hints = typing.get_type_hints(cls)
        kinds = [hints[f.name] for f in dataclasses.fields(cls)]
        return sum(count(kind) if dataclasses.is_dataclass(kind) else 1 for kind in kinds)

    assert len(LEAVES) == count(RunConfig)
    described = {s.name: s for s in all_settings()}
    assert list(described) == list(LEAVES)
    text = settings_help()
    for name, setting in described.items():
        assert f"--{name} {setting.kind}" in text
        assert parse_flag(name, setting.default) in (leaf(RunConfig(), name), None)
    assert described["activations.buffer_tokens"].text.startswith(
        "Tokens in the shuffle buffer, on the device. null is"
    )
    assert described["logging.wandb"].kind == "{off,offline,online}"
    assert described["training.lr"].kind == "FLOAT | null"


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("training.steps", "[", "training.steps: cannot read"),
        ("training.steps", "2026-01-31", "training.steps: expected a whole number, got '2026-01-31'"),
        ("training.lr", "2026-01-31 10:00:00", "training.lr: expected a number, got '2026-01-31 10:00:00'"),
        ("training.steps", "[" * 100_000, "training.steps: cannot read"),
        ("training.steps", "1" * 10_000, "training.steps: cannot read"),
        ("training.steps", "!!int x", "training.steps: cannot read"),
        ("training.steps", "!!bool x", "training.steps: cannot read"),
        ("training.steps", "!!timestamp x", "training.steps: cannot read"),
    ],
)
def test_wrong_flags_are_refused_by_name(flag: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flag(flag, text)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("training.lr", "3e-4", 3e-4),
        ("training.lr", "null", None),
        ("training.steps", "1_000", 1000),
        ("training.betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("transcoder.widths", "[256, 2048]", (256, 2048)),
        ("logging.wandb", "off", "off"),
        ("logging.progress", "false", False),
        ("training.lr", "1e-3", 1e-3),
        ("training.steps", "1e4", 10_000),
        ("name", "123", "123"),
        ("name", "1e-3", "1e-3"),
        ("name", "null", "null"),
        ("name", "true", "true"),
        ("name", "2026-01-31", "2026-01-31"),
        ("name", "'123'", "123"),
        ("model.name", "a: b", "a: b"),
        ("model.name", "[1]", "[1]"),
        ("model.name", "it's #1", "it's #1"),
        ("model.name", '"', '"'),
        ("checkpoint.second_location", "null", None),
        ("checkpoint.second_location", "12", "12"),
    ],
)
def test_flags_read_as_people_write_them(flag: str, text: str, value: object) -> None:
    assert parse_flag(flag, text) == value


def test_presets_load_and_keep_the_lost_runs_numbers() -> None:
    assert preset_names() == ["demo", "gemma-2-2b-layer8"]
    assert RunConfig.load("demo").model.name == "demo"
    lost = RunConfig.load("gemma-2-2b-layer8")
    assert (lost.transcoder.d_sae, lost.transcoder.k, lost.training.steps) == (18432, 48, 4882)
    assert lost.transcoder.widths == (2304, 6912, 16128, 18432)
    assert (lost.training.lr, lost.training.warmup_steps, lost.training.min_lr_ratio) == (3e-4, 200, 0.01)
    for name in preset_names():
        config = RunConfig.load(name)
        assert config.name == name
        parts = config.antidup
        assert all(part.enabled for part in (parts.regularizer, parts.positions, parts.monitor, parts.samples))


def test_overrides_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: mine\ntraining: {steps: 7}\n")
    config = RunConfig.load(path, {"training.batch_size": 32, "training.steps": 9})
    assert (config.name, config.training.steps, config.training.batch_size) == ("mine", 9, 32)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert RunConfig.load(tmp_path / "run.yaml") == RunConfig()


def test_dates_in_a_file_are_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: 2026-01-31\nmodel: {name: 2026-01-31}\n")
    config = RunConfig.load(tmp_path / "run.yaml")
    assert (config.name, config.model.name) == ("2026-01-31", "2026-01-31")
    (tmp_path / "run.yaml").write_text("name: 0_1\ntraining: {steps: 010, lr: 1:30}\n")
    with pytest.raises(ConfigError, match=r"training\.lr: expected a number, got '1:30'"):
        RunConfig.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("name: 007\ntraining: {steps: 010}\n")
    config = RunConfig.load(tmp_path / "run.yaml")
    assert (config.name, config.training.steps) == ("007", 10)
    (tmp_path / "run.yaml").write_text("training.steps: 10\n")
    with pytest.raises(ConfigError, match="it is the key 'steps' below 'training'"):
        RunConfig.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("training: {steps: 2026-01-31}\n")
    with pytest.raises(ConfigError, match=r"training\.steps: expected a whole number, got '2026-01-31'"):
        RunConfig.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 10**30], [0], "at least 1"),
        ("(0, inf)", [5e-324, 1e300], [0, -1], "positive"),
        ("(1, inf)", [1.5], [1], "above 1"),
        ("[0, 1]", [0, 1], [-0.1, 1.1], r"in \[0, 1\]"),
        ("(0, 1)", [0.5], [0, 1], r"in \(0, 1\)"),
        ("[0, 2^63)", [0, 2**63 - 1], [2**63], r"in \[0, 2\^63\)"),
    ],
)
def test_bounds(bound: str, inside: list[float], outside: list[float], words: str) -> None:
    for value in inside:
        assert convert(Annotated[type(value), bound], value, "x") == value
    for value in outside:
        with pytest.raises(ConfigError, match=f"^x: expected {words} or null, got "):
            convert(Annotated[type(value), bound] | None, value, "x")


KEYS = st.text("abcd", min_size=1, max_size=4)
TREES = st.recursive(st.integers(0, 9), lambda inner: st.dictionaries(KEYS, inner, min_size=1), max_leaves=12)


@settings(deadline=None)
@given(st.dictionaries(KEYS, TREES, min_size=1), st.randoms(use_true_random=False), st.booleans())
def test_a_key_that_stands_twice_is_refused_with_both_lines_at_any_depth(
    tree: dict[str, Any], draw: random.Random, quoted: bool
) -> None:
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=False)
    assert read_yaml(text) == yaml.safe_load(text)
    lines = text.splitlines()
    first = draw.randrange(len(lines))
    key = lines[first].split(":")[0]
    depth = len(key) - len(key.lstrip())
    # The end of the mapping that the key is in.
    last = next((n for n in range(first + 1, len(lines)) if len(lines[n]) - len(lines[n].lstrip()) < depth), len(lines))
    name = key.strip()
    lines.insert(last, " " * depth + (f'"{name}"' if quoted else name) + ": 1")
    with pytest.raises(ValueError, match=f"'{name}' stands twice, in line {first + 1} and in line {last + 1};"):
        read_yaml("\n".join(lines))


def test_a_merged_key_may_be_written_again() -> None:
    text = "base: &base {a: 1, b: 2}\nnext: {<<: *base, b: 3}\nlast: {b: 4, <<: *base}"
    assert read_yaml(text) == {"base": {"a": 1, "b": 2}, "next": {"a": 1, "b": 3}, "last": {"a": 1, "b": 4}}
