"""Text -> tokens -> paired activations -> shuffled batches (with token ids and positions kept)."""

from __future__ import annotations

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.cached_activations import cache_activations
from transcoder.activations.documents import DataError
from transcoder.activations.language_model import ModelError, resolve_model_name
from transcoder.activations.shards import write_index, write_shard
from transcoder.activations.stream import ActivationStream, build_stream

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "DataError",
    "ModelError",
    "build_stream",
    "cache_activations",
    "resolve_model_name",
    "write_index",
    "write_shard",
]
