"""Train sparse transcoders (TopK, BatchTopK, Matryoshka, JumpReLU), and see which of their latents duplicate each other.

Public names load on first use, so that `import transcoder` stays quick and needs torch, triton and numpy only.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transcoder.activations import ActivationBatch as ActivationBatch
    from transcoder.antidup import ActivationSampleCollector as ActivationSampleCollector
    from transcoder.antidup import CorrelationMonitor as CorrelationMonitor
    from transcoder.antidup import DiversityRegularizer as DiversityRegularizer
    from transcoder.antidup import PositionSampler as PositionSampler
    from transcoder.antidup import UsageLedger as UsageLedger
    from transcoder.config import ConfigError as ConfigError
    from transcoder.config import RunConfig as RunConfig
    from transcoder.interop.accelerate import accelerate as accelerate
    from transcoder.interop.formats import export_transcoder as export_transcoder
    from transcoder.interop.formats import import_transcoder as import_transcoder
    from transcoder.interop.hub import push_to_hub as push_to_hub
    from transcoder.model import StepOutput as StepOutput
    from transcoder.model import Transcoder as Transcoder
    from transcoder.model import TranscoderConfig as TranscoderConfig
    from transcoder.reporting import Run as Run
    from transcoder.training import RunResult as RunResult
    from transcoder.training import train_transcoder as train_transcoder

__version__ = "0.1.0"

if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    # A checkout on sys.path (the current folder, say) hides an installed package: there kernels/ lies next to this folder.
    __path__.append(os.path.dirname(__path__[0]))

_HOMES = {
    "ActivationBatch": "transcoder.activations",
    "ActivationSampleCollector": "transcoder.antidup",
    "ConfigError": "transcoder.config",
    "CorrelationMonitor": "transcoder.antidup",
    "DiversityRegularizer": "transcoder.antidup",
    "PositionSampler": "transcoder.antidup",
    "Run": "transcoder.reporting",
    "RunConfig": "transcoder.config",
    "RunResult": "transcoder.training",
    "StepOutput": "transcoder.model",
    "Transcoder": "transcoder.model",
    "TranscoderConfig": "transcoder.model",
    "UsageLedger": "transcoder.antidup",
    "accelerate": "transcoder.interop.accelerate",
    "export_transcoder": "transcoder.interop.formats",
    "import_transcoder": "transcoder.interop.formats",
    "push_to_hub": "transcoder.interop.hub",
    "train_transcoder": "transcoder.training",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'transcoder' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
