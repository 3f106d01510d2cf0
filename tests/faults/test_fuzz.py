"""Configs and checkpoint files as no one should write them: ours are the only errors, and nothing wrong is taken."""

from __future__ import annotations

import json
import math
import random
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transcoder.config import CheckpointSection, ConfigError, RunConfig, flags, parse_flag
from transcoder.layer_list import LAYERS, parse_layers
from transcoder.training.checkpoint import CheckpointError, CheckpointStore

NAMES = [name for name, _ in flags()]
KINDS = dict(flags())
NUMBERS = [0, -1, 1, 2, 7, 10**30, -(2**63), 0.0, -0.5, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "null",
    "1e3",
    "3e-4",
    "nan",
    "-inf",
    "off",
    "true",
    "../../etc",
    "a/b",
    "\x00",
    "\ud800",
    "x" * 5000,
    "[1, 2",
]
LEAF = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, None, True, False]), st.integers(), st.floats(), st.text(max_size=20)
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def fitting(name: str) -> st.SearchStrategy[Any]:
    """Values of the field's own kind, in and out of its range."""
    kind = KINDS[name]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    return st.sampled_from([1, 2, 0.5, 64, 1024, [1, 64], [0.9, 0.99], "text", None])


def of_kind(kind: Any, value: Any) -> bool:
    """Whether a config's leaf is what its annotation says, and finite."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(of_kind(args[0], v) for v in value)
    if args:
        return any(value is None if a is type(None) else of_kind(a, value) for a in args)
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind


def leaf(config: RunConfig, dotted: str) -> Any:
    found: Any = config
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def assert_sound(config: RunConfig, given: dict[str, Any]) -> None:
    """Accepted means understood: every field of its kind, what was given is what is there, and YAML brings it back."""
    layers = leaf(config, LAYERS)
    assert parse_layers(list(layers) if isinstance(layers, tuple) else layers) == layers
    rules = {name: leaf(config, name) for name in KINDS if name.startswith("per_layer.")}
    # Rules by layer are read with the layers that they speak of, which refuses wrong ones; without layers there are none.
    assert layers is not None or not any(rule is not None for rule in rules.values())
    for name, kind in KINDS.items():
        assert name == LAYERS or name in rules or of_kind(kind, leaf(config, name)), (
            f"{name}: {leaf(config, name)!r} is no {kind}"
        )
    for name, value in given.items():
        found = leaf(config, name)
        value = parse_layers(value) if name == LAYERS else value
        if isinstance(value, (bool, int, float, tuple)) and value is not False:
            assert found == value, f"{name}: {value!r} became {found!r}"
    assert RunConfig.from_dict(yaml.safe_load(config.to_yaml())) == config


def assert_taken_or_refused(make: Callable[[], RunConfig], named: list[str], given: dict[str, Any]) -> None:
    """Sound, or a ConfigError that has one of these names. Any other error is a failure."""
    refused = None
    try:
        config = make()
    except ConfigError as error:
        refused = str(error)
    if refused is None:
        assert_sound(config, given)
    else:
        assert any(name in refused for name in named), refused


QUICK = settings(max_examples=700, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@QUICK
@given(data=st.data())
def test_made_configs_are_sound_or_refused_by_field(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    given = {name: data.draw(st.one_of(fitting(name), VALUE)) for name in names}
    # A rule between two fields names one of them; the other may be a default.
    assert_taken_or_refused(
        lambda: RunConfig().replace(given), [*(n.rsplit(".", 1)[0] for n in names), "activations."], given
    )


@pytest.mark.slow
@QUICK
@given(
    text=st.one_of(st.text(max_size=80), VALUE.map(lambda v: yaml.safe_dump({"training": v}) if _dumps(v) else "a: ["))
)
def test_files_of_any_text_are_sound_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    assert_taken_or_refused(lambda: RunConfig.load(path), [""], {})


@pytest.mark.slow
@QUICK
@given(name=st.sampled_from(NAMES), text=st.one_of(st.text(max_size=30), st.sampled_from(TEXTS), LEAF.map(str)))
def test_flags_of_any_text_are_sound_or_refused_by_name(name: str, text: str) -> None:
    assert_taken_or_refused(lambda: RunConfig().replace({name: parse_flag(name, text)}), [name.split(".")[0]], {})


def _dumps(value: Any) -> bool:
    try:
        yaml.safe_dump(value)
    except (yaml.YAMLError, UnicodeError):
        return False
    return True


# -- checkpoint files -----------------------------------------------------------------------------------------------------

FILES = ("state.json", "trainer.safetensors", "transcoder.safetensors")
MUTATIONS = 500


def mutated(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One of eight kinds of damage."""
    at, length = draw.randrange(len(data)), draw.randrange(1, 64)
    kinds = [
        lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + draw.randbytes(length) + data[at + length :],
        lambda: data[:at],
        lambda: data + draw.randbytes(length),
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + data[at : at + length] + data[at:],
        lambda: data[:at] + bytes(len(data) - at),
        lambda: other,
    ]
    return draw.choice(kinds)()


def test_mutated_checkpoints_fall_back_or_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", CheckpointSection(keep_last=2))
    saved = {}
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        model = {"W_enc": torch.randn(16, generator=generator)}
        tree = {"moments": torch.randn(8, generator=generator), "list": [1, 2.5, None], "step": step}
        saved[step] = store.save(step, model, tree, {"n": step})
    draw, fell_back = random.Random(5), 0
    whole = {(step, name): (path / name).read_bytes() for step, path in saved.items() for name in FILES}
    for _ in range(MUTATIONS):
        name = draw.choice(FILES)
        alone = draw.random() < 0.2
        damaged = {
            step: mutated(whole[step, name], whole[3 - step, name], draw) for step in ((1, 2) if alone else (2,))
        }
        for step, data in damaged.items():
            (saved[step] / name).write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded, refused = None, ""
            try:
                loaded = store.latest()
            except CheckpointError as error:
                refused = str(error)
        if loaded is None:
            assert alone, refused
            assert "none of 2 checkpoints" in refused
            assert any(file in refused for file in FILES)
        if loaded is not None:
            step = loaded.step
            same = torch.equal(loaded.model["W_enc"], torch.randn(16, generator=torch.Generator().manual_seed(step)))
            assert same
            assert loaded.trainer_tree["step"] == loaded.summary["n"] == step
            if step == 2:
                # Nothing was damaged: other bytes that mean the same JSON, or the same bytes again.
                assert damaged[2] == whole[2, name] or json.loads(damaged[2]) == json.loads(whole[2, name])
            else:
                assert any("step_00000002 is not usable" in str(w.message) for w in caught)
                fell_back += 1
        for step in damaged:
            (saved[step] / name).write_bytes(whole[step, name])
    assert fell_back > MUTATIONS / 2
