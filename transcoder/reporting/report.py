"""write_report: one file that shows what a run learned, from the run folder alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transcoder.files import replace_atomically
from transcoder.layer_list import layer_folders
from transcoder.reporting import latent_cards, sections
from transcoder.reporting.format import clock, number, real
from transcoder.reporting.latent_cards import LatentCards
from transcoder.reporting.layer_sets import set_page
from transcoder.reporting.page import chunk_elements, render, render_page
from transcoder.reporting.run import Run

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"
SECTIONS = ("overview", "curves", "prefixes", "duplicates", "positions", "latents", "settings")
"""Functions of `sections`, and the templates that lay out what they return."""


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


def payload(
    run: Run, cards: LatentCards | None = None, version: int = 0, live: bool = False
) -> tuple[dict[str, Any], LatentCards]:
    """What the page shows, see `render_page`, and the cards of its latents. A layer set's page leads to those of its layers.

    Args:
        cards: the latents where they were built before.
        version: of the cards; a live page reads them again when it changes.
        live: the page is served while the run goes on, and no other page with it.
    """
    if layer_folders(run.path):
        return {**set_page(run, header(run), links=not live), "version": version}, LatentCards({})
    known = cards or _guarded("the latents", lambda: latent_cards.build(run), lambda _: LatentCards({}))

    def drawn(name: str) -> Any:
        return _guarded(
            f"section {name}",
            lambda: render(
                f"sections/{name}.html", run=run, cards=known, version=version, **getattr(sections, name)(run)
            ),
            lambda error: render("sections/undrawn.html", error=f"{type(error).__name__}: {error}"),
        )

    core = {
        "title": f"{run.name}: transcoder run",
        "header": header(run),
        "sections": [{"id": name, "title": name.capitalize(), "html": drawn(name)} for name in SECTIONS],
        "version": version,
    }
    return core, known


def header(run: Run) -> dict[str, Any]:
    """The page's head: {"eyebrow", "title", "pill": (words, look), "facts", "progress": 0..1 | None}."""
    if weights := run.summary.get("evaluated"):
        # Weights that were measured: no training is known.
        facts = [str(weights), f"{number(run.metric('evaluation/tokens'))} held-out tokens"]
        about = {"eyebrow": "Weights of a transcoder", "title": run.name, "pill": ("measured", "good")}
        return {**about, "facts": facts, "progress": None}
    last, steps = number(run.last_step), real(run.setting("training.steps")) or 0.0
    facts = [f"{last} of {number(steps)} steps" if steps > 0 else f"{last} steps"]
    if run.tokens is not None:
        facts.append(f"{number(run.tokens)} tokens")
    if run.metrics.seconds is not None:
        facts.append(clock(run.metrics.seconds))
    return {
        "eyebrow": "Transcoder run",
        "title": run.name,
        "pill": (run.status, "good" if run.finished else "warn"),
        "facts": facts,
        "progress": None if run.finished or steps <= 0 else (run.last_step or 0) / steps,
    }


def _guarded(what: str, draw: Callable[[], Any], instead: Callable[[Exception], Any]) -> Any:
    """One part that cannot be drawn (a file of another version, damage) does not cost the others."""
    try:
        return draw()
    except Exception as error:
        logger.warning("report: %s cannot be drawn: %s: %s", what, type(error).__name__, error)
        return instead(error)
