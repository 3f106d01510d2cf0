"""Training a transcoder: `train_transcoder(config)`."""

from transcoder.training.trainer import RunResult, TrainingDivergedError, train_transcoder

__all__ = ["RunResult", "TrainingDivergedError", "train_transcoder"]
