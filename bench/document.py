"""Tables that commands write into documents, between marks; no number is typed by hand."""

from __future__ import annotations

from pathlib import Path

ANTI_DUPLICATION = Path(__file__).resolve().parent.parent / "docs" / "anti-duplication.md"


def replace_between(document: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Raises ValueError where they are not there once."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = document.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{document}: expected the marks {begin} and {end} once each")
    head, rest = whole.split(begin)
    _, tail = rest.split(end)
    document.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")
