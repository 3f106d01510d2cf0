"""Cached activations: shards of safetensors beside an index, written once and read as a stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.masking import SinkMasker
from transcoder.activations.passes import Chunk, Pass, PositionChoice, RowMaker, counters_of
from transcoder.activations.text import DataError, is_heldout
from transcoder.activations.vocabulary import Vocabulary
from transcoder.config import RunConfig

INDEX_NAME = "index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_shard(
    path: str | Path,
    source: Tensor,
    target: Tensor,
    tokens: Tensor,
    positions: Tensor,
    sequences: Tensor | None = None,
) -> Path:
    """Write one shard (through a temporary file, so that a killed writer leaves no torn one under its name).

    Args:
        path: `<folder>/<name>.safetensors`; shards are read in the order of their names.
        source: [T, d_in]; target: [T, d_out]; float32, bfloat16 or float16, both alike.
        tokens, positions: [T] whole numbers, in the order of the text. Keep sinks: the reader masks them.
        sequences: [T] ids of the packed sequences, unique over all shards; None: a sequence begins where
            positions do not go up.

    Raises:
        ValueError, TypeError: shapes, types or lengths that do not agree, or a name that does not end in
            .safetensors.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"write_shard: path: expected a name ending in .safetensors, got {path.name!r}")
    if source.dim() != 2 or target.dim() != 2 or source.dtype != target.dtype or source.dtype not in _DTYPE_NAMES:
        raise TypeError(
            "write_shard: expected source [T, d_in] and target [T, d_out], both float32, bfloat16 or float16, got "
            f"{list(source.shape)} {source.dtype} and {list(target.shape)} {target.dtype}"
        )
    columns = {
        "source": source,
        "target": target,
        "tokens": tokens.to(torch.int64),
        "positions": positions.to(torch.int64),
    }
    if sequences is not None:
        columns["sequences"] = sequences.to(torch.int64)
    lengths = {name: value.shape[0] for name, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"write_shard: expected one length for all columns, got {lengths}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in columns.items()}, temporary)
    os.replace(temporary, path)
    return path


def write_index(
    folder: str | Path,
    *,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    special_ids: Sequence[int] = (),
    pad_id: int | None = None,
    model: str | None = None,
    extra: Mapping[str, Any] | None = None,
    checksums: bool = True,
) -> Path:
    """Describe the shards of a folder in its index.json: widths, type, tokens and bytes of each, sha256 if
    asked.

    Args:
        sequence_length: set it where shards hold whole sequences of this length in order (needed to sample
            positions).
        vocab_size: number of token ids; None takes the largest id found plus 1.
        special_ids: ids that the reader masks as sinks; pad_id: left out of the median norm.
        model: `demo` or a folder or hub name in the local cache whose tokenizer shows the tokens.
        extra: further JSON values to keep, such as the hooks.
        checksums: hash every file now; a reader then verifies each shard when it first opens it.

    Raises:
        DataError: no shard, an unreadable one, or shards of different widths or types.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise DataError(f"write_index: no .safetensors shard in {str(folder)!r}")
    headers = [_read_header(path) for path in paths]
    _check_alike(paths, headers)
    largest = 0
    for path in paths:
        largest = max(largest, int(_column(path, "tokens").max()) if vocab_size is None else 0)
    shards = [
        {"file": path.name, "tokens": header.tokens, "bytes": path.stat().st_size}
        | ({"sha256": _sha256(path)} if checksums else {})
        for path, header in zip(paths, headers, strict=True)
    ]
    index = {
        "schema_version": 1,
        "d_in": headers[0].d_in,
        "d_out": headers[0].d_out,
        "dtype": headers[0].dtype,
        "tokens": sum(header.tokens for header in headers),
        "sequence_length": sequence_length,
        "vocab_size": largest + 1 if vocab_size is None else vocab_size,
        "special_ids": [int(i) for i in special_ids],
        "pad_id": pad_id,
        "model": model,
        **(extra or {}),
        "shards": shards,
    }
    temporary = folder / (INDEX_NAME + ".partial")
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INDEX_NAME)
    return folder / INDEX_NAME


@dataclass(frozen=True)
class _Header:
    d_in: int
    d_out: int
    dtype: str
    tokens: int
    sequences: bool


@dataclass(frozen=True)
class _Shard:
    """An open shard's small columns; the activations stay in the file."""

    path: Path
    tokens: Tensor
    positions: Tensor
    sequences: Tensor


class CachedSource:
    """Reads shards in order, a pass at a time; see `passes.ActivationSource`.

    A pass is `sequences_per_forward * sequence_length` tokens (the index's sequence length where it gives
    one). Sinks are masked as they are for a model: by the index's special ids, by norm and by position. What
    is held out is chosen by a hash of the sequence's id, so that training and evaluation share no sequence.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, sampler: PositionChoice | None, context_tokens: int
    ) -> None:
        section = config.activations
        assert section.cached_path is not None  # the configuration checks it
        self._folder = Path(section.cached_path).expanduser()
        index = read_index(self._folder)
        self._index = index
        self.d_in, self.d_out = int(index["d_in"]), int(index["d_out"])
        whole = index.get("sequence_length")
        if sampler is not None and whole is None:
            raise DataError(
                f"{self._folder / INDEX_NAME}: positions can only be sampled from whole sequences and this "
                "cache has no sequence_length; set antidup.positions.enabled to false, or cache whole sequences"
            )
        self.sequence_length = int(whole or section.sequence_length)
        self._whole = whole is not None
        self.vocabulary = Vocabulary(_tokenizer(index), int(index["vocab_size"]), index["special_ids"])
        if self.vocabulary.special_ids == [] and index["special_ids"]:
            raise DataError(f"{self._folder / INDEX_NAME}: special_ids lie outside vocab_size = {index['vocab_size']}")
        pad = index.get("pad_id")
        self._masker = SinkMasker(section, self.vocabulary.special_ids, self.vocabulary.size, pad, device)
        self._device, self._fraction = device, section.heldout_fraction
        self._chunk = section.sequences_per_forward * self.sequence_length
        self._context_tokens = context_tokens
        self._rows = RowMaker(self._masker, context_tokens, sampler)
        self.identity: dict[str, Any] = {
            "kind": "cached",
            "d_in": self.d_in,
            "d_out": self.d_out,
            "vocabulary": self.vocabulary.size,
            "tokens": int(index["tokens"]),
            "sequence_length": self.sequence_length,
            "sequences_per_forward": section.sequences_per_forward,
        }
        self.holds_out = self._fraction > 0
        self._verified: set[str] = set()
        self._shard_number = self._row = self._epoch = 0
        self._shard: tuple[int, _Shard] | None = None

    def produce(self) -> Chunk:
        """The next rows of the cache; it begins again when it ends."""
        shards = self._index["shards"]
        shard = self._open(self._shard_number)
        number = int(self._rows.totals["passes"])
        begin, end = self._row, min(self._row + self._chunk, len(shard.tokens))
        found = self._read(shard, begin, end)
        rows, _ = self._rows.make(found, self._training(found), step=number)
        self._row = end
        if end == len(shard.tokens):
            self._shard_number, self._row = self._shard_number + 1, 0
        if self._shard_number == len(shards):
            self._shard_number, self._epoch = 0, self._epoch + 1
        return Chunk(rows, self.cursor())

    def heldout_passes(self) -> Iterator[tuple[ActivationBatch, ActivationBatch]]:
        """(rows, sinks) of the held-out sequences, pass by pass."""
        maker = RowMaker(self._masker, self._context_tokens, None)
        for number in range(len(self._index["shards"])):
            shard = self._load(number)
            for begin in range(0, len(shard.tokens), self._chunk):
                found = self._read(shard, begin, min(begin + self._chunk, len(shard.tokens)))
                yield maker.make(found, ~self._training(found))

    def _training(self, found: Pass) -> Tensor:
        """[T] bool: the tokens of sequences that are not held out."""
        ids, place = found.sequences.unique(return_inverse=True)
        trains = torch.tensor([not is_heldout(int(i), self._fraction) for i in ids.tolist()], device=ids.device)
        return trains[place]

    def _read(self, shard: _Shard, begin: int, end: int) -> Pass:
        from safetensors import safe_open

        with safe_open(shard.path, framework="pt") as file:
            source = file.get_slice("source")[begin:end].to(self._device)
            target = file.get_slice("target")[begin:end].to(self._device)
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
        return Pass(
            source,
            target,
            tokens,
            positions,
            sequences,
            torch.ones_like(tokens, dtype=torch.bool),
            shape,
            where,
        )

    def _open(self, number: int) -> _Shard:
        if self._shard is None or self._shard[0] != number:
            self._shard = (number, self._load(number))
        return self._shard[1]

    def _load(self, number: int) -> _Shard:
        entry = self._index["shards"][number]
        path = self._folder / entry["file"]
        if entry.get("sha256") and path.name not in self._verified:
            if _sha256(path) != entry["sha256"]:
                raise DataError(
                    f"{path}: its sha256 is not the one in {INDEX_NAME}: the shard is damaged; write it again"
                )
            self._verified.add(path.name)
        tokens, positions = _column(path, "tokens"), _column(path, "positions")
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary.size):
            raise DataError(f"{path}: token ids must lie in [0, {self.vocabulary.size}), the index's vocab_size")
        sequences = _column(path, "sequences") if _read_header(path).sequences else _number_sequences(positions, number)
        return _Shard(path, tokens, positions, sequences)

    def cursor(self) -> dict[str, Any]:
        return {
            "shard": self._shard_number,
            "row": self._row,
            "epoch": self._epoch,
            "totals": dict(self._rows.totals),
        }

    def seek(self, cursor: dict[str, Any]) -> None:
        self._shard_number, self._row, self._epoch = (
            int(cursor["shard"]),
            int(cursor["row"]),
            int(cursor["epoch"]),
        )
        self._rows.totals = {name: float(value) for name, value in cursor["totals"].items()}

    def counters(self, cursor: dict[str, Any]) -> dict[str, float]:
        return counters_of(cursor["totals"], {"epochs": int(cursor["epoch"])})


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache, every shard's header checked against it.

    Raises:
        DataError: naming the file that is missing, truncated, or of another width, type or length.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"activations.cached_path: no {INDEX_NAME} in {str(folder)!r}; write one with "
            "transcoder.activations.cached.write_index"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = [(folder / entry["file"], int(entry["tokens"])) for entry in index["shards"]]
        expected = (int(index["d_in"]), int(index["d_out"]), str(index["dtype"]))
        needed = {name: index[name] for name in ("tokens", "vocab_size", "special_ids")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of activation shards: {type(error).__name__}: {error}") from error
    if not shards or needed["tokens"] < 1:
        raise DataError(f"{path}: names no shard with tokens")
    for shard, tokens in shards:
        header = _read_header(shard)
        if (header.d_in, header.d_out, header.dtype) != expected:
            raise DataError(
                f"{shard}: holds d_in {header.d_in}, d_out {header.d_out}, {header.dtype}; the index says "
                f"d_in {expected[0]}, d_out {expected[1]}, {expected[2]}: it belongs to another cache"
            )
        if header.tokens != tokens:
            raise DataError(f"{shard}: holds {header.tokens} tokens and the index says {tokens}; write the index again")
    return dict(index)


def _read_header(path: Path) -> _Header:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: the shard is missing")
    try:
        # Opening checks the file's length against its header: a truncated shard ends here.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            shapes = {name: list(value.get_shape()) for name, value in slices.items()}
            dtypes = {name: value.get_dtype() for name, value in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file (truncated?): {error}; write the shard again") from error
    missing = [name for name in ("source", "target", "tokens", "positions") if name not in shapes]
    if missing:
        raise DataError(f"{path}: lacks the tensor(s) {', '.join(missing)}; it has {sorted(shapes)}")
    tokens = shapes["tokens"][0] if shapes["tokens"] else -1
    vectors = [n for n in ("tokens", "positions", "sequences") if n in shapes and shapes[n] != [tokens]]
    matrices = [n for n in ("source", "target") if len(shapes[n]) != 2 or shapes[n][0] != tokens]
    if vectors or matrices:
        raise DataError(f"{path}: expected source [T, d_in], target [T, d_out] and [T] for the rest, got {shapes}")
    whole = [n for n in ("tokens", "positions", "sequences") if n in dtypes and dtypes[n] not in ("I64", "I32")]
    if whole or dtypes["source"] != dtypes["target"] or dtypes["source"] not in _DTYPES:
        raise DataError(
            f"{path}: expected source and target of one type (F32, BF16 or F16) and I64 for the rest, got {dtypes}"
        )
    return _Header(shapes["source"][1], shapes["target"][1], dtypes["source"], tokens, "sequences" in shapes)


def _check_alike(paths: Sequence[Path], headers: Sequence[_Header]) -> None:
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if (header.d_in, header.d_out, header.dtype) != (first.d_in, first.d_out, first.dtype):
            raise DataError(
                f"{path}: holds d_in {header.d_in}, d_out {header.d_out}, {header.dtype}, and {paths[0].name} holds "
                f"d_in {first.d_in}, d_out {first.d_out}, {first.dtype}; one cache has one width and type"
            )


def _column(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).to(torch.int64)


def _number_sequences(positions: Tensor, shard: int) -> Tensor:
    """[T] int64 ids, unique over shards: a sequence begins where the position does not go up."""
    begins = torch.ones_like(positions)
    begins[1:] = (positions[1:] <= positions[:-1]).to(torch.int64)
    return begins.cumsum(0) - 1 + (shard << 32)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer(index: Mapping[str, Any]) -> Any | None:
    """The tokenizer of the index's model if it is on this machine; tokens show as their ids otherwise."""
    name = index.get("model")
    if not name:
        return None
    from transformers import AutoTokenizer

    from transcoder.demo import language_model_path

    try:
        return AutoTokenizer.from_pretrained(
            str(language_model_path()) if name == "demo" else str(name), local_files_only=True
        )
    except (OSError, ValueError, ImportError):
        return None


def cache_activations(
    config: RunConfig, folder: str | Path, tokens: int, device: torch.device, shard_tokens: int = 1 << 18
) -> Path:
    """Run the model that `config` names over its training documents and write shards and index of whole sequences.

    Sinks are written too (a reader masks them by its own settings); held-out documents are not, so a cache has an
    evaluation set of its own, by sequence.

    Args:
        config: sections `model` and `activations` of kind `model`.
        folder: where the shards go; it must hold none yet.
        tokens: at least this many are written, in whole forward passes.
        device: where the model runs.
        shard_tokens: tokens of a shard, rounded up to whole forward passes.

    Returns:
        The path of index.json.
    """
    from transcoder.activations.model_source import ModelSource

    folder = Path(folder)
    if tokens < 1 or shard_tokens < 1:
        raise ValueError(
            f"cache_activations: tokens and shard_tokens: expected at least 1, got {tokens}, {shard_tokens}"
        )
    if any(folder.glob("*.safetensors")):
        raise DataError(f"cache_activations: {str(folder)!r} holds shards already; give an empty folder")
    model = ModelSource(config, device, None, 0)
    waiting: list[Pass] = []
    written = number = 0
    while written < tokens or waiting:
        if written < tokens:
            waiting.append(model.next_pass())
            written += len(waiting[-1].tokens)
        if written >= tokens or sum(len(p.tokens) for p in waiting) >= shard_tokens:
            columns = {
                name: torch.cat([getattr(p, name) for p in waiting])
                for name in ("source", "target", "tokens", "positions", "sequences")
            }
            write_shard(folder / f"shard_{number:06}.safetensors", **columns)
            waiting, number = [], number + 1
    return write_index(
        folder,
        sequence_length=model.sequence_length,
        vocab_size=model.vocabulary.size,
        special_ids=model.vocabulary.special_ids,
        pad_id=model.vocabulary.pad_id,
        model=config.model.name,
        extra={"source_hook": config.activations.source_hook, "target_hook": config.activations.target_hook},
    )
