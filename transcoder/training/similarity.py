"""How alike the prefixes of one transcoder, or the transcoders of several runs, are: CKA on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.antidup.cka import LEAST_TOKENS, Similarity, StreamingCKA, gram_of_codes, gram_of_rows
from transcoder.checkpoint_folder import CheckpointError, find_checkpoint
from transcoder.files import local_path, replacing
from transcoder.kernels import SparseCodes, sparse_decode
from transcoder.model import Transcoder
from transcoder.tensor_file import read_tensors, write_tensors
from transcoder.training.evaluation import at_inference

SCHEMA_VERSION = 1
BATCH_TOKENS = 512
"""A mini-batch of CKA: its Gram matrices are [512, 512]."""
REPORT_FILE, CODES_FILE = "similarity.json", "heldout_codes.safetensors"


class HeldoutCodes:
    """Codes of held-out tokens, with the tokens' ids and positions.

    Mini-batches take every T-th token, so that neighbours in a text, which are not independent, fall into different ones.
    """

    def __init__(self, codes: Sequence[SparseCodes], tokens: Tensor, positions: Tensor, widths: Sequence[int]) -> None:
        self.codes, self.tokens, self.positions, self.widths = list(codes), tokens, positions, list(widths)

    @classmethod
    @torch.no_grad()
    def of(cls, transcoder: Transcoder, heldout: Sequence[ActivationBatch], tokens: int) -> HeldoutCodes | None:
        """The codes of the first `tokens` of them at inference; None where that is too few for a mini-batch."""
        count, parts = 0, []
        for batch in heldout:
            room = tokens - count
            parts.append((batch.source[:room], batch.tokens[:room], batch.positions[:room]))
            count += len(parts[-1][0])
        size = min(BATCH_TOKENS, count)
        if size < LEAST_TOKENS:
            return None
        turns = count // size
        source, ids, places = (torch.cat(column)[: turns * size] for column in zip(*parts, strict=True))
        with at_inference(transcoder):
            codes = [transcoder.encode(source[t::turns]) for t in range(turns)]
        ids, places = (torch.cat([column[t::turns] for t in range(turns)]) for column in (ids, places))
        return cls(codes, ids, places, transcoder.widths)

    def __len__(self) -> int:
        return sum(codes.shape[0] for codes in self.codes)

    def save(self, path: Path) -> None:
        """Write them: 8 bytes an entry, 12 a token. Raises: OSError; the former file stands."""
        sizes = torch.cat([codes.row_ptr.diff() for codes in self.codes])
        tensors = {
            "values": torch.cat([codes.values for codes in self.codes]).float(),
            "indices": torch.cat([codes.indices for codes in self.codes]).int(),
            "entries": sizes.int(),
            "batches": torch.tensor([codes.shape[0] for codes in self.codes], device="cpu"),
            "tokens": self.tokens.int(),
            "positions": self.positions.int(),
            "widths": torch.tensor(self.widths, device="cpu"),
        }
        with replacing(path) as file:
            write_tensors(file, tensors)

    @classmethod
    def load(cls, path: Path) -> HeldoutCodes:
        """Raises: OSError; ValueError naming a file that is not one of these."""
        try:
            found = read_tensors(path)
            widths = found["widths"].tolist()
            row_ptr = torch.zeros(found["entries"].numel() + 1, dtype=torch.int64, device="cpu")
            torch.cumsum(found["entries"], 0, out=row_ptr[1:])
            codes, row = [], 0
            for size in found["batches"].tolist():
                ends = row_ptr[row : row + size + 1]
                inside = slice(int(ends[0]), int(ends[-1]))
                part = SparseCodes(
                    found["values"][inside], found["indices"][inside].long(), ends - ends[0], (size, widths[-1])
                )
                part.validate()
                codes.append(part)
                row += size
            return cls(codes, found["tokens"], found["positions"], widths)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the codes of held-out tokens ({type(error).__name__}: {error})") from error

    def matches(self, other: HeldoutCodes) -> bool:
        """Whether both are of the same tokens."""
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.positions, other.positions)


@torch.no_grad()
def prefix_similarity(codes: HeldoutCodes, W_dec: Tensor) -> dict[str, Any] | None:
    """CKA within one transcoder; None with a single prefix.

    Returns JSON values: {"schema_version": 1, "tokens", "batch_tokens", "widths", "codes": {"cka": [P][P], "error": [P][P]},
    "reconstructions": likewise}. "codes" compares the groups of latents that each prefix adds, "reconstructions" what each
    prefix reconstructs (biases left out). null where a group does not vary.
    """
    widths = codes.widths
    if len(widths) < 2:
        return None
    groups, outputs = StreamingCKA(len(widths)), StreamingCKA(len(widths))
    for part in codes.codes:
        groups.update(*(gram_of_codes(part, first, last) for first, last in zip([0, *widths], widths, strict=False)))
        outputs.update(*(gram_of_rows(_decoded(part, W_dec, width)) for width in widths))
    about = {"schema_version": SCHEMA_VERSION, "tokens": len(codes), "batch_tokens": codes.codes[0].shape[0]}
    return {**about, "widths": widths, "codes": _plain(groups.result()), "reconstructions": _plain(outputs.result())}


def similarity_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """{"similarity/cka_prefix_<w>"}: between what each narrower prefix reconstructs and what the full width does."""
    last = [row[-1] for row in report["reconstructions"]["cka"]]
    named = zip(report["widths"][:-1], last[:-1], strict=True)
    return {f"similarity/cka_prefix_{width}": value for width, value in named if value is not None}


@torch.no_grad()
def run_similarity(runs: Sequence[Path]) -> dict[str, Any]:
    """CKA between finished runs, on the held-out tokens whose codes each has kept (`training.similarity_tokens`).

    Returns JSON values: {"schema_version": 1, "tokens", "runs": [folder, ...], "codes": {"cka": [R][R], "error": [R][R]},
    "reconstructions": likewise, or null where a run has no checkpoint}.

    Raises:
        ValueError: fewer than two runs, a run that kept no codes, or runs of different held-out tokens.
    """
    if len(runs) < 2:
        raise ValueError(f"similarity: expected at least two runs, got {len(runs)}")
    found: list[HeldoutCodes] = []
    for run in runs:
        path = local_path(run) / CODES_FILE
        if not path.is_file():
            raise ValueError(f"similarity: {run} kept no codes of held-out tokens (training.similarity_tokens is 0?)")
        found.append(HeldoutCodes.load(path))
        if not found[0].matches(found[-1]):
            raise ValueError(f"similarity: {runs[0]} and {run} were evaluated on different held-out tokens")
    decoders = [decoder for decoder in (_decoder(local_path(run)) for run in runs) if decoder is not None]
    decoded = len(decoders) == len(runs)
    codes_cka, output_cka = StreamingCKA(len(runs)), StreamingCKA(len(runs))
    for parts in zip(*(codes.codes for codes in found), strict=True):
        codes_cka.update(*(gram_of_codes(part) for part in parts))
        if decoded:
            output_cka.update(*(gram_of_rows(_decoded(p, d, len(d))) for p, d in zip(parts, decoders, strict=True)))
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": len(found[0]),
        "runs": [str(run) for run in runs],
        "codes": _plain(codes_cka.result()),
        "reconstructions": _plain(output_cka.result()) if decoded else None,
    }


def similarity_text(folders: Sequence[Path], method: str | None = None) -> str:
    """CKA between the runs (of a method's seeds) with a line end, if each of them has saved the codes that it is computed from;
    else nothing."""
    if len(folders) < 2 or not all((folder / CODES_FILE).is_file() for folder in folders):
        return ""
    try:
        found = run_similarity(folders)
    except ValueError as error:
        return f"\nno CKA between {method or 'these'} runs: {error}\n"
    return f"\n{format_run_similarity(found) if method is None else format_seed_similarity(method, found)}\n"


def format_run_similarity(found: Mapping[str, Any]) -> str:
    """CKA of each run with the first one, for a terminal."""
    lines = [f"CKA with {Path(found['runs'][0]).name} on {found['tokens']} held-out tokens, +- 1 standard error:"]
    for kind in ("codes", "reconstructions"):
        for n, run in enumerate(found["runs"][1:], 1):
            if found[kind] is not None:
                lines.append(f"  {Path(run).name}, {kind}: {_cell(found[kind], 0, n)}")
    return "\n".join([*lines, "  (alike up to a rotation of the latents; it says nothing about duplicates within one)"])


def format_seed_similarity(method: str, found: Mapping[str, Any]) -> str:
    """Mean over pairs of a method's seeds."""
    texts = []
    for kind in ("codes", "reconstructions"):
        pairs = [] if found[kind] is None else [v for n, row in enumerate(found[kind]["cka"]) for v in row[n + 1 :]]
        if pairs and None not in pairs:
            texts.append(f"{kind} {fmean(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})")
    return f"{method}: CKA across seeds, mean over pairs (least to most): " + (", ".join(texts) or "not defined")


def _decoded(codes: SparseCodes, W_dec: Tensor, width: int) -> Tensor:
    """[n, d_out] of the latents below `width`, without bias."""
    kept = codes.with_values(torch.where(codes.indices < width, codes.values, 0))
    return sparse_decode(kept, W_dec, W_dec.new_zeros(W_dec.shape[1]))


def _decoder(run: Path) -> Tensor | None:
    """W_dec of the newest checkpoint; None where none can be read."""
    try:
        return Transcoder.from_pretrained(find_checkpoint(run)).W_dec.detach()
    except (OSError, ValueError, CheckpointError):
        return None


def _plain(found: Similarity) -> dict[str, list[list[float | None]]]:
    return {
        name: [[v if math.isfinite(v) else None for v in row] for row in getattr(found, name).tolist()]
        for name in Similarity._fields
    }


def _cell(found: Mapping[str, Any], a: int, b: int) -> str:
    value, error = found["cka"][a][b], found["error"][a][b]
    return "–" if value is None else f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")
