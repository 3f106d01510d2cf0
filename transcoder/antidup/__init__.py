"""Anti-duplication: what keeps latents from duplicating each other, what shows it, and what proves that it
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
