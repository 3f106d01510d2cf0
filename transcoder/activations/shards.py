"""The files of an activation cache: safetensors shards, and an index that says what each must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.documents import DataError
from transcoder.files import file_digest, local_path, replace_atomically, replacing
from transcoder.tensor_file import write_tensors

INDEX_NAME = "index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MATRIX = re.compile(r"(source|target)(?:\.(\d+))?")
"""Names of the columns [T, width], all of one of `DTYPES`: `source` and `target`, or `source.8` and `target.8` by layer."""
_VECTORS = ("tokens", "positions", "sequences", "documents")
"""Columns [T] of whole numbers, written as int64."""
_OPTIONAL = {"sequences", "documents"}


Matrices = Tensor | Mapping[int, Tensor]
"""[T, width] of the one pair of hooks, or of each layer by its number."""


def write_shard(
    path: str | Path,
    source: Matrices,
    target: Matrices,
    tokens: Tensor,
    positions: Tensor,
    sequences: Tensor | None = None,
    documents: Tensor | None = None,
) -> Path:
    """Write one shard; a killed writer leaves no torn one under its name.

    Args:
        path: `<folder>/<name>.safetensors`; shards are read in the order of their names.
        source: [T, d_in]; target: [T, d_out]; float32, bfloat16 or float16, both alike. {layer: matrix} for several layers.
        tokens, positions: [T] whole numbers, in the order of the text. Keep sinks: the reader masks them.
        sequences: [T] ids of the packed sequences, unique over all shards; None: a sequence begins where
            positions do not go up.
        documents: [T] the document of each token, unique over all shards, -1 on padding; what is held out is chosen by
            document then, else by sequence.

    Raises:
        ValueError, TypeError: shapes, types or lengths that do not agree, or a name that does not end in
            .safetensors.
    """
    path = local_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"write_shard: path: expected a name ending in .safetensors, got {path.name!r}")
    sources, targets = _by_layer(source), _by_layer(target)
    if sources.keys() != targets.keys():
        raise ValueError(f"write_shard: expected a target for each source, got layers {[*sources]} and {[*targets]}")
    columns: dict[str, Tensor] = {}
    dtypes = {matrix.dtype for matrix in (*sources.values(), *targets.values())}
    for layer, one in sources.items():
        other = targets[layer]
        if one.dim() != 2 or other.dim() != 2 or len(dtypes) > 1 or one.dtype not in DTYPES.values():
            raise TypeError(
                "write_shard: expected source [T, d_in] and target [T, d_out], both float32, bfloat16 or float16, got "
                f"{list(one.shape)} {one.dtype} and {list(other.shape)} {other.dtype}"
            )
        columns |= dict(zip(matrix_names(layer), (one, other), strict=True))
    for name, value in zip(_VECTORS, (tokens, positions, sequences, documents), strict=True):
        if value is not None:
            columns[name] = value.to(torch.int64)
    lengths = {name: value.shape[0] for name, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"write_shard: expected one length for all columns, got {lengths}")
    with replacing(path) as file:
        write_tensors(file, columns)
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
    hooks: Mapping[int, tuple[str, str]] | None = None,
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
        hooks: (source hook, target hook) of each layer, for shards of several.
        checksums: hash every file now; a reader then verifies each shard when it first opens it.

    Raises:
        DataError: no shard, an unreadable one, or shards of different widths or types.
    """
    folder = local_path(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise DataError(f"write_index: no .safetensors shard in {str(folder)!r}")
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if header.kind != headers[0].kind:
            raise DataError(
                f"{path}: holds {header.kind}, and {paths[0].name} holds {headers[0].kind}; one cache has one width and type"
            )
    if vocab_size is None:
        vocab_size = 1 + max(max(0, int(read_column(path, "tokens").max())) for path in paths)
    shards = [
        {"file": path.name, "tokens": header.tokens, "bytes": path.stat().st_size}
        | ({"sha256": file_digest(path).sha256} if checksums else {})
        for path, header in zip(paths, headers, strict=True)
    ]
    index = {
        "schema_version": 1,
        **_widths_in_index(headers[0].widths),
        "dtype": headers[0].dtype,
        "tokens": sum(header.tokens for header in headers),
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "special_ids": [int(i) for i in special_ids],
        "pad_id": pad_id,
        "model": model,
        **(extra or {}),
        "shards": shards,
    }
    if hooks is not None:
        for layer, pair in hooks.items():
            index["layers"][str(layer)] |= {"source_hook": pair[0], "target_hook": pair[1]}
    return replace_atomically(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")


def _by_layer(matrices: Matrices) -> dict[int | None, Tensor]:
    return {None: matrices} if isinstance(matrices, Tensor) else dict(matrices.items())


def matrix_names(layer: int | None) -> tuple[str, str]:
    """The columns of a layer's source and target; without a layer, of the one pair of hooks."""
    return ("source", "target") if layer is None else (f"source.{layer}", f"target.{layer}")


Widths = dict[int | None, tuple[int, int]]
"""(d_in, d_out) by layer; the layer of the one pair of hooks is None."""


def widths_of(index: Mapping[str, Any]) -> Widths:
    """The widths that an index states."""
    if "layers" not in index:
        return {None: (int(index["d_in"]), int(index["d_out"]))}
    return {int(layer): (int(pair["d_in"]), int(pair["d_out"])) for layer, pair in index["layers"].items()}


def _widths_in_index(widths: Widths) -> dict[str, Any]:
    if None in widths:
        return dict(zip(("d_in", "d_out"), widths[None], strict=True))
    return {"layers": {str(layer): {"d_in": d_in, "d_out": d_out} for layer, (d_in, d_out) in widths.items()}}


def _kind(widths: Widths, dtype: str) -> str:
    """What all shards of a cache have in common, in words."""
    if None in widths:
        return "d_in {}, d_out {}, {}".format(*widths[None], dtype)
    layers = ", ".join(f"{layer}: {d_in} to {d_out}" for layer, (d_in, d_out) in sorted(widths.items(), key=str))
    return f"layers {layers}, {dtype}"


@dataclass(frozen=True)
class Header:
    """What a shard holds, read without its data."""

    widths: Widths
    dtype: str
    tokens: int
    sequences: bool
    documents: bool

    @property
    def kind(self) -> str:
        """What all shards of a cache have in common, in words."""
        return _kind(self.widths, self.dtype)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache, every shard's header checked against it.

    Raises:
        DataError: naming the file that is missing, truncated, or of another width, type or length.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"activations.cached_path: no {INDEX_NAME} in {str(folder)!r}; write one with "
            "transcoder.activations.shards.write_index"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = [str(entry["file"]) for entry in index["shards"]]
        shards = [(folder / name, int(entry["tokens"])) for name, entry in zip(names, index["shards"], strict=True)]
        expected = _kind(widths_of(index), str(index["dtype"]))
        needed = {name: index[name] for name in ("tokens", "vocab_size", "special_ids")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an index of activation shards: {type(error).__name__}: {error}") from error
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise DataError(f"{path}: expected the names of files in its folder, got {outside[0]!r}")
    if not shards or needed["tokens"] < 1:
        raise DataError(f"{path}: names no shard with tokens")
    for shard, tokens in shards:
        header = read_header(shard)
        if header.kind != expected:
            raise DataError(f"{shard}: holds {header.kind}; the index says {expected}: it belongs to another cache")
        if header.tokens != tokens:
            raise DataError(f"{shard}: holds {header.tokens} tokens and the index says {tokens}; write the index again")
    return dict(index)


def read_header(path: Path) -> Header:
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
    found = [match[2] for name in shapes if (match := _MATRIX.fullmatch(name))]
    layers: list[int | None] = [None if layer is None else int(layer) for layer in dict.fromkeys(found)]
    matrices = [name for layer in layers or [None] for name in matrix_names(layer)]
    missing = [name for name in (*matrices, *_VECTORS) if name not in shapes and name not in _OPTIONAL]
    if missing:
        raise DataError(f"{path}: lacks the tensor(s) {', '.join(missing)}; it has {sorted(shapes)}")
    vectors = [name for name in _VECTORS if name in shapes]
    tokens = shapes["tokens"][0] if shapes["tokens"] else -1
    if any(shapes[n] != [tokens] for n in vectors) or any(
        len(shapes[n]) != 2 or shapes[n][0] != tokens for n in matrices
    ):
        raise DataError(f"{path}: expected source [T, d_in], target [T, d_out] and [T] for the rest, got {shapes}")
    whole = all(dtypes[n] in ("I64", "I32") for n in vectors)
    if not whole or len({dtypes[n] for n in matrices}) > 1 or dtypes[matrices[0]] not in DTYPES:
        raise DataError(
            f"{path}: expected source and target of one type (F32, BF16 or F16) and I64 for the rest, got {dtypes}"
        )
    widths: Widths = {}
    for layer in layers:
        source, target = matrix_names(layer)
        widths[layer] = (shapes[source][1], shapes[target][1])
    return Header(widths, dtypes[matrices[0]], tokens, "sequences" in shapes, "documents" in shapes)


def read_column(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).to(torch.int64)
