"""What is to be exported: a live Transcoder, a run, one of its checkpoints, or a saved folder, and what is known about it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from transcoder.checkpoint_folder import find_checkpoint
from transcoder.files import local_path
from transcoder.interop.folded_weights import Hooks
from transcoder.model import Transcoder

Exportable = Transcoder | str | Path
HOOKS_FILE = "hooks.json"


@dataclass(frozen=True)
class Source:
    """A transcoder with what its folder says about it.

    Fields:
        model: in eval mode, on the CPU.   hooks: as far as config.yaml or hooks.json knows them.
        summary: summary.json of the run, empty where there is none.   step: of the checkpoint.
    """

    model: Transcoder
    hooks: Hooks = field(default_factory=Hooks)
    summary: dict[str, Any] = field(default_factory=dict)
    step: int | None = None


def load_source(source: Exportable) -> Source:
    """
    Raises:
        FileNotFoundError: no such folder, or no transcoder in it.   ValueError, CheckpointError: it is torn.
        TypeError: something else than a Transcoder or a path.
    """
    if isinstance(source, Transcoder):
        return Source(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"export: expected a Transcoder, a run folder, a checkpoint or a saved folder, got {type(source).__name__}"
        )
    path = local_path(source)
    if not path.is_dir():
        raise FileNotFoundError(
            f"export: {path}: expected a run folder, a checkpoint or a saved transcoder; no such folder"
        )
    folder = path if (path / "transcoder.safetensors").is_file() else find_checkpoint(path)
    model = Transcoder.from_pretrained(folder)
    run = next((place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file()), None)
    step = folder.name.removeprefix("step_")
    return Source(
        model=model,
        hooks=_recorded_hooks(folder) if run is None else _hooks(_mapping(run / "config.yaml")),
        summary={} if run is None else _mapping(run / "summary.json"),
        step=int(step) if step.isdecimal() else None,
    )


def _hooks(settings: dict[str, Any]) -> Hooks:
    """Of config.yaml, which may be of any version: what is not of the type is not known."""

    def known(section: str, name: str, kind: type) -> Any:
        values = settings.get(section)
        value = values.get(name) if isinstance(values, dict) else None
        return value if isinstance(value, kind) else None

    layers = known("activations", "layers", list) if known("activations", "cross_layer", bool) else None
    return Hooks(
        source=known("activations", "source_hook", str),
        target=known("activations", "target_hook", str),
        model_name=known("model", "name", str),
        context_size=known("activations", "sequence_length", int),
        prepend_bos=known("activations", "prepend_bos", bool),
        layers=None if layers is None else tuple(n for n in layers if isinstance(n, int)),
    )


def _recorded_hooks(folder: Path) -> Hooks:
    """Of an imported transcoder, whose hooks.json says where the foreign one belonged."""
    found = _mapping(folder / HOOKS_FILE)
    return Hooks(**{name: found.get(name) for name in Hooks.__dataclass_fields__})


def _mapping(path: Path) -> dict[str, Any]:
    """Of a YAML or JSON file; empty where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if isinstance(values, dict):
            return values
    return {}
