"""Documents from Hugging Face `datasets`, streamed."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from transcoder.activations.documents import DataError, Record, Records, check_column, content_of
from transcoder.activations.fingerprint import files_digest
from transcoder.activations.text_files import files_below
from transcoder.settings import brief


class HubSource:
    """A dataset of Hugging Face `datasets`, streamed: not downloaded whole; resuming seeks by shard."""

    def __init__(self, name: str, config: str | None, split: str, text_column: str, tokens_column: str | None) -> None:
        self._name, self._config, self._split = name, config, split
        self._local = Path(name).expanduser().exists()
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._dataset = self._load()
        self._listed = self.digest() if self._local else None
        names = self._dataset.column_names
        if names is None:
            names = list(next(iter(self._dataset), {}))
            self._dataset = None
        check_column("tokens_column" if self._tokens else "text_column", self._column, names, f"dataset {name!r}")

    def open(self, state: dict[str, Any] | None) -> Records:
        # A dataset keeps the place of its one iterator, and readers may run in two threads: each gets its own.
        dataset, self._dataset = self._dataset, None
        return _HubRecords(dataset or self._load_again(), self._name, self._column, self._tokens, state)

    def _load_again(self) -> Any:
        """As the first time, and a folder's files are listed again: one that is missing for a moment is an error."""
        dataset = self._load()
        if self._local and self.digest() != self._listed:
            raise FileNotFoundError(f"the files of {self._name} are not those that were there at first")
        return dataset

    def _load(self) -> Any:
        return _load_streaming(self._name, self._config, self._split)

    def digest(self) -> str | None:
        """The repository's commit, or the files of a local folder; None where the hub was not asked."""
        folder = Path(self._name).expanduser()
        if folder.exists():
            files = [folder] if folder.is_file() else files_below(folder)
            return files_digest(
                (path.name if folder.is_file() else str(path.relative_to(folder)), path) for path in files
            )
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return None if HF_HUB_OFFLINE else _check_hub_dataset(self._name)


class _HubRecords:
    def __init__(self, dataset: Any, name: str, column: str, tokens: bool, state: dict[str, Any] | None) -> None:
        self._dataset, self._name, self._column, self._tokens = dataset, name, column, tokens
        self._record = int(state["record"]) if state else 0
        if state and state["dataset"] is not None:
            dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._rows = iter(dataset)
        self._state = state["dataset"] if state else None

    def __iter__(self) -> _HubRecords:
        return self

    def __next__(self) -> Record:
        row = next(self._rows)
        self._state = None
        self._record += 1
        return Record(
            f"dataset {self._name!r} record {self._record - 1}", content_of(row.get(self._column), self._tokens)
        )

    def state(self) -> dict[str, Any]:
        # Before the first row the dataset has no state of its own yet: the state it was opened at stands.
        if self._state is None and self._record:
            self._state = self._dataset.state_dict()
        return {"record": self._record, "dataset": self._state}


def _load_streaming(name: str, config: str | None, split: str) -> Any:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    local = Path(name).expanduser().exists()
    if not local and not HF_HUB_OFFLINE:
        _check_hub_dataset(name)
    try:
        dataset = datasets.load_dataset(
            str(Path(name).expanduser()) if local else name, config, split=split, streaming=True
        )
    except Exception as error:
        # `datasets` raises dozens of types here (missing, gated, bad split or configuration, no network).
        raise DataError(
            f"activations.dataset: cannot open {name!r} (dataset_config {config!r}, dataset_split "
            f"{split!r}) with Hugging Face datasets: {type(error).__name__}: {brief(error)}. Check the name, configuration "
            "and split, and the network; without a network use 'stdlib' or a local file or folder."
        ) from error
    return dataset


@functools.cache
def _check_hub_dataset(name: str) -> str | None:
    """The commit that the hub has of it. Asked once a process."""
    # One quick question first: load_dataset retries for half a minute where there is no network.
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=15).sha
    except Exception as error:
        raise DataError(
            f"activations.dataset: no file or folder {name!r}, and the Hugging Face hub gives no dataset of "
            f"that name: {type(error).__name__}: {brief(error)}. Check the name and the network (a private or gated dataset "
            "needs `hf auth login`); without a network use 'stdlib' or a local file or folder."
        ) from error
