"""What a run shows: metric sinks, the progress bar, the HTML report, comparisons of runs."""

from transcoder.reporting.metrics import MetricsWriter
from transcoder.reporting.progress import ProgressBar

__all__ = ["MetricsWriter", "ProgressBar"]
