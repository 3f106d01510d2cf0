"""Runs a notebook's cells in order, as Jupyter does, without Jupyter: `python run_notebook.py NOTEBOOK`.

The value of a cell's last line is shown: as HTML, as a picture, or as text. What was shown goes to standard output as JSON
lines {"cell", "kind", "content"}.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def show(value: Any) -> tuple[str, str]:
    """(kind, content) of the first of the ways in which a notebook shows a value."""
    for kind, method in (("html", "_repr_html_"), ("png", "_repr_png_")):
        shown = getattr(value, method)() if hasattr(value, method) else None
        # None is how an object says that it has nothing of this kind.
        if shown is not None:
            return kind, base64.b64encode(shown).decode() if isinstance(shown, bytes) else shown
    return "text", repr(value)


def run_cell(source: str, name: str, names: dict[str, Any]) -> list[tuple[str, str]]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    shown = []
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            if value is not None:
                shown.append(show(value))
    return ([("text", printed.getvalue())] if printed.getvalue() else []) + shown


def main(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            for kind, content in run_cell("".join(cell["source"]), f"cell {number}", names):
                print(json.dumps({"cell": number, "kind": kind, "content": content}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
