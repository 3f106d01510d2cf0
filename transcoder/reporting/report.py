"""write_report: one file that shows what a run learned, from the run folder alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transcoder.files import replace_atomically
from transcoder.reporting import latent_cards
from transcoder.reporting.elements import Block, text
from transcoder.reporting.latent_cards import LatentCards
from transcoder.reporting.page import chunk_elements, render_page
from transcoder.reporting.run import Run
from transcoder.reporting.sections import curves, duplicates, latents, overview, positions, prefixes, settings

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    The page is one file without links to anything: styles, script, chart library and data are inside, and its content security
    policy forbids every request and every other script. It is bounded by `logging.report_latents` and stays below 10 MB
    whatever that says. A run that was interrupted gets a page too, which names what is missing and why.

    The page depends on the run folder (and the installed plotly) only: written twice, it is the same byte for byte. It
    replaces an earlier one at once.

    Raises:
        FileNotFoundError: `run_dir` is no folder.
    """
    run = Run(run_dir, empty_ok=True)
    core, cards = payload(run)
    page = render_page(core, chunk_elements(cards.packed_index, cards.chunks))
    return replace_atomically(run.path / FILE_NAME, page)


def payload(run: Run, cards: LatentCards | None = None) -> tuple[dict[str, Any], LatentCards]:
    """What the page shows: the sections, and the latents beside them (`cards` where they were built before)."""
    if cards is None:
        cards = _guarded("the latents", lambda: latent_cards.build(run), lambda _: LatentCards({}))
    known: LatentCards = cards
    parts: list[tuple[str, str, Callable[[], list[Block]]]] = [
        ("overview", "Overview", lambda: overview.section(run)),
        ("curves", "Curves", lambda: curves.section(run)),
        ("prefixes", "Prefixes", lambda: prefixes.section(run)),
        ("duplicates", "Duplicates", lambda: duplicates.section(run)),
        ("positions", "Positions", lambda: positions.section(run)),
        ("latents", "Latents", lambda: latents.section(run, known)),
        ("settings", "Settings", lambda: settings.section(run)),
    ]
    core = {
        "kind": "run",
        "title": f"{run.name}: transcoder run",
        "header": overview.header(run),
        "sections": [
            {"id": key, "title": title, "blocks": _guarded(f"section {title}", draw, _undrawn)}
            for key, title, draw in parts
        ],
    }
    return core, known


def _guarded(what: str, draw: Callable[[], Any], instead: Callable[[Exception], Any]) -> Any:
    """One part that cannot be drawn (a file of another version, damage) does not cost the others."""
    try:
        return draw()
    except Exception as error:
        logger.warning("report: %s cannot be drawn: %s: %s", what, type(error).__name__, error)
        return instead(error)


def _undrawn(error: Exception) -> list[Block]:
    return [text(f"This section cannot be drawn: {type(error).__name__}: {error}", "warn")]
