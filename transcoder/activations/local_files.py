"""What a local path means: which of its files are data of which split, in which format; decided once for all of them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transcoder.activations.documents import DataError
from transcoder.settings import brief

logger = logging.getLogger(__name__)

Format = Literal["lines", "parquet", "text", "datasets", "disk"]
_OWN: dict[str, Format] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TABLES = {"csv", "arrow", "webdataset", "hdf5", "lance", "vortex"}
"""Modules of Hugging Face `datasets` that give rows."""
_HEAD = 1 << 16
_MOST_BAD_BYTES = 0.1
READ = "JSON lines or arrays, Parquet, CSV, Arrow, plain text (each also as .gz, .bz2, .xz, .zst), folders of `save_to_disk`"


@dataclass(frozen=True)
class LocalData:
    """The files of one split, all of one format (JSON lines and Parquet may be mixed).

    Fields:
        root: the folder that names are relative to.
        files: in the order of their names. Of a `save_to_disk` folder, those that it consists of.
        format: `datasets`: read by that library's `module` with `options`; `disk`: by its `load_from_disk`; the others by us.
    """

    root: Path
    files: list[Path]
    format: Format
    module: str = ""
    options: dict[str, Any] | None = None


def local_data(path: Path, config: str | None, split: str) -> LocalData:
    """The data at a file or folder.

    A folder is read as Hugging Face `datasets` would: its README's configurations, or the splits in the names of files and
    folders, or else all files as the split "train". Files that are no data (README, LICENSE) are left out, with a warning that
    names them. A folder without any file of a known format is plain text if all of its files are.

    Raises:
        DataError: a split or configuration that is not there, files of formats that cannot be mixed, or a file that is of no
            known format and no text.
    """
    if path.is_file():
        if config is not None or split != "train":
            raise DataError(
                f"activations.dataset: {str(path)!r} is one file, which has neither configurations nor splits: expected "
                f"dataset_config null and dataset_split 'train', got {config!r} and {split!r}"
            )
        return _decided(path.parent, [path], [], named=True)
    path = _snapshot(path)
    if is_saved(path):
        return LocalData(path, visible_files(path), "disk")
    every = visible_files(path)
    saved = next((file.parent for file in every if is_saved(file.parent)), None)
    if saved is not None:
        raise DataError(
            f"activations.dataset: {str(path)!r} holds folders of save_to_disk: give one of them, as {str(saved)!r}"
        )
    linked = [str(found) for found in path.rglob("*") if found.is_symlink() and found.is_dir()]
    if not every:
        links = f" (a link to a folder, such as {linked[0]}, is not followed: give the folder itself)" if linked else ""
        raise DataError(f"activations.dataset: no file below {str(path)!r}{links}; what is read: {READ}")
    if linked:
        logger.warning(
            "activations.dataset: links to folders are not followed: %s", brief(ValueError(", ".join(linked)))
        )
    splits = _splits(path, config)
    if split not in splits:
        raise DataError(
            f"activations.dataset_split: {str(path)!r} has the splits {', '.join(map(repr, splits))} (by its README's "
            f"configurations or the names of its files and folders), got {split!r}"
        )
    chosen = sorted(splits[split], key=lambda file: file.relative_to(path).as_posix())
    others = {file for files in splits.values() for file in files}
    return _decided(path, chosen, [file for file in every if file not in others])


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def opened(path: Path) -> Any:
    """A binary file for reading, decompressed; its first bytes say how."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return gzip.open(path, "rb")
    if head.startswith(b"BZh"):
        import bz2

        return bz2.open(path, "rb")
    if head.startswith(b"\xfd7zXZ\x00"):
        import lzma

        return lzma.open(path, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"activations.dataset: {path} is compressed by zstd: install the package zstandard, or unpack it"
            ) from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    return path.open("rb")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """`opened`, for a `with` block; what the decompressor cannot read is a DataError."""
    import lzma
    import zlib

    try:
        with opened(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # Without an errno it is the file and not the disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"activations.dataset: {path} is damaged, or cut off: {brief(error)}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"activations.dataset: {path} is damaged, or cut off: {brief(error)}") from error


def encoding_of(path: Path) -> str:
    """That of a text file: UTF-16 where it begins with a mark that says so, else UTF-8."""
    with reading(path) as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def format_of(path: Path) -> Format | None:
    """By the name, in any case, compressed or not; None: none that is known."""
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    found = _OWN.get(Path(name).suffix)
    if found is not None or "." not in name:
        return found
    return "datasets" if _module([path])[0] else None


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder in the order of their names, hidden ones left out."""
    found = (p for p in folder.rglob("*") if p.is_file())
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def _snapshot(folder: Path) -> Path:
    """The newest files of a repository's folder in the hub's cache; any other folder as it is."""
    reference = folder / "refs" / "main"
    if not reference.is_file() or not (folder / "snapshots").is_dir():
        return folder
    return folder / "snapshots" / reference.read_text(encoding="utf-8").strip()


def _splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """{split: files}, as `datasets` finds them."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    readme, base = folder / "README.md", folder.resolve()
    head = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0] if readme.is_file() else ""
    described = config is not None or (head.startswith("---") and "\nconfigs:" in head)
    try:
        if described:
            found = datasets.load_dataset_builder(str(base), config).config.data_files
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(str(base)), base_path=str(base))
    except Exception as error:  # dozens of types, as from load_dataset
        raise DataError(
            f"activations.dataset: Hugging Face datasets finds no data in the folder {str(folder)!r} (dataset_config "
            f"{config!r}): {type(error).__name__}: {brief(error)}. What is read: {READ}"
        ) from error
    return {
        str(split): [folder / Path(file).relative_to(base) for file in files] for split, files in (found or {}).items()
    }


def _decided(root: Path, files: list[Path], left_out: list[Path], named: bool = False) -> LocalData:
    """`files` as the data that they are; those of `left_out` belong to no split. `named`: the user named the one file."""
    formats = {file: format_of(file) for file in files}
    rows = [file for file in files if formats[file] in ("lines", "parquet", "datasets")]
    texts = [file for file in files if formats[file] == "text"]
    papers = ("README", "LICENSE", "LICENCE")
    kept = rows or texts or [file for file in files if named or not file.name.upper().startswith(papers)]
    if not kept:
        raise DataError(f"activations.dataset: no data in {str(root)!r}, only {files[0].name}; what is read: {READ}")
    for file in () if rows else kept:
        _require_text(file)
    unread = [file for file in [*files, *left_out] if file not in set(kept) and file.name != "README.md"]
    if unread:
        names = ", ".join(file.relative_to(root).as_posix() for file in unread[:5]) + ", ..." * (len(unread) > 5)
        kinds = "files of rows" if rows else "text files"
        logger.warning(
            "activations.dataset: %d %s of %s are read; %d other files are not: %s",
            len(kept),
            kinds,
            root,
            len(unread),
            names,
        )
    if not rows:
        return LocalData(root, kept, "text")
    foreign = [file for file in rows if formats[file] == "datasets"]
    if not foreign:
        return LocalData(root, rows, "lines")
    module, options = _module(foreign)
    different = [file for file in rows if _module([file]) != (module, options)]
    if different:
        raise DataError(
            f"activations.dataset: {str(root)!r} holds files of formats that are not read together, such as {foreign[0].name} "
            f"and {different[0].name}: put those to train on into a folder of their own"
        )
    return LocalData(root, rows, "datasets", module, options)


def _module(files: list[Path]) -> tuple[str, dict[str, Any]]:
    """(module of `datasets` that reads these files, its options); "" where it is none that gives rows."""
    from datasets.load import infer_module_for_data_files_list

    try:
        module, options = infer_module_for_data_files_list([str(file) for file in files])
    except Exception:
        return "", {}
    archive = files[0].suffix.lower() == ".zip"
    if archive and module == "text":
        return module, {"sample_by": "document"}
    return (module, options) if module in _TABLES or (archive and module in ("json", "parquet")) else ("", {})


def _require_text(path: Path) -> None:
    with reading(path) as file:
        head = file.read(_HEAD)
    encoding = encoding_of(path)
    bad = sum("\udc80" <= c <= "\udcff" for c in head.decode("utf-8", "surrogateescape")) if encoding != "utf-16" else 0
    if encoding != "utf-16" and (b"\0" in head or bad > _MOST_BAD_BYTES * len(head)):
        raise DataError(
            f"activations.dataset: {path} is neither UTF-8 text nor of a format that is read ({READ}); convert it, or put the "
            "data to train on into a folder of their own"
        )
