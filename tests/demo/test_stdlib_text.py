"""The standard library as a corpus: splits, order and resumption."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from transcoder.demo import stdlib_text
from transcoder.demo.stdlib_text import (
    HELDOUT_FRACTION,
    count_skipped,
    document_split,
    iter_documents,
)


@pytest.fixture
def small_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up standard library with every kind of file that is left out."""
    files = {
        "argparse.py": b"import os\n",
        "asyncio/base_events.py": b"x = 1\r\ny = 2\r\n",
        "email/mark.py": b"\xef\xbb\xbfz = 3\n",
        "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n",
        "empty.py": b"",
        "blank.py": b" \n\n",
        "test/test_os.py": b"pass\n",
        "ctypes/tests/test_a.py": b"pass\n",
        "idlelib/idle_test/test_b.py": b"pass\n",
        "site-packages/other.py": b"pass\n",
        "dist-packages/other.py": b"pass\n",
        "__pycache__/cached.py": b"pass\n",
        "config-3.11-x86/python-config.py": b"pass\n",
        "_sysconfigdata__linux_.py": b"build_time_vars = {}\n",
        "notes.txt": b"pass\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda key: str(tmp_path))
    return tmp_path


def test_what_is_left_out_and_how_text_is_cleaned(small_stdlib: Path) -> None:
    texts = {document.name: document.text for document in iter_documents(None)}
    assert texts == {
        "argparse.py": "import os\n",
        "asyncio/base_events.py": "x = 1\ny = 2\n",  # line ends as on every other system
        "email/mark.py": "z = 3\n",  # no byte order mark
    }
    assert count_skipped() == 1  # latin.py; blank files do not count


def test_splits_are_disjoint_complete_and_about_the_right_size() -> None:
    train = [document.name for document in iter_documents("train")]
    heldout = [document.name for document in iter_documents("heldout")]
    both = [document.name for document in iter_documents(None)]
    assert not set(train) & set(heldout)
    assert len(both) == len(set(both))
    assert set(both) == set(train) | set(heldout)
    assert len(both) > 300
    # Four standard deviations of a binomial draw around the nominal share.
    share = len(heldout) / len(both)
    assert abs(share - HELDOUT_FRACTION) < 4 * (HELDOUT_FRACTION / len(both)) ** 0.5


def test_split_and_order_depend_on_the_path_alone(small_stdlib: Path) -> None:
    before = [document.name for document in iter_documents(None)]
    # Another Python version: one file more, another one changed.
    (small_stdlib / "tomllib.py").write_text("new = True\n")
    (small_stdlib / "argparse.py").write_text("import sys\n")
    after = [document.name for document in iter_documents(None)]
    assert [name for name in after if name != "tomllib.py"] == before
    # Fixed for good: the packaged model's train split rests on these.
    assert document_split("asyncio/base_events.py") == "heldout"
    assert document_split("optparse.py") == "heldout"
    assert document_split("argparse.py") == "train"
    assert document_split("dataclasses.py") == "train"


def test_neighbours_are_not_from_one_package() -> None:
    packages = [document.name.rpartition("/")[0] for document in iter_documents("train")]
    pairs = list(itertools.pairwise(packages))
    same = sum(first == second != "" for first, second in pairs)
    assert same / len(pairs) < 0.1  # in sorted order it would be more than a half


def test_names_are_relative_posix_paths_and_texts_are_not_blank() -> None:
    for document in iter_documents(None):
        assert document.name.endswith(".py")
        assert not document.name.startswith("/")
        assert "\\" not in document.name
        assert document.text.strip()
        assert "\r\n" not in document.text


@pytest.mark.parametrize("split", ["train", "heldout", None])
@pytest.mark.parametrize("start", [0, 1, 7, 10_000])
def test_iteration_goes_on_from_start(split: stdlib_text.Split | None, start: int) -> None:
    assert list(iter_documents(split, start=start)) == list(iter_documents(split))[start:]


def test_start_counts_yielded_documents(small_stdlib: Path) -> None:
    # Not files: otherwise a reader that counts documents would go wrong at the first file left out.
    everything = list(iter_documents(None))
    for start in range(4):
        assert list(iter_documents(None, start=start)) == everything[start:]


def test_wrong_arguments_raise_at_the_call() -> None:
    with pytest.raises(ValueError, match="split must be"):
        iter_documents("validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must not be negative"):
        iter_documents("train", start=-1)


def test_installation_without_sources_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda key: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="installed without them"):
        iter_documents("train")


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    # Other modules may be loaded by a site hook before any import, so only what the import adds counts.
    code = (
        "import sys; before = set(sys.modules); import transcoder.demo; "
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(added & {'torch', 'transformers'}))"
    )
    root = Path(stdlib_text.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"
