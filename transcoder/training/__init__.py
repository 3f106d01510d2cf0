"""Training a transcoder: `train_transcoder(config)`."""

from transcoder.training.nonfinite import TrainingDivergedError
from transcoder.training.run_end import RunResult
from transcoder.training.train import train_transcoder

__all__ = ["RunResult", "TrainingDivergedError", "train_transcoder"]
