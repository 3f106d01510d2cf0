"""Where a run's documents come from: the standard library, local files, or Hugging Face `datasets`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transcoder.activations.documents import DataError, Record, Records, Source
from transcoder.activations.fingerprint import files_digest
from transcoder.activations.retry import PatientSource
from transcoder.activations.text_files import RECORD_SUFFIXES, FilesSource
from transcoder.activations.text_hub import HubSource
from transcoder.config import ActivationsSection
from transcoder.demo.stdlib_text import iter_documents, source_files


def build_sources(section: ActivationsSection) -> tuple[Source, Source, float]:
    """(training source, evaluation source, share to hold out by place); 0 where the sources are apart
    already.

    `section.dataset` is `stdlib`, an existing file or folder, or else a name for Hugging Face `datasets`;
    the prefix `hf:` forces `datasets` for a local folder too (its splits and configurations are then those
    of `datasets`).

    Raises:
        DataError: a missing file, an unknown column or split, an unknown dataset or no network.
    """
    name = section.dataset
    if name == "stdlib" and not Path(name).exists():
        if section.tokens_column is not None:
            raise DataError(
                "activations.tokens_column: the dataset 'stdlib' is text; set it to null or choose another dataset"
            )
        return StdlibSource("train"), StdlibSource("heldout"), 0.0
    path = Path(name).expanduser()
    source: Source
    if path.exists():
        source = FilesSource(path, section.text_column, section.tokens_column)
    elif _looks_like_path(name):
        raise DataError(
            f"activations.dataset: no file or folder at {name!r}; give an existing text, JSONL or Parquet "
            "file, a folder of them, 'stdlib', or the name of a Hugging Face dataset"
        )
    else:
        source = HubSource(
            name.removeprefix("hf:"), section.dataset_config, section.dataset_split, section.text_column,
            section.tokens_column,
        )  # fmt: skip
    source = PatientSource(source)
    return source, source, section.heldout_fraction


class StdlibSource:
    """The machine's own standard library, one of its two splits by file name."""

    def __init__(self, split: str) -> None:
        self._split = split

    def open(self, state: dict[str, Any] | None) -> Records:
        return _StdlibRecords(self._split, int(state["document"]) if state else 0)

    def digest(self) -> str:
        """Another Python version has another standard library."""
        return files_digest(source_files("train" if self._split == "train" else "heldout"))


class _StdlibRecords:
    def __init__(self, split: str, start: int) -> None:
        self._documents = iter_documents("train" if split == "train" else "heldout", start=start)
        self._document = start

    def __iter__(self) -> _StdlibRecords:
        return self

    def __next__(self) -> Record:
        document = next(self._documents)
        self._document += 1
        return Record(document.name, document.text)

    def state(self) -> dict[str, Any]:
        return {"document": self._document}


def _looks_like_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    many_parts = name.count("/") > 1 and not name.startswith("hf:")
    return name.startswith((".", "~", os.sep)) or many_parts or suffix in (".txt", *RECORD_SUFFIXES)
