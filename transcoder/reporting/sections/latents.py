"""The latents of the page, in words: which are here, and what could not be shown."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from transcoder.reporting.elements import Block, text
from transcoder.reporting.format import number
from transcoder.reporting.latent_cards import LatentCards
from transcoder.reporting.run import Run


def section(run: Run, cards: LatentCards) -> list[Block]:
    index = cards.index
    if not index.get("count"):
        why = next((m.why for m in run.missing if m.what == "activation samples"), "no latent is known")
        return [text(f"No latents to show: {why}.", "empty")]
    return [
        text(_lead(run, cards), "lead"),
        {"is": "latents", "prefixes": prefix_labels(index["widths"]), **_lacking(run)},
    ]


def prefix_labels(widths: list[int]) -> list[str]:
    return [f"{number(low)} to {number(high - 1)}" for low, high in pairwise([0, *widths])]


def _lead(run: Run, cards: LatentCards) -> str:
    total = number(cards.index["count"])
    if run.samples is None:
        why = next((m.why for m in run.missing if m.what == "activation samples"), "")
        return f"{total} latents, without contexts: {why}."
    if cards.with_contexts < cards.sampled:
        contexts = (
            f"{number(cards.with_contexts)} of the {number(cards.sampled)} with samples have their contexts in this page: "
            "those of duplicate pairs first, the others evenly over the dictionary (logging.report_latents sets how many, and "
            "the page stays below 10 MB)"
        )
    else:
        contexts = f"{number(cards.sampled)} have samples, and all of those their contexts in this page"
    return (
        f"{total} latents; {contexts}. A token is shaded by how strongly the latent fires on it, as far as samples of it were "
        "kept; the framed token is the one that the sample was kept for."
    )


def _lacking(run: Run) -> dict[str, Any]:
    """Why parts of the cards are not there, in the page's own words."""
    why = {m.what: m.why for m in run.lacking}
    return {"lacking": {**why, **({} if run.heldout_latents is None else run.heldout_latents.why)}}
