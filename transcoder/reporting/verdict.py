"""What is said of a pair of latents, and of a run: the one place that decides it, for page, terminal, notebook and metrics."""

from __future__ import annotations

MERGEABLE_SHARE, REFUSED_SHARE = 0.1, 0.3
"""Of what a latent is worth: a pair that merges at the first share or less is a duplicate, above the second it is none."""
TWIN_COSINE = 0.8
"""Decoder rows of a duplicate pair that agree this much make it a twin; otherwise one feature was split over both latents."""
LEAST_JUDGED = 0.5
"""Share of live latents that must fire often enough to be judged before a count of duplicates says something of the run."""


def pair_verdict(share: float | None, error: float | None = None) -> str:
    """ "duplicate", "correlated" or "undecided".

    A duplicate: one latent can do the work of both at a tenth or less of what the dropped one is worth, and two standard errors
    above are still below three tenths. Correlated: above three tenths, and two standard errors below are still above a tenth.

    Args:
        share: cost of merging, as a share of what the dropped latent is worth; None where it was not tested.
        error: its standard error; None where it is not known.
    """
    if share is None:
        return "undecided"
    reach = 2 * (error or 0.0)
    if share <= MERGEABLE_SHARE and share + reach <= REFUSED_SHARE:
        return "duplicate"
    if share > REFUSED_SHARE and share - reach > MERGEABLE_SHARE:
        return "correlated"
    return "undecided"


def duplicate_kind(decoder_cosine: float | None) -> str | None:
    """ "twin": both latents write the same direction. "split": they fire together and write different ones, so that one latent
    with the sum of both rows does the work of two. None where the cosine is not known."""
    return None if decoder_cosine is None else "twin" if decoder_cosine >= TWIN_COSINE else "split"
