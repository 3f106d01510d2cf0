"""Text into HTML and JSON into a page. Everything that came from data passes through here."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

# HTML has no way to write these (a NUL ends up as U+FFFD in any case); shown as their pictures, U+2400 and on.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def escape(text: object) -> str:
    """`text` safe as element content and inside quoted attributes."""
    return html.escape(_CONTROL.sub(lambda m: chr(0x2400 + min(ord(m[0]), 0x21)), str(text)), quote=True)


def embedded_json(value: Any) -> str:
    """JSON that is safe inside a <script type="application/json"> element.

    No `<` is left, so neither `</script` nor `<!--` can be spelled; U+2028 and U+2029 are escaped for readers that take them
    for line ends. NaN is refused (ValueError).
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numeric: Iterable[int] = ()) -> str:
    """A table that scrolls sideways on a narrow screen. Cells are HTML; columns in `numeric` are right-aligned."""
    right = set(numeric)

    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{value}</{tag}>" for i, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
