"""`transcoder export` and `transcoder import`: words to calls of the front, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXPORT = "Write a run's transcoder in another library's format."
IMPORT = "Make a transcoder of another library's files."
_NAMES = "saelens, sparsify, dictionary-learning, circuit-tracer, gemma-scope, original"
_CHANGED = "convert even where the other side cannot hold the same function; conversion.json says what changed"


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run folder (its newest checkpoint), a checkpoint, or a saved transcoder; several for circuit-tracer",
    )
    parser.add_argument("--to", metavar="FORMAT", required=True, help=_NAMES)
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: RUN/exports/FORMAT)")
    parser.add_argument("--allow-changed-function", action="store_true", help=_CHANGED)
    _add_hooks(parser)
    parser.add_argument("--layer", type=int, help="circuit-tracer: the layer, where the source hook does not name it")
    parser.add_argument(
        "--n-layers", type=int, help="circuit-tracer: layers of the model; those without a run are zeros"
    )
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="saelens: topk writes a TopK transcoder as its SAE; transcoder, skip_transcoder a plain ReLU",
    )
    parser.add_argument(
        "--threshold", type=float, help="for TopK as thresholds: the one to use (default: the tracked one)"
    )
    _add_norm_weight(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", metavar="FORMAT", help=_NAMES)
    parser.add_argument("path", metavar="PATH", help="the folder or file that the library wrote")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="a new folder, which Transcoder.from_pretrained loads"
    )
    parser.add_argument("--allow-changed-function", action="store_true", help=_CHANGED)
    _add_hooks(parser)
    parser.add_argument("--layer", type=int, help="circuit-tracer, gemma-scope: which layer")
    parser.add_argument("--k", type=int, help="latents a token for further training, where the files do not say")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        default=None,
        help="load a .pt file that holds Python objects: it can run any code",
    )
    _add_norm_weight(parser)


def _add_hooks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-hook", metavar="HOOK", help="where it reads, such as blocks.8.ln2.hook_normalized")
    parser.add_argument("--target-hook", metavar="HOOK", help="where it writes, such as blocks.8.hook_mlp_out")
    parser.add_argument("--model-name", metavar="NAME", help="the language model")


def _add_norm_weight(parser: argparse.ArgumentParser) -> None:
    text = "gemma-scope: the RMSNorm's factor before the MLP: a .npy file, or the model's Hugging Face folder"
    parser.add_argument("--norm-weight", metavar="FILE", help=text)


def run_export(options: argparse.Namespace, _: dict[str, Any]) -> int:
    from transcoder.interop.formats import export_transcoder, format_name

    name = format_name(options.to)
    runs = options.runs
    out = Path(options.out) if options.out is not None else _home(Path(runs[0])) / "exports" / name
    words = (
        "source_hook",
        "target_hook",
        "model_name",
        "layer",
        "n_layers",
        "architecture",
        "threshold",
        "norm_weight",
    )
    record = export_transcoder(
        runs if len(runs) > 1 else runs[0],
        name,
        out,
        allow_changed_function=options.allow_changed_function,
        **_given(options, words),
    )
    return _done(record.format_lines, out)


def run_import(options: argparse.Namespace, _: dict[str, Any]) -> int:
    from transcoder.interop.formats import read_transcoder

    words = ("source_hook", "target_hook", "model_name", "layer", "k", "allow_pickle", "norm_weight")
    found = read_transcoder(
        options.format,
        options.path,
        allow_changed_function=options.allow_changed_function,
        **_given(options, words),
    )
    out = found.save(options.out)
    return _done(found.record.format_lines, out)


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _home(path: Path) -> Path:
    """The run folder that a checkpoint is in; a checkpoint's own folder stays as it was written."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _done(lines: Callable[[], str], out: Path) -> int:
    print(lines())
    print(f"written: {out}")
    return 0
