"""A small, really trained language model and the text it was trained on: the default of every example.

Importing this package loads neither torch nor transformers, so it is safe to call from argument parsers and
from configuration code.
"""

from __future__ import annotations

from pathlib import Path

from transcoder.demo.stdlib_text import Document, iter_documents

__all__ = ["Document", "iter_documents", "language_model_path"]

_MODEL_FOLDER = Path(__file__).resolve().parent / "language_model"
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def language_model_path() -> Path:
    """Return the folder of the packaged language model, in Hugging Face layout.

    Raises:
        FileNotFoundError: a file of the model is missing (an install without package data, or an unfinished
            clone); the message says how to get the model back.
    """
    missing = [name for name in _NEEDED_FILES if not (_MODEL_FOLDER / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the packaged language model is incomplete: {', '.join(missing)} not found in {_MODEL_FOLDER}. "
            "Install the package again with its package data, or train the model again in a checkout with "
            f"`python tools/train_language_model.py --out {_MODEL_FOLDER}` (under an hour on one CPU thread)."
        )
    return _MODEL_FOLDER
