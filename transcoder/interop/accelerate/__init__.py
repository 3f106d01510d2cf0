"""`accelerate(module)`: a live module of another library, running on our kernels."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from transcoder.interop.accelerate.activations import DenseView, LazyTensor, SparseActivations
from transcoder.interop.accelerate.dispatch import Accelerated

__all__ = ["DenseView", "LazyTensor", "PeerVersionError", "SparseActivations", "accelerate"]

M = TypeVar("M", bound=nn.Module)

LIBRARIES = {"sae_lens": "saelens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
"""Top-level package of a library: the module here that knows it."""


class PeerVersionError(ImportError):
    """A library's version, or a part of it, that is not one this was tested with."""


def accelerate(
    module: M, *, repair_auxk: bool | None = None, allow_untested: bool = False, always: bool | None = None
) -> M:
    """The same module object, its encoder, selection and decoder running on `transcoder.kernels`.

    Takes SAELens' TopK, BatchTopK and MatryoshkaBatchTopK training SAEs, its TopK and JumpReLU SAEs and JumpReLU transcoders;
    sparsify's SparseCoder; dictionary_learning's AutoEncoderTopK, BatchTopKSAE and MatryoshkaBatchTopKSAE.

    The object keeps its parameters (their storage, names, shapes), buffers, hooks and class (`isinstance` holds: it gets a
    subclass of its own, nothing of the library is changed), so optimizers, trainers, saving and loading go on as they were,
    also ones made before. Calling it again changes what is given and leaves the rest.

    Activations come back as `SparseActivations`: tensors of the usual shape that hold compressed codes and turn dense, once and
    with a `DenseView` warning, where something needs it. Autograd, hooks, views and changes in place are followed. What is
    computed only where it is read (pre-activations) refuses that once the parameters have changed: RuntimeError. Selections
    with ties may choose otherwise among equals; values and gradients agree to fp32 rounding of a product of length d_in.
    Entries that the ReLU switched off get no gradient.

    Batches of fewer than 2**18 activations (rows times latents) run on the library's own code, which is faster there; those of
    sparsify and dictionary_learning with fewer than 256 rows too.

    Args:
        repair_auxk: sparsify's encoder loses the gradient of its AuxK loss (and of multi_topk): True gives it back. The other
            libraries keep it, and for them this changes nothing. None: as before, at first False.
        always: run small batches on our kernels too. `repair_auxk` does so by itself. None: as before, at first False.
        allow_untested: go on with a version of the library that was not tested.

    Raises:
        TypeError: a module of another class, or of a subclass that replaces the very methods that are accelerated.
        PeerVersionError: a library's version that was not tested, or one without the expected parts; names those tested.
    """
    if hasattr(type(module), "_transcoder_original"):
        return _set(module, repair_auxk, always)
    package = next((p for p in (c.__module__.split(".")[0] for c in type(module).__mro__) if p in LIBRARIES), None)
    if package is None:
        raise TypeError(
            f"accelerate: expected a module of SAELens, sparsify or dictionary_learning, got {type(module).__module__}."
            f"{type(module).__qualname__}"
        )
    library = importlib.import_module(f"{__name__}.{LIBRARIES[package]}")
    if not allow_untested:
        check_version("accelerate", library, "pass allow_untested=True and compare a step with the library's own")
    with missing_parts_named("accelerate", library):
        known: list[Accelerated] = library.accelerated()
    found = next((one for one in known if isinstance(module, one.library_class)), None)
    if found is None:
        names = ", ".join(one.library_class.__name__ for one in known)
        raise TypeError(f"accelerate: expected one of {names}, got {type(module).__qualname__}")
    for name in found.replaces:
        if getattr(type(module), name, None) is not getattr(found.library_class, name):
            raise TypeError(
                f"accelerate: {type(module).__qualname__} has its own {name}, which would be passed over; only "
                f"{found.library_class.__name__} and subclasses that leave {', '.join(found.replaces)} alone can be accelerated"
            )
    library_class: Any = type(module)
    module.__class__ = accelerated_class(library_class, found.methods)
    return _set(module, repair_auxk, always)


def _set(module: M, repair_auxk: bool | None, always: bool | None) -> M:
    had = module.__dict__
    repair = had.get("_transcoder_repair_auxk", False) if repair_auxk is None else repair_auxk
    asked = had.get("_transcoder_always", False) if always is None else always
    # The library's own code has no repaired gradient.
    had.update(_transcoder_repair_auxk=repair, _transcoder_always=asked or repair)
    return module


@functools.cache
def accelerated_class(library_class: Any, methods: type) -> Any:
    """A subclass under the library's own name, one for each class; pickles as that class, accelerated again."""
    taken = {n: m for c in reversed(methods.__mro__[:-1]) for n, m in vars(c).items() if callable(m)}
    own = {"_transcoder_original": library_class, "_transcoder_methods": methods, "__reduce_ex__": _reduce}
    return type(library_class.__name__, (library_class,), {"__module__": library_class.__module__, **taken, **own})


def _reduce(self: Any, protocol: Any) -> Any:
    cls = type(self)
    return _again, (cls._transcoder_original, cls._transcoder_methods), self.__getstate__()


def _again(library_class: type, methods: type) -> Any:
    return copyreg.__newobj__(accelerated_class(library_class, methods))  # type: ignore[attr-defined]


def check_version(where: str, library: Any, otherwise: str = "") -> None:
    """PeerVersionError unless the library's version is the tested one (`TESTED`, or that and a further number)."""
    have = _version(library)
    if have != library.TESTED and not (have or "").startswith(f"{library.TESTED}."):
        raise PeerVersionError(
            f"{where}: {_versions(library)}; install {library.PACKAGE}=={library.TESTED}.*"
            + (f" or {otherwise}" if otherwise else "")
        )


@contextlib.contextmanager
def missing_parts_named(where: str, library: Any) -> Iterator[None]:
    """What the library does not have becomes a PeerVersionError."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise PeerVersionError(f"{where}: {_versions(library)}: a part is missing: {error}") from error


def _versions(library: Any) -> str:
    return f"tested with {library.PACKAGE} {library.TESTED}, found {_version(library) or 'none installed'}"


def _version(library: Any) -> str | None:
    try:
        return importlib.metadata.version(library.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
