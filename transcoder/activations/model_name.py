"""What `model.name` means: the packaged model, a folder, or a name on the hub; and what a folder is that is no model."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

from transcoder.demo import language_model_path
from transcoder.files import local_path
from transcoder.settings import brief

OLDEST = (3, 9)
"""The oldest TransformerLens whose bridge the tests pass with. Other libraries pin older ones, so an install may bring one."""


class ModelError(ValueError):
    """A language model or a hook that cannot be had. The message says what there is and what to do."""


def resolve_model_name(name: str) -> str:
    """What to load for `model.name`: `demo` is the packaged folder (one of that name here is `./demo`), an existing folder is
    itself, else a hub name.

    Asks the hub one quick question unless the model is in its local cache, so that a wrong name or a missing
    network is an error at once and not after half a minute of retries.

    Raises:
        ModelError: no such folder, a folder without config.json, or nothing of that name on the hub.
    """
    if name == "demo":
        try:
            return str(language_model_path())
        except FileNotFoundError as error:
            raise ModelError(f"model.name: {error}") from error
    path = local_path(name, "model.name")
    if path.is_dir():
        what = _no_model(path)
        if what is not None:
            raise ModelError(f"model.name: the folder {name!r} {what}")
        return str(path)
    if path.is_file():
        raise ModelError(
            f"model.name: {name!r} is a file; give the folder in Hugging Face layout (config.json and *.safetensors) that it "
            f"belongs to{'; a .gguf is of llama.cpp, and is made from such a folder' * (path.suffix == '.gguf')}"
        )
    if path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ModelError(f"model.name: no model folder at {name!r}; give 'demo', a Hugging Face folder or a hub name")
    _check_hub_model(name)
    return name


_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_OTHERS = {
    "transcoder.safetensors": "holds a transcoder, not a language model",
    "sae_weights.safetensors": "holds a sparse autoencoder of SAELens, not a language model",
    "sae.safetensors": "holds a sparse coder of sparsify, not a language model",
    "checkpoints/step_*": "is the folder of a run; its config.yaml names the language model",
    "model_index.json": "is a pipeline of diffusers, not a language model",
    "consolidated*.pth": "holds a model in Meta's own layout; give the same model in Hugging Face layout",
    "*.gguf": "holds a .gguf of llama.cpp; give the folder in Hugging Face layout that it was made from",
}
"""What a file in a folder says of it."""


def _no_model(path: Path) -> str | None:
    """Why this folder is no language model in Hugging Face layout, with what to do; None where it may be one."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"holds an adapter (LoRA) of {base}, not a model: merge it (peft's merge_and_unload, save_pretrained) and give the "
            "folder of that"
        )
    for pattern, what in _OTHERS.items():
        if any(path.glob(pattern)) and not any(path.glob("model*.safetensors")):
            return what
    if not (path / "config.json").is_file():
        # The hub's cache, and a trainer's output, have the model one or two folders down.
        below = sorted(str(found.parent) for depth in ("*", "*/*") for found in path.glob(f"{depth}/config.json"))
        here = f"; there is one in {', '.join(below[:3])}" if below else "; give a folder in Hugging Face layout"
        return f"holds no config.json{here}"
    config = _json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        return "has a config.json without model_type: it is not of a model in Hugging Face layout"
    for index in path.glob("*.safetensors.index.json"):
        names = _json(index).get("weight_map")
        missing = sorted(
            {str(n) for n in names.values() if not (path / str(n)).is_file()} if isinstance(names, dict) else ()
        )
        if missing:
            return f"lacks {', '.join(missing[:3])} of the files that {index.name} names; is the download complete?"
    if not any(found.stat().st_size for pattern in _WEIGHTS for found in path.glob(pattern)):
        return "holds no weights (model.safetensors, or shards of it)"
    return None


def _json(path: Path) -> dict[str, Any]:
    """{} where it is no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_hub_model(name: str) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    official = _official_name(name)
    try:
        if isinstance(try_to_load_from_cache(official, "config.json"), str):
            return
        HfApi().model_info(official, timeout=15)
    except HFValidationError as error:
        raise ModelError(
            f"model.name: {name!r} is neither 'demo' nor a folder, and no hub name either: {brief(error)}"
        ) from error
    except Exception as error:
        # The hub's client raises its own types and those of two HTTP libraries.
        raise ModelError(
            f"model.name: there is no folder {name!r}, and the Hugging Face hub gives no model of that name: "
            f"{type(error).__name__}: {brief(error)}. Check the name and the network (a gated model needs `hf auth login`); "
            "without a network use 'demo' or a local folder."
        ) from error


def _official_name(name: str) -> str:
    """The hub's name of a model that TransformerLens knows by another."""
    check_library()
    from transformer_lens.tools.model_registry import registry_io

    if hasattr(registry_io, "resolve_model_alias"):
        return registry_io.resolve_model_alias(name) or name
    # Up to 3.x the aliases are a plain table.
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((official for official, aliases in MODEL_ALIASES.items() if name in aliases), name)


def check_library() -> None:
    """ModelError where the installed TransformerLens is older than what the tests pass with."""
    have = importlib.metadata.version("transformer-lens")
    if tuple(int(part) for part in re.findall(r"\d+", have)[:2]) < OLDEST:
        raise ModelError(
            "model.name: reading a language model needs transformer-lens 3.9 or newer (tested with 3.9 and 4.3), and this "
            f"environment has {have}: pip install 'transformer-lens>=3.9,<5', in an environment of its own where another "
            "library pins the older one"
        )


def layer_count(name: str) -> int:
    """Number of layers of the language model `model.name`, from its config alone.

    Raises:
        ModelError: no such model, or its config does not say.
    """
    from transformers import AutoConfig

    place = resolve_model_name(name)
    try:
        config = AutoConfig.from_pretrained(place if Path(place).is_dir() else _official_name(place))
        return int(config.get_text_config().num_hidden_layers)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model.name: the config of {name!r} does not say how many layers it has: {brief(error)}"
        ) from error


def known_layer_count(name: str) -> int | None:
    """As `layer_count`, of a model that is on this machine; None where it is not, or does not say. Asks no hub."""
    from transformers import AutoConfig

    try:
        place = language_model_path() if name == "demo" else name
        config = AutoConfig.from_pretrained(str(place), local_files_only=True)
        return int(config.get_text_config().num_hidden_layers)
    except (OSError, ValueError, AttributeError):
        return None
