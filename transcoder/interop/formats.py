"""The front of the formats: export a transcoder to another library's files, import one from them, each with its record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transcoder.checkpoint_folder import MODEL_FILE, STATE_FILE, candidates
from transcoder.files import local_path
from transcoder.interop import (
    circuit_tracer,
    circuit_tracer_cross_layer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    original,
    saelens,
    sparsify,
)
from transcoder.interop.conversion_record import ChangedFunctionError, Conversion
from transcoder.interop.export_source import HOOKS_FILE, Exportable, load_source
from transcoder.interop.files import new_folder, write_json
from transcoder.interop.folded_weights import FoldedWeights, Hooks, check_weights, from_transcoder, to_transcoder
from transcoder.layer_list import layer_folders
from transcoder.model import Transcoder
from transcoder.settings import brief

__all__ = [
    "EXPORTED",
    "FORMATS",
    "ChangedFunctionError",
    "Conversion",
    "Imported",
    "export_transcoder",
    "format_name",
    "import_transcoder",
    "open_transcoder",
    "read_transcoder",
]


@dataclass(frozen=True)
class Format:
    """How one foreign format is written and read, and the options that each takes."""

    read: Callable[[Path, Conversion, Mapping[str, Any]], FoldedWeights]
    tested: str
    write: Callable[[FoldedWeights, Path, Conversion, Mapping[str, Any]], None] | None = None
    export_options: tuple[str, ...] = ()
    import_options: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "saelens": Format(saelens.read, saelens.TESTED, saelens.write, ("architecture", "threshold")),
    "sparsify": Format(sparsify.read, sparsify.TESTED, sparsify.write),
    "dictionary-learning": Format(
        dictionary_learning.read,
        dictionary_learning.TESTED,
        dictionary_learning.write,
        (),
        ("allow_pickle", "threshold"),
    ),
    "circuit-tracer": Format(
        circuit_tracer.read,
        circuit_tracer.TESTED,
        None,
        ("layer", "n_layers", "scan", "activation", "threshold"),
        ("layer",),
    ),
    "gemma-scope": Format(
        gemma_scope.read, gemma_scope.TESTED, gemma_scope.write, ("norm_weight", "threshold"), ("layer", "norm_weight")
    ),
    "original": Format(original.read, original.TESTED, original.write, ("threshold",), ("allow_pickle", "threshold")),
    "llama-scope": Format(llama_scope.read, llama_scope.TESTED, None, (), ("threshold",)),
}
EXPORTED = tuple(name for name, known in FORMATS.items() if known.write is not None or name == "circuit-tracer")
"""Those that can be written."""
_NOT_READ = {
    "transcoder.safetensors": "It is a transcoder of this library, which Transcoder.from_pretrained reads as it is",
    "checkpoints/step_*/transcoder.safetensors": "It is the folder of a run; Transcoder.from_pretrained reads its checkpoints",
    "W_enc_*.safetensors": "It is a cross-layer transcoder, each of whose latents writes into every later layer",
    "params_layer_*.safetensors": "It is Gemma Scope 2's cross-layer transcoder; transcoder/, transcoder_all/ are of one layer",
    "*.dcp": "It is a distributed checkpoint: save it in its library as .safetensors first",
}
"""What is in folders that no format reads."""
_EXPORT, _IMPORT = ("source_hook", "target_hook", "model_name"), ("k", "source_hook", "target_hook", "model_name")


@dataclass(frozen=True, eq=False)
class Imported:
    """What `read_transcoder` returns: the transcoder (eval mode, CPU), where it belongs, and the record."""

    transcoder: Transcoder
    hooks: Hooks
    record: Conversion

    def save(self, out_dir: str | Path) -> Path:
        """A new folder that `Transcoder.from_pretrained` loads, with conversion.json and hooks.json in it.

        Raises:
            FileExistsError: `out_dir` is not empty.   OSError: it cannot be written; nothing is left then.
        """
        out = local_path(out_dir)
        with new_folder(f"{self.record.format} import", out, self.record) as folder:
            self.transcoder.save_pretrained(folder)
            write_json(folder / HOOKS_FILE, asdict(self.hooks))
        return out


def format_name(name: str) -> str:
    """The format's name as `FORMATS` has it: hyphens and underscores, small and capital letters are one.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    known = name.strip().lower().replace("_", "-")
    if known not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return known


def export_transcoder(
    source: Exportable | Sequence[Exportable] | Mapping[int, Exportable],
    format: str,
    out_dir: str | Path,
    *,
    allow_changed_function: bool = False,
    **options: Any,
) -> Conversion:
    """Write a transcoder in another library's format into a new folder that also holds conversion.json.

    The normalisation of source and target is folded into the weights; latents keep their numbers and their activations.

    Args:
        source: a Transcoder, a run folder (its newest checkpoint), a checkpoint, or a saved folder. circuit-tracer takes
            several: a list, or {layer: source}. A layer set's folder is all of its layers: one set for circuit-tracer, for
            other formats a folder for each layer in `out_dir`.
        format: one of `EXPORTED`: saelens, sparsify, dictionary-learning, circuit-tracer, gemma-scope, original.
        out_dir: a folder that does not exist or is empty.
        allow_changed_function: write what the format can hold where it cannot hold the same function.
        options: of the format (`FORMATS[name].export_options`), and source_hook, target_hook, model_name, where the run does
            not know them or another is meant.

    Returns: the record: every step, and whether the function is the same.

    Raises:
        ChangedFunctionError (a ValueError): the format cannot hold this function; the message names why and the way round.
        ValueError: the format cannot hold this transcoder at all, or an option is unknown or missing.
        FileNotFoundError, FileExistsError, OSError: folders. Nothing is left half-written.
    """
    name = format_name(format)
    if name not in EXPORTED:
        raise ValueError(f"{name} export: expected one of {', '.join(EXPORTED)}; this format is only read")
    known = FORMATS[name]
    given = _options(f"{name} export", options, (*known.export_options, *_EXPORT))
    out = local_path(out_dir)
    record = Conversion("export", name, str(out), allow_changed_function, known.tested)
    layers = layer_folders(local_path(source)) if isinstance(source, (str, Path)) else {}
    several = list(layers.values()) or _several(name, source)
    folded = [_folded(one, record, given) for one in several]
    for weights in folded:
        check_weights(f"{name} export", weights)
    across = [weights for weights in folded if weights.hooks.layers is not None]
    if across and (name != "circuit-tracer" or len(folded) > 1):
        raise ValueError(f"{name} export: a cross-layer transcoder is written for circuit-tracer only, one at a time")
    with new_folder(f"{name} export", out, record) as folder:
        if across:
            circuit_tracer_cross_layer.write(across[0], folder, record, given)
        elif known.write is None:
            by_layer = _by_layer(layers or source, folded, given)
            circuit_tracer.write_set(by_layer, folder, record, given, dict(zip(by_layer, several, strict=True)))
        elif not layers:
            known.write(folded[0], folder, record, given)
        for layer, weights in zip(layers, folded, strict=False):
            if known.write is not None:
                # sparsify names a folder by the module that it stands for.
                place = folder / f"layers.{layer}.mlp"
                place.mkdir()
                known.write(weights, place, record, given)
    return record


def read_transcoder(format: str, path: str | Path, *, allow_changed_function: bool = False, **options: Any) -> Imported:
    """Read a transcoder (or a sparse autoencoder) from another library's files.

    Args:
        format: one of `FORMATS`.
        path: the folder or file that the library wrote.
        allow_changed_function: take what a Transcoder can hold where it cannot hold the same function.
        options: of the format (`FORMATS[name].import_options`); k (what further training uses, where the file does not say);
            source_hook, target_hook, model_name, where the file does not know them.

    Returns: the transcoder in eval mode, its hooks and the record.

    Raises:
        ChangedFunctionError (a ValueError): a Transcoder cannot hold this function.
        FileNotFoundError: a file is missing.
        ValueError: a file is torn, of another format, or does not fit; it names what was expected, what was found, and what
            to do.
    """
    name, where = format_name(format), local_path(path)
    if not where.exists():
        raise FileNotFoundError(f"{name} import: {where}: expected a folder or file of this format, there is none")
    try:
        return _read(name, where, allow_changed_function, options)
    except ChangedFunctionError:
        raise
    except (FileNotFoundError, ValueError) as error:
        hint = _what_it_is(where, name)
        if not hint:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error}. {hint}") from error


def _read(name: str, where: Path, allow_changed_function: bool, options: Mapping[str, Any]) -> Imported:
    known = FORMATS[name]
    given = _options(f"{name} import", options, (*known.import_options, *_IMPORT))
    k = given.get("k")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"{name} import: k: expected a whole number of at least 1, got {k!r}")
    record = Conversion("import", name, str(where), allow_changed_function, known.tested)
    weights = known.read(where, record, given)
    return Imported(to_transcoder(weights, record, k=k), _named(weights.hooks, given), record)


def _what_it_is(where: Path, tried: str) -> str:
    """For errors: the format that reads these files, or what they are where none does; "" where that is not known."""
    for name, known in FORMATS.items():
        if name != tried:
            with contextlib.suppress(Exception):
                known.read(where, Conversion("import", name, str(where), allow_changed_function=True), {})
                return f"These files are of the format {name}: transcoder import {name}"
    return next((what for pattern, what in _NOT_READ.items() if any(where.glob(pattern))), "")


def open_transcoder(
    path: str | Path, format: str | None = None, *, allow_changed_function: bool = False, **options: Any
) -> Imported:
    """A transcoder of this package (a run folder's newest checkpoint, a checkpoint, a saved folder, the hub's org/name) or of
    any format that `read_transcoder` reads.

    Args:
        format: None tries all of them.
        options: as in `read_transcoder`; a format takes those that it knows.

    Raises: ValueError: no format reads it; with what each of them says. Others as `read_transcoder` where a format is named.
    """
    where = local_path(path)
    if format is not None:
        return read_transcoder(format, path, allow_changed_function=allow_changed_function, **options)
    own = Conversion("import", "transcoder", str(where))
    if (where / MODEL_FILE).is_file() or (where / STATE_FILE).is_file() or candidates([where / "checkpoints", where]):
        source = load_source(where)
        return Imported(source.model, _named(source.hooks, options), own)
    if not where.exists():
        return Imported(Transcoder.from_pretrained(path), _named(Hooks(), options), own)
    said: dict[str, str] = {}
    for name, known in FORMATS.items():
        given = {key: value for key, value in options.items() if key in (*known.import_options, *_IMPORT)}
        try:
            return _read(name, where, allow_changed_function, given)
        except ChangedFunctionError:
            raise
        except (ValueError, TypeError, OSError) as error:
            said[name] = brief(error, 200)
    told = "; ".join(f"{name}: {why}" for name, why in said.items())
    raise ValueError(f"{where}: expected a transcoder of this package or of a format that import reads. {told}")


def import_transcoder(format: str, path: str | Path, **options: Any) -> Transcoder:
    """The transcoder alone of `read_transcoder`, which see.

    Equivalent to: `read_transcoder(format, path, **options).transcoder`.
    """
    return read_transcoder(format, path, **options).transcoder


def _several(name: str, source: Exportable | Sequence[Exportable] | Mapping[int, Exportable]) -> list[Exportable]:
    if not isinstance(source, (Mapping, list, tuple)):
        return [source]  # type: ignore[list-item]
    sources: list[Exportable] = list(source.values() if isinstance(source, Mapping) else source)
    if not sources or (len(sources) > 1 and name != "circuit-tracer"):
        raise ValueError(
            f"{name} export: expected one transcoder, got {len(sources)}; only circuit-tracer takes several"
        )
    return sources


def _folded(source: Exportable, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    loaded = load_source(source)
    return from_transcoder(loaded.model, _named(loaded.hooks, options), record)


def _named(hooks: Hooks, options: Mapping[str, Any]) -> Hooks:
    given = {"source": "source_hook", "target": "target_hook", "model_name": "model_name"}
    return replace(hooks, **{name: options[option] for name, option in given.items() if option in options})


def _by_layer(source: object, folded: list[FoldedWeights], options: Mapping[str, Any]) -> dict[int, FoldedWeights]:
    if isinstance(source, Mapping):
        layers = [int(layer) for layer in source]
    elif options.get("layer") is not None and len(folded) == 1:
        layers = [int(options["layer"])]
    else:
        unknown = [weights.hooks.source for weights in folded if weights.hooks.layer is None]
        if unknown:
            raise ValueError(
                f"circuit-tracer export: expected source hooks of the form blocks.L..., to know the layer, got {unknown}: give "
                "layer= (--layer), or {layer: source}"
            )
        layers = [weights.hooks.layer or 0 for weights in folded]
    if len(set(layers)) != len(layers) or min(layers) < 0:
        raise ValueError(f"circuit-tracer export: expected one transcoder a layer, from 0 on, got layers {layers}")
    return dict(zip(layers, folded, strict=True))


def _options(where: str, options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown options {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if value is not None}
