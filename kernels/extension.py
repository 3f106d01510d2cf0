"""The C++ extension behind backend `cpp`: compiled at first use, kept in the user's cache, loaded once a process.

The cache entry's name holds everything that shapes the binary: sources, flags, compiler, torch, machine. Which instruction
set runs is decided when it is loaded, so one entry serves every CPU of an architecture. Nothing is downloaded; the extension is
compiled against and linked to the torch of this process.

torch.utils.cpp_extension.load is not used: it compiles all sources with the same flags, a killed compilation leaves a lock that
other processes wait for forever, and it records neither a checksum nor the reason of a failure.

Environment: TRANSCODER_BUILD=0 disables the extension; TRANSCODER_CACHE moves the cache; CXX names the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = "transcoder_cpp.so"
CHECKSUM = "sha256"
FAILURE = "failed.txt"
BUILD = ".build-"
SECONDS = "seconds"
RETRY_AFTER = 24 * 3600.0
"""Seconds before a failed compilation is tried again. Without this every process would repeat it."""
_OF_THE_MOMENT = re.compile(
    r"\b(killed|hangup|bus error|(interrupt|terminated) signal|(terminated with signal |ended with -)(1|2|7|9|15|24|25)\b"
    r"|unable to execute command: (killed|terminated|interrupt)|(out of|not enough|insufficient|cannot allocate) memory"
    r"|memory exhausted|bad_alloc|no space left|quota exceeded|file too large|(cpu time|file size) limit|too many open files"
    r"|resource temporarily unavailable|input/output error|stale file handle|text file busy|busy or unavailable|no message)",
    re.IGNORECASE,
)
"""What compilers, linkers and the system say of an event that passes: an interrupt, a kill, a full memory or disk. It says
nothing about sources and compiler, so the next process tries again."""

_COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_X86 = {
    "base": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [*("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"), "-mprefer-vector-width=512"],
}

_OPS = (
    ("bindings", "correlation", "counts", "samples", "transpose"),
    ("encode", "screened", "nearest_rows", "sketch", "decode", "adam"),
)
"""The files of csrc/ that include torch, in groups that are compiled together: torch's headers take 5 s a compilation, more
than most of the files themselves. The two groups take about the same time and run in parallel."""

_lock = threading.Lock()
_reason: str | None = "not tried yet"
_tried = False
_waited = 0.0


def usable() -> bool:
    """Whether the extension is loaded; the first call of a process compiles or loads it."""
    return available_reason() is None


def available_reason() -> str | None:
    """None if the extension is loaded, else the reason in one line."""
    global _reason, _tried, _waited
    with _lock:
        if not _tried:
            start = time.perf_counter()
            _reason, _tried = _load(), True
            _waited = time.perf_counter() - start
    return _reason


class FirstCall(NamedTuple):
    """Times of the compilation and of the first load."""

    compiled: float | None
    """Seconds of the compilation of this cache entry; None if not recorded."""
    waited: float
    """Seconds that this process waited, for the compilation or for loading the library from the cache."""
    folder: Path


def first_call() -> FirstCall | None:
    """None where the extension is not loaded."""
    command = compiler()
    if not usable() or command is None:
        return None
    folder = cache_folder() / "extension" / entry_name(command)
    try:
        compiled: float | None = float((folder / SECONDS).read_text())
    except (OSError, ValueError):
        compiled = None
    return FirstCall(compiled, _waited, folder)


def cache_folder() -> Path:
    """Where compiled extensions are kept: $TRANSCODER_CACHE, else $XDG_CACHE_HOME/transcoder, else ~/.cache/transcoder."""
    own = os.environ.get("TRANSCODER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transcoder"


def source_folder() -> Path:
    """csrc/: inside this package once installed, next to it in a checkout."""
    here = Path(__file__).resolve().parent
    return next((f for f in (here / "csrc", here.parent / "csrc") if (f / "bindings.cpp").is_file()), here / "csrc")


def compiler() -> list[str] | None:
    """The C++ compiler as a command: $CXX (may carry arguments), else the first of c++, g++, clang++ on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def entry_name(command: list[str]) -> str:
    """The cache entry for these sources, compiler, flags, torch and machine."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    digest = hashlib.sha256()
    for part in (*command, version, torch.__version__, platform.machine(), repr(_units(Path("."), Path(".")))):
        digest.update(part.encode() + b"\0")
    for file in sorted(source_folder().iterdir()):
        if file.suffix in (".cpp", ".h"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _load() -> str | None:
    if os.environ.get("TRANSCODER_BUILD") == "0":
        return "switched off by TRANSCODER_BUILD=0"
    if platform.system() != "Linux":
        return f"built and tested on Linux only, this is {platform.system()}"
    command = compiler()
    if command is None:
        return "no C++ compiler (install g++ or clang++, or set CXX)"
    try:
        folder = cache_folder() / "extension" / entry_name(command)
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder / "lock"):
            return _build_and_load(command, folder)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def passes(failure: str) -> bool:
    """Whether this reason of a failure is of the moment, so that the next process tries again."""
    return _OF_THE_MOMENT.search(failure) is not None


def _build_and_load(command: list[str], folder: Path) -> str | None:
    library = folder / LIBRARY
    if _is_whole(library):
        try:
            torch.ops.load_library(library)
        except OSError as error:
            if passes(str(error)):
                return f"cannot be loaded: {_first_line(str(error))}"
            # The checksum is right, but another system that shares the folder compiled it: compile again.
            library.unlink()
        else:
            return None
    failure = folder / FAILURE
    if failure.is_file() and time.time() - failure.stat().st_mtime < RETRY_AFTER:
        known = failure.read_text(errors="replace").strip()
        if known and not passes(known):
            return f"{known} (delete {folder} to try again)"
    for leftover in folder.glob(f"{BUILD}*"):
        # Of a process that was killed while it compiled: this one holds the lock.
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"transcoder: compiling the C++ backend into {folder} (once, about 20 s)", file=sys.stderr, flush=True)
    start = time.perf_counter()
    wrong = _compile(command, library)
    if wrong is None:
        (folder / SECONDS).write_text(f"{time.perf_counter() - start:.2f}")
        try:
            torch.ops.load_library(library)
        except OSError as error:
            wrong = f"cannot be loaded: {_first_line(str(error))}"
    if wrong is None:
        failure.unlink(missing_ok=True)
    elif passes(wrong):
        wrong = f"{wrong} (the next process tries again)"
    else:
        failure.write_text(wrong)
    return wrong


def _is_whole(library: Path) -> bool:
    """Whether the library matches its checksum. Loading a truncated file would kill the process instead of raising."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest() == library.with_name(CHECKSUM).read_text()
    except OSError:
        return False


def _units(sources: Path, objects: Path) -> list[tuple[list[str], Path]]:
    """(arguments, object file) of every compilation."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    include = Path(torch.__file__).parent / "include"
    # OpenMP pragmas without linking a runtime: torch's runtime is used, so there is one pool of threads.
    # No contraction to fused multiply-add: sums of products must equal torch's, which rounds each product.
    torch_flags = [
        *("-O2", "-fopenmp", "-ffp-contract=off", *(["-DTRANSCODER_X86"] if on_x86 else [])),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
    ]
    units = []
    for number, names in enumerate(_OPS):
        together = [word for name in names for word in ("-include", str(sources / f"{name}.cpp"))]
        arguments = [*_COMMON, *torch_flags, *together, "-x", "c++", os.devnull]
        units.append((arguments, objects / f"ops_{number}.o"))
    for name, flags in (_X86 if on_x86 else {"base": []}).items():
        arguments = [*_COMMON, "-O3", *flags, f"-DTRANSCODER_ISA={name}", str(sources / "kernels.cpp")]
        units.append((arguments, objects / f"kernels_{name}.o"))
    return units


def _compile(command: list[str], library: Path) -> str | None:
    """Compile and link in a temporary folder, then move the result into place. Returns the error, or None."""
    with tempfile.TemporaryDirectory(prefix=BUILD, dir=library.parent) as name:
        build = Path(name)
        units = _units(source_folder(), build)
        (library.parent / "build.log").unlink(missing_ok=True)
        wrong = _run(command, [[*command, *args, "-c", "-o", str(to)] for args, to in units], library.parent)
        if wrong is not None:
            return wrong
        torch_lib = Path(torch.__file__).parent / "lib"
        link = [*command, "-shared", *(str(to) for _, to in units), f"-L{torch_lib}", "-ltorch_cpu", "-lc10"]
        wrong = _run(command, [[*link, "-o", str(build / LIBRARY)]], library.parent)
        if wrong is not None:
            return wrong
        checksum = hashlib.sha256((build / LIBRARY).read_bytes()).hexdigest()
        # The checksum is moved last: until then a reader sees that the library is incomplete.
        (build / LIBRARY).replace(library)
        (build / CHECKSUM).write_text(checksum)
        (build / CHECKSUM).replace(library.with_name(CHECKSUM))
    return None


def _run(command: list[str], calls: list[list[str]], folder: Path) -> str | None:
    """Run the calls of the compiler at the same time; what they say is added to build.log. Returns the error, or None."""
    running: list[subprocess.Popen[str]] = []
    try:
        for call in calls:
            # Its own language: `passes` reads what it says.
            environment = {**os.environ, "LC_ALL": "C"}
            running.append(subprocess.Popen(call, stderr=subprocess.PIPE, text=True, errors="replace", env=environment))
        errors = [process.communicate()[1] for process in running]
    finally:
        # Whatever interrupts the wait, no compiler goes on by itself.
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    with (folder / "build.log").open("a") as log:
        log.write("\n".join(errors))
    failed = [(process.returncode, said) for process, said in zip(running, errors, strict=True) if process.returncode]
    if not failed:
        return None
    # One that was killed has nothing to say about the sources, whatever the others say.
    code, said = min(failed)
    why = f"ended with {code}" if code < 0 else f"failed: {_first_error(said)}"
    return f"{Path(command[0]).name} {why}"


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # What a killed or starved part of the compiler leaves says nothing about the sources, wherever it stands.
    told = [line for line in lines if "error" in line.lower() or passes(line)]
    return next((line for line in told if passes(line)), (told or lines or ["no message"])[0])[:300]


def _first_line(text: str) -> str:
    return (text.splitlines() or ["no message"])[0][:300]


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """A file lock: one process at a time; the others say that they wait, and then find the cached result. It ends with its
    process, however that ends."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"transcoder: another process works on {path.parent}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
