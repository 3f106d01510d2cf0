"""The planted data and the small config of tests/training/planted.py, for the programs of this folder: they run as
scripts, outside the package that pytest makes of the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transcoder.training import checkpoint

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parents[1] / "training" / "planted.py")
assert _spec is not None
assert _spec.loader is not None
_tests: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tests)

Planted, config = _tests.Planted, _tests.config

# A disk that these programs fill stays full: nobody is going to make room within seconds.
checkpoint.BACK_OFF = (0.0, 0.0)
