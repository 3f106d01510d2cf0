"""mkdocs hook: README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site, with their links pointing into it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE = ("LICENSE", "LOG.md")
"""Files of the checkout that are no pages: a link to one becomes its name."""


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_inside(ROOT / source)))
    return files


def _inside(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    for name in OUTSIDE:
        text = re.sub(rf"\[([^\]]+)\]\({re.escape(name)}\)", r"\1", text)
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    # mkdocs leaves what is written as HTML as it is.
    text = re.sub(r'href="docs/([^"]+)\.md"', r'href="\1.html"', text)
    return text.replace("](docs/", "](").replace('src="docs/', 'src="')
