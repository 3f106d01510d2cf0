"""python -m bench.peers saelens|sparsify|dictionary-learning [--json FILE]: the rows that a library takes part in, with ours.

The libraries pin versions that exclude each other and us, so each runs in its own environment, made once by
tests/interop/environment.py: there ours and theirs take turns in the same rounds. `--here` runs them in this interpreter, for a
library that is installed in the same environment.

Exit codes: 0 measured; 1 a result was wrong or a row failed (FILE has the other rows and the errors);
3 there is no environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.cases import SIZES, Case
from bench.operations import OPERATIONS
from bench.peers import LIBRARIES, module
from bench.rows import measure

NO_ENVIRONMENT = 3
MAKE = machine.ROOT / "tests" / "interop" / "environment.py"


class NoEnvironmentError(RuntimeError):
    """The library's environment is missing and could not be made."""


def rows_of(peer: str, kind: str, seconds: float) -> dict[str, Any]:
    """The section of one peer, as of `pytest bench/`, with its rows only. `failed` has the errors by row. Raises
    NoEnvironmentError if the library is not installed."""
    why = module(peer).missing()
    if why is not None:
        raise NoEnvironmentError(why)
    found, failed = [], {}
    for size in SIZES[kind]:
        for operation, activation, nested in OPERATIONS:
            name = f"{operation} {activation}{' nested' if nested else ''}, {size}"
            if not hasattr(module(peer), operation):
                continue
            try:
                case = Case(size, activation, nested)
                if not getattr(module(peer), operation)(case):
                    continue
                row, _ = measure(operation, case, [peer], seconds)
            except Exception as error:
                # A release with another interface must not affect the other rows.
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            failed.update({f"{name}, {n}": one["wrong"] for n, one in row["variants"].items() if "wrong" in one})
            found.append(row)
            print("\n".join(results.table([row])), flush=True)
    return {**results.about(), "peer": peer, "rows": found, "failed": failed}


def python_of(library: str, into: Path | None) -> str:
    """The interpreter of the library's environment, which is made if it is missing. Raises NoEnvironmentError."""
    where = [] if into is None else ["--into", str(into)]
    done = subprocess.run([sys.executable, str(MAKE), library, *where], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoEnvironmentError((done.stderr or done.stdout).strip() or f"exit {done.returncode} of {MAKE.name}")
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
    try:
        if options.here:
            found = rows_of(options.library.replace("-", "_"), options.size, options.seconds)
        else:
            return _there(options, python_of(options.library, options.into))
    except NoEnvironmentError as error:
        print(f"bench.peers: no environment for {options.library}: {error}", file=sys.stderr)
        found, code = {"skipped": str(error)}, NO_ENVIRONMENT
    else:
        code = int(bool(found["failed"]))
        for name, why in found["failed"].items():
            print(f"bench.peers: {name}: {why}", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return code


def _there(options: argparse.Namespace, python: str) -> int:
    again = ["--here", "--size", options.size, "--seconds", str(options.seconds)]
    again += [] if options.json is None else ["--json", str(options.json.resolve())]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "bench.peers", options.library, *again]
    return subprocess.run(command, cwd=machine.ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
