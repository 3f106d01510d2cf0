"""train_transcoder: one run from a config to a folder of results, resumable bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transcoder.activations import ActivationBatch, ActivationStream
from transcoder.activations.pass_feed import PassFeed
from transcoder.activations.stream import build_stream, layer_stream, open_source, resolved_layers
from transcoder.config import BUFFER_TOKENS, ConfigError, RunConfig
from transcoder.files import local_path
from transcoder.layer_list import LAYERS_FOLDER, layer_configs
from transcoder.training.layer_set import LayerSet, buffer_tokens, layers_folder
from transcoder.training.run_end import RunResult
from transcoder.training.run_folder import FolderLock
from transcoder.training.run_parts import RunParts
from transcoder.training.signals import StopRequest
from transcoder.training.start_checks import (
    as_started,
    check_folder,
    check_for_ranks,
    check_one_process,
    check_streams,
    check_switches,
    device_of,
    in_ranks,
    say_backend,
    say_nothing_held_out,
    under_torchrun,
)
from transcoder.training.trainer import Trainer

if TYPE_CHECKING:
    from transcoder.parallel.ranks import Ranks


def train_transcoder(
    config: RunConfig,
    out: Path | str | None = None,
    resume: bool = False,
    *,
    batches: Iterable[ActivationBatch] | None = None,
    heldout: Sequence[ActivationBatch] | None = None,
) -> RunResult:
    """Train one transcoder and leave a run folder: config, metrics, checkpoints, anti-duplication reports, samples, report.
    With `activations.layers`, one for each layer, with such a folder each under layers/; with `activations.cross_layer` one of
    all layers.

    Args:
        config: the run, see `transcoder.config`.
        out: run folder; None is runs/<name>.
        resume: go on from the folder's newest good checkpoint (from the start where there is none). Without it a folder
            that holds a run is refused.
        batches: train on these instead of config.activations: any iterable of ActivationBatch. It resumes exactly only if
            it has `state_dict` and `load_state_dict`.
        heldout: only with `batches`: what evaluation reads; None takes the first `training.evaluation_tokens` of `batches`
            away from training.

    Raises:
        ConfigError, ValueError, TypeError: settings or data that cannot be trained on, before any work is done; a field of
            `batches` by name.
        FileExistsError: the folder holds a run and `resume` is off.  RunLockedError: another process is using it.
        LedgerError: an enabled anti-duplication part was not called, had no effect or wrote nothing.
        TrainingDivergedError: more than training.max_bad_steps steps were NaN or Inf, or the weights overflowed.
        CheckpointError: the disk cannot take a checkpoint.
    """
    if under_torchrun():
        return _train_in_ranks(config, out, resume, batches)
    run_dir = Path("runs") / config.name if out is None else local_path(out)
    if config.activations.layers is not None and batches is not None:
        raise ConfigError("activations.layers: expected null with `batches`, which are of one layer")
    if config.activations.layers is not None and not config.activations.cross_layer:
        with StopRequest() as stop, opened_set(config, run_dir, resume) as layers:
            return layers.train(stop)
    with StopRequest() as stop, opened_run(config, run_dir, batches, heldout, resume) as run:
        return run.train(stop)


def _train_in_ranks(
    config: RunConfig, out: Path | str | None, resume: bool, batches: Iterable[ActivationBatch] | None
) -> RunResult:
    """`train_transcoder` in one of the processes that torchrun has started."""
    from transcoder.parallel.ranks import Ranks, device_of_rank

    device = device_of(device_of_rank(config.model.device))
    with Ranks.joined(device) as ranks, ExitStack() as stack:
        check_for_ranks(config, ranks.count, batches is not None)
        run_dir = Path("runs") / config.name if out is None else local_path(out)
        if ranks.rank:
            # Every process looks at training as one alone does; the files of the first are the run's.
            run_dir = Path(stack.enter_context(TemporaryDirectory())) / "run"
        with StopRequest() as stop, opened_run(config, run_dir, resume=resume, ranks=ranks) as run:
            return run.train(stop)


@contextmanager
def opened_run(
    config: RunConfig,
    run_dir: Path,
    batches: Iterable[ActivationBatch] | None = None,
    heldout: Sequence[ActivationBatch] | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Iterator[Trainer]:
    """A run in its locked folder before its first step, whose steps the caller takes: `train` or `advance`. Arguments and
    errors as `train_transcoder`; `ranks` are the processes that share it, of which the first has the folder."""
    if config.activations.layers is not None and not config.activations.cross_layer:
        raise ConfigError(
            "activations.layers: expected null, for a run whose steps the caller takes; `train_transcoder` trains layer sets"
        )
    if ranks is None:
        check_one_process()
    device = device_of(config.model.device) if ranks is None else ranks.device
    if ranks is None or ranks.rank == 0:
        config = as_started(resolved_layers(config), run_dir, resume)
    if ranks is not None:
        config = in_ranks(ranks.from_first(lambda: config), ranks)
    check_switches(config, batches, heldout)
    check_streams(config, batches is not None)
    say_backend(device)
    with ExitStack() as stack:
        lock = stack.enter_context(FolderLock(run_dir))
        check_folder(run_dir, config, resume)
        build: Callable[..., ActivationStream] = build_stream
        if (config.parallel.streams or 1) > 1:
            from transcoder.activations.text_streams import streams_of_text

            build = functools.partial(streams_of_text, processes=ranks)
        parts = RunParts(config, run_dir, device, batches, heldout, stack, build, ranks)
        run = Trainer(parts.config, run_dir, device, parts, stack)
        if not run.parts.data.heldout:
            say_nothing_held_out(config)
        run.prepare(resume)
        lock.begun = True
        yield run


@contextmanager
def opened_set(config: RunConfig, run_dir: Path, resume: bool = False) -> Iterator[LayerSet]:
    """The runs of a layer set in their locked folders before their first step. Arguments and errors as `train_transcoder`."""
    check_one_process()
    check_streams(config, False)
    device = device_of(config.model.device)
    config = resolved_layers(config)
    say_backend(device)
    with ExitStack() as stack:
        lock = stack.enter_context(FolderLock(run_dir))
        check_folder(run_dir, config, resume)
        source = open_source(config, device)
        feed = PassFeed(source, config.activations.prefetch)
        started = next((run_dir / LAYERS_FOLDER).glob("*/config.yaml"), None) if resume else None
        if started is not None:
            buffer = RunConfig.load(started).activations.buffer_tokens or BUFFER_TOKENS
        else:
            buffer = config.activations.buffer_tokens or buffer_tokens(source, config, device)
        folders = {layer: layers_folder(run_dir, layer) for layer in layer_configs(config, buffer)}
        configs = {
            layer: as_started(own, folders[layer], resume) for layer, own in layer_configs(config, buffer).items()
        }
        for place, own in enumerate(configs.values()):
            source.set_multiple(place, own.activations.mask_norm_multiple)
        check_switches(next(iter(configs.values())), None, None)
        locks, runs = [lock], {}
        for place, (layer, own) in enumerate(configs.items()):
            locks.append(stack.enter_context(FolderLock(folders[layer])))
            check_folder(folders[layer], own, resume)
            build = functools.partial(layer_stream, feed, place)
            parts = RunParts(own, folders[layer], device, None, None, stack, build)
            runs[layer] = Trainer(parts.config, folders[layer], device, parts, stack)
        for run in runs.values():
            run.prepare(resume, len(runs))
        layers = LayerSet(config, run_dir, runs, source, stack)
        for one in locks:
            one.begun = True
        yield layers
