"""Activation samples: small columns as NumPy, contexts only for the rows that are asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.tables import safe, visible

INTEGERS = ("latent", "position", "sequence", "step", "anchor")
COLUMNS = (*INTEGERS, "kind", "activation", "token", "context")
"""What every samples.parquet has; `tokens`, the display strings, may lack."""
BATCH_ROWS = 8192
"""Rows of contexts in memory at a time."""
LINE_CHARACTERS = 100
"""Characters of a context that one line of text shows."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_UNIT = re.compile(f"{_BYTE.pattern}|[^<]+|<")
_SHADE = "255,140,0"
"""A colour that can be read on a light page and on a dark one."""


@dataclass(frozen=True, eq=False)
class Context:
    """One kept sample of a latent.

    Fields:
        kind: "top" for one of its strongest, "stratified" for one drawn over positions.
        tokens: display strings, padding left out. Of a character that several tokens make up, the last one has the character,
            those before it their bytes (`<0xE6>`).
        anchor: the place in `tokens` of the token that the sample was kept for.
        activation: at the anchor.
        activations: [tokens] float64: the latent's on each token; NaN where it is not known (a masked token; every token but
            the anchor in samples of training), which is not a zero.
        position: of the anchor in its sequence.
        sequence: number of the sequence, -1 where unknown.
        step: the training step that saw it.
        latent: whose sample it is.
    """

    kind: Literal["top", "stratified"]
    tokens: list[str]
    anchor: int
    activation: float
    activations: NDArray[np.float64]
    position: int
    sequence: int
    step: int
    latent: int

    @property
    def text(self) -> str:
        return "".join(self._searched)

    @property
    def _searched(self) -> list[str]:
        """The tokens without bytes of a character that a later token completes."""
        return [_BYTE.sub("", token) for token in self.tokens]

    def firing_on(self, text: str) -> float:
        """The strongest known activation on a token of `text`, wherever it is in the context, upper and lower case alike."""
        sizes = [len(token) for token in self._searched]
        ends = np.cumsum(sizes)
        begins, strongest = ends - sizes, 0.0
        joined, wanted = self.text.lower(), text.lower()
        at = joined.find(wanted)
        while at >= 0:
            touched = self.activations[(begins < at + len(wanted)) & (ends > at)]
            strongest = max(strongest, float(np.nanmax(touched, initial=0.0)))
            at = joined.find(wanted, at + 1)
        return strongest

    def __repr__(self) -> str:
        return f"{self.activation:9.4g}  {self.marked()}"

    def marked(self, characters: int = LINE_CHARACTERS) -> str:
        """The context on one line, its token in brackets »«, cut to about `characters` around it."""
        before = visible("".join(self.tokens[: self.anchor]))
        token = f"»{visible(self.tokens[self.anchor])}«"
        after = visible("".join(self.tokens[self.anchor + 1 :]))
        room = max(0, characters - len(token))
        left = before if len(before) <= room * 2 // 3 else "…" + before[len(before) - room * 2 // 3 :]
        rest = room - len(left)
        return left + token + (after if len(after) <= rest else after[: max(0, rest)] + "…")

    def _repr_html_(self) -> str:
        return self.shaded(self.activation)

    def shaded(self, peak: float) -> str:
        """The context as HTML: a token is the darker the stronger the latent fires on it, `peak` being the darkest."""
        parts = []
        for n, token in enumerate(self.tokens):
            style, title, value = "", "", self.activations[n]
            if np.isfinite(value):
                title = f' title="{value:.4g}"'
                if peak > 0:
                    style = (
                        f"background:rgba({_SHADE},{0.75 * min(1.0, max(0.0, value / peak)):.2f});border-radius:2px;"
                    )
            if n == self.anchor:
                style += "outline:1px solid currentColor;"
            parts.append(f'<span style="{style}"{title}>{safe(token)}</span>' if style else safe(token))
        return f'<span style="font-family:monospace;white-space:pre-wrap">{"".join(parts)}</span>'


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Samples, one row each; every column has the same length.

    Fields:
        latent: int64 latent ids.
        top: bool, True for a top-activating sample, False for a position-stratified one.
        activation: float64.
        position, sequence, step, anchor: int64.
    """

    latent: NDArray[np.int64]
    position: NDArray[np.int64]
    sequence: NDArray[np.int64]
    step: NDArray[np.int64]
    anchor: NDArray[np.int64]
    top: NDArray[np.bool_]
    activation: NDArray[np.float64]
    _path: Path

    def __len__(self) -> int:
        return len(self.latent)

    def rows_of(self, latent: int) -> NDArray[np.int64]:
        """The rows of a latent, the strongest first."""
        order, latents = self._by_latent
        begin, end = np.searchsorted(latents, [latent, latent + 1])
        return order[begin:end]

    def read_contexts(self, rows: NDArray[np.int64]) -> list[Context]:
        """The contexts of `rows`, in their order; a row whose anchor is outside its context is left out."""
        read: dict[int, Context | None] = {}
        for places, batch in self._batches(rows):
            strings = batch.strings()
            read |= {int(p): self._context(int(rows[p]), *strings[n]) for n, p in enumerate(places)}
        return [context for place in range(len(rows)) if (context := read[place]) is not None]

    def read_windows(self, rows: NDArray[np.int64], before: int, after: int) -> Windows:
        """At most `before` and `after` tokens around the token of each of `rows`: many rows at once, without an object for each
        token."""
        width = before + 1 + after
        ids: dict[str, int] = {}
        word = np.full((len(rows), width), -1, np.int64)
        activation = np.full((len(rows), width), np.nan)
        for places, batch in self._batches(rows):
            ends = np.cumsum(batch.lengths)
            anchor = self.anchor[rows[places]]
            column = anchor[:, None] + np.arange(-before, after + 1)
            inside = (column >= 0) & (column < batch.lengths[:, None])
            inside &= ((anchor >= 0) & (anchor < batch.lengths))[:, None]
            at = np.where(inside, (ends - batch.lengths)[:, None] + column, 0)
            if batch.codes.size:
                numbers = np.array([ids.setdefault(w, len(ids)) for w in batch.words])
                word[places] = np.where(inside & (batch.codes[at] != PADDING), numbers[batch.codes[at]], -1)
                if batch.activations is not None:
                    activation[places] = np.where(inside, batch.activations[at], np.nan)
            spelled = np.array(["<0x" in w for w in batch.words], dtype=bool)
            for n in np.flatnonzero((inside & spelled[batch.codes[at]]).any(1)).tolist() if spelled.any() else ():
                tokens = batch.tokens(n)
                texts = whole_characters(tokens)
                for c in np.flatnonzero(inside[n] & (word[places[n]] >= 0)):
                    word[places[n], c] = ids.setdefault(texts[column[n, c]], len(ids))
        known = word[:, before] >= 0
        activation[known, before] = self.activation[rows[known]]
        return Windows(list(ids), word, activation, before)

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], _Tokens]]:
        """The tokens of `rows` in parts, each with its places among them. Reads the file once, `BATCH_ROWS` rows at a time."""
        import pyarrow.parquet as pq

        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        with pq.ParquetFile(self._path) as file:
            first = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=_text_columns(file)):
                begin, end = np.searchsorted(wanted, [first, first + len(batch)])
                if begin < end:
                    yield order[begin:end], _Tokens.of(batch.take(wanted[begin:end] - first))
                first += len(batch)

    def _context(self, row: int, texts: list[str], known: NDArray[np.float64] | None) -> Context | None:
        """`known`: the activation on each token, where the file has it."""
        anchor, position, sequence = int(self.anchor[row]), int(self.position[row]), int(self.sequence[row])
        if not 0 <= anchor < len(texts):
            return None
        begin = next(n for n, token in enumerate(texts) if token != "" or n == anchor)
        near = np.full(len(texts), np.nan) if known is None or len(known) != len(texts) else known.copy()
        near[anchor] = activation = float(self.activation[row])
        kind: Literal["top", "stratified"] = "top" if self.top[row] else "stratified"
        step, latent = int(self.step[row]), int(self.latent[row])
        shown = whole_characters(texts[begin:]), anchor - begin, activation, near[begin:]
        return Context(kind, *shown, position, sequence, step, latent)

    def containing(self, text: str) -> NDArray[np.bool_]:
        """[rows] bool: whether `text` is in the row's context, upper and lower case alike; it may span several tokens."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        found: list[NDArray[np.bool_]] = []
        with pq.ParquetFile(self._path) as file:
            column = "tokens" if "tokens" in file.schema_arrow.names else "context"
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                if column == "tokens":
                    # Joined by the library: a run keeps millions of tokens.
                    joined = pc.binary_join(batch.column(0), pa.scalar(""))
                else:
                    joined = pa.array(
                        ["".join(f"[{i}]" for i in ids or () if i >= 0) for ids in batch.column(0).to_pylist()]
                    )
                if not text.isascii():
                    spelled = ("".join(whole_characters([t])) if t else t for t in joined.to_pylist())
                    joined = pa.array([t and _BYTE.sub("", t) for t in spelled], type=pa.string())
                hit = pc.fill_null(pc.match_substring(joined, pattern=text, ignore_case=True), False)
                found.append(np.asarray(hit.to_numpy(zero_copy_only=False), dtype=bool))
        return np.concatenate(found) if found else np.zeros(0, dtype=bool)

    @cached_property
    def _by_latent(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.lexsort((-self.activation, self.latent))
        return order, self.latent[order]


def whole_characters(tokens: list[str]) -> list[str]:
    """Tokens with the characters that they make up together: the token with a character's last byte gets the character in the
    place of that byte. Bytes of a character that is cut off stay as they are.

    >>> whole_characters([" <0xE6>", "<0x97>", "<0xA5>", "<0xE6>"])
    [' <0xE6>', '<0x97>', '日', '<0xE6>']
    """
    if not any("<0x" in token for token in tokens):
        return tokens
    units = [(n, unit[0], unit[1]) for n, token in enumerate(tokens) for unit in _UNIT.finditer(token)]
    found, at = [""] * len(tokens), 0
    while at < len(units):
        owner, text, lead = units[at]
        size = 1 if lead is None or lead < "C0" else 2 if lead < "E0" else 3 if lead < "F0" else 4
        part = units[at : at + size]
        with contextlib.suppress(ValueError):  # a piece of a character, without the others
            if lead is not None:
                text = bytes.fromhex("".join(byte or "text" for _, _, byte in part)).decode()
                owner, at = part[-1][0], at + size - 1
                for earlier, spelled, _ in part[:-1]:
                    found[earlier] += spelled if earlier != owner else ""
        found[owner] += text
        at += 1
    return found


def read_samples(path: Path) -> SampleTable:
    """Read samples.parquet; the contexts only when they are asked for.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not Parquet, or columns are lacking; the message names them.
    """
    table, _ = read_columns(path, COLUMNS, [*INTEGERS, "kind", "activation"])
    integers = {name: table.column(name).to_numpy().astype(np.int64) for name in INTEGERS}
    top = np.asarray(table.column("kind").to_numpy() == "top", dtype=bool)
    return SampleTable(
        **integers, top=top, activation=table.column("activation").to_numpy().astype(np.float64), _path=path
    )


def read_columns(path: Path, required: Sequence[str], wanted: Sequence[str]) -> tuple[Any, dict[bytes, bytes]]:
    """The `wanted` columns of a Parquet file as an Arrow table, and the file's own metadata.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not Parquet, or one of the `required` columns is lacking; the message names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in required if name not in file.schema_arrow.names]
            if lacking:
                raise ValueError(f"columns are lacking: {', '.join(lacking)}")
            return file.read(columns=list(wanted)), file.schema_arrow.metadata or {}
    except pa.ArrowException as error:
        raise ValueError(f"not a Parquet file: {error}") from error


def _text_columns(file: Any) -> list[str]:
    return [name for name in ("context", "tokens", "activations") if name in file.schema_arrow.names]


PADDING = 0
"""The code of no token."""


class _Tokens(NamedTuple):
    """Tokens of n rows, one after another: `words[codes]` are their display strings ("" for padding; token ids in brackets
    where the file has none), `lengths` [n] their number in each row, `activations` on each, where the file has them."""

    words: list[str]
    codes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    activations: NDArray[np.float64] | None

    @classmethod
    def of(cls, batch: Any) -> _Tokens:
        contexts = batch.column("context")
        lengths = contexts.value_lengths().fill_null(0)
        ids = contexts.flatten()

        def column(name: str) -> Any:
            # A file of another writer may have more or fewer entries than ids; then none belongs to an id.
            found = batch.column(name) if name in batch.schema.names else None
            return None if found is None or not found.value_lengths().fill_null(0).equals(lengths) else found.flatten()

        strings, activations = column("tokens"), column("activations")
        encoded = (ids if strings is None else strings.fill_null("")).dictionary_encode()
        spelled = encoded.dictionary.to_pylist()
        codes = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64) + 1
        codes = np.where(np.asarray(ids.to_numpy(zero_copy_only=False)) < 0, PADDING, codes)
        return cls(
            ["", *(spelled if strings is not None else (f"[{i}]" for i in spelled))],
            codes,
            np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64),
            None if activations is None else np.asarray(activations.to_numpy(zero_copy_only=False), np.float64),
        )

    def tokens(self, row: int) -> list[str]:
        end = int(self.lengths[: row + 1].sum())
        return [self.words[code] for code in self.codes[end - int(self.lengths[row]) : end]]

    def strings(self) -> list[tuple[list[str], NDArray[np.float64] | None]]:
        """Each row's display strings (alike ones are one object) and its activations."""
        ends = np.cumsum(self.lengths)[:-1]
        texts = [part.tolist() for part in np.split(np.asarray(self.words, dtype=object)[self.codes], ends)]
        if self.activations is None:
            return [(text, None) for text in texts]
        return list(zip(texts, np.split(self.activations, ends), strict=True))


class Windows(NamedTuple):
    """Tokens around those of n samples.

    Fields:
        words: display strings.
        word: [n, width] int64: which of `words`; -1 where there is no token.
        activation: [n, width] float64, NaN where it is not known.
        anchor: the column of the samples' own tokens.
    """

    words: list[str]
    word: NDArray[np.int64]
    activation: NDArray[np.float64]
    anchor: int

    @property
    def known(self) -> NDArray[np.bool_]:
        """[n] bool: whether the sample's own token is known."""
        return self.word[:, self.anchor] >= 0

    def part(self, rows: slice) -> Windows:
        return self._replace(word=self.word[rows], activation=self.activation[rows])
