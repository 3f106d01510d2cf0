"""write_report: one file that shows what a run learned, from the run folder alone."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transcoder.reporting.files import write_text
from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.sections import curves, duplicates, latents, overview, positions, prefixes, settings

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    The page is one file without links to anything: styles, script and data are inside, and its content security policy forbids
    every request and every script but its own. It is bounded by `logging.report_latents` and stays below 10 MB whatever
    that says. A run that was interrupted gets a page too, which names what is missing and why.

    The page depends on the run folder only: written twice, it is the same byte for byte. It replaces an earlier one at once.

    Raises:
        FileNotFoundError: `run_dir` is no folder.
    """
    run = RunFolder(run_dir)
    return write_text(run.path / FILE_NAME, render(run))


def render(run: RunFolder) -> str:
    """The page as text."""
    payload: dict[str, Any] = _guarded("the contexts", lambda: latents.build_payload(run), lambda _: _EMPTY_PAYLOAD)
    parts: list[tuple[str, str, Callable[[], str]]] = [
        ("overview", "Overview", lambda: overview.section(run)),
        ("curves", "Curves", lambda: curves.section(run)),
        ("prefixes", "Prefixes", lambda: prefixes.section(run)),
        ("duplicates", "Duplicates", lambda: duplicates.section(run)),
        ("positions", "Positions", lambda: positions.section(run)),
        ("latents", "Latents", lambda: latents.section(run, payload)),
        ("settings", "Settings", lambda: settings.section(run)),
    ]
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
        f"{_guarded(f'section {title}', draw, _undrawn)}</section>"
        for key, title, draw in parts
    )
    navigation = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    slots = {
        "title": escape(f"{run.name}: transcoder run"),
        "script-digest": digest,
        "style": _template("page.css"),
        "header": overview.header(run),
        "navigation": navigation,
        "sections": sections,
        "data": embedded_json(payload),
        "script": script,
    }
    # Split before filling: what comes from data can never be taken for a slot.
    page = _template("page.html").split("%%")
    return "".join(slots[part] if n % 2 else part for n, part in enumerate(page))


_EMPTY_PAYLOAD: dict[str, Any] = {"strings": [], "widths": [], "total": 0, "latents": []}


def _guarded(what: str, draw: Callable[[], Any], instead: Callable[[Exception], Any]) -> Any:
    """One part that cannot be drawn (a file of another version, damage) does not cost the others."""
    try:
        return draw()
    except Exception as error:
        logger.warning("report: %s cannot be drawn: %s: %s", what, type(error).__name__, error)
        return instead(error)


def _undrawn(error: Exception) -> str:
    return f'<p class="empty undrawn">This section cannot be drawn: {escape(type(error).__name__)}: {escape(error)}</p>'


def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
