"""Training a transcoder: `train_transcoder(config)`."""

from transcoder.training.nonfinite import TrainingDivergedError
from transcoder.training.trainer import RunResult, train_transcoder

__all__ = ["RunResult", "TrainingDivergedError", "train_transcoder"]
