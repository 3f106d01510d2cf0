"""What is to be exported: a live Transcoder, a run, one of its checkpoints, or a saved folder, and what is known about it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from transcoder.checkpoint_folder import find_checkpoint
from transcoder.interop.folded_weights import Hooks
from transcoder.model import Transcoder

Exportable = Transcoder | str | Path
HOOKS_FILE = "hooks.json"


@dataclass(frozen=True)
class Source:
    """A transcoder with what its folder says about it.

    Fields:
        model: in eval mode, on the CPU.   hooks: as far as config.yaml or hooks.json knows them.
        path: the folder it came from, None for a live one.   run: its run folder, if it is in one.
        settings, summary: config.yaml and summary.json of the run; empty where there is none.
        step: of the checkpoint.
    """

    model: Transcoder
    hooks: Hooks = field(default_factory=Hooks)
    path: Path | None = None
    run: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
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
    path = Path(source)
    if not path.is_dir():
        raise FileNotFoundError(
            f"export: {path}: expected a run folder, a checkpoint or a saved transcoder; no such folder"
        )
    folder = path if (path / "transcoder.safetensors").is_file() else find_checkpoint(path)
    model = Transcoder.from_pretrained(folder)
    run = next((place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").is_file()), None)
    settings = {} if run is None else _yaml(run / "config.yaml")
    step = folder.name.removeprefix("step_")
    return Source(
        model=model,
        hooks=_recorded_hooks(folder) if run is None else _hooks(settings),
        path=folder,
        run=run,
        settings=settings,
        summary={} if run is None else _json(run / "summary.json"),
        step=int(step) if step.isdecimal() else None,
    )


def _hooks(settings: dict[str, Any]) -> Hooks:
    parts = settings.get("activations"), settings.get("model")
    activations, model = (part if isinstance(part, dict) else {} for part in parts)
    length, bos = activations.get("sequence_length"), activations.get("prepend_bos")
    return Hooks(
        source=_text(activations.get("source_hook")),
        target=_text(activations.get("target_hook")),
        model_name=_text(model.get("name")),
        context_size=length if isinstance(length, int) else None,
        prepend_bos=bos if isinstance(bos, bool) else None,
    )


def _recorded_hooks(folder: Path) -> Hooks:
    """Of an imported transcoder, whose hooks.json says where the foreign one belonged."""
    found = _json(folder / HOOKS_FILE)
    return Hooks(**{name: found.get(name) for name in Hooks.__dataclass_fields__})


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _yaml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
    return {}
