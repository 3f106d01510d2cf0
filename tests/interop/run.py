"""Conformance against the real peer libraries: tests/interop/conformance/ in the environment of each, one line a library.

    python tests/interop/run.py                      # all of them
    python tests/interop/run.py saelens sparsify     # these

The environments are made first where they are missing (environment.py); as many libraries as there are cores are tested at a
time. In each run the files named for its library, `test_<library>*.py`; what is skipped there is listed with its reason, and a
library of which no test ran fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environment import PEERS, ROOT, environment

TESTS = ROOT / "tests" / "interop" / "conformance"
_ONE_AT_A_TIME = threading.Lock()
"""Environments are made one after another: they share uv and its cache."""


def run(library: str, into: Path | None, torch_backend: str | None) -> bool:
    """Make, test, print one line; the whole output too where something failed."""
    began = time.monotonic()
    try:
        with _ONE_AT_A_TIME:
            python = environment(library, into, torch_backend)
    except subprocess.CalledProcessError as error:
        print(f"{library}: no environment: {error}")
        return False
    made = time.monotonic()
    # Hubs answer nothing in these tests, and asking them would cost their timeouts.
    settings = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    # Trains where a peer pins an older library than a run needs.
    settings["TRANSCODER_PYTHON"] = sys.executable
    files = sorted(map(str, TESTS.glob(f"test_{library.replace('-', '_')}*.py")))
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-rs", "--no-fold-skipped", *(files or [str(TESTS)])],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    counts = dict(reversed(pair) for pair in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout))
    good = done.returncode == 0 and int(counts.get("passed", 0)) > 0
    if not good:
        print(done.stdout, done.stderr, sep="\n")
    found = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("passed", "failed", "skipped"))
    seconds = f"environment {made - began:.0f} s, tests {time.monotonic() - made:.0f} s"
    print(f"{library} ({PEERS[library]}): {found}; {seconds}", flush=True)
    for name, why in re.findall(r"(?m)^SKIPPED \S*::(\S+) - (?:Skipped: )?(.*)$", done.stdout):
        print(f"  skipped {name}: {why}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description="the conformance tests, each library in an environment of its own")
    parser.add_argument("library", nargs="*", help=f"any of {', '.join(PEERS)} (default: all)")
    parser.add_argument(
        "--into", type=Path, help="the folder that holds environments (default: .interop/ of the checkout)"
    )
    parser.add_argument("--torch-backend", help="as uv's --torch-backend, such as cpu")
    given = parser.parse_args()
    unknown = set(given.library) - set(PEERS)
    if unknown:
        parser.error(f"no library {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(
            pool.map(lambda library: run(library, given.into, given.torch_backend), given.library or list(PEERS))
        )
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
