"""Tables for a notebook and for a terminal, from the same rows. Everything in them may come from hostile data."""

from __future__ import annotations

import html
from collections.abc import Sequence

SHOWN = 20
"""Rows of a long table that a representation shows."""


def visible(text: str) -> str:
    """`text` on one line without characters that act: a line end as ↵, a tab as ⇥, others that cannot be printed (control
    characters, escape sequences, direction marks, lone surrogates) as their escapes.

    >>> visible("a\\n\\x1b[31mb")
    'a↵\\\\x1b[31mb'
    """
    return "".join(_shown(c) for c in text)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with blanks; a column of figures is right-aligned."""
    cells = [list(head), *([visible(c) for c in row] for row in rows)]
    sizes = [max(len(row[n]) for row in cells) for n in range(len(head))]
    right = [all(_figure(row[n]) for row in cells[1:]) and len(cells) > 1 for n in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(s) if r else c.ljust(s) for c, s, r in zip(row, sizes, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, cells))


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, escaped here."""
    right = {n for n in range(len(head)) if rows and all(_figure(row[n]) for row in rows)}

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = (f"<{tag}{' class=n' if n in right else ''}>{safe(cell)}</{tag}>" for n, cell in enumerate(cells))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'
    )


def safe(text: object) -> str:
    """`text` as HTML that shows it and does nothing."""
    return html.escape(visible(str(text)))


def left_out(total: int, shown: int = SHOWN) -> str:
    """The line under a table that does not show everything; empty where it does."""
    return f"{total - shown:,} more" if total > shown else ""


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    return {"\n": "↵", "\t": "⇥"}.get(char) or char.encode("unicode_escape").decode("ascii")


def _figure(cell: str) -> bool:
    return not cell or cell[0] in "0123456789-–+.≥" or cell == "not finite"
