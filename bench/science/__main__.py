"""python -m bench.science [--quick] [--only s0,s2] [--seed N] [--json FILE] [--document FILE]: exit 1 when a target is short.

Full: five seeds a stage (fourteen for recycling in S3), about a quarter of an hour on an idle core. Quick: one seed, fewer
comparisons, under two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bench.document import replace_between
from bench.science import s0_monitor
from bench.science.stages import STAGES
from bench.science.table import Line, markdown, render

ALL = {"s0": s0_monitor.run, **STAGES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.science", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(ALL), help="stages, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--beside", type=Path, help="an earlier --json, for the lines of the stages that are not run now"
    )
    parser.add_argument("--document", type=Path, help="write the table into this document, between its marks")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ALL)}, got {', '.join(unknown)}")
    lines: list[Line] = []
    for name in names:
        start = time.perf_counter()
        found = ALL[name](options.quick, options.seed)
        print(render(found), f"({time.perf_counter() - start:.0f} s)\n", sep="\n", flush=True)
        lines += found
    if options.beside:
        earlier = [Line(**line) for line in json.loads(options.beside.read_text(encoding="utf-8"))]
        lines += [line for line in earlier if line.stage.lower() not in names]
        lines.sort(key=lambda line: line.stage)
    if options.json:
        options.json.write_text(json.dumps([line.as_dict() for line in lines], indent=1) + "\n", encoding="utf-8")
    if options.document:
        seeds = "one seed" if options.quick else "five seeds a stage, fourteen for recycling in S3"
        said = f"`python -m bench.science{' --quick' if options.quick else ''}`, {seeds}, seed {options.seed} on."
        replace_between(options.document, "bench.science", f"{said}\n\n{markdown(lines)}")
    short = [line for line in lines if line.met is False]
    print(f"{sum(line.met is True for line in lines)} targets met, {len(short)} short")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
