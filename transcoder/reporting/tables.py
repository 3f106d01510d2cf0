"""Tables for a notebook and for a terminal, from the same rows. Everything in them may come from hostile data."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence

SHOWN = 20
"""Rows of a long table that a representation shows."""
Rows = Sequence[Sequence[str]]


class ShownAsTable:
    """A sequence or mapping that shows itself, as text and as HTML: a headline, at most `SHOWN` rows, how many are left out."""

    HEAD: Sequence[str]

    def _headline(self) -> str:
        return ""

    def _cells(self) -> Rows:
        """The first rows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = self._cells()
        table = text_table(self.HEAD, rows) if rows else ""
        return "\n".join(filter(None, [self._headline(), table, self._left_out()]))

    def _repr_html_(self) -> str:
        rows = self._cells()
        table = html_table(self.HEAD, rows) if rows else ""
        return f"<p>{safe(self._headline())}</p>{table}<p>{safe(self._left_out())}</p>".replace("<p></p>", "")

    def _left_out(self) -> str:
        rows = len(self)  # type: ignore[arg-type]
        return f"{rows - SHOWN:,} more" if rows > SHOWN else ""


def visible(text: str) -> str:
    """`text` on one line without characters that act: a line end as ↵, a tab as ⇥, others that cannot be printed (control
    characters, escape sequences, direction marks, lone surrogates) as their escapes.

    >>> visible("a\\n\\x1b[31mb")
    'a↵\\\\x1b[31mb'
    """
    return "".join(_shown(c) for c in text)


def safe(text: object) -> str:
    """`text` as HTML that shows it and does nothing."""
    return html.escape(visible(str(text)), quote=True)


def text_table(head: Sequence[str], rows: Rows, right: Container[int] | None = None) -> str:
    """Columns padded with blanks. `right` are the columns that are right-aligned, by default those of numbers."""
    cells = [[visible(c) for c in row] for row in (head, *rows)]
    sizes = [max(len(row[n]) for row in cells) for n in range(len(head))]
    right = numeric_columns(rows) if right is None else right
    lines = (
        "  ".join(c.rjust(s) if n in right else c.ljust(s) for n, (c, s) in enumerate(zip(row, sizes, strict=True)))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def ruled_table(head: Sequence[str], rows: Rows) -> str:
    """A text table with a line below its head; every column but the first is right-aligned."""
    first, *lines = text_table(head, rows, range(1, len(head))).splitlines()
    return "\n".join([first, "-" * max(map(len, [first, *lines])), *lines])


def html_table(head: Sequence[str], rows: Rows) -> str:
    """A table of plain text, escaped here."""
    right = numeric_columns(rows)

    def line(tag: str, row: Iterable[str]) -> str:
        style = ["right" if n in right else "left" for n in range(len(head))]
        cells = (f'<{tag} style="text-align:{s}">{safe(c)}</{tag}>' for c, s in zip(row, style, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def numeric_columns(rows: Rows) -> set[int]:
    """The numbers of the columns in which every cell is a number, or empty."""
    return {n for n, column in enumerate(zip(*rows, strict=True)) if all(map(_is_number, column))}


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    return {"\n": "↵", "\t": "⇥"}.get(char) or char.encode("unicode_escape").decode("ascii")


def _is_number(cell: str) -> bool:
    return not cell or cell[0] in "0123456789-–+.≥±" or cell == "not finite"
