"""How the C++ extension is compiled, kept and loaded. The compiler here is a script that hands out the library that this
session runs on, so the loader is real and nothing is compiled again; without a compiler only the fallback is looked at."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from transcoder.kernels import extension, topk_encode

FAKE = """#!/bin/sh
for word in "$@"; do
    case $word in
        --version) echo "fake 1.0 $FAKE_VERSION"; exit 0;;
        -c|-shared) mode=$word;;
    esac
    last=$word
done
echo $mode >> "{log}"
if [ -n "$FAKE_DIES" ]; then kill -$FAKE_DIES $$; fi
if [ -n "$FAKE_HANGS" ]; then echo $$ >> "{log}.pids"; exec sleep 60; fi
if [ -n "$FAKE_FAILS" ]; then echo "adam.cpp:1: error: $FAKE_FAILS" >&2; exit 1; fi
if [ $mode = -shared ]; then sleep 0.3; cp "{library}" "$last"; else : > "$last"; fi
"""
ONE_OP = """
import sys, torch
from transcoder.kernels import active_backend, extension, topk_encode
print(active_backend("cpu"), extension.available_reason())
assert topk_encode(torch.eye(3), torch.eye(3), torch.zeros(3), 1).values.tolist() == [1, 1, 1]
"""


class Box:
    """A cache of its own and a compiler that counts."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.log, self.cxx = folder / "cache", folder / "log", folder / "cxx"
        command = extension.compiler()
        assert command is not None
        library = extension.cache_folder() / "extension" / extension.entry_name(command) / extension.LIBRARY
        self.cxx.write_text(FAKE.format(log=self.log, library=library))
        self.cxx.chmod(self.cxx.stat().st_mode | stat.S_IXUSR)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        own = {"TRANSCODER_CACHE": str(self.cache), "CXX": str(self.cxx), **environment}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("TRANSCODER_")}
        words = [sys.executable, "-c", ONE_OP]
        return subprocess.Popen(words, env={**clean, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, **environment: str) -> tuple[str, str]:
        return finished(self.start(**environment))

    def links(self) -> int:
        return self.log.read_text().split().count("-shared") if self.log.exists() else 0

    def entry(self) -> Path:
        (library,) = self.cache.glob(f"extension/*/{extension.LIBRARY}")
        return library


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture
def box(tmp_path: Path) -> Box:
    if not extension.usable():
        pytest.skip(f"no extension to hand out: {extension.available_reason()}")
    return Box(tmp_path)


@pytest.mark.slow
def test_concurrent_first_uses_compile_once_and_a_broken_entry_again(box: Box) -> None:
    ends = [finished(process) for process in [box.start() for _ in range(2)]]
    assert [out for out, _ in ends] == ["cpp None"] * 2
    assert sum(err.count("transcoder: compiling the C++ backend into") for _, err in ends) == 1
    assert box.links() == 1
    whole = box.entry().read_bytes()
    box.entry().write_bytes(whole[: len(whole) // 2])
    assert box.run()[0] == "cpp None"
    assert box.links() == 2
    assert box.entry().read_bytes() == whole
    # Whole by its checksum, but no library: the loader refuses it, and it is made again.
    box.entry().write_bytes(b"nothing")
    box.entry().with_name(extension.CHECKSUM).write_text(extension.hashlib.sha256(b"nothing").hexdigest())
    assert box.run()[0] == "cpp None"
    assert box.links() == 3


def test_a_failed_compilation_leaves_torch_with_the_reason_and_is_remembered(box: Box) -> None:
    out, err = box.run(FAKE_FAILS="out of registers")
    assert out.startswith("torch cxx failed: adam.cpp:1: error: out of registers")
    assert "compiling" in err
    out, err = box.run()
    assert out.startswith("torch cxx failed: adam.cpp:1: error: out of registers (delete ")
    assert "compiling" not in err
    assert box.run(FAKE_VERSION="newer")[0] == "cpp None"


@pytest.mark.parametrize(
    "said",
    [
        "g++: fatal error: Killed signal terminated program cc1plus",
        "g++: fatal error: Interrupt signal terminated program cc1plus",
        "internal compiler error: Killed (program cc1plus)",
        "clang: error: unable to execute command: Terminated",
        "cc1plus: out of memory allocating 65536 bytes after a total of 25 bytes",
        "virtual memory exhausted: Cannot allocate memory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "fatal error: error writing to /tmp/ccX.s: No space left on device",
        "collect2: fatal error: ld terminated with signal 7 [Bus error]",
        "g++: fatal error: cannot execute 'cc1plus': vfork: Resource temporarily unavailable",
        "/usr/bin/ld: final link failed: Disk quota exceeded",
    ],
)
def test_a_passing_event_is_told_from_a_fault(said: str) -> None:
    assert extension.passes(said)


@pytest.mark.parametrize(
    "said",
    [
        "adam.cpp:1: error: out of registers",
        "fatal error: torch/extension.h: No such file or directory",
        "error: no member named 'memory_order' in namespace 'std'",
        "error: 'signal' was not declared in this scope",
        "g++: fatal error: Segmentation fault signal terminated program cc1plus",
        "g++: error: unrecognized command-line option '-std=c++20'",
        "cannot be loaded: x.so: undefined symbol: interrupt",
    ],
)
def test_a_fault_is_told_from_a_passing_event(said: str) -> None:
    assert not extension.passes(said)


@pytest.mark.parametrize(
    "environment", [{"FAKE_DIES": "INT"}, {"FAKE_DIES": "KILL"}, {"FAKE_FAILS": "No space left on device"}]
)
def test_a_passing_failure_is_tried_again_by_the_next_process(box: Box, environment: dict[str, str]) -> None:
    out, _ = box.run(**environment)
    assert out.startswith("torch cxx ")
    assert out.endswith("(the next process tries again)")
    assert box.run()[0] == "cpp None"


def test_notes_and_leftovers_of_killed_processes_do_not_stay(box: Box) -> None:
    box.run(FAKE_FAILS="out of registers")
    (failure,) = box.cache.glob(f"extension/*/{extension.FAILURE}")
    # As an earlier version noted an interrupt.
    failure.write_text("cxx failed: no message")
    leftover = failure.with_name(f"{extension.BUILD}killed")
    leftover.mkdir()
    assert box.run()[0] == "cpp None"
    assert not failure.exists()
    assert not leftover.exists()


def test_an_interrupt_ends_the_compilers_too(box: Box) -> None:
    process, pids = box.start(FAKE_HANGS="1"), Path(f"{box.log}.pids")
    # All of them: one that is being started as the interrupt comes has no number yet, and ends by itself.
    units = len(extension._units(extension.source_folder(), box.cache))
    while len(pids.read_text().split() if pids.exists() else []) < units:
        assert process.poll() is None
        time.sleep(0.05)
    # To the one process only, as `kill -INT` sends it.
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(box.cache.glob(f"extension/*/{extension.BUILD}*"))
    assert box.run()[0] == "cpp None"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TRANSCODER_BUILD": "0"}, "switched off by TRANSCODER_BUILD=0"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler (install g++ or clang++, or set CXX)"),
    ],
)
def test_without_it_everything_runs_on_torch(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(extension, "_tried", False)
    monkeypatch.setattr(extension, "_reason", extension._reason)  # overwritten below, and to be as it was afterwards
    assert extension.available_reason() == reason
    assert topk_encode(torch.eye(3), torch.eye(3), torch.zeros(3), 1).values.tolist() == [1, 1, 1]


def test_the_entry_is_named_by_sources_compiler_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho $FAKE_VERSION\n")
    compiler.chmod(0o755)
    sources = tmp_path / "csrc"
    shutil.copytree(extension.source_folder(), sources)
    monkeypatch.setattr(extension, "source_folder", lambda: sources)
    names = [extension.entry_name([str(compiler)])]
    assert extension.entry_name([str(compiler)]) == names[0]
    monkeypatch.setenv("FAKE_VERSION", "2")
    names.append(extension.entry_name([str(compiler)]))
    names.append(extension.entry_name([str(compiler), "-g"]))
    (sources / "select.h").write_text("// changed\n")
    names.append(extension.entry_name([str(compiler)]))
    monkeypatch.setattr(torch, "__version__", "99")
    names.append(extension.entry_name([str(compiler)]))
    assert len(set(names)) == len(names)


def test_the_sources_are_found() -> None:
    names = {file.name for file in extension.source_folder().iterdir()}
    assert names >= {"bindings.cpp", "kernels.cpp", "kernels.h", "select.h", "reduce.h"}
