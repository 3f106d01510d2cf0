"""ActivationSampleCollector: for each followed latent its strongest examples and a sample over positions; their file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup.ledger import UsageLedger
from transcoder.antidup.positions import PositionSampler
from transcoder.antidup.sample_store import EMPTY, Samples, best_entries, evenly_chosen, merged, strata_of
from transcoder.antidup.special_tokens import SpecialTokens
from transcoder.config import SamplesSection
from transcoder.files import local_path, replacing_all
from transcoder.kernels import SparseCodes, counts_cpp
from transcoder.kernels.correlation.counter_rng import uniform

_NAME = "activation_samples"
COLUMNS = ("latent", "kind", "activation", "token", "position", "sequence", "step")
_BYTES_A_SAMPLE, _BYTES_A_TOKEN = 4 + 4 + 4 * 8, 4
"""Bytes of a sample's score, activation and four int64 numbers; and of a token of its context."""
_NUMBERS_BYTES = 64
"""Bytes reserved for the numbers of a state that are no tensors, as text."""


class ActivationSampleCollector:
    """Keeps samples of latent activations with their token contexts, in fixed memory on the device.

    Two stores for each followed latent (`max_latents` of them, evenly spread over the dictionary):
        top: the `top_per_latent` strongest activations.
        stratified: for each of `position_bins` equal bins of the sequence a uniform reservoir (the highest of
        random keys), of
            equal size whatever share of the tokens the bin has: normalised by exposure. Together at least
            `stratified_per_latent` places, and at least `min_per_bin` a bin. Special tokens have their own stratum, cut on
            saving to at most `max_sink_fraction` of a latent's stratified samples.

    A sample older than `keep_steps` is dropped: the weights that gave it are gone. What is on cards after training is not from
    these stores but from the final weights, see `transcoder.training.describe_latents`.

    Samples whose contexts overlap a better one of the same store (same sequence, fewer than context_tokens
    positions apart) are dropped; a batch offers each store its best k, before overlaps within the batch are
    dropped (rare in batches shuffled over sequences). Activations below `min_activation` are not sampled.
    Random keys come from (seed, rank, step, micro-batch, entry): resuming changes nothing.

    Args:
        section: sizes.
        d_sae, device: of the codes.
        seed: keys the reservoirs.
        out_dir: folder of `samples.parquet` and `summary.json`.
        special_ids: token ids counted as special.
        sequence_length: positions run from 0 to sequence_length - 1.
        ledger: records calls, samples kept and files.
        positions: chooses which tokens of a batch are looked at; None looks at all of them.
        keep_steps: steps after which a sample is forgotten; None keeps it.
    """

    def __init__(
        self,
        section: SamplesSection,
        d_sae: int,
        device: torch.device | str,
        seed: int,
        out_dir: Path,
        special_ids: Sequence[int],
        sequence_length: int,
        ledger: UsageLedger,
        positions: PositionSampler | None = None,
        keep_steps: int | None = None,
    ) -> None:
        self._rank = 0
        """Keys the random draws, with seed and step."""
        self.section, self.d_sae, self.seed, self.sequence_length = section, d_sae, seed, sequence_length
        self.device = torch.empty(0, device=device).device
        self._out_dir, self._ledger, self._positions = local_path(out_dir), ledger, positions
        self._special, self._keep_steps = SpecialTokens(special_ids, self.device), keep_steps
        number = min(section.max_latents, d_sae)
        self.latents = torch.arange(number, device=self.device) * d_sae // number
        """[followed] int64 latent ids."""
        # Latents that are not followed map to slot `number`, which is beyond all stores.
        self._slot = torch.full((d_sae,), number, dtype=torch.int64, device=self.device)
        self._slot[self.latents] = torch.arange(number, device=self.device)
        self._strata, self._per_bin = strata_of(section)
        self._stores: tuple[Samples, Samples] | None = None
        self._anchor = 0

    @torch.no_grad()
    def collect(self, codes: SparseCodes, batch: ActivationBatch, step: int, micro: int = 0) -> None:
        """Offer a batch's activations to the stores; steps that `collect_every` does not divide are skipped.

        Never waits for a device.

        Args:
            codes: shape (B, d_sae).
            batch: the same B tokens; without `contexts` a sample shows its own token alone, without
                `sequences` overlapping contexts cannot be told.
            step: the training step.
            micro: which of the step's micro-batches; their reservoir draws are independent.
        """
        if step % self.section.collect_every:
            return
        if codes.shape != (len(batch), self.d_sae):
            raise ValueError(
                f"ActivationSampleCollector.collect: codes: expected shape {(len(batch), self.d_sae)}, got {codes.shape}"
            )
        contexts = batch.tokens.int()[:, None] if batch.contexts is None else batch.contexts.int()
        anchor = 0 if batch.contexts is None else batch.context_anchor
        top, spread = self._opened(contexts.shape[1], anchor)
        if (contexts.shape[1], anchor) != (top.context.shape[2], self._anchor):
            raise ValueError(
                "ActivationSampleCollector.collect: batch.contexts: expected the first batch's width "
                f"{top.context.shape[2]} and anchor {self._anchor}, got width {contexts.shape[1]} and anchor {anchor}"
            )
        if self._keep_steps is not None:
            for store in (top, spread):
                store.score.masked_fill_(store.step < step - self._keep_steps, EMPTY)
        section, window = self.section, max(1, contexts.shape[1])
        value, rows = codes.values.detach().float(), codes.rows()
        followed = self.latents.numel()
        looked_at = (value > 0) & (value >= section.min_activation)
        if self._positions is not None:
            drawn = self._positions.sample_positions(
                batch.tokens[None], step, positions=batch.positions[None], micro=micro
            )
            looked_at &= drawn.keep[0, rows]
        slot = torch.where(looked_at, self._slot[codes.indices], followed)

        def candidates(group: Tensor, score: Tensor, groups: int, k: int) -> Samples:
            entry = best_entries(group, score, groups, k)
            there, at = entry >= 0, entry.clamp(min=0)
            if codes.nnz == 0:
                return Samples.empty(groups, k, contexts.shape[1], self.device)
            row = rows[at]
            sequence = torch.full_like(row, -1) if batch.sequences is None else batch.sequences[row]
            return Samples(
                torch.where(there, score[at], -1.0),
                value[at],
                batch.tokens[row],
                batch.positions[row],
                sequence,
                torch.full_like(row, step),
                contexts[row],
            )

        def offered(store: Samples, group: Tensor, score: Tensor) -> tuple[Samples, Tensor]:
            if not counts_cpp.runs(codes):
                groups, k = store.score.shape
                store, new = merged(store, candidates(group, score, groups, k), k, window)
                return store, new.sum()
            found = (batch.tokens, batch.positions, batch.sequences, contexts)
            number = counts_cpp.offer_samples(group, score, value, rows, found, step, window, store)
            return store, torch.tensor(number, device=self.device)

        top, new_top = offered(top, slot, value)
        bin_of = (batch.positions * section.position_bins // self.sequence_length).clamp(0, section.position_bins - 1)
        stratum = torch.where(self._special.marked(batch.tokens), section.position_bins, bin_of)[rows]
        groups = followed * self._strata
        inside = (slot < followed) & (stratum < self._strata)
        group = torch.where(inside, slot * self._strata + stratum, groups)
        key = uniform(torch.arange(codes.nnz, device=self.device), self.seed, self._rank, step, micro).float()
        spread, new_spread = offered(spread, group, key)
        self._stores = (top, spread)
        self._ledger.record_call(_NAME)
        self._ledger.record_effect(_NAME, samples_kept=new_top + new_spread)

    def forget(self, latents: Tensor) -> None:
        """Drop the samples of these latents [n] int64, which were reset (recycled)."""
        if self._stores is None:
            return
        slot = self._slot[latents]
        slot = slot[slot < self.latents.numel()]
        for store in self._stores:
            store.score.view(self.latents.numel(), -1).index_fill_(0, slot, EMPTY)

    @property
    def opened(self) -> bool:
        """Whether a batch was collected: the first one sets the width of the contexts."""
        return self._stores is not None

    def save(self, step: int, decode_tokens: Callable[[Sequence[int]], list[str]]) -> list[Path]:
        """Write samples.parquet and summary.json. Reads the device.

        Args:
            step: recorded in the summary.
            decode_tokens: ids to display strings, one each.

        Returns: the paths written.

        Raises:
            OSError: a file could not be written; the previous files and the collected samples are unchanged.
        """
        top, spread = self._opened(1, 0)
        window = max(1, top.context.shape[2])
        every = sample_columns(self.latents, top, evenly_chosen(spread, self.latents.numel(), self.section, window))
        ids = self._special.ids
        summary = samples_summary(self.section, self.sequence_length, ids, self.latents.numel(), step, every)
        paths = write_samples(self._out_dir, every, every["context"], self._anchor, decode_tokens, summary)
        for path in paths:
            self._ledger.record_file(_NAME, path)
        return paths

    def state_dict(self) -> dict[str, Any]:
        if self._stores is None:
            return {"opened": False}
        top, spread = self._stores
        return {"opened": True, "anchor": self._anchor, "top": _plain(top), "spread": _plain(spread)}

    def state_bytes_at_most(self) -> int:
        """Upper bound of the bytes of tensors and numbers in `state_dict`, with contexts of at most `context_tokens`."""
        context = self.section.context_tokens
        if self._stores is not None:
            context = max(context, self._stores[0].context.shape[2])
        followed = self.latents.numel()
        places = followed * (self.section.top_per_latent + self._strata * self._per_bin)
        return places * (_BYTES_A_SAMPLE + _BYTES_A_TOKEN * max(1, context)) + _NUMBERS_BYTES

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        if not state["opened"]:
            self._stores = None
            return
        followed, anchor = self.latents.numel(), int(state["anchor"])
        sizes = {"top": (followed, self.section.top_per_latent), "spread": (followed * self._strata, self._per_bin)}
        stores = []
        for part, size in sizes.items():
            missing = set(Samples._fields) - set(state[part])
            found = {name: tuple(state[part][name].shape[:2]) for name in Samples._fields if name not in missing}
            if missing or any(shape != size for shape in found.values()):
                raise ValueError(
                    f"ActivationSampleCollector.load_state_dict: {part}: expected a store of {size} samples, got {found}"
                )
            stores.append(Samples(**{name: state[part][name].to(self.device, copy=True) for name in Samples._fields}))
        self._stores, self._anchor = (stores[0], stores[1]), anchor

    def _opened(self, context: int, anchor: int) -> tuple[Samples, Samples]:
        """The stores, made at first use, when the contexts' width is known."""
        if self._stores is None:
            followed = self.latents.numel()
            self._anchor = anchor
            self._stores = (
                Samples.empty(followed, self.section.top_per_latent, context, self.device),
                Samples.empty(followed * self._strata, self._per_bin, context, self.device),
            )
        return self._stores


def _plain(samples: Samples) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in samples._asdict().items()}


def sample_columns(latents: Tensor, top: Samples, spread: Samples) -> dict[str, NDArray[Any]]:
    """Columns of the samples of `latents` [F], each [n], sorted by latent, top samples first, and falling activation."""
    ids, parts = latents.cpu().numpy(), []
    for samples, is_top in ((top, True), (spread, False)):
        keep = (samples.score >= 0).cpu().numpy()
        group, _ = np.nonzero(keep)
        columns = {name: getattr(samples, name).cpu().numpy()[keep] for name in Samples._fields}
        parts.append({**columns, "latent": ids[group], "kind": np.full(len(group), is_top)})
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((-every["activation"], ~every["kind"], every["latent"]))
    return {name: column[order] for name, column in every.items()}


def samples_summary(
    section: SamplesSection,
    length: int,
    special: Sequence[int],
    followed: int,
    step: int,
    every: dict[str, NDArray[Any]],
) -> dict[str, Any]:
    """Content of activation_samples/summary.json for columns of `sample_columns`."""
    bins = section.position_bins
    place = np.clip(every["position"] * bins // max(1, length), 0, bins - 1)
    spread = ~every["kind"]
    sinks = np.isin(every["token"], special)
    return {
        "schema_version": 1,
        "step": step,
        "latents_followed": followed,
        "latents_with_samples": len(np.unique(every["latent"])),
        "samples_kept": len(place),
        "position_bins": np.bincount(place[spread], minlength=bins).tolist(),
        "sink_fraction": float(sinks[spread].mean()) if spread.any() else 0.0,
    }


def write_samples(
    folder: Path,
    columns: dict[str, NDArray[Any]],
    contexts: NDArray[np.int32],
    anchor: int,
    decode_tokens: Callable[[Sequence[int]], list[str]],
    summary: dict[str, Any],
    activations: NDArray[np.float32] | None = None,
) -> list[Path]:
    """Write `samples.parquet` and `summary.json` into `folder`; both are complete before either replaces the old one.

    Args:
        columns: the columns of `COLUMNS`, each [n]; `kind` is bool, True for "top".
        contexts: [n, C] int32 token ids, -1 where there is none (left out of the file's lists).
        anchor: the column of `contexts` that holds the token itself.
        decode_tokens: ids to display strings, one each.
        summary: content of summary.json without `file`.
        activations: [n, C], the latent's on each token of the context, NaN where not known; None writes no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    present = contexts >= 0
    lengths = present.sum(1)
    ids = contexts[present]
    # A table over the vocabulary instead of a sort: there are millions of ids and few distinct ones.
    used = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
    used[ids] = True
    distinct, place = np.flatnonzero(used), (np.cumsum(used) - 1)[ids]
    # A byte-level vocabulary may hold half of a surrogate pair, which is not valid UTF-8.
    words = [w.encode("utf-8", "replace").decode("utf-8") for w in decode_tokens(distinct.tolist())]
    if len(words) != len(distinct):
        raise ValueError(f"decode_tokens: expected {len(distinct)} strings, got {len(words)}")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    strings = pa.array(words, type=pa.string()).take(pa.array(place))
    kind = pa.array(np.where(columns["kind"], "top", "stratified"), type=pa.string())
    table = pa.table(
        {
            "latent": pa.array(columns["latent"].astype(np.int32)),
            "kind": kind,
            "activation": pa.array(columns["activation"].astype(np.float32)),
            "token": pa.array(columns["token"].astype(np.int32)),
            "position": pa.array(columns["position"].astype(np.int32)),
            "sequence": pa.array(columns["sequence"].astype(np.int64)),
            "step": pa.array(columns["step"].astype(np.int32)),
            "context": pa.ListArray.from_arrays(offsets, pa.array(ids.astype(np.int32))),
            "anchor": pa.array(present[:, :anchor].sum(1).astype(np.int16)),
            "tokens": pa.ListArray.from_arrays(offsets, strings),
        }
    )
    if activations is not None:
        found = pa.array(activations[present].astype(np.float32))
        table = table.append_column("activations", pa.ListArray.from_arrays(offsets, found))
    data, about = folder / "samples.parquet", folder / "summary.json"
    content = json.dumps({**summary, "file": data.name}, indent=1, allow_nan=False) + "\n"

    with replacing_all(data, about) as (samples, text):
        pq.write_table(table, samples)
        text.write(content.encode())
    return [data, about]
