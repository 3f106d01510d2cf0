"""A page as a test reads it: its elements as a tree, its charts, tables and packed latents as values."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "input", "br", "img"}


@dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Element]:
        """Every element inside, in the order of the page."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def all(self, tag: str, look: str = "") -> list[Element]:
        """Elements of a tag, and of a class where `look` names one."""
        return [e for e in self if e.tag == tag and (not look or look in e.attributes.get("class", "").split())]

    def one(self, tag: str, look: str = "") -> Element:
        (found,) = self.all(tag, look)
        return found

    @property
    def raw(self) -> str:
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    @property
    def words(self) -> str:
        """The text without scripts, white space folded."""
        parts = [c if isinstance(c, str) else "" if c.tag in ("script", "style") else c.words for c in self.children]
        return " ".join(" ".join(parts).split())

    @property
    def rows(self) -> list[list[str]]:
        """The cells of a table's body."""
        return [[cell.words for cell in row.all("td")] for row in self.one("tbody").all("tr")]

    @property
    def charts(self) -> dict[str, Element]:
        return {figure.one("figcaption").words: figure for figure in self.all("figure", "chart")}

    @property
    def figure(self) -> dict[str, Any]:
        """What plotly is given of a chart."""
        return json.loads(self.one("script").raw)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        self.scripts = self.root.all("script")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    @property
    def sections(self) -> dict[str, Element]:
        return {section.attributes["id"]: section for section in self.root.all("section")}

    @property
    def charts(self) -> dict[str, Element]:
        return self.root.charts

    @property
    def tiles(self) -> dict[str, str]:
        return {tile.one("dt").words: tile.one("dd").words for tile in self.root.all("div", "tile")}

    @property
    def words(self) -> str:
        return f"{self.root.one('header').words} {self.root.one('main').words}"

    @property
    def own_scripts(self) -> list[str]:
        """Scripts that run: neither data nor packed."""
        return [script.raw for script in self.scripts if "type" not in script.attributes]

    def script(self, name: str) -> str:
        (found,) = [script.raw for script in self.scripts if script.attributes.get("id") == name]
        return found

    @property
    def index(self) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.script("latent-index"))))

    @property
    def chunks(self) -> list[str]:
        return [script.raw for script in self.scripts if script.attributes.get("id", "").startswith("chunk-")]

    @property
    def cards(self) -> dict[int, dict[str, Any]]:
        """Latent -> {"rows", "facts", "words"}."""
        found = {}
        for text in self.chunks:
            chunk = json.loads(gzip.decompress(base64.b64decode(text)))
            for latent, rows, facts in chunk["cards"]:
                found[latent] = {"rows": rows, "facts": facts, "words": chunk["words"]}
        return found


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [page.root], "every element is closed"
    assert "cannot be drawn" not in page.words
    return page
