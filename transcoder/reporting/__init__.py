"""What a run shows: metric sinks, the progress bar, the HTML report, comparisons of runs, a run's folder in a notebook.

Public names load on first use: what only reads a run's folder (the report's own process) needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transcoder.reporting.compare import compare_runs as compare_runs
    from transcoder.reporting.compare import format_comparison as format_comparison
    from transcoder.reporting.compare import write_comparison as write_comparison
    from transcoder.reporting.metrics import MetricsWriter as MetricsWriter
    from transcoder.reporting.parts import RunPartMissingError as RunPartMissingError
    from transcoder.reporting.progress import ProgressBar as ProgressBar
    from transcoder.reporting.report import write_report as write_report
    from transcoder.reporting.run import Run as Run

_HOMES = {
    "MetricsWriter": "metrics",
    "ProgressBar": "progress",
    "Run": "run",
    "RunPartMissingError": "parts",
    "compare_runs": "compare",
    "format_comparison": "compare",
    "write_comparison": "compare",
    "write_report": "report",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'transcoder.reporting' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"transcoder.reporting.{_HOMES[name]}"), name)
