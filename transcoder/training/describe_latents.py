"""What the final weights do, looked at once after training: contexts, histograms and densities of latents, and duplicates."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from transcoder.activations import ActivationBatch, ActivationStream, build_stream
from transcoder.antidup.sample_store import Samples
from transcoder.antidup.samples import sample_columns, samples_summary, write_samples
from transcoder.antidup.special_tokens import SpecialTokens
from transcoder.checkpoint_folder import find_checkpoint, read_state
from transcoder.config import RunConfig
from transcoder.files import replace_atomically
from transcoder.model import Transcoder
from transcoder.reporting import Run
from transcoder.training.firings import Firings
from transcoder.training.heldout_pairs import FILE_NAME, find_pairs, report_metrics
from transcoder.training.latent_facts import write_latent_facts
from transcoder.training.start_checks import device_of

logger = logging.getLogger(__name__)

HELD_BYTES = 1 << 29
"""Most activations of held-out tokens that are held for the merge test; more are made a second time."""
SHARE_OF_TRAINING = 0.25
"""Most tokens that are looked at, as a share of those that a run trained on: without gradients they cost less than that share
of its time."""


def tokens_to_look_at(config: RunConfig, trained: int) -> int:
    """`logging.report_tokens`, but at most a quarter of the tokens trained on (and at least what evaluation reads)."""
    least = config.training.evaluation_tokens
    return min(config.logging.report_tokens, max(least, int(SHARE_OF_TRAINING * trained)))


def describe_latents(
    folder: Path,
    config: RunConfig,
    transcoder: Transcoder,
    data: ActivationStream | Sequence[ActivationBatch],
    *,
    step: int,
    tokens: int,
) -> dict[str, float]:
    """Look at the text once more with these weights and write into `folder` what a report shows of latents.

    Files: activation_samples/ (contexts with the activation on every token) and latents.parquet (firings, histograms,
    quantiles, promoted tokens) of the first `tokens` tokens of the training text;
    heldout_duplicates.json, see `find_pairs`, of at most as many held-out tokens. Any `Transcoder` will
    do, an imported one too.

    Args:
        config: `antidup.samples` and `antidup.monitor` (sizes and thresholds, whether or not enabled), `training.seed`.
        transcoder: its mode is restored.
        data: a stream made with `context_tokens=config.antidup.samples.context_tokens`; or held-out batches, which then serve
            for both.
        step: recorded in the files.
        tokens: at most so many are looked at, of each kind; 0 looks at none.

    Returns: `report_metrics` of the duplicates; {} where nothing is held out, or `tokens` is 0.

    Raises:
        OSError: a file could not be written; those before it were.
    """
    if tokens == 0:
        return {}
    began = time.monotonic()
    stream = data if isinstance(data, ActivationStream) else None

    def text(heldout: bool) -> Iterable[ActivationBatch]:
        return data.passes(heldout) if isinstance(data, ActivationStream) else data

    firings = Firings.of(transcoder, text(heldout=False), tokens)
    _write_contexts(folder, config, firings, stream, step, transcoder)
    metrics: dict[str, float] = {}

    held: list[ActivationBatch] = []

    def heldout() -> Iterator[ActivationBatch]:
        """The same tokens each time; where they fit into `HELD_BYTES`, the language model runs on them once."""
        if held:
            yield from held
            return
        seen = size = 0
        for batch in text(heldout=True):
            seen += len(batch)
            size += batch.source.nbytes + batch.target.nbytes
            yield batch
            if size <= HELD_BYTES:
                held.append(batch)
            if seen >= tokens:
                break
        if size > HELD_BYTES:
            held.clear()

    shown = _followed(config, transcoder.config.d_sae)
    if data if stream is None else stream.holds_out:
        report = find_pairs(transcoder, heldout, config.antidup.monitor, step)
        path = folder / FILE_NAME
        replace_atomically(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
        metrics = report_metrics(report)
        paired = [latent for pair in report["pairs"] for latent in (pair["i"], pair["j"])]
        shown = torch.cat([shown, torch.tensor(paired, dtype=torch.int64, device="cpu")]).unique()
    unembedding = "the run had no language model at hand" if stream is None else stream.unembedding()
    decode = None if stream is None else stream.decode_tokens
    write_latent_facts(folder, transcoder, firings, shown, unembedding, decode)
    logger.info("latents described on %d tokens in %.1f s", len(firings), time.monotonic() - began)
    return metrics


def refresh(folder: Path) -> dict[str, float]:
    """`describe_latents` of a run's newest good checkpoint, whose duplicates replace those in summary.json if there is one.

    Returns: the metrics of the duplicates.

    Raises:
        ValueError: the run's text cannot be read again: it trained on batches of its own.
        FileNotFoundError: there is no checkpoint. Others as `build_stream` and `Transcoder.from_pretrained`.
    """
    run = Run(folder)
    if run.data_source == "own batches":
        raise ValueError(
            f"report --refresh: {folder} was trained on batches given to train_transcoder, which cannot be read again; "
            "call transcoder.training.describe_latents.describe_latents with held-out batches"
        )
    config, path = RunConfig.load(folder / "config.yaml"), find_checkpoint(folder)
    device = device_of(config.model.device)
    transcoder, state = Transcoder.from_pretrained(path, device=device), read_state(path)
    trained, step = int(state["trainer"]["tokens"]), int(state["step"])
    with build_stream(config, device, context_tokens=config.antidup.samples.context_tokens) as stream:
        tokens = tokens_to_look_at(config, trained)
        metrics = describe_latents(folder, config, transcoder, stream, step=step, tokens=tokens)
    if run.summary:
        kept = {name: value for name, value in run.summary.items() if not name.startswith("heldout_duplicates/")}
        replace_atomically(folder / "summary.json", json.dumps({**kept, **metrics}, indent=2))
    return metrics


def _followed(config: RunConfig, d_sae: int) -> torch.Tensor:
    """Latents whose contexts are kept, as `ActivationSampleCollector` chooses them."""
    number = min(config.antidup.samples.max_latents, d_sae)
    return torch.arange(number, device="cpu") * d_sae // number


def _write_contexts(
    folder: Path,
    config: RunConfig,
    firings: Firings,
    stream: ActivationStream | None,
    step: int,
    transcoder: Transcoder,
) -> None:
    section = config.antidup.samples
    if not section.enabled or len(firings) == 0:
        return
    special_ids = [] if stream is None else stream.special_ids
    length = config.activations.sequence_length if stream is None else stream.sequence_length
    special = SpecialTokens(special_ids, "cpu").marked(firings.tokens)
    followed = _followed(config, transcoder.config.d_sae)
    top, spread = firings.samples(section, followed, special, length, config.training.seed, step)
    columns = sample_columns(followed, top, spread)
    kept = Samples(*(torch.from_numpy(columns[name]) for name in Samples._fields))
    activations = firings.activations(torch.from_numpy(columns["latent"]), kept).numpy()
    summary = samples_summary(section, length, special_ids, followed.numel(), step, columns)
    about = {
        **summary,
        "tokens": len(firings),
        "weights": "final",
        "text": "held-out" if stream is None else "training",
    }
    decode = (lambda ids: [str(i) for i in ids]) if stream is None else stream.decode_tokens
    out = folder / "activation_samples"
    write_samples(out, columns, columns["context"], firings.anchor, decode, about, activations)
