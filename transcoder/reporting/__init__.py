"""What a run shows: metric sinks, the progress bar, the HTML report, comparisons of runs."""

from transcoder.reporting.compare import compare_runs, format_comparison, write_comparison
from transcoder.reporting.metrics import MetricsWriter
from transcoder.reporting.progress import ProgressBar
from transcoder.reporting.report import write_report
from transcoder.reporting.run import Run
from transcoder.reporting.run_errors import RunPartMissingError
from transcoder.reporting.runfolder import RunFolder

__all__ = [
    "MetricsWriter",
    "ProgressBar",
    "Run",
    "RunFolder",
    "RunPartMissingError",
    "compare_runs",
    "format_comparison",
    "write_comparison",
    "write_report",
]
