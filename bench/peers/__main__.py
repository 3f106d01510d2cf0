"""python -m bench.peers saelens|sparsify|dictionary-learning [--json FILE]: the rows that a library has a part in, with ours.

The libraries pin versions that exclude each other and us, so each runs in an environment of its own, made once by
tests/interop/environment.py: there ours and theirs take turns in the same rounds. `--here` runs them in this interpreter, for a
library that is installed beside us.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.cases import SIZES, Case
from bench.operations import OPERATIONS
from bench.peers import LIBRARIES, module
from bench.rows import measure

MAKE = machine.ROOT / "tests" / "interop" / "environment.py"


def rows_of(peer: str, kind: str, seconds: float) -> dict[str, Any]:
    """The section of one peer: as that of `pytest bench/`, its own rows only. Raises SystemExit where it is not here."""
    why = module(peer).missing()
    if why is not None:
        raise SystemExit(f"bench.peers: {why}")
    found = []
    for size in SIZES[kind]:
        for operation, activation, nested in OPERATIONS:
            case = Case(size, activation, nested)
            if not getattr(module(peer), operation, lambda _: [])(case):
                continue
            row, _ = measure(operation, case, [peer], seconds)
            found.append(row)
            print("\n".join(results.table([row])), flush=True)
    return {**results.about(), "peer": peer, "rows": found}


def python_of(library: str, into: Path | None) -> str:
    """The interpreter of the library's environment, made where it is not there."""
    where = [] if into is None else ["--into", str(into)]
    done = subprocess.run([sys.executable, str(MAKE), library, *where], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench.peers: no environment for {library}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().splitlines()[-1]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("library", choices=[name.replace("_", "-") for name in LIBRARIES])
    parser.add_argument("--here", action="store_true", help="in this interpreter")
    parser.add_argument("--into", type=Path, help="folder of the environments (default: .interop/ of the checkout)")
    parser.add_argument("--size", choices=sorted(SIZES), default=machine.device().type)
    parser.add_argument("--seconds", type=float, default=6.0, help="of rounds a row (at least 5 rounds)")
    parser.add_argument("--json", type=Path, help="write the section to this file")
    options = parser.parse_args(words)
    if options.here:
        found = rows_of(options.library.replace("-", "_"), options.size, options.seconds)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    again = ["--here", "--size", options.size, "--seconds", str(options.seconds)]
    again += [] if options.json is None else ["--json", str(options.json.resolve())]
    python = python_of(options.library, options.into)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "bench.peers", options.library, *again]
    return subprocess.run(command, cwd=machine.ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
