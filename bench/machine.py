"""The machine, the versions of the code and the load, which are recorded with every measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "sae-lens", "eai-sparsify", "dictionary-learning", "pytest-benchmark")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name() -> str:
    """The GPU's name, or the CPU's model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = _read("/proc/cpuinfo").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def slug() -> str:
    """`name` as part of a file name: bench/results/<slug>.json."""
    return "-".join(re.findall(r"[a-z0-9]+", name().lower()))


def describe() -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name(),
        "slug": slug(),
        "kind": device().type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
    else:
        found |= {"memory_bytes": _memory_bytes(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found


def cache_bytes() -> int:
    """Size of the last cache before memory; 32 MiB if unknown."""
    if torch.cuda.is_available():
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 32 << 20))
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kilobytes = [int(_read(str(file)).strip().rstrip("K") or 0) for file in files]
    return 1024 * max(kilobytes, default=0) or 32 << 20


def free_bytes() -> int:
    """Free memory of the device in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else 4 << 30


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """{"hash", "clean"}: HEAD of this checkout, and whether tracked files were as committed (bench/results aside)."""
    return {
        "hash": _git("rev-parse", "HEAD") or None,
        "clean": _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results") == "",
    }


def load() -> float | None:
    """Processes that want a core, mean of the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _memory_bytes() -> int | None:
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
