"""What a run shows: metric sinks, the progress bar, the HTML report, comparisons of runs."""

from transcoder.reporting.metrics import MetricsWriter
from transcoder.reporting.progress import ProgressBar
from transcoder.reporting.report import write_report
from transcoder.reporting.runfolder import RunFolder

__all__ = ["MetricsWriter", "ProgressBar", "RunFolder", "write_report"]
