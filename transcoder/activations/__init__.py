"""Text -> tokens -> paired activations -> shuffled batches (with token ids and positions kept)."""

from __future__ import annotations

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.bridge import ModelError, resolve_model_name
from transcoder.activations.stream import ActivationStream, build_stream
from transcoder.activations.text import DataError

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "DataError",
    "ModelError",
    "build_stream",
    "resolve_model_name",
]
