"""Activations read from a cache, and the run that fills one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.activation_source import ActivationSource
from transcoder.activations.documents import DataError, is_heldout
from transcoder.activations.record_sources import files_digest
from transcoder.activations.rows import PASS_COLUMNS, Pass
from transcoder.activations.shards import (
    DTYPES,
    INDEX_NAME,
    matrix_names,
    read_column,
    read_header,
    read_index,
    widths_of,
    write_index,
    write_shard,
)
from transcoder.activations.vocabulary import Vocabulary
from transcoder.config import ActivationsSection, RunConfig
from transcoder.files import file_digest, local_path

logger = logging.getLogger(__name__)

_DOCUMENTS = 1 << 40


@dataclass(frozen=True)
class _Shard:
    """An open shard's small columns; the activations stay in the file."""

    path: Path
    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    documents: Tensor | None


class CachedActivations(ActivationSource):
    """Reads shards in order, a pass at a time.

    A pass is `sequences_per_forward * sequence_length` tokens (the index's sequence length where it gives
    one). Sinks are masked as they are for a model: by the index's special ids, by norm and by position. What
    is held out is chosen by a hash of the document's place, so that training and evaluation share no document; in a cache
    that does not name documents by a hash of the sequence's id, with a warning.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        section = config.activations
        assert section.cached_path is not None  # the configuration checks it
        self._folder = local_path(section.cached_path, "activations.cached_path")
        self._index = index = read_index(self._folder)
        whole = index.get("sequence_length")
        if whole is None:
            self.no_sampling = (
                f"{self._folder / INDEX_NAME}: positions can only be sampled from whole sequences and this "
                "cache has no sequence_length; set antidup.positions.train to false, or cache whole sequences"
            )
        self._whole = whole is not None
        vocabulary = Vocabulary(_tokenizer(index), int(index["vocab_size"]), index["special_ids"])
        if vocabulary.special_ids == [] and index["special_ids"]:
            raise DataError(f"{self._folder / INDEX_NAME}: special_ids lie outside vocab_size = {index['vocab_size']}")
        self._pairs = _pairs_read(index, config, self._folder / INDEX_NAME)
        super().__init__(
            config,
            device,
            vocabulary=vocabulary,
            widths=[(pair.d_in, pair.d_out) for pair in self._pairs],
            sequence_length=int(whole or section.sequence_length),
            activation_bytes=[(pair.d_in + pair.d_out) * DTYPES[index["dtype"]].itemsize for pair in self._pairs],
            pad_id=index.get("pad_id"),
        )
        self._fraction = section.heldout_fraction
        self._identity = {
            "kind": "cached",
            "dtype": index["dtype"],
            "vocabulary": self.vocabulary.size,
            "tokens": int(index["tokens"]),
            "sequence_length": self.sequence_length,
            "sequences_per_forward": section.sequences_per_forward,
            "data": files_digest((entry["file"], self._folder / entry["file"]) for entry in index["shards"]),
        }
        self.holds_out = self._fraction > 0
        self._by_document = all(read_header(self._folder / entry["file"]).documents for entry in index["shards"])
        if self.holds_out and not self._by_document:
            logger.warning(
                "activations.cached_path: this cache does not say which document a token is from, so tokens are held out by "
                "sequence: other sequences of the same document train, and held-out FVU is lower than on new text. Write the "
                "cache again, or give write_shard the documents"
            )
        self._verified: set[str] = set()
        self._shard_number = self._row = self._epoch = 0
        self._shard: tuple[int, _Shard] | None = None

    def identity(self, layer: int) -> dict[str, Any]:
        pair = self._pairs[layer]
        # The cache of one pair of hooks has none of them in its identity: another cache of the same data will do.
        hooks = {"source_hook": pair.source_hook, "target_hook": pair.target_hook} if pair.number is not None else {}
        return {**self._identity, "d_in": pair.d_in, "d_out": pair.d_out, **hooks}

    def next_pass(self) -> list[Pass]:
        shard = self._open(self._shard_number)
        begin, end = self._row, min(self._row + self.pass_rows, len(shard.tokens))
        found = self._read(shard, begin, end)
        self._row = end
        if end == len(shard.tokens):
            self._shard_number, self._row = self._shard_number + 1, 0
        if self._shard_number == len(self._index["shards"]):
            self._shard_number, self._epoch = 0, self._epoch + 1
        return found

    def from_start(self, heldout: bool, skip: int = 0) -> Iterator[list[Pass]]:
        for number in range(len(self._index["shards"])):
            shard = self._load(number)
            for begin in range(0, len(shard.tokens), self.pass_rows):
                if skip > 0:
                    skip -= 1
                    continue
                yield self._read(shard, begin, min(begin + self.pass_rows, len(shard.tokens)))

    def trains(self, found: Pass) -> Tensor:
        column = found.documents if self._by_document and found.documents is not None else found.sequences
        # The documents that the writer held out are not in the cache: those held out of it are drawn by another hash.
        shift = _DOCUMENTS if self._by_document else 0
        ids, place = column.unique(return_inverse=True)
        trains = torch.tensor([not is_heldout(i + shift, self._fraction) for i in ids.tolist()], device=ids.device)
        return trains[place]

    def _read(self, shard: _Shard, begin: int, end: int) -> list[Pass]:
        from safetensors import safe_open

        with safe_open(shard.path, framework="pt") as file:
            pairs = [
                [file.get_slice(name)[begin:end].to(self._device) for name in matrix_names(pair.number)]
                for pair in self._pairs
            ]
        tokens, positions, sequences = (
            column[begin:end].to(self._device) for column in (shard.tokens, shard.positions, shard.sequences)
        )
        length = self.sequence_length
        where = f"{shard.path} rows {begin} to {end}"
        shape = (len(tokens) // length, length) if self._whole else None
        if self._whole and (
            len(tokens) % length or bool((positions != torch.arange(len(tokens), device=self._device) % length).any())
        ):
            raise DataError(
                f"{where}: the index says whole sequences of {length} tokens, and positions do not run 0 to "
                f"{length - 1} here"
            )
        documents = None if shard.documents is None else shard.documents[begin:end].to(self._device)
        valid = torch.ones_like(tokens, dtype=torch.bool) if documents is None else documents >= 0
        return [
            Pass(
                source=source,
                target=target,
                tokens=tokens,
                positions=positions,
                sequences=sequences,
                valid=valid,
                shape=shape,
                where=where,
                documents=documents,
            )
            for source, target in pairs
        ]

    def _open(self, number: int) -> _Shard:
        if self._shard is None or self._shard[0] != number:
            self._shard = (number, self._load(number))
        return self._shard[1]

    def _load(self, number: int) -> _Shard:
        entry = self._index["shards"][number]
        path = self._folder / entry["file"]
        if entry.get("sha256") and path.name not in self._verified:
            if file_digest(path).sha256 != entry["sha256"]:
                raise DataError(
                    f"{path}: its sha256 is not the one in {INDEX_NAME}: the shard is damaged; write it again"
                )
            self._verified.add(path.name)
        tokens, positions = read_column(path, "tokens"), read_column(path, "positions")
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary.size):
            raise DataError(f"{path}: token ids must lie in [0, {self.vocabulary.size}), the index's vocab_size")
        header = read_header(path)
        sequences = read_column(path, "sequences") if header.sequences else _number_sequences(positions, number)
        documents = read_column(path, "documents") if header.documents else None
        return _Shard(path, tokens, positions, sequences, documents)

    def place(self) -> dict[str, Any]:
        return {"shard": self._shard_number, "row": self._row, "epoch": self._epoch}

    def seek(self, place: dict[str, Any]) -> None:
        self._shard_number, self._row, self._epoch = (int(place[name]) for name in ("shard", "row", "epoch"))

    def progress(self, place: dict[str, Any]) -> dict[str, int]:
        return {"epochs": int(place["epoch"])}


def cached_layers(section: ActivationsSection) -> list[int]:
    """The layers that a cache holds. DataError where it holds one pair of hooks, by no number."""
    assert section.cached_path is not None  # the configuration checks it
    folder = local_path(section.cached_path, "activations.cached_path")
    layers = [layer for layer in widths_of(read_index(folder)) if layer is not None]
    if not layers:
        raise DataError(f"{folder / INDEX_NAME}: holds one pair of hooks, not layers; leave activations.layers out")
    return sorted(layers)


@dataclass(frozen=True)
class _Pair:
    """A pair of hooks in a cache; `number` is its layer, None where the cache holds one pair only."""

    number: int | None
    d_in: int
    d_out: int
    source_hook: str
    target_hook: str


def _pairs_read(index: Mapping[str, Any], config: RunConfig, where: Path) -> list[_Pair]:
    """The pairs of a cache that a run reads: by the number of the layer and its hooks; the one pair there is in any case."""
    wanted, widths = config.activations.pairs, widths_of(index)
    if None in widths:
        if wanted[0].layer is not None:
            raise DataError(
                f"{where}: holds one pair of hooks, and activations.layers asks for layers {[w.layer for w in wanted]}; "
                "cache them together, or leave activations.layers out"
            )
        return [_Pair(None, *widths[None], wanted[0].source, wanted[0].target)]
    there = {
        int(layer): (str(pair.get("source_hook")), str(pair.get("target_hook")))
        for layer, pair in index["layers"].items()
    }
    found = []
    for layer, *hooks in wanted:
        number = layer if layer in there else next((n for n, pair in there.items() if pair == tuple(hooks)), None)
        if number is None or there[number] != tuple(hooks):
            raise DataError(
                f"{where}: holds the hooks {'; '.join(f'{n}: {a}, {b}' for n, (a, b) in sorted(there.items()))}, and the run "
                f"asks for {hooks[0]}, {hooks[1]}; set activations.layers, source_hook and target_hook to what is there"
            )
        found.append(_Pair(number, *widths[number], *there[number]))
    return found


def _number_sequences(positions: Tensor, shard: int) -> Tensor:
    """[T] int64 ids, unique over shards: a sequence begins where the position does not go up."""
    begins = torch.ones_like(positions)
    begins[1:] = (positions[1:] <= positions[:-1]).to(torch.int64)
    return begins.cumsum(0) - 1 + (shard << 32)


def _tokenizer(index: Mapping[str, Any]) -> Any | None:
    """The tokenizer of the index's model if it is on this machine; tokens show as their ids otherwise."""
    name = index.get("model")
    if not name:
        return None
    from transformers import AutoTokenizer

    from transcoder.demo import language_model_path

    try:
        return AutoTokenizer.from_pretrained(
            str(language_model_path() if name == "demo" else local_path(name, "model")), local_files_only=True
        )
    except (OSError, ValueError, ImportError):
        return None


def cache_activations(
    config: RunConfig, folder: str | Path, tokens: int, device: torch.device, shard_tokens: int = 1 << 18
) -> Path:
    """Run the model that `config` names over its training documents and write shards and index of whole sequences.

    Sinks are written too (a reader masks them by its own settings); held-out documents are not, so a cache has an
    evaluation set of its own, by document.

    Args:
        config: sections `model` and `activations` of kind `model`.
        folder: where the shards go; it must hold none yet.
        tokens: at least this many are written, in whole forward passes.
        device: where the model runs.
        shard_tokens: tokens of a shard, rounded up to whole forward passes.

    Returns:
        The path of index.json.
    """
    from transcoder.activations.model_activations import ModelActivations

    folder = local_path(folder)
    if tokens < 1 or shard_tokens < 1:
        raise ValueError(
            f"cache_activations: tokens and shard_tokens: expected at least 1, got {tokens}, {shard_tokens}"
        )
    if any(folder.glob("*.safetensors")):
        raise DataError(f"cache_activations: {str(folder)!r} holds shards already; give an empty folder")
    model, pairs = ModelActivations(config, device), config.activations.pairs
    waiting: list[list[Pass]] = []
    written = number = 0
    while written < tokens or waiting:
        if written < tokens:
            waiting.append(model.next_pass())
            written += len(waiting[-1][0].tokens)
        if written >= tokens or sum(len(passes[0].tokens) for passes in waiting) >= shard_tokens:
            columns: dict[str, Any] = {
                name: torch.cat([getattr(passes[0], name) for passes in waiting])
                for name in (*PASS_COLUMNS[2:], "documents")
            }
            for name in PASS_COLUMNS[:2]:
                by_layer = {
                    pair.layer: torch.cat([getattr(passes[n], name) for passes in waiting])
                    for n, pair in enumerate(pairs)
                }
                columns[name] = by_layer.get(None, by_layer)
            write_shard(folder / f"shard_{number:06}.safetensors", **columns)
            waiting, number = [], number + 1
    one = pairs[0].layer is None
    return write_index(
        folder,
        sequence_length=model.sequence_length,
        vocab_size=model.vocabulary.size,
        special_ids=model.vocabulary.special_ids,
        pad_id=model.vocabulary.pad_id,
        model=config.model.name,
        extra={"source_hook": pairs[0].source, "target_hook": pairs[0].target} if one else None,
        hooks=None if one else {pair.layer: (pair.source, pair.target) for pair in pairs if pair.layer is not None},
    )
