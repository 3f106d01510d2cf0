"""`transcoder doctor`: one line for each thing that this machine has or lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transcoder import __version__
from transcoder.files import replace_atomically

if TYPE_CHECKING:
    import torch

ESSENTIAL = ("torch", "numpy", "pyyaml", "safetensors", "tqdm", "transformer-lens", "transformers", "pyarrow")
OPTIONAL = {
    "datasets": "text from the hub",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
}
SUPPORTED = ((3, 10), (3, 14))
LITTLE_DISK = 2 * 2**30


@dataclass(frozen=True)
class Fact:
    """One line of the output. `missing` makes the command fail; `note` only informs."""

    status: Literal["ok", "note", "missing"]
    text: str

    @property
    def fine(self) -> bool:
        return self.status != "missing"

    def __str__(self) -> str:
        return f"{self.status:<8}{self.text}"


def examine() -> list[Fact]:
    """All facts, the most important first. Never raises: an error becomes a fact."""
    facts: list[Fact] = []
    for look in (_python, _packages, _devices, _backends, _triton_time, _ops, _demo, _tools, _disk):
        try:
            facts.extend(look())
        except Exception as error:
            facts.append(Fact("missing", f"{look.__name__.strip('_')}: {type(error).__name__}: {error}"))
    return facts


def _python() -> Iterator[Fact]:
    fits = SUPPORTED[0] <= sys.version_info[:2] < SUPPORTED[1]
    span = f"{'.'.join(map(str, SUPPORTED[0]))} up to and without {'.'.join(map(str, SUPPORTED[1]))}"
    text = f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    yield Fact("ok", text) if fits else Fact("missing", f"{text}: expected {span}")


def _packages() -> Iterator[Fact]:
    yield Fact("ok", f"transcoder {__version__}")
    # Triton has no build for other systems, and the torch backend runs without it.
    essential = (*ESSENTIAL, "triton") if platform.system() == "Linux" else ESSENTIAL
    for name in essential:
        version = _version(name)
        yield Fact("ok", f"{name} {version}") if version else Fact("missing", f"{name}: pip install {name}")
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Fact("ok", f"{name} {version}") if version else Fact("note", f"{name} is not installed (for {use})")


def _version(name: str) -> str | None:
    """The installed version, without importing the package: some take seconds."""
    module = {"pyyaml": "yaml"}.get(name, name.replace("-", "_"))
    try:
        return importlib.metadata.version(name) if importlib.util.find_spec(module) else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Fact]:
    import torch

    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        capability = f"sm_{about.major}{about.minor}"
        yield Fact("ok", f"device cuda:{i}: {about.name}, {about.total_memory / 2**30:.0f} GiB, {capability}")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        known = torch.version.cuda or torch.version.hip
        yield Fact("note", f"PyTorch is built for {built}; no GPU found" if known else "PyTorch is built for CPUs only")


def _backends() -> Iterator[Fact]:
    import torch

    from transcoder.kernels import extension
    from transcoder.kernels.backend import active_backend, has_backend, requested_backend

    reason = extension.available_reason()
    if reason is None:
        yield Fact("ok", f"C++ extension: loaded, for {torch.ops.transcoder_cpp.instruction_set()}")
        yield from _extension_time()
    else:
        yield Fact("note", f"C++ extension: {reason}; the CPU runs on backend torch")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = {family: active_backend(device, family) for family in ("encode", "decode", "correlation", "adam")}
        text = ", ".join(f"{family} {backend}" for family, backend in chosen.items())
        yield Fact("ok", f"backends on {device}: {text} (asked for: {requested_backend()})")
    if torch.cuda.is_available() and has_backend("triton", "encode"):
        yield from _native_verdicts(torch.device("cuda", torch.cuda.current_device()))


def _native_verdicts(device: torch.device) -> Iterator[Fact]:
    from transcoder.kernels.gpu_selftest import FAMILIES, proof

    for family in FAMILIES:
        verdict = proof(family, device)
        again = "" if verdict.good else f" (delete {verdict.file} to check again); backend auto uses torch"
        yield Fact("ok" if verdict.good else "note", f"Triton kernels checked natively: {verdict}{again}")


def _extension_time() -> Iterator[Fact]:
    from transcoder.kernels import extension

    cost = extension.first_call()
    if cost is not None:
        cold = "" if cost.compiled is None else f" in {cost.compiled:.1f} s"
        text = f"C++ extension: compiled once{cold}; this process waited {cost.waited:.3f} s; kept in {cost.folder}"
        yield Fact("ok", text)


def _triton_time() -> Iterator[Fact]:
    """Compile the kernels that are not compiled yet, so that a later run does not wait for it."""
    if importlib.util.find_spec("triton") is None:
        return
    import torch
    from triton import knobs

    kept = f"kept in {knobs.cache.dir}"
    if not torch.cuda.is_available():
        yield Fact("note", f"Triton kernels: no GPU to compile them for; compiled ones would be {kept}")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    found = compile_every_kernel(device)
    first = remember_first(f"{capability}, triton {_version('triton')}", found)
    cold = "at a time not noted" if first is None else f"{first.compiled} in {first.compile_seconds:.1f} s"
    now = f"{found.compiled} in {found.compile_seconds:.1f} s, {found.loaded} from the cache in {found.load_seconds:.2f} s"
    yield Fact("ok", f"Triton kernels for {capability}: compiled at first {cold}; now {now}; {kept}")


@dataclass
class CompileTime:
    """Triton kernels that a block of code used: how many were compiled, and how many came from the cache on disk."""

    compiled: int = 0
    loaded: int = 0
    compile_seconds: float = 0.0
    load_seconds: float = 0.0


@contextmanager
def compile_time() -> Iterator[CompileTime]:
    """Counts what Triton compiles or loads from its cache inside the block. Kernels that this process has already loaded are
    not counted."""
    from triton import knobs

    found, before = CompileTime(), knobs.compilation.listener

    def note(*, times: Any, cache_hit: bool, **others: Any) -> None:
        if cache_hit:
            found.loaded += 1
            found.load_seconds += 1e-6 * times.total
        else:
            found.compiled += 1
            found.compile_seconds += 1e-6 * times.total
        if before is not None:
            before(times=times, cache_hit=cache_hit, **others)

    knobs.compilation.listener = note
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def compile_every_kernel(device: torch.device) -> CompileTime:
    """Run each op once on `device` with backend `triton`, as a bf16 training step would: every kernel is then compiled."""
    import torch

    from transcoder import kernels

    rows, d, d_sae, k = 256, 256, 2048, 16
    x, W_enc, W_dec, b_enc, b_dec = (
        torch.randn(*shape, device=device).requires_grad_()
        for shape in ((rows, d), (d_sae, d), (d_sae, d), (d_sae,), (d,))
    )
    with compile_time() as found, kernels.use_backend("triton"), torch.autocast(device.type, torch.bfloat16):
        for codes in (kernels.topk_encode(x, W_enc, b_enc, k), kernels.batch_topk_encode(x, W_enc, b_enc, k)):
            loss = kernels.nested_loss(codes, W_dec, b_dec, x.detach(), [d_sae // 4, d_sae]).value
            (loss + kernels.sparse_decode(codes, W_dec, b_dec).mean()).backward()
        kernels.threshold_encode(x, W_enc, b_enc, 1.0)
        for dim in (None, 64):
            monitor = kernels.FeatureCorrelation(d_sae, dim, device=device)
            monitor.update(codes.detach())
            monitor.pairs(0.9)
    return found


def remember_first(what: str, found: CompileTime) -> CompileTime | None:
    """The first full compilation for `what` (a chip and a version of Triton) on this machine, recorded on disk."""
    from transcoder.kernels.extension import cache_folder

    file = cache_folder() / "first_call.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if found.compiled and not found.loaded:
        known[what] = {"compiled": found.compiled, "compile_seconds": found.compile_seconds}
        replace_atomically(file, json.dumps(known, indent=1) + "\n")
    return CompileTime(**known[what]) if what in known else None


def _ops() -> Iterator[Fact]:
    import torch

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, check in _op_checks(device).items():
            worst = check()
            fits = worst < 1e-4
            text = (
                f"{name} on {device}: {'matches' if fits else 'differs from'} the reference (largest error {worst:.1g})"
            )
            yield Fact("ok" if fits else "missing", text if fits else f"{text}, expected below 1e-4")


def _op_checks(device: str) -> dict[str, Callable[[], float]]:
    """Largest absolute difference of each op from its reference, on small inputs."""
    import torch

    from transcoder import kernels
    from transcoder.kernels.correlation.reference import correlation_reference
    from transcoder.kernels.decode import reference as decode
    from transcoder.kernels.encode import reference as encode

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, W_enc, b_enc, W_dec, b_dec, y = draw(16, 8), draw(32, 8), draw(32), draw(32, 8), draw(8), draw(16, 8)
    codes = kernels.topk_encode(x, W_enc, b_enc, 4)
    dense = codes.to_dense()

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).abs().max())

    def correlation() -> float:
        streamed = kernels.FeatureCorrelation(32, device=device)
        streamed.update(codes)
        i, j = torch.triu_indices(32, 32, 1, device=device)
        expected = correlation_reference(dense).correlation[i, j]
        return off(streamed.correlation(i, j).nan_to_num(0), expected)

    return {
        "topk_encode": lambda: off(dense, encode.topk_encode_reference(x, W_enc, b_enc, 4)),
        "batch_topk_encode": lambda: off(
            kernels.batch_topk_encode(x, W_enc, b_enc, 4).to_dense(),
            encode.batch_topk_encode_reference(x, W_enc, b_enc, 4),
        ),
        "threshold_encode": lambda: off(
            kernels.threshold_encode(x, W_enc, b_enc, 1.0).to_dense(),
            encode.threshold_encode_reference(x, W_enc, b_enc, 1.0),
        ),
        "sparse_decode": lambda: off(
            kernels.sparse_decode(codes, W_dec, b_dec), decode.sparse_decode_reference(dense, W_dec, b_dec)
        ),
        "nested_loss": lambda: off(
            kernels.nested_loss(codes, W_dec, b_dec, y, (8, 32)).per_prefix,
            decode.nested_loss_reference(dense, W_dec, b_dec, y, (8, 32))[0],
        ),
        "FeatureCorrelation": correlation,
    }


def _demo() -> Iterator[Fact]:
    from transcoder.demo import iter_documents, language_model_path

    size = sum(file.stat().st_size for file in language_model_path().iterdir())
    yield Fact("ok", f"demo language model is there ({size / 2**20:.1f} MiB)")
    documents = sum(1 for _ in iter_documents("train"))
    yield Fact("ok", f"demo text: {documents} files of this Python's standard library")


def _tools() -> Iterator[Fact]:
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    yield (
        Fact("ok", f"C++ compiler: {Path(compiler).name}")
        if compiler
        else Fact("note", "no C++ compiler: backend torch")
    )


def _disk() -> Iterator[Fact]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    yield Fact("ok" if free >= LITTLE_DISK else "note", f"free disk in the current folder: {free / 2**30:.1f} GiB")
    if not os.access(here, os.W_OK):
        yield Fact("note", "the current folder is not writable: give --out")
