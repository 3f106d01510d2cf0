"""python -m bench.measure: everything for this device, into bench/results/<device>.json, then docs/performance.md.

    python -m bench.measure [--only rows,peers,scaling,whole_run] [--steps 4882] [--seconds 3] [--no-report]

On a quiet machine. Under twenty minutes on two cores with `--seconds 2`. The file is replaced, and written after every stage: a
stage that fails, or ends this command, does not affect the others. Failures are in the file and on the page, and the exit code
is 1. Stages that `--only` leaves out are kept from the old file, with their date and commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.peers import LIBRARIES
from bench.peers.__main__ import NO_ENVIRONMENT
from bench.whole_run import STEPS

STAGES = ("rows", "peers", "scaling", "whole_run")


def _run(words: Sequence[str], target: Path) -> dict[str, Any]:
    """The section that the command wrote; {"failed": reason} if it wrote none."""
    start = time.monotonic()
    name = " ".join(word for word in words[:2] if not word.startswith(("-", "/")))
    print(f"-- {name} begins", flush=True)
    code = subprocess.run([sys.executable, "-m", *words], cwd=machine.ROOT, check=False).returncode
    took = round(time.monotonic() - start)
    print(f"-- {name}: {took} s, exit {code}", flush=True)
    if not target.is_file():
        return {"failed": f"python -m {name}: exit code {code}, nothing was written"}
    section: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    if code not in (0, NO_ENVIRONMENT) and not section.get("failed"):
        section["failed"] = {"the command": f"exit code {code}"}
    return {**section, "seconds": took}


def stages(options: argparse.Namespace, folder: Path) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(its place in the file, the section) of each requested part, when it is done."""
    size = ["--size", options.size]
    if "rows" in options.only:
        target = folder / "rows.json"
        words = ["pytest", str(machine.ROOT / "bench"), "-q", "--benchmark-disable-gc", f"--bench-json={target}"]
        words += [f"--bench-size={options.size}", f"--bench-seconds={options.seconds}", "-p", "no:cacheprovider"]
        yield ("rows",), _run(words, target)
    for library in options.libraries if "peers" in options.only else ():
        target = folder / f"{library}.json"
        words = ["bench.peers", library.replace("_", "-"), *size, f"--seconds={options.seconds}", f"--json={target}"]
        yield ("peers", library), _run(words + ([] if options.into is None else [f"--into={options.into}"]), target)
    if "scaling" in options.only:
        target = folder / "scaling.json"
        words = ["bench.scaling", *size, f"--seconds={options.scaling_seconds}", f"--json={target}"]
        yield ("scaling",), _run(words, target)
    if "whole_run" in options.only:
        target = folder / "whole_run.json"
        yield ("whole_run",), _run(["bench.whole_run", f"--steps={options.steps}", f"--json={target}"], target)


def put(found: dict[str, Any], place: tuple[str, ...], section: dict[str, Any]) -> None:
    for name in place[:-1]:
        found = found.setdefault(name, {})
    found[place[-1]] = section


def kept(target: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The old file's sections of parts that are not measured now; none if its format differs."""
    if not target.is_file():
        return {}
    try:
        before = results.load(target)
    except results.OtherFormatError as error:
        print(f"bench.measure: nothing is kept of it: {error}", flush=True)
        return {}
    found = {name: before[name] for name in STAGES if name in before and name not in options.only}
    if "peers" in options.only:
        others = {n: s for n, s in before.get("peers", {}).items() if n not in options.libraries}
        found |= {"peers": others} if others else {}
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.measure", description=__doc__)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(STAGES), help="stages, commas between"
    )
    parser.add_argument("--size", default=machine.device().type, help="as --bench-size")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds a row (at least 5 rounds)")
    parser.add_argument(
        "--scaling-seconds", type=float, default=0.4, help="of rounds a scaling point (at least 3 rounds)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run")
    parser.add_argument(
        "--libraries",
        type=lambda text: text.split(","),
        default=list(LIBRARIES),
        help="peers that run in separate environments",
    )
    parser.add_argument("--into", type=Path, help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<device>.json)")
    parser.add_argument("--no-report", action="store_true", help="leave docs/performance.md as it is")
    options = parser.parse_args(words)
    for name, known in (("only", STAGES), ("libraries", LIBRARIES)):
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: expected among {', '.join(known)}, got {', '.join(unknown)}")
    target = options.out or results.FOLDER / f"{machine.slug()}.json"
    found = {"format": results.FORMAT, "device": machine.describe(), **kept(target, options)}
    start, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for place, section in stages(options, Path(folder)):
            put(found, place, section)
            results.save(found, target)
            if section.get("failed"):
                failed.append("/".join(place))
            print(f"-- {time.monotonic() - start:.0f} s in all; {target}", flush=True)
    if not options.no_report:
        from bench.report import write

        print(write())
    if failed:
        print(
            f"bench.measure: FAILED, in whole or in part: {', '.join(failed)}; the other measurements are valid",
            file=sys.stderr,
        )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
