"""Anti-duplication: parts that keep latents from duplicating each other, that report duplicates, and that prove that the parts
ran."""

from transcoder.antidup.correlation_report import validate_correlation_report
from transcoder.antidup.ledger import LedgerError, UsageLedger
from transcoder.antidup.monitor import CorrelationMonitor
from transcoder.antidup.positions import PositionSample, PositionSampler
from transcoder.antidup.regularizer import DiversityRegularizer
from transcoder.antidup.samples import ActivationSampleCollector

__all__ = [
    "ActivationSampleCollector",
    "CorrelationMonitor",
    "DiversityRegularizer",
    "LedgerError",
    "PositionSample",
    "PositionSampler",
    "UsageLedger",
    "validate_correlation_report",
]
