"""Files that say anything at all: an import either works or is refused with an error made for people."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder import Transcoder, TranscoderConfig, export_transcoder
from transcoder.interop.formats import EXPORTED, read_transcoder

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
HOOKS = {"source_hook": "blocks.0.ln2.hook_normalized", "target_hook": "blocks.0.hook_mlp_out"}
REFUSALS = (ValueError, FileNotFoundError)
"""What `read_transcoder` says that it raises; the command line prints it as one line, with exit code 2."""
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["topk", "relu", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fast = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def exports() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for name in EXPORTED:
            activation = "topk" if name == "sparsify" else "batch_topk"
            config = TranscoderConfig(5, 5, 12, 3, activation=activation, widths=[4, 12])  # type: ignore[arg-type]
            export_transcoder(Transcoder(config), name, Path(folder) / name, **HOOKS)
        yield Path(folder)


def attempt(name: str, folder: Path) -> None:
    refusal = ""
    try:
        found = read_transcoder(name, folder)
        assert found.transcoder.config.d_sae >= 1
    except REFUSALS as error:
        refusal = str(error)
    # Ours begin with the conversion; whatever begins otherwise came from somewhere deep.
    assert not refusal or refusal.startswith(f"{name} import"), refusal


def paths(values: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [so_far] if so_far else []
    if isinstance(values, dict):
        found += [path for key, inner in values.items() for path in paths(inner, (*so_far, key))]
    return found


@pytest.mark.parametrize("name", [name for name in EXPORTED if name != "gemma-scope"])
@fast
@given(data=st.data())
def test_any_value_anywhere_in_the_config(name: str, data: st.DataObject, exports: Path) -> None:
    (config,) = (
        (exports / name).glob("c*fig.*") if name not in ("saelens", "sparsify") else (exports / name).glob("cfg.json")
    )
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    *above, last = data.draw(st.sampled_from(paths(values)))
    place = values
    for key in above:
        place = place[key]
    if data.draw(st.booleans()):
        place[last] = data.draw(VALUES)
    else:
        del place[last]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shutil.copytree(exports / name, Path(folder) / "in")
        (Path(folder) / "in" / config.name).write_text(json.dumps(values), encoding="utf-8")
        attempt(name, Path(folder) / "in")


@pytest.mark.parametrize("name", EXPORTED)
@fast
@given(data=st.data())
def test_any_bytes_anywhere_in_the_weights(name: str, data: st.DataObject, exports: Path) -> None:
    patterns = ("*.safetensors", "*.pt", "*.npz")
    weights = next(path for pattern in patterns for path in (exports / name).rglob(pattern))
    whole = bytearray(weights.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly the head, where the structure is.
        end = len(whole) if data.draw(st.booleans()) else min(len(whole), 300)
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shutil.copytree(exports / name, Path(folder) / "in")
        (Path(folder) / "in" / weights.relative_to(exports / name)).write_bytes(whole)
        attempt(name, Path(folder) / "in")
