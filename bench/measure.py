"""python -m bench.measure: everything for this device, into bench/results/<device>.json, then docs/performance.md.

    python -m bench.measure [--only rows,peers,scaling,whole_run] [--steps 4882] [--seconds 3] [--no-report]

On a quiet machine. About twelve minutes on two cores. The file is replaced; what `--only` leaves out is kept from the one that
was there, with the date and commit of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.peers import LIBRARIES
from bench.whole_run import STEPS

STAGES = ("rows", "peers", "scaling", "whole_run")


def _run(words: Sequence[str], target: Path) -> dict[str, Any] | None:
    """The section that a command of ours wrote, None where it failed and wrote nothing."""
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *words], cwd=machine.ROOT, check=False).returncode
    print(f"-- {' '.join(words[:2])}: {time.monotonic() - start:.0f} s, exit {code}", flush=True)
    if not target.is_file():
        return None
    section: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    section["seconds"] = round(time.monotonic() - start)
    return section


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The sections that were asked for."""
    found: dict[str, Any] = {}
    size = ["--size", options.size]
    if "rows" in options.only:
        target = folder / "rows.json"
        words = ["pytest", str(machine.ROOT / "bench"), "-q", "--benchmark-disable-gc", f"--bench-json={target}"]
        words += [f"--bench-size={options.size}", f"--bench-seconds={options.seconds}", "-p", "no:cacheprovider"]
        rows = _run(words, target)
        if rows is None or rows["exit_status"] != 0:
            raise SystemExit("bench.measure: pytest bench/ failed: nothing was written")
        found["rows"] = rows
    if "peers" in options.only:
        found["peers"] = {}
        for library in options.libraries:
            target = folder / f"{library}.json"
            words = [
                "bench.peers",
                library.replace("_", "-"),
                *size,
                f"--seconds={options.seconds}",
                f"--json={target}",
            ]
            section = _run(words + ([] if options.into is None else [f"--into={options.into}"]), target)
            found["peers"][library] = section or {"skipped": "its environment could not be made or run"}
    if "scaling" in options.only:
        target = folder / "scaling.json"
        found["scaling"] = _run(["bench.scaling", *size, f"--json={target}"], target)
    if "whole_run" in options.only:
        target = folder / "whole_run.json"
        found["whole_run"] = _run(["bench.whole_run", f"--steps={options.steps}", f"--json={target}"], target)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.measure", description=__doc__)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(STAGES), help="stages, commas between"
    )
    parser.add_argument("--size", default=machine.device().type, help="as --bench-size")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds a row (at least 5 rounds)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run")
    parser.add_argument(
        "--libraries",
        type=lambda text: text.split(","),
        default=list(LIBRARIES),
        help="peers with environments of their own",
    )
    parser.add_argument("--into", type=Path, help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<device>.json)")
    parser.add_argument("--no-report", action="store_true", help="leave docs/performance.md as it is")
    options = parser.parse_args(words)
    for name, known in (("only", STAGES), ("libraries", LIBRARIES)):
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: expected among {', '.join(known)}, got {', '.join(unknown)}")
    target = options.out or results.FOLDER / f"{machine.slug()}.json"
    everything = set(options.only) == set(STAGES) and set(options.libraries) == set(LIBRARIES)
    before = results.load(target) if target.is_file() and not everything else {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        sections = measure(options, Path(folder))
    kept = {name: before[name] for name in STAGES if name in before}
    if "peers" in sections:
        sections["peers"] = {**kept.get("peers", {}), **sections["peers"]}
    results.save({"format": results.FORMAT, "device": machine.describe(), **kept, **sections}, target)
    print(f"{target}: {time.monotonic() - start:.0f} s in all")
    if not options.no_report:
        from bench.report import write

        print(write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
