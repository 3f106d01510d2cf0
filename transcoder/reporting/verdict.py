"""What is said of a pair of latents, and of a run: the one place that decides it, for page, terminal, notebook and metrics."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from transcoder.checkpoint_folder import CheckpointError, find_checkpoint, read_state
from transcoder.reporting.format import number, percent

if TYPE_CHECKING:
    from pathlib import Path

    from transcoder.config import RunConfig
    from transcoder.reporting.run import Run

VERDICTS = ("duplicate", "correlated", "undecided")
MERGEABLE_SHARE, REFUSED_SHARE = 0.1, 0.3
"""Of what a latent is worth: a pair that merges at the first share or less is a duplicate, above the second it is none."""
TWIN_COSINE = 0.8
"""Decoder rows of a duplicate pair that agree this much make it a twin; otherwise one feature was split over both latents."""
LEAST_JUDGED = 0.5
"""Share of live latents that must fire often enough to be judged before a count of duplicates says something of the run."""
MANY_DEAD, SOME_PAIRED, MANY_PAIRED = 0.1, 0.005, 0.02
"""Shares of latents that are a reason to look closer: dead ones, and live ones in a duplicate pair."""
DUPLICATE_METRICS = (
    *("pairs", "mergeable", "twins", "splits", "correlated", "undecided", "duplicate_share", "live_latents"),
    *("share_supported", "tokens"),
)


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


class Verdict(NamedTuple):
    """An answer in one or two sentences. `look`: "good", "warn", "bad" or "" where it cannot be said."""

    question: str
    look: str
    text: str


def verdicts(run: Run) -> list[Verdict]:
    """Did it go well? Are there duplicates? What do latents mean?"""
    return [quality(run), duplicates(run), meaning(run)]


def verdict_lines(run: Run) -> list[str]:
    """`verdicts` for a terminal: the same words as on the page."""
    return [f"{verdict.question} {verdict.text}" for verdict in verdicts(run)]


def quality(run: Run) -> Verdict:
    question = "Did it go well?"
    fvu, linear, mean = (
        run.metric(f"evaluation/{name}") for name in ("fvu", "baseline_linear_fvu", "baseline_mean_fvu")
    )
    dead, words = run.metric("sparsity/dead_share"), ""
    if dead is not None:
        words = f" {percent(dead)} of latents are dead{trend(run.metrics.get('sparsity/dead_share').values)}."
    if fvu is None:
        return Verdict(question, "", f"No evaluation on held-out tokens was recorded.{words}")
    rivals = [(f"a linear map leaves {number(linear)}", linear), (f"the mean {number(mean)}", mean)]
    known = [(text, value) for text, value in rivals if value is not None]
    against = f"; {', '.join(text for text, _ in known)}" if known else ""
    sinks = run.metric("evaluation/fvu_with_sinks")
    with_sinks = "" if sinks is None else f", with sinks {number(sinks)}"
    share = percent(1 - fvu) if fvu < 1 else "Nothing"
    text = f"{share} of the variance of held-out tokens is explained (FVU {number(fvu)}{with_sinks}{against})."
    beaten = [fvu < value for _, value in known]
    if not all(beaten):
        return Verdict(
            question, "bad", f"NOT better than {'the mean' if not beaten[-1] else 'a linear map'}: {text}{words}"
        )
    if fvu >= 1:
        return Verdict(question, "bad", text + words)
    return Verdict(question, "warn" if dead is not None and dead > MANY_DEAD else "good" if known else "", text + words)


def trend(values: Sequence[float]) -> str:
    """ ", rising" or ", falling" where the last tenth of the run differs from its middle by more than a tenth of it."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 20:
        return ""
    tenth = len(finite) // 10
    middle, last = (statistics.fmean(part) for part in (finite[len(finite) // 2 :][:tenth], finite[-tenth:]))
    if abs(last - middle) <= 0.1 * max(middle, 0.005):
        return ", steady"
    return ", rising" if last > middle else ", falling"


def duplicates(run: Run) -> Verdict:
    question = "Are there duplicates?"
    found = {name: run.metric(f"heldout_duplicates/{name}") for name in DUPLICATE_METRICS}
    mergeable, judged, tokens = found["mergeable"], found["share_supported"], found["tokens"]
    if mergeable is None:
        pairs = run.metric("duplicates/pairs")
        if pairs is None:
            return Verdict(question, "", "Not counted.")
        return Verdict(
            question, "", f"{counted(pairs, 'candidate pair')} in training; the final weights were not looked at."
        )
    where = "held-out tokens" if tokens is None else f"{number(tokens)} held-out tokens"
    text = f"{counted(mergeable, 'duplicate pair')} among {number(found['live_latents'])} live latents"
    if found["duplicate_share"] is not None:
        text += f" ({percent(found['duplicate_share'])} of them"
        text += (
            f": {counted(found['twins'] or 0, 'twin')}, {counted(found['splits'] or 0, 'split')})" if mergeable else ")"
        )
    if found["correlated"] is not None and found["undecided"] is not None:
        text += (
            f"; {number(found['correlated'])} more correlated but no duplicates, {number(found['undecided'])} undecided"
        )
    if judged is not None and judged < LEAST_JUDGED:
        few = f"Too few tokens to judge: only {percent(judged)} of live latents fire often enough on {where}."
        return Verdict(question, "", f"{few} Among those: {text}.")
    basis = (
        "" if judged is None else f" Judged on {where}, on which {percent(judged)} of live latents fire often enough."
    )
    share = found["duplicate_share"] or 0.0
    look = "bad" if share > MANY_PAIRED else "warn" if share > SOME_PAIRED else "good"
    return Verdict(question, look, f"{text}.{basis}")


def meaning(run: Run) -> Verdict:
    from transcoder.reporting.latent_cards import telling
    from transcoder.reporting.tables import visible

    question, table = "What do latents mean?", run.heldout_latents
    if table is None or not table.tokens:
        return Verdict(question, "", "Nothing is known of the final weights' activations.")
    fired = int((table.fired > 0).sum())
    dead = len(table.fired) - fired
    text = f"{number(fired)} of {number(len(table.fired))} latents fire on {number(table.tokens)} tokens"
    text += f"; {number(dead)} do not, and are shown as dead." if dead else "."
    examples = [f"{latent} on {visible(word)!r}" for latent, word in telling(run)]
    return Verdict(question, "", f"{text} For example {', '.join(examples)}." if examples else text)


def counted(count: float, noun: str) -> str:
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def said_of(out: Path) -> list[str]:
    """The lines that end the output of a run in a terminal: in the words of its page, and where that is."""
    from transcoder.reporting.layer_sets import layer_folders, set_lines
    from transcoder.reporting.run import Run

    run = Run(out, empty_ok=True)
    lines = verdict_lines(run)
    if layer_folders(out):
        # Of a layer set these are means; its page leads to each layer's.
        lines = [f"mean over layers: {lines[0]}", *set_lines(run.final)]
    return [*lines, *([f"report: {out / 'report.html'}"] if (out / "report.html").exists() else [])]


def is_done(out: Path, config: RunConfig) -> bool:
    """Whether the folder holds the run of these settings, finished, with its last checkpoint and its page. Needs no torch."""
    from transcoder.config import ConfigError, RunConfig
    from transcoder.layer_list import layer_folders
    from transcoder.reporting.compare import flattened
    from transcoder.reporting.run import Run

    if not (out / "config.yaml").is_file():
        return False
    run, asked = Run(out), flattened(config.to_dict())
    try:
        # Settings that a run of an earlier version lacks have their defaults.
        held = flattened(RunConfig.load(out / "config.yaml").to_dict())
    except ConfigError:
        return False
    # The run's file has the values that were found for `auto`, and those that follow its length.
    same = held.keys() == asked.keys() and all(asked[name] in (value, None, "auto") for name, value in held.items())
    whole = (out / "report.html").exists() or not config.logging.report
    if not (same and run.finished and whole and run.last_step == config.training.steps):
        return False
    ended = run.final.get("ended", {})
    folders = [folder for folder in layer_folders(out).values() if folder.name not in ended] or [out]
    return all(_last_checkpoint(folder) == run.last_step for folder in folders)


def _last_checkpoint(folder: Path) -> int | None:
    """The step of the newest good checkpoint of a run; None where there is none."""
    try:
        with warnings.catch_warnings():
            # What is wrong with one is said where the run goes on.
            warnings.simplefilter("ignore")
            return int(read_state(find_checkpoint(folder))["step"])
    except (FileNotFoundError, CheckpointError):
        return None
