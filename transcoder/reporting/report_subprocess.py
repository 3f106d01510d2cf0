"""report.html written by another process: of low priority, with a memory limit, and waited for only so long."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

from transcoder.reporting.report import FILE_NAME, write_report

MEMORY_BYTES = 8 << 30
"""Address space of the process: what a report reads is bounded, and a fault in that ends the report and not the machine."""


class ReportError(RuntimeError):
    """The process could not write the page; the message is its last line."""


def write_report_apart(run_dir: Path, patience: float) -> Path | None:
    """Have `run_dir/report.html` written by another process, and wait `patience` seconds for it.

    Returns its path, or None where the process still writes: it goes on by itself, also when this one ends.

    Raises:
        ReportError: the page could not be written.
    """
    # What this process can import the other one can: a checkout is not always installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "transcoder.reporting.report_subprocess", str(run_dir.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        # Ctrl-C stops the run, not its report.
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        _, said = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return None
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0:
        lines = said.strip().splitlines()
        raise ReportError(lines[-1] if lines else f"its process ended with code {process.returncode}")
    return run_dir / FILE_NAME


def _main() -> None:
    os.nice(10)
    # A page is millions of small objects without circles, and its memory is bounded.
    gc.disable()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        # No such limits here: the page's own bounds stand.
        pass
    try:
        write_report(sys.argv[1])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _main()
